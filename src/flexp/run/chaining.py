"""A server as one of several (:mod:`flexp.server.chain`): its blocks, whom it follows and leads, and its snapshots.

A chain falls and rises together. Where one server has gone, what the others have is not what it will have when it is
back; so each then begins anew, and the first says to which snapshot all go back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from flexp.assets import resolve
from flexp.client.joined import OFF
from flexp.config import CodecConfig, DeploymentConfig, RunConfig
from flexp.errors import ConfigError, LinkError, StorageError
from flexp.links.base import Link
from flexp.links.messages import Join
from flexp.models.anatomy import block_count, check_cut
from flexp.models.fingerprint import fingerprint
from flexp.models.loading import load_config
from flexp.run.belonging import BELONGS, check_session
from flexp.run.conduct import run_name
from flexp.run.party import patiently
from flexp.run.store import Store
from flexp.server import Server
from flexp.server.chain import PREVIOUS, Chain, Following, check_can_chain

Reach = Callable[[str], Link]


PATIENCE = 3600.0
"""Seconds that an answer of the next server may take, which saves its state meanwhile: that it has gone is noticed at
once."""


class Kept:
    """The snapshots of a server that is led, in a folder (:class:`flexp.server.chain.Keeper`)."""

    def __init__(self, server: Server, store: Store, say: Callable[[str], None]) -> None:
        store.keep = None  # which go the first server says, so that all keep the same ones
        self._server, self._store, self._say = server, store, say
        newest = store.newest_whole(quarantine=True)
        if newest is not None:
            check_session(newest.facts, server.belongs(), store.folder)
        self.run = "" if newest is None else str(newest.facts["run"])
        self.numbers: Sequence[int] = store.numbers()

    def keep(self, number: int, run: str, held: Collection[int]) -> None:
        try:
            state = self._server.state(unfinished=True)
            facts = {"run": run, "updates": self._server.updates, BELONGS: self._server.belongs(saved=True)}
            self._store.save(number, {"server": state}, facts)
            self._store.only({number, *held})
        except StorageError as error:  # the first server is told which there are
            self._say(f"snapshot {number} was not saved: {error}")
        self.run, self.numbers = run, self._store.numbers()

    def back(self, number: int) -> None:
        self._server.load(self._store.open(number).load("server"))
        self._say(f"back to snapshot {number}: {self._server.updates} updates of the shared blocks")


def follows(deployment: DeploymentConfig, depth: int) -> bool:
    """Whether another server leads the one that is deployed so: its blocks are not the first of the shared ones."""
    return deployment.blocks is not None and deployment.blocks[0] > depth


def shared_blocks(config: RunConfig, end: int | None, depth: int | None = None) -> tuple[int, int]:
    """All shared blocks of a run: without a base depth from the second of the model on, and without ``end`` all."""
    name = str(resolve(config.model.id))
    depth = config.model.base_depth if depth is None else depth
    return check_cut((1 if depth is None else depth, end), block_count(name, load_config(name)), where="shared blocks")


def own_blocks(deployment: DeploymentConfig, depth: int, end: int) -> tuple[int, int]:
    """The blocks that a server itself holds of the shared ones [``depth``, ``end``).

    Raises:
        ConfigError: they are none of those, or nobody has those behind them.
    """
    own = deployment.blocks or (depth, end)
    if not depth <= own[0] < own[1] <= end:
        raise ConfigError(f"--blocks {own[0]}:{own[1]} (deployment.blocks) are no blocks of the shared ones, which are "
                          f"[{depth}, {end}): expected {depth} <= first < last <= {end}")  # fmt: skip
    if (own[1] < end) != (deployment.next is not None):
        has = "and nobody has those behind them: name the server that has" if own[1] < end else "the last: leave out"
        raise ConfigError(f"this server's blocks are [{own[0]}, {own[1]}), {has} --next (deployment.next)")
    return own


def take_place(
    server: Server,
    config: RunConfig,
    deployment: DeploymentConfig,
    state: Path | None,
    reach: Reach | None,
    say: Callable[[str], None],
    stop: threading.Event | None = None,
) -> None:
    """Let a server be one of several: wait for the next one and lead it, and be led by the one before.

    Args:
        state: where it has its snapshots.
        reach: a link under a client's name to the next server; ``None``: it is the last.

    Raises:
        ConfigError: the next server does not go on where this one ends, or something is set that several cannot do.
        LinkError: it cannot be reached, or has other settings.
    """
    if deployment.blocks is None:
        return
    check_can_chain(config.server)
    settings, store = settings_of(config, deployment), None if state is None else Store(state, deployment.keep)
    if store is not None:
        store.claim()
    depth, end = shared_blocks(config, deployment.end)
    if follows(deployment, depth):
        server.following = Following(settings, None if store is None else Kept(server, store, say))
        server.only = None  # the first server says who takes part
    if reach is None:
        return
    stage = server.shared.stage
    card = Join(
        PREVIOUS,
        fingerprint(stage.model.config),
        (server.blocks[1], end),
        str(stage.model.dtype),
        server.tuning,
        OFF,
        lora=server.lora,
        weights=stage.weights,
        autocast=stage.autocast_name,
        codec=CodecConfig(),
    )
    run = "" if server.following is not None else run_name(store)
    said = False

    def attempt() -> Chain:
        nonlocal said
        try:
            return Chain(reach, card, settings, run)
        except LinkError as error:
            if not said:
                say(f"waiting for the next server: {error}")
            said = True
            raise

    server.chain = patiently(attempt, deployment.patience, stop or threading.Event())


def settings_of(config: RunConfig, deployment: DeploymentConfig) -> dict[str, str]:
    """What all servers of a chain must have alike, so that they train as one would."""
    server, train, model = config.server, config.train, config.model
    update = [server.update, server.mean_over, server.trim]
    return {
        "seed": str(config.seed),
        "train.shared": json.dumps(train.shared.model_dump(mode="json"), sort_keys=True),
        "train.rounds × steps_per_round": str(train.total_steps),
        "server.update, mean_over, trim": json.dumps(update),
        "tuning": str(server.tuning or model.tuning),
        "quantization": str(server.quantization or model.quantization),
        "deployment.clients": json.dumps(deployment.clients),
    }
