"""Conducting a run in a fixed order, so that its weights are those of a simulation with the same settings, bit for bit.

One client steps at a time, in the order of :func:`flexp.methods.turns.schedule`. Whoever is away is waited for:
determinism has that price. A client that comes back without its last steps goes back to its newest snapshot and does
them again, and gets the answers that it got then. When the server itself comes back, everybody goes back to the newest
snapshot that all have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from flexp.errors import LinkError, StorageError
from flexp.links.messages import Order, Ready
from flexp.methods.turns import GATHER, Place
from flexp.run.conduct import ENDED, MOVED, Conductor


@dataclass(eq=False)
class Deterministic(Conductor):
    """See above.

    Args:
        places: the schedule.

    Attributes:
        place: where in the schedule the run is.
    """

    clients: Sequence[str]
    places: Sequence[Place]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snapshots is not None and self.snapshots.keep is not None:
            self.snapshots.keep = max(2, self.snapshots.keep)  # clients save after the server
        self.place = 0
        self._begun = False
        self._done: set[str] = set()  # who has done the place that all do
        self._saved = -1  # the last place at which the server was to save …
        self._kept = True  # … and whether it could
        owners = [item.client if item.what == "step" else "" for item in self.places]
        self._meetings = [number for number, item in enumerate(self.places) if item.what in GATHER]
        self._steps = {name: [0, *accumulate(owner == name for owner in owners)] for name in self.clients}
        if self.over:
            self._saved = max(self.numbers)
            self.restore(self._saved)
            self.place, self._begun = len(self.places), True

    @property
    def gatherings(self) -> list[Place]:
        return [item for item in self.places if item.what in GATHER]

    @cached_property
    def order(self) -> str:
        places = [(place.what, place.client, place.number) for place in self.places]
        return hashlib.sha256(repr((list(self.clients), places)).encode()).hexdigest()[:16]

    def ready(self, client: str, ready: Ready) -> Future[Order]:
        if client not in self.clients:
            raise LinkError(f"client {client} takes no part in this run: it has {', '.join(self.clients)}")
        if ready.facts.get(ENDED):
            raise LinkError(
                f"client {client} stops early (train.early_stopping), and in a deterministic run nobody stops before "
                'the others: leave it out, or set deployment.schedule = "free" at the server'
            )
        if ready.facts.get(MOVED):
            raise LinkError(
                f"client {client} has another cut than in its snapshots, and a cut may change between sessions in a "
                "free run only; start it with the cut that it had (cut in the client.json of its --state)"
            )
        _, future = self.come(client, ready)
        if self._begun and ready.done is None:
            self._return(client, ready)
        elif self._begun and ready.done == self.place:
            self._has_done(client)
        elif self._begun and self._ahead(client, ready):  # its snapshot is from after its step, whose word was lost
            self._next()
        self._advance()
        return future

    def close(self) -> str:
        if self.over and not self._kept:  # or else whoever goes on does again what was not saved
            self._kept = self.save(self._saved)
            if not self._kept:
                raise StorageError(f"the run's last weights were not saved, and are lost; {self.where()}")
        return self.where()

    def steps_of(self, client: str, place: int) -> int:
        """How many steps ``client`` has done when the run is at ``place``."""
        return self._steps[client][place]

    def _has_done(self, client: str) -> None:
        item = self.places[self.place]
        if item.what == "step" and item.client == client:
            self._next()
        elif item.what in ("evaluate", "save", *GATHER):
            if item.what == "save":  # if it could: a full disk leaves it with what it saved before
                self.server.keep_answers_after(client, self.members[client].ready.saved)
            self._done.add(client)

    def _next(self) -> None:
        self.place += 1
        self._done = set()

    def _advance(self) -> None:
        if not self._begun:
            if any(name not in self.members or not self.members[name].waits for name in self.clients):
                return
            self._begin()
        while self.place < len(self.places):
            item = self.places[self.place]
            if item.what == "flush":
                self.server.flush()
                self._next()
                continue
            if item.what == "save" and self._saved < self.place:
                self._saved, self._kept = self.place, self.save(self.place)
                if not self._kept:  # clients keep what goes with the server's last
                    self._next()
                    continue
            if item.what != "step" and self._done == set(self.clients):
                self._next()
                continue
            for name in self.clients if item.what != "step" else [item.client]:
                self._order(name, item)
            self._catch_up()
            return
        if not self.over:
            self.seal()
            self._kept = self.save(self._saved)
        for name in self.clients:
            member = self.members.get(name)
            if member is not None and member.waits:
                member.stopped = True
                save = self._saved if member.ready.saved < member.ready.steps else None
                member.answer(Order("stop", self.run, self.place, save=save))

    def _order(self, client: str, item: Place) -> None:
        member = self.members.get(client)
        if member is None or not member.waits or client in self._done:
            return
        if member.ready.steps == self.steps_of(client, self.place) and member.ready.met >= self._due(self.place):
            number = self.place if item.what == "save" else item.number
            self.tell(client, Order(item.what, self.run, self.place, number))  # type: ignore[arg-type]

    def _catch_up(self) -> None:
        """Let those who went back do again what the run has already; nobody waits for that unless it is their turn."""
        for client, member in self.members.items():
            met = member.ready.met
            missed = self._meetings[met] if met < self._due(self.place) else None
            if member.waits and missed is not None and member.ready.steps == self.steps_of(client, missed):
                again = self.places[missed]  # the server still has the sums
                self.tell(client, Order(again.what, self.run, -1, again.number))  # type: ignore[arg-type]
            elif member.waits and member.ready.steps < self.steps_of(client, self.place):
                member.answer(Order("step", self.run, -1))

    def _due(self, place: int) -> int:
        """How many meetings and averages there were before the run came to ``place``."""
        return sum(number < place for number in self._meetings)

    def _ahead(self, client: str, ready: Ready) -> bool:
        """Whether it is this client's turn, and it has taken its step already."""
        item = self.places[self.place] if self.place < len(self.places) else None
        mine = item is not None and item.client == client
        return mine and ready.steps == self.steps_of(client, self.place) + 1

    def _return(self, client: str, ready: Ready) -> None:
        """A client that was here before comes back, as it was or with less."""
        expected = self.steps_of(client, self.place)
        item = self.places[self.place] if self.place < len(self.places) else None
        ahead = self._ahead(client, ready)
        if ready.steps == expected or ahead:
            if ahead:  # only the word that it had done its step was lost
                self._next()
            elif item is not None and item.what in GATHER and ready.met > self._due(self.place):  # likewise
                self._done.add(client)
            return
        found = [number for number in ready.snapshots if number <= self.place]
        if not found and not ready.steps:
            raise LinkError(
                f"client {client} comes with nothing, and has done {expected} steps in this run, which would train the "
                "shared blocks again; give it the --state folder that it had, or begin the run anew"
            )
        if found:
            self.say(f"{client} is back and goes on from its snapshot {max(found)}")
            self.members[client].answer(Order("restore", self.run, -1, max(found)))
        elif ready.steps > expected:
            raise LinkError(
                f"client {client} has done {ready.steps} steps and this run {expected} of its; delete its state to "
                "let it begin anew"
            )

    def _begin(self) -> None:
        """All are here: go back to the newest snapshot that everybody has, or begin."""
        readies = {name: self.members[name].ready for name in self.clients}
        common = set(self.numbers)
        for ready in readies.values():
            common &= set(ready.snapshots)
        if not common:
            # A client that was stopped has one of its own; those that all were to save the server had as well.
            saves = {number for number, item in enumerate(self.places) if item.what == "save"}
            late = ["the server"] if self.numbers or self.server.updates else []
            late += [name for name, ready in readies.items() if ready.steps or saves & set(ready.snapshots)]
            if late:
                why = (
                    f"the run cannot go on: server and clients have no snapshot in common ({', '.join(late)} would "
                    "have to go back to the beginning); give each the --state that it had, or a new one to all"
                )
                self.say(why)
                raise LinkError(why)  # to who came last; the others wait for whoever comes with another state
            self._begun = True
            return
        self._begun = True
        number = max(common)
        self.restore(number)
        self.place = self._saved = number
        self._done = set()
        for name in self.clients:
            self.members[name].answer(Order("restore", self.run, number, number))
