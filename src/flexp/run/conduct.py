"""What the two ways to conduct a run have in common: who waits for what, the server's snapshots, and the run's name."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from flexp.config import TrainConfig
from flexp.errors import ConfigError, LinkError, LinkLostError, StorageError
from flexp.files import read_json, write_json
from flexp.links.messages import AGAIN, Order, Ready
from flexp.links.passing import Keep
from flexp.methods.turns import Place, steps_before
from flexp.run.belonging import BELONGS, check_session
from flexp.run.store import Store

if TYPE_CHECKING:
    from flexp.server import Server

ENDED = "ended"
"""Among what a client tells: it stops before its last step, since it gets no better on its validation data."""

MOVED = "moved"
"""Likewise: it has another cut than in its newest snapshot."""

NAME = "run.json"
Say = Callable[[str], None]
TOLD = ("loss", "lr", "score", "seconds", "bytes_up", "bytes_down", "waited_seconds", "compute_seconds")
"""What a client may say of itself; anything else is left out."""


@dataclass
class Member:
    """What is known of a client: its last word, and who waits for the answer to it."""

    ready: Ready = field(default_factory=lambda: Ready(0))
    waits: Future[Order] | None = None
    stopped: bool = False

    @property
    def facts(self) -> dict[str, float]:
        """What the client says of itself, as far as it may and it is a number."""
        said = self.ready.facts
        return {name: said[name] for name in TOLD if name in said and math.isfinite(said[name])}

    def answer(self, order: Order) -> None:
        """Give the client its order, if it still listens."""
        future, self.waits = self.waits, None
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(order)


@dataclass(eq=False)
class Conductor:
    """Keeps the server's snapshots and the members; how it answers them is a subclass's.

    Args:
        run: the run's name; a server that goes on with one has the name from its snapshots.
        clients: who takes part; ``None``: whoever comes.

    Attributes:
        may_last: whether a run may have another length than it was planned with.
        over: all clients that take part were told to stop, now or before the server was started again. A run that is
            over is sealed: nobody trains its blocks any more, unless the configuration says more steps by now.

    Raises:
        ConfigError: see :func:`flexp.run.server.make_conductor`.
    """

    may_last: ClassVar[bool] = False

    server: Server
    snapshots: Store | None
    run: str
    say: Say
    train: TrainConfig
    clients: Sequence[str] | None

    def __post_init__(self) -> None:
        self.members: dict[str, Member] = {}
        run, train, snapshots = self.run, self.train, self.snapshots
        if snapshots is not None and snapshots.numbers() and not self.numbers:
            raise ConfigError(
                f"the servers of the run {run} have no snapshot in common: give each the --state that it had, or a new "
                "one to all"
            )
        saved = newest_facts(snapshots, self.numbers)
        planned = saved.get("planned", train.total_steps)
        if planned != train.total_steps and (not self.may_last or train.shared.schedule != "constant"):
            raise ConfigError(
                f"the run {run} was planned with {planned} steps of each client, not {train.total_steps}, which only a "
                "free run with a constant train.shared.schedule may change; set train.rounds as it was, or begin anew"
            )
        was, now = saved.get("gatherings", []), self._gatherings_said
        self._held = len(was)
        if any(before != after for before, after in zip(was, now, strict=False)):
            raise ConfigError(
                f"the run {run} has held other meetings or averages ({_shown(was)}) than the settings say now "
                f"({_shown(now)}): after the last meeting there are no more rounds; set train.rounds, "
                "train.steps_per_round and method.meet.on as they were, or begin anew"
            )
        if snapshots is not None:
            check_session(saved, self.server.belongs(), snapshots.folder)
        self.over = self.server.sealed = is_over(saved, train)
        if self.order and not self.over and saved.get("order", self.order) != self.order:
            raise ConfigError(
                f"the run {run} was begun with another order of steps, scores and snapshots, which numbers its "
                "snapshots; set evaluation.every, deployment.schedule and save_every, [train], seed and the clients as "
                "they were, or begin anew"
            )
        if self.over:
            self.say(f"the run {run} is over: nobody trains it any more")

    @property
    def gatherings(self) -> list[Place]:
        """What all clients do together, in its order."""
        raise NotImplementedError

    @property
    def _gatherings_said(self) -> list[list[Any]]:
        """The same for a snapshot, each with the steps that a client has done by then; of them those are saved that
        somebody was at, since only what is to come may be changed."""
        return [[place.what, place.number, steps_before(place, self.train)] for place in self.gatherings]

    @property
    def order(self) -> str:
        """A digest of all that is to be done, where snapshots are numbered by it; else nothing."""
        return ""

    @property
    def middle(self) -> bool:
        """Whether the server has any blocks."""
        return self.server.blocks[0] < self.server.blocks[1]

    @property
    def numbers(self) -> list[int]:
        """The server's own snapshots; of several servers those that all have."""
        own, chain = [] if self.snapshots is None else self.snapshots.numbers(), self.server.chain
        return own if chain is None else [number for number in own if number in chain.told.snapshots]

    def ready(self, client: str, ready: Ready) -> Future[Order]:
        """Take what a client says, and see what can be done now.

        Raises:
            LinkError: it is no client of this run, or its state belongs to another one.
        """
        raise NotImplementedError

    def tell(self, client: str, order: Order) -> None:
        """Answer a client that waits; of an average it may give to the one that it is told to alone."""
        if order.what == "average":
            self.server.sums.asked[client] = order.number
        self.members[client].answer(order)

    def close(self) -> str:
        """The run ends here, or is stopped; gives what to tell the operator.

        Raises:
            StorageError: what was trained last could not be saved.
        """
        raise NotImplementedError

    def where(self) -> str:
        """What to tell the operator of the newest snapshot."""
        if self.snapshots is None:
            return "nothing was saved, as no --state DIR was given"
        return f"the newest snapshot in {self.snapshots.folder} is {max(self.numbers, default='none')}"

    def come(self, client: str, ready: Ready) -> tuple[Member, Future[Order]]:
        """A client waits for its order.

        Raises:
            LinkError: its snapshots are those of another run, or it plans for a run of another length.
        """
        steps = self.train.total_steps
        if ready.planned not in (0, steps):
            raise LinkError(
                f"client {client} plans {ready.planned} steps, and this run has {steps}, so it would end, and its "
                "learning rate fall, at another time; set the same train.rounds and train.steps_per_round on both sides"
            )
        if ready.run not in ("", self.run):
            raise LinkError(
                f"client {client} is in the middle of the run {ready.run}, and this server conducts {self.run}; give "
                "the client another --state folder to begin anew, or start the server with that run's state"
            )
        member = self.members.setdefault(client, Member())
        earlier = member.waits
        member.ready, member.waits = ready, Future()
        if earlier is not None and earlier.set_running_or_notify_cancel():
            earlier.set_exception(LinkLostError(AGAIN))
        return member, member.waits

    def dismiss(self, why: LinkError) -> None:
        """Nobody gets an order any more: who waits for one is told why."""
        for member in self.members.values():
            future, member.waits = member.waits, None
            if future is not None and future.set_running_or_notify_cancel():
                future.set_exception(why)

    def gone(self, client: str) -> None:
        """A client's stream has ended; whatever it waited for it will ask again. Only who needs it waits for it."""
        if client in self.members:
            self.members[client].waits = None

    def seal(self) -> None:
        """The run is over; snapshots say so from now on."""
        self.over = self.server.sealed = True

    @property
    def finished(self) -> bool:
        """Whether all clients that take part were told to stop, since the server was started."""
        return self.clients is not None and all(
            name in self.members and self.members[name].stopped for name in self.clients
        )

    def save(self, number: int, unfinished: bool = False) -> bool:
        """The server's own snapshot; a failure is said, and what was saved before stays. Gives whether it is there, or
        nothing is to be saved."""
        if self.snapshots is None:
            return True
        self._held = max([self._held, *(member.ready.met for member in self.members.values())])
        facts = {
            "run": self.run,
            "updates": self.server.updates,
            "planned": self.train.total_steps,
            "gatherings": self._gatherings_said[: self._held],
            "order": self.order,
            BELONGS: self.server.belongs(saved=True),
        }
        chain = self.server.chain
        try:
            # All save after the same update, this one last: what it has, all have.
            keep = Keep(number, self.run, held=tuple(self.snapshots.numbers()))
            if chain is not None and number not in chain.tell(keep).result().snapshots:
                self.say(f"snapshot {number} was not saved: a server further on could not")
                return False
            state = self.server.state(unfinished=unfinished)
            self.snapshots.save(number, {"server": state}, {**facts, "over": self.over})
            (self.snapshots.folder / NAME).unlink(missing_ok=True)  # a run whose snapshots are lost is another one
            return True
        except (StorageError, LinkLostError) as error:
            self.say(f"snapshot {number} was not saved: {error}")
            return False

    def restore(self, number: int) -> None:
        """Go back to one of :attr:`numbers`."""
        assert self.snapshots is not None
        if self.server.chain is not None:
            self.server.chain.tell(Keep(number, self.run, back=True)).result()
        state = self.snapshots.open(number).load("server")
        if any(name.startswith("sums/") for name in state):
            self.say("this snapshot is of an older FlexP, whose sums of clients are not read: let all clients come "
                     "back before the next meeting or average")  # fmt: skip
        self.server.load(state)
        self.say(f"back to snapshot {number}: {self.server.updates} updates of the shared blocks")


