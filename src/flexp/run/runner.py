"""A whole simulated federation: train, score, save, report; and go on from where it was stopped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexp import finite
from flexp.audit import Watch, unread, watchable, watching
from flexp.client.meeting import FIRST, LAST, RARE
from flexp.client.personal_head import Choice
from flexp.config import RunConfig
from flexp.config.loading import validate
from flexp.data import load_federation
from flexp.data.scores import Scores as Scored
from flexp.data.scores import evaluate
from flexp.data.split import check_same
from flexp.data.types import Example, Federation
from flexp.errors import ConfigError, StorageError
from flexp.files import check_free, read_json, write_json
from flexp.methods import Method, World
from flexp.methods.split import Split
from flexp.methods.turns import scored_rounds
from flexp.report import write_report
from flexp.report.metrics import MetricsLog, read
from flexp.report.progress import Progress
from flexp.report.summary import (
    UNKNOWN,
    VALIDATION,
    aggregate,
    best_round,
    picked_on,
    scores_by_round,
    scores_of,
)
from flexp.report.tensorboard import writer_of
from flexp.rng import generator
from flexp.run.audited import WATCHED, conclude, public_of
from flexp.run.belonging import BELONGS, belonging, check_session
from flexp.run.costs import MemoryProbes
from flexp.run.diary import Diary, ended, may_be_last
from flexp.run.folder import AUDIT, MEND, check_length, data_of, is_joined, said, saved_facts
from flexp.run.keeping import cache_notes
from flexp.run.outcome import Summary, summary_of
from flexp.run.participants import Dropped, place
from flexp.run.recutting import Recutting
from flexp.run.settle import Federate, build_world
from flexp.run.store import CHECKPOINTS, Store

WRITES = ("metrics.jsonl", "summary.json", "report.html", "plan.json", "memory.json", "events", AUDIT)
"""What a run writes beside its configuration and its checkpoints."""


def run(
    config: RunConfig,
    out: Path,
    *,
    progress: Callable[..., Progress] = Progress,
    memory_cache: Path | None = None,
) -> Summary:
    """Start a run in the folder ``out``.

    Args:
        memory_cache: a folder that runs share for their measurements of memory, so that equal ones are made once.

    Raises:
        ConfigError: ``out`` holds a run already, or no client's device can hold what the method trains.
        FlexpError: what is wrong with configuration, model, data or disk.
    """
    refuse_taken(out)
    world, probes, dropped = _prepared(config, out, memory_cache)
    method = world.method(world)  # whatever cannot be built leaves no folder behind
    write_json(out / "config.json", world.config.resolved())  # with the cuts that were planned, for whoever resumes
    if world.plan is not None:
        write_json(out / "plan.json", world.plan)
    probes.save()
    return _Run(world, method, probes, dropped, out, progress).go()


def train(world: World, method: Method, out: Path, *, progress: Callable[..., Progress] = Progress) -> Summary:
    """Start a run in the folder ``out`` with a method that was made already, perhaps with other weights than usual.

    Raises:
        ConfigError: ``out`` holds a run already.
        FlexpError: what is wrong with the data or the disk.
    """
    refuse_taken(out)
    write_json(out / "config.json", world.config.resolved())
    return _Run(world, method, MemoryProbes(world, out), [], out, progress).go()


def refuse_taken(out: Path) -> None:
    """See that ``out`` holds no run, and nothing that a run would write over.

    Raises:
        ConfigError: it does.
    """
    if (out / "config.json").exists() or Store(out / CHECKPOINTS).numbers():
        raise ConfigError(
            f"{out} holds a run already; continue it with flexp run --resume {out}, or choose another --out"
        )
    check_free(out, WRITES, "a run")


def resume(
    out: Path,
    *,
    rounds: int | None = None,
    device: str | None = None,
    progress: Callable[..., Progress] = Progress,
    memory_cache: Path | None = None,
) -> Summary:
    """Go on with a run that was stopped, from its last checkpoint; its final weights are those of an undisturbed run.

    Args:
        rounds: so many in all from now on, also of a run that is over; ``None``: as its ``config.json`` says.
        device: where to compute this time; the last bits of what comes out are that device's.

    Raises:
        StorageError: ``out`` holds no run, or its checkpoint is damaged.
        DataError: the data are not those that it was trained on.
        ConfigError: it cannot have so many rounds.
    """
    if not (out / "config.json").exists():
        raise StorageError(f"{out} holds no run to resume: it has no config.json")
    if is_joined(out):
        raise ConfigError(f"{out} is of a client that joined a run, which is not resumed; run flexp join again")
    content, saved = read_json(out / "config.json"), saved_facts(out)
    content.setdefault("method", {}).setdefault("meet", {}).setdefault("on", False)  # an older run did not meet unasked
    if rounds is not None:
        content["train"]["rounds"] = rounds
    config = validate(content, str(out / "config.json")).on(device)
    check_length(config, saved, out)

    def same_data(*of: Any) -> Federation:
        found = load_federation(*of)
        check_same(saved.get("data"), data_of(found), out, MEND)
        return found

    world, probes, dropped = _prepared(config, out, memory_cache, same_data)
    run = _Run(world, world.method(world), probes, dropped, out, progress)
    if rounds is not None:
        write_json(out / "config.json", world.config.resolved())
    return run.go()


def _prepared(
    config: RunConfig, out: Path, cache: Path | None, federate: Federate = load_federation
) -> tuple[World, MemoryProbes, list[Dropped]]:
    """The world without those whose device cannot hold what the method trains, and what was measured to know that."""
    world = build_world(config, federate)
    if config.train.early_stopping.patience is not None and world.meets.last:
        raise ConfigError(
            "train.early_stopping: clients meet (method.meet) after the last step, and which that is nobody knows "
            "beforehand; leave one of them out"
        )
    probes = MemoryProbes(world, out, cache)
    world, dropped = place(world, probes) if config.on_devices else (world, [])
    return world, probes, dropped


class _Run:
    """One simulated run in its folder: rounds, scores, checkpoints, and the summary of all of it."""

    def __init__(
        self,
        world: World,
        method: Method,
        probes: MemoryProbes,
        dropped: list[Dropped],
        out: Path,
        progress: Callable[..., Progress],
    ) -> None:
        self.world, self.config, self.out = world, world.config, out
        self.method, self.probes, self.dropped = method, probes, dropped
        self.audited = self.config.privacy.audit and isinstance(method, Split)
        if self.audited:
            watchable(method)  # before anything is trained
            self.public = public_of(self.config)
        self.store = Store(out / CHECKPOINTS)
        task = world.federation.task
        self.facts: dict[str, Any] = {
            "data": data_of(world.federation),
            "rounds": self.config.train.rounds,
            BELONGS: belonging(self.config, world.source, task.model_kind, task.label_names),
        }
        self.names = [client.name for client in world.federation.clients]
        self.everybody = sample(world.federation.test, self.config.evaluation.global_examples, self.config.seed)
        self.scoring = scored_rounds(self.config.train, self.config.evaluation.every)
        self.first_round = self._restore()
        self.recutting = Recutting(world, method) if self.config.on_devices else None
        log = MetricsLog(out / "metrics.jsonl")
        log.truncate_after(self.first_round - 1)
        kept = read(log.path)
        self.scored = scores_by_round(kept, self.names, world.federation.task.metric)
        events = writer_of(out, self.config, kept or None)
        self.seconds_before = max((float(r["seconds"]) for r in kept if r["kind"] == "round"), default=0.0)
        self.began = time.perf_counter()
        per_round = self.config.train.steps_per_round * len(world.participants)
        self.progress = progress(
            self.config.train.rounds * per_round,
            self.config.name,
            metric=world.federation.task.metric,
            done=sum(record["kind"] == "step" for record in kept),
        )
        if self.first_round > 1:
            self.progress.passed(self.first_round - 1, self.config.train.rounds)
        self.diary = Diary(log, self.progress, events)

    def go(self) -> Summary:
        try:
            with self.progress as progress:
                for note in self.world.federation.remarks:
                    progress.note(note)
                for note in cache_notes(self.method.clients) if isinstance(self.method, Split) else ():
                    progress.note(note)
                if self.first_round > 1:
                    progress.note(f"resumed after round {self.first_round - 1}")
                if self.first_round == 0:
                    self._evaluate(0)
                    if self.world.meets.first:
                        progress.note("clients meet: one classifier of everybody's sums, before the first step")
                        self.method.meet(FIRST)
                        if self.method.rare:
                            progress.note(RARE.format(self.method.rare, self.config.method.meet.min_examples))
                for number in range(max(1, self.first_round), self.config.train.rounds + 1):
                    if self._ended():
                        break
                    self._round(number)
                if self._ended() and not self._complete():
                    progress.note("stopped early: scores on validation data got no better (train.early_stopping)")
                self.probes.measure(progress.note)
                self.probes.save()
        finally:
            self.method.close()
            self.diary.close()
            self.store.close()
        summary = summary_of(
            self.world,
            self.method,
            self.probes,
            read(self.out / "metrics.jsonl"),
            dropped=self.dropped,
            stopped=self._ended(),
            server_reads=self._read(),
        )
        write_json(self.out / "summary.json", summary)
        if self.config.output.html:
            write_report(self.out)
        return summary

    def _round(self, number: int) -> None:
        for record in [] if self.recutting is None else self.recutting.before_round(number):
            self.diary.change(record)
        if number == 1 and self.audited:
            self._audited_round()
        else:
            self.method.train_round(number, lambda step: self.diary.step(number, step))
        self.progress.passed(number, self.config.train.rounds)
        if number == self.config.train.rounds and self.world.meets.last:
            self.progress.note("clients meet: a classifier for each, after the last step")
            self._tell(self.method.meet(LAST))
        if number in self.scoring:
            self._evaluate(number)
        last = number == self.config.train.rounds or self._ended()
        accounts = [self.method.account(name) for name in self.names]
        spent = {data.name: self.method.account(data.name).client_seconds for data in self.world.participants}
        self.diary.write(
            {
                "kind": "round",
                "round": number,
                "seconds": self.seconds_before + time.perf_counter() - self.began,
                "bytes_up": sum(account.training.bytes_up for account in accounts),
                "bytes_down": sum(account.training.bytes_down for account in accounts),
                "client_seconds": sum(spent.values()) / len(spent),  # of a participant's device, on average
                "seconds_by_client": spent,
            }
        )
        best = None
        if picked_on(self.scored) == VALIDATION:  # a round picked on test data is nothing to go back to
            best = best_round(self.scored, self.world.federation.task.higher_is_better)
        every = self.config.output.checkpoint_every
        if every and (last or number == best or number % every == 0):
            self.store.save(number, self.method.state(), self.facts, best=best)

    def _read(self) -> str:
        """What the server can read, in a line."""
        method = self.method
        return said(self.out) or (UNKNOWN if isinstance(method, Split) else unread(method, method.world.config))

    def _audited_round(self) -> None:
        """The first round, and what the server can read of it: texts are read most easily before heads have moved."""
        method = watchable(self.method)
        watch = Watch.of(method, max(1, WATCHED // len(self.world.participants)))
        with watching(method, watch):
            method.train_round(1, lambda step: self.diary.step(1, step))
        began = time.perf_counter()
        conclude(watch, self.out, self.public, self.progress.note)
        self.began += time.perf_counter() - began  # attacks are no part of the run

    def _ended(self) -> bool:
        """Whether scores on validation data got no better for long enough."""
        higher = self.world.federation.task.higher_is_better
        means = {number: aggregate(scores, higher).get("validation_mean") for number, scores in self.scored.items()}
        return ended(means, self.config.train.early_stopping, higher)

    def _complete(self) -> bool:
        return self.config.train.rounds in self.scored

    def _tell(self, choices: dict[str, Choice]) -> None:
        counted = Counter(choices.values())
        kinds = ", ".join(f"{name} of {count}" for name, count in counted.most_common())
        self.progress.note(f"after the last meeting the clients' classifiers are: {kinds}")

    def _evaluate(self, number: int) -> None:
        task, size = self.world.federation.task, self.config.evaluation.batch_size
        found: dict[str, dict[str, Scored]] = {}
        extras = may_be_last(number, self.config.train)
        alike = getattr(self.method, "same_for_all", False)
        alike |= number == 0 and not self.config.privacy.of_texts  # before training all have what came, or were taught
        everybody: Scored | None = None
        for client in self.world.federation.clients:
            forward = self.method.personal(client.name)
            personal = evaluate(forward, task, client.test, size, extras=extras)
            if everybody is None or not alike:
                everybody = evaluate(forward, task, self.everybody, size, extras=extras)
            sides = {"personal": personal, "global": everybody}
            if client.validation:
                sides[VALIDATION] = evaluate(forward, task, client.validation, size, extras=False)
            self.diary.scores(number, client.name, sides)
            found[client.name] = sides
        self.scored[number] = {name: scores_of(sides, task.metric) for name, sides in found.items()}
        self.progress.round(number, aggregate(self.scored[number], task.higher_is_better))
        for line in finite.told(number, found):
            self.progress.note(f"warning: {line}")

    def _restore(self) -> int:
        """Load the last checkpoint; the round to go on with, 0 being the scores before training."""
        if self.config.output.checkpoint_every:
            self.store.claim()
        if not self.store.numbers():
            return 0
        number = max(self.store.numbers())
        check_session(self.store.open(number).facts, self.facts[BELONGS], self.out)
        self.method.load(self.store.load(number))
        return number + 1


def sample(examples: list[Example], most: int | None, seed: int) -> list[Example]:
    """At most ``most`` of everybody's test examples (``evaluation.global_examples``), drawn from the run's seed."""
    if most is None or len(examples) <= most:
        return examples
    chosen = generator(seed, "everybody").choice(len(examples), most, replace=False)
    return [examples[int(index)] for index in sorted(chosen)]
