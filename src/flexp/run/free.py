"""Conducting a run in which nobody waits for anybody: every client goes on as fast as it can.

The server saves now and then, in the middle of whatever clients do, and tells them to save as well. What a client does
again after it went back to a snapshot is answered and not applied twice; what the shared blocks lose when the server
goes back to a snapshot is said, step for step.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from flexp.client.meeting import FIRST, LAST, Meets
from flexp.errors import LinkError, StorageError
from flexp.links.messages import Order, Ready
from flexp.methods.turns import Place, gatherings, scored_rounds
from flexp.run.conduct import ENDED, Conductor, Member

NEVER = Meets(False, False)
MOST_STEPS = 8
"""Of one order: so often a client hears of new snapshots, and the operator of the client."""


@dataclass
class _Told:
    """What a client was told: the newest snapshot, which rounds it has scored, and whether it is just going back."""

    snapshot: int = -1
    back: bool = False
    scored: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Free(Conductor):
    """See above.

    Args:
        evaluate_every: rounds between two scores.
        save_every: the server saves when the clients have done so many steps each, on average.
        meets: for these alone a client waits for others, before its first step and after its last …
        averages: … and for the average after each round.
    """

    may_last = True

    evaluate_every: int
    save_every: int
    meets: Meets = NEVER
    averages: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._gatherings = self.gatherings
        self._scored = scored_rounds(self.train, self.evaluate_every)
        self._told: dict[str, _Told] = {}
        self._number = max(self.numbers, default=-1)
        if self._number >= 0:
            self.restore(self._number)
        self._saved_steps, self._kept = self._steps, True

    @property
    def gatherings(self) -> list[Place]:
        return gatherings(self.train, self.meets, self.averages)

    def ready(self, client: str, ready: Ready) -> Future[Order]:
        member, future = self.come(client, ready)
        self.server.sums.past(client, [(place.what, place.number) for place in self._gatherings[: ready.met]])
        told = self._told.setdefault(client, _Told())
        if ready.done is None and not ready.steps and ready.snapshots and ready.run:
            told.back = True
            member.answer(Order("restore", self.run, self._number, max(ready.snapshots)))
            return future
        here = self.server.clients[client].progress.newest
        ended = bool(ready.facts.get(ENDED))
        back = ready.run == self.run and not self.middle  # with a snapshot of this run, and nothing shared to train
        if self.over and not (ended or back) and max(here, ready.steps) < self.train.total_steps:
            raise LinkError(
                f"client {client}: the run {self.run} is over, and the client has done {ready.steps} of its "
                f"{self.train.total_steps} steps; give it the --state folder that it had in this run"
            )
        if ready.done is None or told.back:
            told.back = False
            self._compare(client, ready, here)
        self.server.keep_answers_after(client, ready.saved)
        self._save_if_due()
        self._answer(client, member, ready, told)
        return future

    def close(self) -> str:
        """Save once more, wherever clients are, unless the run is over and saved; gives what to tell the operator."""
        if not self.over or not self._kept:
            self._save()
        if not self._kept:
            raise StorageError(f"what was trained since was not saved, and is lost; {self.where()}")
        return self.where()

    def _answer(self, client: str, member: Member, ready: Ready, told: _Told) -> None:
        round_number, rest = divmod(ready.steps, self.train.steps_per_round)
        save = self._number if self._number > told.snapshot else None
        told.snapshot = max(told.snapshot, self._number)
        ended = ready.steps >= self.train.total_steps or bool(ready.facts.get(ENDED))
        due = next(iter(self._gatherings[ready.met :]), None)
        if due is not None and due.what == "average" and not rest and due.number <= round_number:
            kept = max(due.number, self.server.sums.first)
            self.tell(client, Order("average", self.run, self._number, kept, save=save))
        elif due == Place("meet", number=LAST) and ended:
            member.answer(Order("meet", self.run, self._number, LAST, save=save))
        elif not rest and round_number in self._scored and round_number not in told.scored:
            told.scored.add(round_number)
            member.answer(Order("evaluate", self.run, self._number, round_number, save=save))
        elif due == Place("meet", number=FIRST) and not ready.steps:
            member.answer(Order("meet", self.run, self._number, FIRST, save=save))
        elif not ended:
            count = min(MOST_STEPS, self.train.steps_per_round - rest)
            member.answer(Order("step", self.run, self._number, count=count, save=save))
        else:
            member.stopped = True
            if self.finished and not self.over:
                self.server.flush()
                self.seal()
                self._save()
            member.answer(Order("stop", self.run, self._number, save=self._number))

    def _save_if_due(self) -> None:
        self._saved_steps = min(self._saved_steps, self._steps)  # who comes as another client begins to count anew
        new = self._steps - self._saved_steps
        if new >= self.save_every * max(1, len(self.members)) or self._number < 0:
            self._save()

    @property
    def _steps(self) -> int:
        """Of all clients; of frozen blocks as well, which nothing updates."""
        return sum(
            record.progress.newest if self.middle else self.members.get(name, Member()).ready.steps
            for name, record in self.server.clients.items()
        )

    def _save(self) -> None:
        self._number += 1
        self._saved_steps = self._steps
        self._kept = self.save(self._number, unfinished=True)

    def _compare(self, client: str, ready: Ready, here: int) -> None:
        """Say what was lost, on either side; ``here``: so many of its steps the shared blocks have."""
        if ready.steps > here and self.middle:
            self.say(
                f"{client} has done {ready.steps} steps, of which the shared blocks have the first {here}: the other "
                f"{ready.steps - here} were lost with the server's state after its last snapshot"
            )
        elif here > ready.steps:
            self.say(
                f"{client} goes back to step {ready.steps}: its steps up to {here} are answered again and not applied "
                "again"
            )