def _shown(gatherings: Sequence[Sequence[Any]]) -> str:
    """In a few words: all meetings, and averages after how many steps and how often."""
    averages = [steps for what, _, steps in gatherings if what == "average"]
    said = [f"a meeting after step {steps}" for what, _, steps in gatherings if what == "meet"]
    said += [f"{len(averages)} averages, one every {averages[0]} steps"] if averages else []
    return ", ".join(said) or "none"


def newest_facts(snapshots: Store | None, numbers: Sequence[int] | None = None) -> Mapping[str, Any]:
    """What a server's newest snapshot (of ``numbers``) says of its run; nothing, if there is none."""
    if numbers is None:
        numbers = [] if snapshots is None else snapshots.numbers()
    return snapshots.open(max(numbers)).facts if snapshots is not None and numbers else {}


def is_over(saved: Mapping[str, Any], train: TrainConfig) -> bool:
    """Whether nothing is left to train of a run whose newest snapshot says ``saved``."""
    return bool(saved.get("over")) and train.total_steps <= saved.get("planned", train.total_steps)


def run_name(snapshots: Store | None) -> str:
    """The name of the run that the newest snapshot belongs to, or a new one, which is written down: whoever falls
    before its first snapshot is back with the same run, which clients and servers may know already.

    Raises:
        StorageError: it cannot be written.
    """
    if snapshots is None:
        return secrets.token_hex(4)
    newest, path = snapshots.newest_whole(quarantine=True), snapshots.folder / NAME
    if newest is not None:
        return str(newest.facts["run"])
    if not path.is_file():
        write_json(path, {"run": secrets.token_hex(4)})
    return str(read_json(path)["run"])
