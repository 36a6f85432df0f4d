"""A run's memory measurements: once for each distinct cut, kept with the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexp.errors import FlexpError
from flexp.evaluation.memory import Measured, Probe, measure
from flexp.experiments.setup import model_folder
from flexp.files import read_json, write_json
from flexp.methods.base import World

WHOLE_MODEL = {"local", "fedavg", "fedavg-ft", "fedprox", "fedper", "fedrep"}
"""Methods whose clients train one whole model."""

MEASURED = WHOLE_MODEL | {"flexp-sfl"}
"""The others hold a second copy of the weights, or train nothing; nothing is reported rather than guessed."""


class MemoryProbes:
    """Measures the peak memory of one client per distinct cut, once training no longer needs the processor.

    (Two processes that compute at once on few cores slow each other down far more than twofold.)
    """

    def __init__(self, world: World, out: Path) -> None:
        self.world = world
        self.path = out / "memory.json"
        self.found: dict[str, Any] = read_json(self.path) if self.path.exists() else {}

    def measure(self, say: Callable[[str], None]) -> None:
        """Measure what is not known yet, one process a core; a failure is said and leaves the figure out."""
        config = self.world.config
        if not config.evaluation.measure_memory or config.method.name not in MEASURED:
            return
        missing = {key: probe for key, probe in self._probes().items() if "peak" not in self.found.get(key, {})}
        if not missing:
            return
        say(f"measuring a client's peak memory, once for each of {len(missing)} cuts")
        with ThreadPoolExecutor(max_workers=max(1, min(len(missing), os.cpu_count() or 1))) as pool:
            for key, result in zip(missing, pool.map(_try, missing.values()), strict=True):
                if isinstance(result, FlexpError):
                    say(f"the memory of cut {key} is not known: {result}")
                    continue
                probe = missing[key]
                facts = {"loaded": result.loaded, "peak": result.peak}
                self.found[key] = {**facts, "examples": probe.examples, "length": probe.length}
        write_json(self.path, self.found)

    def peak(self, client: str) -> int | None:
        """Peak bytes of a client above the bare interpreter; ``None`` if it was not, or could not be, measured."""
        if self.world.config.method.name not in MEASURED:
            return None
        peak: int | None = self.found.get(self._key(client), {}).get("peak")
        return peak

    def _key(self, client: str) -> str:
        if self.world.config.method.name in WHOLE_MODEL:
            return "whole"
        return f"{self.world.cuts[client][0]}:{self.world.cuts[client][1]}"

    def _probes(self) -> dict[str, Probe]:
        """One probe per distinct cut, at the size of the largest exchange of any client with that cut."""
        config, task = self.world.config, self.world.federation.task
        smallest = min(start for start, _ in self.world.cuts.values())
        base_depth = smallest if config.model.base_depth is None else config.model.base_depth
        probes: dict[str, Probe] = {}
        for client in self.world.federation.clients:
            key = self._key(client.name)
            longest = max((len(example.get("input_ids", ())) for example in client.train), default=1)
            length = max(longest, probes[key].length if key in probes else 0)
            probes[key] = Probe(
                model=model_folder(config),
                kind=task.model_kind,
                cut=None if key == "whole" else self.world.cuts[client.name],
                examples=config.train.micro_batch or config.train.batch_size,
                length=length,
                labels=task.label_names,
                model_config=config.model.model_dump(mode="json"),
                optimizer=config.train.personal.model_dump(mode="json"),
                align=None if key == "whole" else config.method.align.model_dump(mode="json"),
                base_depth=None if key == "whole" else base_depth,
            )
        return probes


def _try(probe: Probe) -> Measured | FlexpError:
    try:
        return measure(probe)
    except FlexpError as error:
        return error
