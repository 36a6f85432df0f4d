"""Whose turn it is, who goes back to what, and who is refused; with clients that are only words."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from flexp.client.meeting import Meets
from flexp.config import OptimizerConfig, TrainConfig
from flexp.errors import ConfigError, LinkError, LinkLostError, StorageError
from flexp.links.messages import Order, Ready
from flexp.methods.turns import Place, gatherings, schedule, turns
from flexp.run.deterministic import Deterministic
from flexp.run.free import NEVER, Free
from flexp.run.store import Store
from tests.harness import world

TRAIN = TrainConfig(rounds=2, steps_per_round=2, order="random")
STEPS = TRAIN.rounds * TRAIN.steps_per_round
NAMES = ["a", "b", "c"]
BOTH = Meets(True, True)


class Word:
    """What a client says and hears: it does at once what it is told."""

    def __init__(self, name: str, conductor: Deterministic | Free) -> None:
        self.name, self.conductor = name, conductor
        self.steps = self.saved = self.met = 0
        self.kept: dict[int, tuple[int, int]] = {}
        self.heard: list[Order] = []
        self.waits: Future[Order] | None = None
        self.done: int | None = None

    def say(self, run: str = "") -> None:
        ready = Ready(self.steps, self.done, run, tuple(sorted(self.kept)), self.saved, met=self.met)
        self.waits = self.conductor.ready(self.name, ready)

    def hear(self) -> bool:
        """Do what was ordered; gives whether there was anything."""
        if self.waits is None or not self.waits.done():
            return False
        order = self.waits.result()
        self.heard.append(order)
        for number in [order.number] * (order.what == "save") + ([] if order.save is None else [order.save]):
            self.saved = self.steps
            self.kept[number] = (self.steps, self.met)
        if order.what in ("meet", "average"):
            self.met = max(self.met + 1, order.number if order.what == "average" else 0)  # some may be left out
        if order.what == "step":
            self.steps += order.count
        if order.what == "restore":
            self.steps, self.met = self.kept[order.number]
            self.saved = self.steps
        self.done, self.waits = order.place, None
        if order.what != "stop":
            self.say(order.run)
        return True


def deterministic(folder: Path | None, meets: Meets = Meets(False, False), averages: bool = False) -> Deterministic:
    snapshots = None if folder is None else Store(folder)
    places = schedule(NAMES, TRAIN, 3, evaluate_every=1, save_every=1, meets=meets, averages=averages)
    return Deterministic(world("bert").server, snapshots, "run", lambda _: None, TRAIN, NAMES, places)


def talk(words: list[Word], most: int = 10_000) -> int:
    """Until nobody has anything to do, or for so many orders."""
    count = 0
    while count < most and any(word.hear() for word in words):
        count += 1
    return count


def begun(conductor: Deterministic | Free, orders: int) -> list[Word]:
    """Clients that have come, and done so many orders."""
    words = [Word(name, conductor) for name in NAMES]
    for word in words:
        word.say()
    talk(words, orders)
    return words


def order_of_steps(words: list[Word]) -> list[tuple[int, str]]:
    told = [(order.place, word.name) for word in words for order in word.heard if order.what == "step"]
    return sorted(pair for pair in told if pair[0] >= 0)


def test_the_order_is_the_simulations() -> None:
    conductor = deterministic(None)
    words = [Word(name, conductor) for name in NAMES]
    for word in words:
        assert not any(other.waits and other.waits.done() for other in words)  # nobody begins before all are there
        word.say()
    talk(words)
    assert conductor.finished
    wanted = [name for number in (1, 2) for name in turns(NAMES, TRAIN, 3, number)]
    assert [name for _, name in order_of_steps(words)] == wanted
    for word in words:
        assert [order.number for order in word.heard if order.what == "evaluate"] == [0, 1, 2]
        assert word.heard[-1].what == "stop"
        assert [steps for steps, _ in word.kept.values()] == [0, 1, 2, 3, 4, 4]


def test_who_comes_back_goes_back_to_what_it_has(tmp_path: Path) -> None:
    conductor = deterministic(tmp_path)
    words = begun(conductor, 30)
    lost = words[1]
    place, steps = conductor.place, lost.steps
    assert steps
    conductor.gone("b")
    again = Word("b", conductor)
    again.kept = dict(list(lost.kept.items())[:-1])
    again.say("run")
    assert again.hear()
    assert again.heard[0].what == "restore"
    assert again.steps < steps
    while again.steps < steps:
        assert again.hear()
        assert (again.heard[-1].what, again.heard[-1].place) == ("step", -1)
    assert conductor.place >= place
    words[1] = again
    talk(words)
    assert conductor.finished
    assert [word.steps for word in words] == [4, 4, 4]


def test_in_a_free_run_a_client_waits_for_meetings_alone(tmp_path: Path) -> None:
    conductor = free(tmp_path, meets=BOTH)
    words = [Word(name, conductor) for name in NAMES]
    for word in words:
        word.say()
    talk(words)
    for word in words:
        heard = [(order.what, order.number) for order in word.heard if order.what != "stop"]
        assert heard == [("evaluate", 0), ("meet", 0), ("step", 0), ("step", 0), ("meet", 1), ("evaluate", 2)]
    assert conductor.finished


def test_who_asks_again_while_it_waits_is_answered_once_more() -> None:
    """Over the same link, to see whether the server is there: nothing is done twice."""
    conductor = deterministic(None)
    words = begun(conductor, 20)
    late = next(word for word in words if word.waits is not None and not word.waits.done())
    earlier, place = late.waits, conductor.place
    late.say("run")
    assert earlier is not None
    with pytest.raises(LinkLostError, match="asked again since"):
        earlier.result(0)
    assert conductor.place == place
    assert late.waits is not None
    assert not late.waits.done()
    talk(words)
    assert conductor.finished
    assert [word.steps for word in words] == [STEPS] * 3


def test_all_meet_before_the_first_step_and_after_the_last() -> None:
    conductor = deterministic(None, BOTH)
    words = [Word(name, conductor) for name in NAMES]
    for word in words:
        word.say()
    talk(words)
    for word in words:
        heard = [(order.what, order.number) for order in word.heard if order.what in ("evaluate", "meet", "step")]
        steps = [("step", 0)] * 2
        assert heard == [("evaluate", 0), ("meet", 0), *steps, ("evaluate", 1), *steps, ("meet", 1), ("evaluate", 2)]
        assert word.kept[max(word.kept)] == (4, 2)


@pytest.mark.parametrize("orders", range(3, 48, 5))
def test_who_lost_a_meeting_has_it_again_before_anything_else(tmp_path: Path, orders: int) -> None:
    """Wherever the run is: a client that comes back with less never steps, scores or saves without what all have."""
    averages = orders % 2 == 0
    conductor = deterministic(tmp_path, BOTH, averages)
    words = [Word(name, conductor) for name in NAMES]
    for word in words:
        word.say()
    talk(words, orders)
    conductor.gone("b")
    again = Word("b", conductor)
    again.kept = dict(list(words[1].kept.items())[:1])  # its first snapshot, or none
    again.say("run" if again.kept else "")
    words[1] = again
    talk(words)
    assert conductor.finished
    all_do, met, steps = gatherings(TRAIN, BOTH, averages), 0, 0
    for order in again.heard:
        if order.what == "restore":
            steps, met = again.kept[order.number]
        if order.what in ("meet", "average"):
            assert Place(order.what, number=order.number) == all_do[met]
            assert order.what == "meet" or steps == TRAIN.steps_per_round * order.number
            met += 1
        if order.what in ("step", "save"):
            assert met >= 1 + averages * (steps // TRAIN.steps_per_round)
        steps += order.what == "step"
    assert (again.steps, again.met) == (4, len(all_do))


def test_in_a_free_run_who_comes_back_too_late_goes_on_from_the_oldest_average_that_is_kept(tmp_path: Path) -> None:
    conductor = free(tmp_path, averages=True)
    word = Word("a", conductor)
    word.say()
    talk([word])
    heard = [(order.what, order.number) for order in word.heard if order.what not in ("step", "stop")]
    assert heard == [("evaluate", 0), ("average", 1), ("average", 2), ("evaluate", 2)]
    conductor.server.sums.first = 2
    late = Word("b", conductor)
    late.say()
    talk([late])
    heard = [(order.what, order.number) for order in late.heard if order.what != "stop"]
    assert heard == [("evaluate", 0), ("step", 0), ("average", 2), ("step", 0), ("evaluate", 2)]


def test_a_new_server_goes_on_from_what_all_have(tmp_path: Path) -> None:
    first = deterministic(tmp_path)
    words = begun(first, 36)
    second = deterministic(tmp_path)
    common = set(second.numbers).intersection(*(word.kept for word in words))
    for word in words:
        word.conductor, word.done = second, None
        word.say("run")
    assert all(word.hear() for word in words)
    assert {(word.heard[-1].what, word.heard[-1].number) for word in words} == {("restore", max(common))}
    talk(words)
    assert second.finished
    assert [word.steps for word in words] == [4, 4, 4]


@pytest.mark.parametrize("lost", ["a client", "the server"])
def test_nobody_begins_again_beside_snapshots_that_others_have(tmp_path: Path, lost: str) -> None:
    """A new history beside the old one: the next fall would put halves of both together."""
    words = begun(deterministic(tmp_path / "first"), 36)
    second = deterministic(tmp_path / ("first" if lost == "a client" else "second"))
    again = [Word(word.name, second) for word in words]
    for word, old in zip(again, words, strict=True):
        word.kept = {} if (word.name, lost) == ("b", "a client") else old.kept
    for word in again[:2]:
        word.say("run" if word.kept else "")
    with pytest.raises(LinkError, match=r"have no snapshot in common.*would have to go back to the beginning"):
        again[2].say("run")
    with pytest.raises(LinkError, match=r"have no snapshot in common"):  # who comes again begins nothing either
        again[1].say("run" if again[1].kept else "")
    for word in again[1:]:
        second.gone(word.name)
    if lost == "a client":
        again[1].kept = words[1].kept
        for word in again[1:]:
            word.say("run")
        talk(again)
        assert [word.steps for word in again] == [STEPS] * 3


def test_who_was_stopped_before_all_had_saved_begins_again(tmp_path: Path) -> None:
    conductor = deterministic(tmp_path)
    words = [Word(name, conductor) for name in NAMES]
    words[0].kept = {3: (1, 0)}  # of its own: at place 3 nobody was to save
    assert conductor.places[3].what != "save"
    for word in words:
        word.say("run" if word.kept else "")
    talk(words)
    assert [word.steps for word in words] == [STEPS] * 3


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Store, number: int, *of: object, **more: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Store, "save", save)


def test_clients_keep_what_goes_with_the_servers_last_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conductor = deterministic(tmp_path)
    words = begun(conductor, 19)
    numbers, before = conductor.numbers, [dict(word.kept) for word in words]
    full(monkeypatch)
    while not conductor.over:
        assert talk(words, 1)
        if not conductor.over:
            assert [word.kept for word in words] == before
    talk(words)
    assert [word.steps for word in words] == [STEPS] * 3
    assert all(max(word.kept.values())[0] == STEPS for word in words)  # with the end each has all that is its own
    with pytest.raises(StorageError, match=f"last weights were not saved.*newest snapshot .* is {max(numbers)}"):
        conductor.close()
    monkeypatch.undo()
    said = conductor.close()
    assert said.endswith(f"is {max(conductor.numbers)}")
    assert max(conductor.numbers) > max(numbers)
    assert deterministic(tmp_path).over


def test_a_free_server_that_cannot_save_says_so_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conductor = free(tmp_path)
    words = begun(conductor, 4)
    numbers = conductor.numbers
    full(monkeypatch)
    talk(words)
    assert conductor.over
    with pytest.raises(StorageError, match=f"is lost; the newest snapshot in .* is {max(numbers)}"):
        conductor.close()
    monkeypatch.undo()
    said = conductor.close()
    assert said.endswith(f"is {max(conductor.numbers)}")
    assert max(conductor.numbers) > max(numbers)
    assert free(tmp_path).over


def test_nobody_stops_early_in_a_deterministic_run() -> None:
    with pytest.raises(LinkError, match=r"stops early \(train.early_stopping\)"):
        deterministic(None).ready("a", Ready(2, facts={"ended": 1.0}))


def test_a_run_goes_on_in_its_order_alone(tmp_path: Path) -> None:
    """Its snapshots have numbers of places in it: with other scores nobody could be told what to do, for ever."""
    first = deterministic(tmp_path)
    words = begun(first, 36)
    other = schedule(NAMES, TRAIN, 3, evaluate_every=2, save_every=1)
    with pytest.raises(ConfigError, match=r"begun with another order of steps.* set evaluation.every"):
        Deterministic(world("bert").server, Store(tmp_path), "run", lambda _: None, TRAIN, NAMES, other)
    for word in words:
        word.conductor, word.done, word.waits = first, None, None
        word.say("run")
    talk(words)
    assert first.over
    Deterministic(world("bert").server, Store(tmp_path), "run", lambda _: None, TRAIN, NAMES, other)  # it is over


def test_strangers_and_other_runs_are_refused(tmp_path: Path) -> None:
    conductor = deterministic(tmp_path)
    with pytest.raises(LinkError, match="takes no part in this run: it has a, b, c"):
        Word("d", conductor).say()
    with pytest.raises(LinkError, match="in the middle of the run other"):
        Word("a", conductor).say("other")


def test_a_client_with_a_run_of_another_length_is_refused() -> None:
    conductor = deterministic(None)
    with pytest.raises(LinkError, match=r"client a plans 5 steps, and this run has 4.*set the same train\.rounds"):
        conductor.ready("a", Ready(0, planned=5))
    conductor.ready("a", Ready(0, planned=STEPS))


def test_in_a_free_run_nobody_waits(tmp_path: Path) -> None:
    conductor = Free(
        world("bert").server, Store(tmp_path), "run", lambda _: None, TRAIN, NAMES, evaluate_every=2, save_every=1
    )
    words = [Word(name, conductor) for name in NAMES]
    words[0].say()
    talk(words[:1])
    assert words[0].steps == 4
    assert words[0].heard[-1].what == "stop"
    assert not conductor.finished
    for word in words[1:]:
        word.say()
    talk(words)
    assert conductor.finished
    assert [order.number for order in words[2].heard if order.what == "evaluate"] == [0, 2]


@pytest.mark.parametrize(
    ("here", "says"),
    [
        (1, "a has done 2 steps, of which the shared blocks have the first 1: the other 1 were lost"),
        (3, "a goes back to step 2: its steps up to 3 are answered again and not applied again"),
        (2, ""),
    ],
)
def test_in_a_free_run_it_is_said_what_was_lost_also_of_a_client_that_was_started_again(
    tmp_path: Path, here: int, says: str
) -> None:
    conductor, said = free(tmp_path), list[str]()
    conductor.say = said.append
    conductor.server.clients["a"].progress.newest = here
    word = Word("a", conductor)
    word.kept = {0: (2, 0)}
    word.say("run")
    talk([word], 3)
    assert word.heard[0].what == "restore"
    assert len(said) == bool(says)
    assert says in "".join(said)


def test_everybody_is_in_step_where_all_save() -> None:
    places = schedule(NAMES, TrainConfig(rounds=2, steps_per_round=6, turn="round"), 0, 1, save_every=4)
    done = dict.fromkeys(NAMES, 0)
    saves = []
    for place in places:
        if place.what == "step":
            done[place.client] += 1
        if place.what == "save":
            assert len(set(done.values())) == 1
            saves.append(done["a"])
    assert saves == [0, 12, 12]  # with whole rounds in a row, all are equal after 6 and 12 steps only
    assert places[-2:] == [Place("evaluate", number=2), Place("save")]


def free(folder: Path, train: TrainConfig = TRAIN, meets: Meets = Meets(False, False), averages: bool = False) -> Free:
    server, say = world("bert").server, lambda _: None
    return Free(server, Store(folder), "run", say, train, NAMES, 2, save_every=1, meets=meets, averages=averages)


def fixed(folder: Path, train: TrainConfig = TRAIN) -> Deterministic:
    places = schedule(NAMES, train, 3, evaluate_every=1, save_every=1)
    return Deterministic(world("bert").server, Store(folder), "run", lambda _: None, train, NAMES, places)


@pytest.mark.parametrize("make", [free, fixed])
def test_a_finished_run_is_sealed(tmp_path: Path, make: Callable[..., Free | Deterministic]) -> None:
    """Also by a server that is started again; who has all of it is told that it is over, who has nothing is refused."""
    first = make(tmp_path)
    words = [Word(name, first) for name in NAMES]
    for word in words:
        word.say()
    talk(words)
    assert first.finished
    assert first.server.sealed
    first.close()
    second = make(tmp_path)
    assert second.server.sealed
    assert not second.finished
    with pytest.raises(LinkError, match=r"client b.* give it the --state folder that it had"):
        Word("b", second).say()
    numbers = second.numbers
    for word in words:
        word.conductor, word.done = second, None
        word.say("run")
        talk([word])
        assert (word.heard[-1].what, word.steps) == ("stop", STEPS)
    assert second.finished
    second.close()
    assert second.numbers == numbers  # nothing was rotated away


def test_a_run_may_last_longer_where_nothing_depends_on_its_length(tmp_path: Path) -> None:
    longer = TRAIN.model_copy(update={"rounds": 3})
    falling = longer.model_copy(update={"shared": OptimizerConfig(schedule="linear")})
    for name, make in (("free", free), ("fixed", fixed)):
        words = [Word(client, make(tmp_path / name)) for client in NAMES[:1]]
        first = words[0].conductor
        words += [Word(client, first) for client in NAMES[1:]]
        for word in words:
            word.say()
        talk(words)
        for train in (longer, falling) if make is fixed else (falling,):
            with pytest.raises(ConfigError, match="was planned with 4 steps of each client, not 6"):
                make(tmp_path / name, train)
    second = free(tmp_path / "free", longer)
    assert not second.server.sealed
    word = Word("a", second)
    word.steps, word.kept = STEPS, {max(second.numbers): STEPS}
    word.say("run")
    talk([word])
    assert word.steps == 6


@pytest.mark.parametrize("averages", [True, False])
def test_after_the_last_meeting_there_are_no_more_rounds(tmp_path: Path, averages: bool) -> None:
    """Nor is an average left out, or taken at another step."""
    changed = {"rounds": 3}, {"rounds": 1}, {"rounds": 4, "steps_per_round": 1}
    for meets, refused in ((BOTH, changed[:2] + changed[2:] * averages), (NEVER, changed[2:] * averages)):
        folder = tmp_path / str(meets.last)
        word = Word("a", free(folder, meets=meets, averages=averages))
        word.say()
        talk([word])
        assert isinstance(word.conductor, Free)
        word.conductor.close()
        for change in changed:
            train = TRAIN.model_copy(update=change)
            if change in refused:
                with pytest.raises(ConfigError, match=r"has held other meetings or averages .* no more rounds; set"):
                    free(folder, train, meets, averages)
            else:
                free(folder, train, meets, averages)
    if averages:  # a meeting that comes before them
        with pytest.raises(
            ConfigError, match=r"\(2 averages, one every 2 steps\) than the settings say now \(a meeting"
        ):
            free(tmp_path / "False", meets=BOTH, averages=True)


@pytest.mark.parametrize("rounds", [1, 3])
def test_before_the_last_meeting_there_may_be_more_rounds_or_fewer(tmp_path: Path, rounds: int) -> None:
    word = Word("a", free(tmp_path, meets=BOTH))
    word.say()
    talk([word], 3)  # it has met the first time, and goes on
    assert (word.met, word.heard[1].what) == (1, "meet")
    assert isinstance(word.conductor, Free)
    word.conductor.close()
    free(tmp_path, TRAIN.model_copy(update={"rounds": rounds}), BOTH)


def test_who_lost_all_of_it_does_not_train_the_shared_blocks_again() -> None:
    conductor = deterministic(None)
    begun(conductor, 30)
    conductor.gone("b")
    with pytest.raises(LinkError, match=r"client b comes with nothing, and has done \d steps in this run"):
        Word("b", conductor).say()
