"""A run's memory measurements: once for each distinct cut, in the background, kept with the run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from flexp.errors import FlexpError
from flexp.evaluation.memory import Probe, measure
from flexp.experiments.setup import model_folder
from flexp.files import read_json, write_json
from flexp.methods.base import World

WHOLE_MODEL = {"local", "fedavg", "fedavg-ft", "fedprox", "fedper", "fedrep"}
"""Methods whose clients train one whole model."""

MEASURED = WHOLE_MODEL | {"flexp-sfl"}
"""The others hold a second copy of the weights, or train nothing; nothing is reported rather than guessed."""


class MemoryProbes:
    """Measures the peak memory of one client per distinct cut while the run trains."""

    def __init__(self, world: World, out: Path) -> None:
        self.world = world
        self.path = out / "memory.json"
        self.found: dict[str, Any] = read_json(self.path) if self.path.exists() else {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin measuring what is not known yet."""
        if self.world.config.evaluation.measure_memory and self.world.config.method.name in MEASURED:
            self._thread = threading.Thread(target=self._measure, name="memory-probes", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until all is measured."""
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """Begin no further measurement."""
        self._stop.set()

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

    def _measure(self) -> None:
        for key, probe in self._probes().items():
            if self._stop.is_set() or key in self.found:
                continue
            try:
                result = measure(probe)
            except FlexpError as error:
                self.found[key] = {"error": str(error)}
                continue
            self.found[key] = {
                "loaded": result.loaded,
                "peak": result.peak,
                "examples": probe.examples,
                "length": probe.length,
            }
            write_json(self.path, self.found)

    def _probes(self) -> dict[str, Probe]:
        """One probe per distinct cut, at the size of the largest exchange of any client with that cut."""
        config, task = self.world.config, self.world.federation.task
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
            )
        return probes
