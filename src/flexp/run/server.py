"""A server as a process of its own: goes on from a file, tells what happens, stops cleanly and saves."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flexp.assets import resolve
from flexp.client.averaging import READABLE
from flexp.client.meeting import UNMASKED, Meets
from flexp.client.noise import told
from flexp.config import DeploymentConfig, RunConfig
from flexp.config.loading import OTHERS, overridden, validate
from flexp.errors import ConfigError, LinkError, LinkLostError, StorageError
from flexp.gaussian import DELTA, epsilon
from flexp.kinds import ModelKind
from flexp.limits import allow_many_files
from flexp.links.grpc import Serving, serve
from flexp.links.passing import Keep
from flexp.methods.base import deployed
from flexp.methods.turns import schedule
from flexp.models.anatomy import block_count
from flexp.models.loading import load_config
from flexp.run.belonging import BELONGS, PRETRAINED, SERVED, SESSION, check_session
from flexp.run.chaining import own_blocks, shared_blocks
from flexp.run.conduct import Conductor, run_name
from flexp.run.deterministic import Deterministic
from flexp.run.diary import check_conducted
from flexp.run.free import Free
from flexp.run.status import StatusReporter, observed
from flexp.run.store import Store
from flexp.server import Server
from flexp.server.chain import PREVIOUS
from flexp.server.journal import Journal
from flexp.server.rules import Quota
from flexp.signals import stopped_by_signal

Say = Callable[[str], None]
"""What a server says of the run that it conducted to its end."""


def read_config(path: Path | None, overrides: Sequence[str]) -> tuple[RunConfig, DeploymentConfig]:
    """A run's configuration as the server needs it: without ``[data]`` and a file, if need be.

    Raises:
        ConfigError: a key is unknown or impossible.
    """
    content, where = overridden(path, overrides), "flexp server" if path is None else str(path)
    content.setdefault("data", {}).setdefault("source", "none")
    deployment = DeploymentConfig.checked(content.get("deployment", {}), where, "deployment")
    return validate({table: keys for table, keys in content.items() if table not in OTHERS}, where), deployment


def make_server(
    config: RunConfig,
    base_depth: int,
    end: int | None,
    kind: ModelKind,
    clients: Sequence[str] | None,
    *,
    deployment: DeploymentConfig | None = None,
    remembers: bool = True,
) -> Server:
    """The server that a simulation of ``config`` would have, loaded by itself; or one of several, by its blocks.

    Args:
        clients: who takes part, if that is known: nobody else may join; for schedules of the shared learning rate.
        deployment: says which of the blocks are here, if others have the rest.
        remembers: keep the answers of clients' last steps, for clients that may go back to a snapshot.
    """
    if not deployed(config).middle:
        base_depth = end = block_count(config.model.id, load_config(str(resolve(config.model.id))))
    if deployment is not None and deployment.blocks is not None:
        base_depth, end = own_blocks(deployment, *shared_blocks(config, end, base_depth))
    made = Server.from_pretrained(
        config.model,
        kind,
        base_depth=base_depth,
        end=end,
        seed=config.seed,
        config=config.server,
        optimizer=config.train.shared,
        total_steps=config.server.trained_by(config.train.total_steps, None if clients is None else len(clients)),
        remembers=remembers,
    )
    made.only = clients
    return made


def make_conductor(
    server: Server, config: RunConfig, deployment: DeploymentConfig, state: Path | None, say: Say
) -> Conductor:
    """Who conducts the run, going on from the snapshots in the folder ``state``, if there are any.

    Raises:
        ConfigError: the run of ``state`` was to have another length, by which its learning rate falls.
        StorageError: ``state`` cannot be written, or is of another version of FlexP.
    """
    snapshots = None if state is None else Store(state, deployment.keep)
    if snapshots is not None:
        snapshots.claim()
    check_conducted(config.train, deployment.schedule)
    run, clients, train = run_name(snapshots), deployment.clients, config.train
    every, save_every = config.evaluation.every, deployment.save_every
    meets, averages = Meets.of(config), deployed(config).averages
    if meets or averages:
        if not config.method.meet.masked:
            say(READABLE if averages else UNMASKED)
        if not deployment.clients:
            raise ConfigError(
                'method.meet, model.head = "closed-form" and methods that average need deployment.clients, the names '
                "of all whose sums are taken; name them, or leave these out"
            )
        waits = deployment.meeting_seconds if deployment.schedule == "free" else None
        steps = train.steps_per_round
        between = math.lcm(save_every, steps) if train.turn == "round" else save_every  # two snapshots, of a client
        # So far ahead of a client's newest snapshot others can be; without a state nobody goes back behind a fall.
        kept = 2 + between // steps if state is None else 4 + math.ceil(between / steps)
        journal = None if state is None else Journal(state / "sums", run, say)
        server.sums.open(deployment.clients, waits, train.rounds if averages else 0, kept, journal)
    if deployment.schedule == "free":
        if deployment.quota is not None:
            server.shared.quota = Quota(deployment.quota, deployment.quota_ahead, train.total_steps, say)
        return Free(server, snapshots, run, say, train, clients, every, save_every, meets, averages)
    assert clients is not None
    places = schedule(clients, train, config.seed, every, save_every, meets, averages)
    return Deterministic(server, snapshots, run, say, train, clients, places)


class FallenError(LinkLostError):
    """Another server of the chain has gone, so this one must begin anew, where it listened."""

    def __init__(self, text: str, listen: str) -> None:
        super().__init__(text)
        self.listen = listen


def rise(begin: Callable[[], tuple[Server, Conductor | None]], listen: str, *, say: Say, **options: Any) -> None:
    """:func:`run_server` of what ``begin`` makes, again whenever another server of a chain has gone.

    Raises:
        FlexpError: as it does, and ``begin``.
    """
    while True:
        server, conductor = begin()
        try:
            return run_server(server, listen, conductor=conductor, say=say, **options)
        except FallenError as fallen:
            say(f"{fallen}; beginning anew")
            listen = fallen.listen
            del server, conductor  # there may be no room for the old blocks beside the new
            gc.collect()
        except BaseException:
            if server.chain is not None:
                server.chain.close()
            raise


def run_server(
    server: Server,
    listen: str,
    *,
    state: Path | None = None,
    keep: int = 2,
    say: Say,
    every: float = 30.0,
    grace: float = 10.0,
    stop: threading.Event | None = None,
    conductor: Conductor | None = None,
    metrics: str | None = None,
    allow_export: bool = False,
    frozen: bool = False,
    dismiss: bool = True,
    ready: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """Serve until SIGINT or SIGTERM, or until a conducted run is over; then let steps end, save, and leave.

    Args:
        state: the folder to save in, and to go on from if something is there.
        say: told one line at a time, from several threads.
        every: seconds between two lines of progress.
        grace: seconds that unfinished steps get; what is unfinished then is dropped, without effect on the weights.
        stop: stops the server as a signal does; with it, signals are left alone.
        keep: of what it saves, so many stay.
        conductor: conducts a run, and keeps snapshots of its own.
        metrics: HOST:PORT for /metrics, /healthz and /readyz.
        dismiss: clients of a conducted run that is stopped are told to save and leave, and get ``grace`` seconds for
            it; otherwise they try to reach the server until it is back.
        allow_export: give clients the trained weights of their shared blocks; the server then stays when a conducted
            run is over.
        frozen: nobody trains the blocks, and nothing is saved.
        ready: called when nothing is left to do before it listens.
        options: of :class:`flexp.links.grpc.Serving`.

    Raises:
        ConfigError: it may not, or cannot, listen there.
        StorageError: the state is damaged, belongs to other blocks, or cannot be written.
    """
    allow_many_files()
    store = None if state is None else Store(state, keep)
    if store is not None:
        store.claim()
        if store.numbers():
            load(server, store, trains=not frozen)
            say(f"going on from {state}: {server.updates} updates of the shared blocks so far")
    if frozen:
        if store is not None and not store.numbers():
            raise StorageError(f"{state} holds nothing that was trained: name the --state of a server, or leave it out")
        server.sealed, store = True, None
    server.guard.say, server.conductor = say, conductor
    reporter = StatusReporter(server, conductor)
    options |= {"say": say, "facts": reporter.facts}
    server.allow_export = server.allow_export or allow_export
    if allow_export and conductor is not None and conductor.numbers and not server.updates:
        conductor.restore(max(conductor.numbers))  # clients may fetch before all have come to go on
    following = server.following is not None
    options |= {"bearer": PREVIOUS} if following else {}
    ready()
    with stopped_by_signal(stop) as stopped, serve(server, listen, **options) as serving, ExitStack() as stack:
        server.submit = serving.submit
        if server.chain is not None:
            stack.callback(server.chain.close)
        if conductor is not None and conductor.snapshots is not None:
            stack.callback(conductor.snapshots.close)
        if metrics is not None:
            at = stack.enter_context(observed(metrics, lambda: reporter.facts(serving), lambda: not stopped.is_set()))
            say(f"metrics at http://{at}/metrics")
        say(f"serving blocks [{server.blocks[0]}, {server.blocks[1]}) at {serving.address}")
        try:
            _wait(server, serving, conductor, stopped, say, every)
        except LinkLostError as error:
            raise FallenError(str(error), str(serving.address)) from error
        over = (conductor is not None and conductor.finished) or (
            server.following is not None and server.following.over
        )
        if server.shared.told is not None:
            say("so far " + told({"delta": DELTA, "shared": epsilon(server.shared.told)}))
        say("the run is over" if over else "stopping")
        if conductor is not None and dismiss and not conductor.over:
            serving.at_rest(server.dismiss)
            end = time.monotonic() + grace
            while serving.clients and time.monotonic() < end:
                time.sleep(0.02)
        saved = _save_between_steps(server, serving, store, 0.0 if over else grace)
        if conductor is not None:
            where = serving.at_rest(conductor.close)
            if server.chain is not None and conductor.finished:
                server.chain.tell(Keep(over=True)).result()
            say(f"stopped after {server.updates} updates; {where}")
            return
    if store is not None and not saved:
        save(server, store)  # everybody has left, so no step is unfinished any more
    if following:
        say(f"stopped after {server.updates} updates; the server before says what is saved")
        return
    where = f"saved in {state}" if state is not None else "nothing was saved, as no --state DIR was given"
    where = "nothing was trained, so nothing was saved" if frozen else where
    say(f"stopped after {server.updates} updates; {where}")


def _wait(
    server: Server,
    serving: Serving,
    conductor: Conductor | None,
    stopped: threading.Event,
    say: Say,
    every: float,
) -> None:
    """Until a signal, or until the run is over and everybody has left; now and then, a line of progress.

    Raises:
        LinkLostError: another server of the chain has gone.
    """
    told, since, stays = None, time.monotonic(), False
    while not stopped.wait(min(every, 0.2)):
        following = server.following
        if following is not None and following.over:
            return
        if following is not None and following.lost:
            raise LinkLostError("the server before has gone")
        if server.chain is not None:
            server.chain.alive()
        if conductor is not None and conductor.finished and not serving.clients:
            if not server.allow_export:
                return
            if not stays:
                say("the run is over; staying for clients that export or use their models, until Ctrl-C")
            stays = True
        now = (server.updates, serving.clients)
        if now != told and time.monotonic() - since >= every:
            told, since = now, time.monotonic()
            names = ", ".join(serving.clients) or "none"
            say(f"{now[0]} updates, {server.compute_seconds:.0f} s of computing; clients: {names}")


def save(server: Server, store: Store) -> None:
    """Save :meth:`Server.state`, after what is there already.

    Raises:
        StorageError: it cannot be written; what was saved before is untouched.
        LinkError: steps are unfinished.
    """
    number = max(store.numbers(), default=0) + 1
    facts = {"updates": server.updates, BELONGS: server.belongs(saved=True)}
    store.save(number, {"server": server.state()}, facts)


def load(server: Server, store: Store, *, trains: bool = True) -> None:
    """Go on from the newest that :func:`save` wrote, or from the server's part of a simulation's checkpoint.

    Raises:
        StorageError: it is damaged, or of another server.
        ConfigError: it was trained in another pretrained model, or with another LoRA or optimiser.
    """
    newest = store.open(max(store.numbers()))
    said, keys = newest.facts.get(BELONGS, {}), SESSION if trains else SERVED
    if "model_kind" in said:  # a simulation's, whose tuning is that of its clients
        keys = SERVED if said["tuning"] == server.tuning else PRETRAINED
    check_session(newest.facts, server.belongs(), store.folder, keys)
    try:
        server.load(newest.load("server"))
    except KeyError as error:
        raise StorageError(f"{newest.place}: no state of a server can be read from it ({error})") from error


def _save_between_steps(server: Server, serving: Serving, store: Store | None, grace: float) -> bool:
    """Save when no client is in the middle of a step, and take no request after; gives whether that came in time."""

    def action() -> None:
        if store is not None:
            save(server, store)
        serving.refuse_more()

    end = time.monotonic() + grace
    while True:
        try:
            serving.at_rest(action)
            return True
        except LinkError:
            if time.monotonic() > end:
                serving.refuse_more()
                return False
            time.sleep(0.02)
