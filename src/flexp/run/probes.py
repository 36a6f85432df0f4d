"""A run's memory measurements: once for each distinct cut (and rank), kept with the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexp.config import RunConfig
from flexp.cost.probe import Measured, Probe, measure_once
from flexp.errors import FlexpError
from flexp.files import read_json, write_json
from flexp.methods.base import World, base_depth
from flexp.methods.parties import own_world
from flexp.run.settle import model_folder


class MemoryProbes:
    """Measures the peak memory of one client per distinct cut and rank, while nothing trains.

    (Two processes that compute at once on few cores slow each other down far more than twofold.)

    Args:
        out: the run's folder, where :meth:`save` puts what was found.
        cache: a folder that runs share, so that each distinct probe is measured once for all of them.
    """

    def __init__(self, world: World, out: Path, cache: Path | None = None) -> None:
        self.world = world
        self.path = out / "memory.json"
        self.cache = cache
        self.holds = world.method.holds(world.config)
        self.found: dict[str, Any] = read_json(self.path) if self.path.exists() else {}

    def measure(self, say: Callable[[str], None]) -> None:
        """Measure what is not known yet, one process a core that the run may use (``threads``).

        A failure is said and leaves the figure out.
        """
        config = self.world.config
        wanted = config.evaluation.measure_memory or config.devices is not None
        if not wanted or self.holds.part is None:
            return
        missing = {key: probe for key, probe in self._probes().items() if "peak" not in self.found.get(key, {})}
        if not missing:
            return
        each = f", once for each of {len(missing)} cuts" if len(missing) > 1 else ""
        say(f"measuring a client's peak memory{each}")
        cores = os.cpu_count() or 1
        most = min(len(missing), cores, config.threads or cores)  # in a comparison, others measure at the same time
        with ThreadPoolExecutor(max_workers=most) as pool:
            for key, result in zip(missing, pool.map(self._try, missing.values()), strict=True):
                if isinstance(result, FlexpError):
                    say(f"the memory of cut {key} is not known: {result}")
                    continue
                probe = missing[key]
                facts = {"loaded": result.loaded, "peak": result.peak}
                self.found[key] = {**facts, "examples": probe.examples, "length": probe.length}

    def save(self) -> None:
        """Write down what was found, so that a resumed run need not measure again."""
        if self.found:
            write_json(self.path, self.found)

    def peak(self, client: str) -> int | None:
        """Peak bytes of a client above the bare interpreter; ``None`` if it was not, or could not be, measured."""
        if self.holds.part is None:
            return None
        peak: int | None = self.found.get(self._key(client), {}).get("peak")
        return peak

    def _key(self, client: str) -> str:
        start, stop = self.world.cuts[client]
        part = {"whole": "whole", "ends": f"{start}:{stop}", "start": f"{start}"}[self.holds.part or "whole"]
        rank = self.world.adapters(client).lora.rank
        whole, own = self.world.config, self._config(client)
        micro, checkpointing = own.train.micro_batch, own.model.gradient_checkpointing
        words = [
            *([] if rank == whole.model.lora.rank else [f"rank {rank}"]),
            *([] if micro == whole.train.micro_batch else [f"exchanges of {micro}"]),
            *([] if checkpointing == whole.model.gradient_checkpointing else [f"checkpointing {checkpointing}"]),
        ]
        return ", ".join([part, *words])

    def _config(self, client: str) -> RunConfig:
        """The client's own, where the method's clients have one."""
        return own_world(self.world, client).config if self.holds.part == "ends" else self.world.config

    def _probes(self) -> dict[str, Probe]:
        """One probe per distinct cut, at the size of the largest exchange of any client with that cut."""
        world_config, task = self.world.config, self.world.federation.task
        depth = base_depth(world_config, self.world.cuts)
        aligned = self.world.method.aligns
        probes: dict[str, Probe] = {}
        for client in self.world.federation.clients:
            key, config = self._key(client.name), self._config(client.name)
            own = self.world.adapters(client.name)
            longest = max((len(example.get("input_ids", ())) for example in client.train), default=1)
            length = max(longest, probes[key].length if key in probes else 0)
            probes[key] = Probe(
                model=model_folder(config),
                kind=task.model_kind,
                cut=None if self.holds.part == "whole" else self.world.cuts[client.name],
                examples=config.train.micro_batch or config.train.batch_size,
                length=length,
                labels=task.label_names,
                model_config=config.model.model_copy(update={"lora": own.lora}).model_dump(mode="json"),
                optimizer=config.train.personal.model_dump(mode="json"),
                align=config.method.align.model_dump(mode="json") if aligned else None,
                base_depth=depth if aligned else None,
                tail=self.holds.part != "start",
                extra_weights=self.holds.weights,
                extra_optimizers=self.holds.optimizers,
                ranks=tuple(own.beside.items()),
            )
        return probes

    def _try(self, probe: Probe) -> Measured | FlexpError:
        try:
            return measure_once(probe, self.cache)
        except FlexpError as error:
            return error
