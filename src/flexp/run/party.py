"""One client in a conducted run: it says that it is ready, and steps, scores, saves or goes back as it is told."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from flexp import finite
from flexp.client.model import SplitModel
from flexp.client.recut import fit
from flexp.client.trainer import Step, Trainer, cut_in, load_party, party_state
from flexp.data.scores import Scores, evaluate
from flexp.errors import FullError, LinkError, LinkLostError, StoppedError, StorageError, TrainingError
from flexp.limits import out_of_memory
from flexp.links.base import Link
from flexp.links.coding import load_residuals
from flexp.links.messages import Order, Ready
from flexp.report.metrics import Record
from flexp.report.summary import VALIDATION
from flexp.rng import RandomStream
from flexp.run.belonging import BELONGS
from flexp.run.conduct import ENDED, MOVED
from flexp.run.diary import Diary, ended, may_be_last
from flexp.run.gathering import Gathering
from flexp.run.judging import judge, judge_end
from flexp.run.settle import ClientSetup
from flexp.run.store import Store, party_of

if TYPE_CHECKING:
    from flexp.run.recutting import Mover

R = TypeVar("R")
PAUSE = 0.2
"""Seconds between the first two attempts to reach a server."""
QUICK = 1.0
"""A link that was lost sooner after the one before, in seconds, is not made anew at once."""


class Party:
    """One client's part of a conducted run.

    Args:
        reach: gives a new link after the old one was lost.
        patience: seconds that it tries to reach the server again before it gives up.
        mover: moves the cut when the device changes; ``tell_cut`` is told it.
        moved: the snapshot that the client goes on from with another cut, written anew when the server takes it so.
        first_round: called when that is over.
    """

    def __init__(
        self,
        setup: ClientSetup,
        trainer: Trainer,
        reach: Callable[[], Link],
        *,
        snapshots: Store,
        diary: Diary,
        run: str = "",
        patience: float = 300.0,
        mover: Mover | None = None,
        moved: int | None = None,
        validated: dict[int, float | None] | None = None,
        tell_cut: Callable[[tuple[int, int]], None] = lambda _: None,
        first_round: Callable[[], None] = lambda: None,
    ) -> None:
        self.setup, self.config, self.data, self.task = setup, setup.config, setup.data, setup.run.federation.task
        assert isinstance(trainer.model, SplitModel)
        self.trainer, self.model, self.reach = trainer, trainer.model, reach
        self.snapshots, self.diary = snapshots, diary
        self._stop = threading.Event()
        self.scores: Scores = {}
        self._run, self._patience, self._belongs = run, patience, setup.belonging(self.model.stage)
        self._mover, self._moved_from = mover, moved
        self._tell_cut, self._first_round = tell_cut, first_round
        self._facts: dict[str, float] = {}
        self._validated = validated or {}
        self._agreed: int | None = None  # the last snapshot that the server ordered, which others have as well
        self._unsaved: int | None = None  # the snapshot that could not be written last
        self._saved_steps = trainer.steps  # of a client that has moved to another cut, what it moved with
        self._place = -1 if snapshots.numbers() else 0
        self._gathering = Gathering(setup, trainer, snapshots.folder, diary.note, self._waited)
        self._pull_due = False
        self._linked = time.monotonic()
        self._quick = 0.0  # seconds to rest before the link is made anew

    def work(self, stop: threading.Event) -> bool:
        """Obey until the run is over, ``stop`` is set or the server stops, then save; gives whether the run is over.

        Raises:
            LinkError: the server refuses, or cannot be reached any more; what is done is saved.
            TrainingError: a loss is not finite.
        """
        self._stop = stop
        try:
            while True:
                try:
                    return self._obey()
                except StoppedError:
                    raise
                except LinkLostError as error:
                    self.diary.note(f"{error}; trying again")
                    self._reconnect(error)
        except StoppedError as error:
            return self._dismissed(error)

    def save(self, number: int) -> None:
        """Write a snapshot, in place of one that has the same number; that the disk is full is told, and an error only
        if it still is when the client leaves."""
        facts = {
            "run": self._run,
            "client": self.data.name,
            "numbering": self.model.steps.numbering,
            "steps": self.trainer.steps,
            "cut": list(self.model.cut),
            "met": self._gathering.met,
            "pull": self._pull_due,
            "data": self.setup.identity,
            BELONGS: self._belongs,
        }
        try:
            state = {party_of(self.data.name): party_state(self.trainer)}
            self.snapshots.save(number, state, facts, best=self._agreed)
            self._saved_steps, self._unsaved = self.trainer.steps, None
        except StorageError as error:
            self._unsaved = number
            self.diary.note(f"snapshot {number} was not saved: {error}")

    def settle(self) -> None:
        """Save what could not be saved before.

        Raises:
            StorageError: it cannot be saved now either.
        """
        if self._unsaved is not None:
            self.save(self._unsaved)
        if self._unsaved is not None:
            lost = self.trainer.steps - self._saved_steps
            raise StorageError(
                f"{self.data.name}: its last {lost} steps are not saved in {self.snapshots.folder}, whose newest "
                f"snapshot is {max(self.snapshots.numbers(), default='none')}"
            )

    def _obey(self) -> bool:
        done: int | None = None
        while not self._stop.is_set():
            try:
                order = self._next_order(done)
                if order is None:
                    break
                self._judge(order)
            except LinkLostError:
                raise
            except LinkError:
                self._keep()
                raise
            self._take_move()
            self._run, self._place = order.run, order.place
            if order.save is not None:
                self.save(order.save)
            match order.what:
                case "step":
                    for _ in range(order.count):
                        self._step()
                        self._move_if_due()
                        if self._stop.is_set():
                            break
                case "evaluate":
                    self._evaluate(order.number)
                case "meet":
                    self._gathering.meet(order.number, self._run)
                case "average":
                    self._gathering.average(order.number, self._run)
                case "save":
                    self.save(order.number)
                    self._agreed = self._agreed if self._unsaved == order.number else order.number
                case "restore":
                    self._restore(order.number)
                case "stop":
                    judge_end(self.config, self.trainer.steps, self._gathering.met, early=ENDED in self._told())
                    return True
            done = order.place
        if self._place >= 0:  # there is something new to go on from
            self.save(self._place)
        return False

    def _dismissed(self, why: StoppedError) -> bool:
        """Save, unless the newest snapshot is what to go on from: without an order, or in the middle of doing again
        what was done before. A step that is under way does not count; its number comes again."""
        if self._place >= 0:
            self.save(self._place)
        self.diary.note(f"{self.data.name}: {why}")
        return False

    def _keep(self) -> None:
        """The same where the client ends with an error; who has had no order leaves nothing behind."""
        if self._place >= 0 and self._run:
            self.save(self._place)

    def _judge(self, order: Order) -> None:
        """Refuse what no server of this run would say. Raises LinkError."""
        if self._run and order.run != self._run:  # what owners compared of a run holds for that run
            raise LinkError(f"the server calls the run {order.run}, which this client knows as {self._run}")
        begun = self.trainer.steps > 0 or bool(self.snapshots.numbers())  # or else all may begin the run again
        judge(order, self.config, self.trainer.steps, self._gathering.met, begun=begun)

    def _next_order(self, done: int | None) -> Order | None:
        """The next order; ``None`` if the client is to stop meanwhile."""
        numbers = tuple(self.snapshots.numbers())
        planned = self.config.train.total_steps
        steps, saved, met = self.trainer.steps, self._saved_steps, self._gathering.met
        ready = Ready(steps, done, self._run, numbers, saved, self._told(), planned, met)
        try:
            return self._waited(self.model.link.call(ready))
        except _InterruptedError:
            return None

    def _waited(self, future: Future[R]) -> R:
        """An answer that is given when others are there. Raises StoppedError: the client is to stop meanwhile."""
        while True:
            try:
                return future.result(0.5)
            except TimeoutError:
                if self._stop.is_set():
                    raise _InterruptedError("stopped while it waited for others") from None

    def _step(self) -> None:
        while (step := self._try()) is None:
            pass
        self._facts = {"loss": step.loss, "lr": step.lr, "seconds": step.seconds}
        self.diary.step(self._round, step)
        if self.trainer.steps == self.config.train.steps_per_round:
            self._first_round()

    def _try(self) -> Step | None:
        """A step; ``None``: memory ran out in it, and the client has given something up since.

        Raises:
            TrainingError: memory ran out, and there is nothing to give up.
        """
        before = self.trainer.steps
        try:
            return self.trainer.step()
        except LinkLostError:
            self._pull_due = self.trainer.steps > before  # all of the step is done but the pull at its end
            raise
        except (MemoryError, RuntimeError) as error:
            why, there = out_of_memory(error), isinstance(error, FullError)
            if why is None or self._mover is None or self.model.steps.done > before:  # the server has applied it
                raise
        self.trainer.updater.forget()  # the step's tensors went with the exception, but for its gradients
        record = self._mover.after_failure(there=there)
        if record is None:
            raise TrainingError(f"{self.data.name}, step {before + 1}: {why}")
        self._moved(record)
        return None

    def _move_if_due(self) -> None:
        """Let the cut follow the device."""
        record = None if self._mover is None else self._mover.after_step()
        if record is not None:
            self._moved(record)

    def _moved(self, record: Record) -> None:
        """Tell it, and save: whoever goes back must not do steps again with another cut than they were done with."""
        self.diary.change({**record, "round": self._round})
        if record["kind"] == "move":
            self.save(self._place)
            self._tell_cut(self.model.cut)

    def _take_move(self) -> None:
        """The server has taken the client with another cut than it had: going back to that snapshot would undo it."""
        if self._moved_from is not None:
            number, self._moved_from = self._moved_from, None
            self.save(number)
            self._tell_cut(self.model.cut)

    def _evaluate(self, number: int) -> None:
        sides: dict[str, Scores] = {}
        size, extras = self.config.evaluation.batch_size, may_be_last(number, self.config.train)
        with RandomStream(0, self.model.device).active():  # a forward moves the generator, which others draw from
            if self.data.test:
                sides["personal"] = evaluate(self.trainer.personal, self.task, self.data.test, size, extras=extras)
            if self.data.validation:
                sides[VALIDATION] = evaluate(self.trainer.personal, self.task, self.data.validation, size, extras=False)
        if not sides:
            return
        self.diary.scores(number, self.data.name, sides)
        if VALIDATION in sides:
            self._validated[number] = sides[VALIDATION][self.task.metric]
        if "personal" in sides:
            self.scores = sides["personal"]
            value = self.scores[self.task.metric]
            said = "has no value" if value is None else f"{value:.4g}"
            self.diary.note(f"{self.data.name}: round {number}, {self.task.metric} {said} on its own test data")
        for line in finite.told(number, {self.data.name: sides}):
            self.diary.note(f"warning: {line}")

    def _restore(self, number: int) -> None:
        snapshot = self.snapshots.open(number)
        state = snapshot.load(party_of(self.data.name))
        cut = cut_in(state)
        if cut is not None:
            fit(self.trainer, cut, self.setup.load)
        load_party(self.trainer, state)
        self._saved_steps, self._agreed = self.trainer.steps, number
        self._gathering.met = int(snapshot.facts.get("met", 0))
        self._pull_due = bool(snapshot.facts.get("pull"))
        if self._mover is not None:
            self._mover.begin()
        self.diary.note(f"{self.data.name}: back to snapshot {number}, after {snapshot.facts['steps']} steps")
        if self._pull_due:
            self.model.go_on(self.trainer.steps, pulled=False)
            self._pull()

    def _reconnect(self, why: LinkError) -> None:
        """A new link, joined; then the pull that is still due.

        Raises:
            StoppedError: the client is to stop meanwhile, or the server stops.
            LinkError: the server cannot be reached within the time, or refuses; what is done is saved.
        """
        self._quick = min(2 * self._quick or PAUSE, 5.0) if time.monotonic() - self._linked < QUICK else 0.0
        self._stop.wait(self._quick)  # a server may take every client in and refuse whatever it sends

        def again() -> None:
            with suppress(LinkError):
                self.model.link.close()  # first: a client has one stream at a time
            self.model.rejoin(self._keeping_the_meter(self.reach()))
            self._linked = time.monotonic()
            if self._pull_due:
                self._pull()

        try:
            patiently(again, self._patience, self._stop)
        except StoppedError:
            raise
        except LinkError as error:
            self._keep()
            if not isinstance(error, LinkLostError):
                raise
            newest = max(self.snapshots.numbers(), default=None)
            where = "" if newest is None else f": it goes on from snapshot {newest} in {self.snapshots.folder}"
            raise LinkError(f"{error}; start the client again when it is back{where}") from why

    def _pull(self) -> None:
        """What belongs to the end of the last step."""
        self.model.after_step()
        self._pull_due = False

    def _keeping_the_meter(self, link: Link) -> Link:
        link.meter = self.model.link.meter
        load_residuals(link.residuals, self.model.link.residuals)
        return link

    def _told(self) -> dict[str, float]:
        """What the operator may know: no data, no labels, no weights; where no gradients are sent no losses and scores
        either, out of which labels could be computed."""
        meter = self.model.link.meter.training
        open_ = self.config.privacy.gradients and not self.model.whole
        facts = {
            **{key: value for key, value in self._facts.items() if open_ or key != "loss"},
            "bytes_up": float(meter.bytes_up),
            "bytes_down": float(meter.bytes_down),
            "waited_seconds": meter.waited_seconds,
            "compute_seconds": self.trainer.seconds - meter.waited_seconds,
        }
        if open_ and ended(self._validated, self.config.train.early_stopping, self.task.higher_is_better):
            facts[ENDED] = 1.0
        if self._moved_from is not None:
            facts[MOVED] = 1.0
        score = self.scores.get(self.task.metric)
        if score is not None and math.isfinite(score) and open_:
            facts["score"] = float(score)
        return facts

    @property
    def _round(self) -> int:
        """Of the last step."""
        return (self.trainer.steps - 1) // self.config.train.steps_per_round + 1


class _InterruptedError(StoppedError):
    """The client is to stop while it waits."""


def patiently(attempt: Callable[[], R], seconds: float, stop: threading.Event, most: float = 5.0) -> R:
    """What ``attempt`` gives, made again and again for so long as the server cannot be reached, ``most`` seconds apart.

    Raises:
        StoppedError: it is there, and stops; or ``stop`` was set before it could be reached.
        LinkLostError: it could not be reached in so many seconds.
        LinkError: it refuses.
    """
    end, pause = time.monotonic() + seconds, PAUSE
    while True:
        try:
            return attempt()
        except StoppedError:
            raise
        except LinkLostError as error:
            if stop.is_set():
                raise _InterruptedError(f"stopped while the server could not be reached ({error})") from error
            if time.monotonic() + pause > end:
                raise LinkLostError(f"the server could not be reached within {seconds:g} s ({error})") from error
            stop.wait(pause)
            pause = min(2 * pause, most)
