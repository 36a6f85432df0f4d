"""What a run's clients cost: memory, measured, and operations, counted; each once for every distinct cut and rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexp.config import RunConfig
from flexp.cost.choice import ExchangeCost
from flexp.cost.flops import count_exchange, mean_shape
from flexp.cost.probe import Measured, Probe, measure_once
from flexp.errors import FlexpError
from flexp.files import read_json, write_json
from flexp.machine import device_of
from flexp.methods.base import World, base_depth
from flexp.methods.parties import client_seed, own_stage, own_world, server_stage, with_model
from flexp.models.anatomy import Part
from flexp.run.settle import model_folder
from flexp.server import Server


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
        wanted = config.evaluation.measure_memory or config.on_devices
        if not wanted or self.holds.part is None:
            return
        if device_of(config.model.device).type != "cpu":
            say("the clients' memory is not measured: it would be that of this machine, and they compute on a GPU")
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
        return _own_world(self.world, client).config

    def _probes(self) -> dict[str, Probe]:
        """One probe per distinct cut, at the size of the largest exchange of any client with that cut."""
        probes: dict[str, Probe] = {}
        for client in self.world.federation.clients:
            key, train = self._key(client.name), self._config(client.name).train
            longest = max((len(example.get("input_ids", ())) for example in client.train), default=1)
            length = max(longest, probes[key].length if key in probes else 0)
            probes[key] = _probe(self.world, client.name, train.micro_batch or train.batch_size, length)
        return probes

    def _try(self, probe: Probe) -> Measured | FlexpError:
        try:
            return measure_once(probe, self.cache)
        except FlexpError as error:
            return error


class Costs:
    """Counts once for each distinct cut, rank and batch shape of a run's clients."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._known: dict[Any, ExchangeCost] = {}

    def of(self, client: str, only: Collection[str] | None = None) -> ExchangeCost:
        """An exchange of ``client`` at its mean shape; ``only``: of a whole model of which just these weights train."""
        examples, length, exchanges = self.shape(client)
        probe = _probe(self.world, client, examples, length)
        key = (repr(probe), None if only is None else frozenset(only))
        if key not in self._known:
            world = with_model(_own_world(self.world, client), lora=self.world.adapters(client).lora)
            self._known[key] = self._count(world, probe, only)
        train = _own_world(self.world, client).config.train
        epoch = -(-len(self._examples(client)) // train.batch_size)
        return replace(self._known[key], exchanges=exchanges, epoch=epoch)

    def shape(self, client: str) -> tuple[int, int, int]:
        """Examples and tokens of the mean exchange of ``client``, and exchanges in a step."""
        config = _own_world(self.world, client).config
        lengths = [len(example.get("input_ids", (0,))) for example in self._examples(client)]
        return mean_shape(config.train, lengths, client_seed(config.seed, client))

    def _examples(self, client: str) -> Sequence[Any]:
        return next(data.train for data in self.world.federation.clients if data.name == client)

    def _count(self, world: World, probe: Probe, only: Collection[str] | None) -> ExchangeCost:
        blocks = world.source.anatomy.blocks
        if probe.cut is None or not probe.tail:
            return count_exchange(probe, own_stage(world, Part.whole(blocks)), only=only)
        base = probe.cut[0] if probe.base_depth is None else probe.base_depth
        stage = own_stage(world, Part.client(probe.cut, blocks), dict(probe.ranks))
        return count_exchange(probe, stage, _server(world, (base, probe.cut[1])))


def _own_world(world: World, client: str) -> World:
    """The client's own, where the method's clients have one."""
    return own_world(world, client) if world.method.held.part == "ends" else world


def _probe(world: World, client: str, examples: int, length: int) -> Probe:
    """What ``client`` does in an exchange of so many examples and tokens."""
    method, task, config = world.method, world.federation.task, _own_world(world, client).config
    held, own = method.holds(world.config), world.adapters(client)
    return Probe(
        model=model_folder(config),
        kind=task.model_kind,
        cut=None if held.part == "whole" else world.cuts[client],
        examples=examples,
        length=length,
        labels=task.label_names,
        model_config=config.model.model_copy(update={"lora": own.lora}).model_dump(mode="json"),
        optimizer=config.train.personal.model_dump(mode="json"),
        align=config.method.align.model_dump(mode="json") if method.aligns else None,
        base_depth=base_depth(world.config, world.cuts) if method.aligns else None,
        tail=held.part != "start",
        extra_weights=held.weights,
        extra_optimizers=held.optimizers,
        ranks=tuple(own.beside.items()),
        frozen=config.frozen(world.cuts.get(client, (0, 0))[0]),
        rows=config.link.rows,
        cache=config.link.cache,
        pools=config.privacy.pool,
        gradients=config.privacy.gradients,
    )


def _server(world: World, blocks: tuple[int, int]) -> Server:
    config = world.config
    stage, tuning = server_stage(world, Part.server(*blocks)), config.server.tuning or config.model.tuning
    return Server(stage, tuning=tuning, config=config.server, optimizer=config.train.shared)
