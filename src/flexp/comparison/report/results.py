"""What a comparison found, method by method, as numbers: what all tables, figures and pages are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flexp.comparison import views
from flexp.comparison.statistics import Interval, interval, mean, paired, worst_decile
from flexp.errors import StorageError
from flexp.report import formats

SCHEMA = 1
TAKING_PART = "the clients that take part"
"""Over whom costs are means, in every table, figure and view: who is dropped spends nothing."""


@dataclass(frozen=True)
class Dropped:
    """Clients whose device cannot hold what a method trains: how many (fewest and most of any seed), and in bytes the
    memory that the neediest of them would need and the largest of their devices has (``None``: not known)."""

    fewest: int
    most: int
    clients: int
    need: float | None
    have: float | None = None

    def __str__(self) -> str:
        """``4 of 8 clients dropped: need 316 MB, have 268 MB``; empty when all take part."""
        if not self.most:
            return ""
        number = str(self.most) if self.fewest == self.most else f"{self.fewest}–{self.most}"
        number = f"all {self.clients}" if self.fewest == self.clients > 1 else f"{number} of {self.clients}"
        need = "" if self.need is None else f": need {formats.size(self.need)}"
        have = "" if self.need is None or self.have is None else f", have {formats.size(self.have)}"
        return f"{number} client{'' if self.clients == 1 else 's'} dropped{need}{have}"


@dataclass(frozen=True)
class Result:
    """One method over all of its seeds.

    Scores are those after the last round but for ``best``; ``worst`` is the worst decile of clients. ``difference`` is
    the paired one of the reference to this method, positive where the reference is better, ``None`` for the reference
    itself. Costs are means over seeds and over the clients that take part, ``memory`` the highest of any of them, in
    bytes and seconds.
    """

    name: str
    personal: Interval | None
    worst: Interval | None
    everybody: Interval | None
    loss: Interval | None
    best: Interval | None
    best_rounds: tuple[int, int] | None
    picked_on_test: bool
    difference: Interval | None
    bytes_up: float | None
    bytes_down: float | None
    client_seconds: float | None
    memory: float | None
    virtual_seconds: float | None
    dropped: Dropped
    is_reference: bool
    seeds: int

    @property
    def traffic(self) -> float | None:
        """Bytes up and down."""
        return None if self.bytes_up is None or self.bytes_down is None else self.bytes_up + self.bytes_down


@dataclass(frozen=True)
class Standing:
    """Where one method stood at the reference's budget: the score, after which rounds, the paired difference."""

    name: str
    score: Interval | None
    rounds: tuple[int, int] | None
    difference: Interval | None
    is_reference: bool


@dataclass(frozen=True)
class Majority:
    """What whoever always gives the most frequent answer scores on the test data, as in :class:`Result`."""

    personal: Interval | None
    worst: Interval | None
    everybody: Interval | None


def checked(comparison: Mapping[str, Any]) -> Mapping[str, Any]:
    """``comparison`` if it is of this schema; while no run is finished, its metric is called *score*.

    Raises:
        StorageError: it is of another schema.
    """
    found = comparison.get("schema")
    if found != SCHEMA:
        raise StorageError(
            f"comparison.json: has schema {found!r}, expected {SCHEMA}; "
            "use the version of FlexP that wrote it, or compare again"
        )
    if comparison.get("metric") is None:
        return {**comparison, "metric": "score", "higher_is_better": True}
    return comparison


def results(comparison: Mapping[str, Any]) -> list[Result]:
    """One result a method, the reference first, the others in the order of the comparison."""
    return [_result(comparison, method) for method in ordered(comparison)]


def majority(comparison: Mapping[str, Any]) -> Majority | None:
    """The majority's scores, on which all methods of a seed agree; ``None`` where there are no right answers."""
    runs = {int(run["seed"]): run for method in ordered(comparison) for run in method["runs"] if run.get("majority")}
    shares = [[list(run["majority"][side].values()) for run in runs.values()] for side in ("personal", "global")]
    own, everybody = shares
    if not any(own):
        return None
    worst = interval(worst_decile(values, higher_is_better=True) for values in own)
    return Majority(interval(map(mean, own)), worst, interval(map(mean, everybody)))


def tested(comparison: Mapping[str, Any]) -> tuple[int, int] | None:
    """The fewest and the most test examples of a client."""
    clients = [client for method in comparison["methods"] for run in method["runs"] for client in run["clients"]]
    return _range(client["test_examples"] for client in clients if client.get("test_examples") is not None)


def ordered(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The methods, the reference first."""
    return sorted(comparison["methods"], key=lambda method: method["name"] != comparison["reference"])


def standings(comparison: Mapping[str, Any], axis: views.Axis) -> list[Standing]:
    """One standing a method at equal bytes or equal time; empty when what the reference spent is not known."""
    reference, higher = str(comparison["reference"]), bool(comparison["higher_is_better"])
    if axis != "examples" and not any(views.budgets(comparison, axis).values()):
        return []
    reached = {method["name"]: views.view(comparison, method["name"], axis) for method in ordered(comparison)}
    scores = {name: {seed: place.score for seed, place in places.items()} for name, places in reached.items()}
    return [
        Standing(
            name=name,
            score=interval(scores[name].values()),
            rounds=_range(place.round for place in places.values()),
            difference=None if name == reference else paired(scores.get(reference, {}), scores[name], higher),
            is_reference=name == reference,
        )
        for name, places in reached.items()
    ]


def chosen(method: Mapping[str, Any], trial: Mapping[str, Any]) -> bool:
    """Whether ``trial`` tried the settings that ``method`` ran with."""
    settings = method["settings"]
    return all(key in settings and settings[key] == value for key, value in trial["settings"].items())


def settings_text(settings: Mapping[str, Any]) -> str:
    """``train.rounds = 6, train.personal.lr = 0.0002``."""
    return ", ".join(f"{key} = {_plain(value)}" for key, value in settings.items()) or "defaults"


def by_seed(method: Mapping[str, Any], score: Callable[[Mapping[str, Any]], float | None]) -> dict[int, float | None]:
    """``score`` of every run, by seed."""
    return {int(run["seed"]): score(run) for run in method["runs"]}


def _result(comparison: Mapping[str, Any], method: Mapping[str, Any]) -> Result:
    reference, higher = str(comparison["reference"]), bool(comparison["higher_is_better"])
    runs = method["runs"]

    def over_seeds(score: Callable[[Mapping[str, Any]], float | None]) -> Interval | None:
        return interval(by_seed(method, score).values())

    def best(run: Mapping[str, Any]) -> float | None:
        round = run["best_round"]
        return None if round is None else mean(views.side_scores(run, "personal", int(round)))

    def client_mean(key: str) -> Interval | None:
        return over_seeds(lambda run: mean(client.get(key) for client in participants(run)))

    def traffic(key: str) -> Interval | None:
        per_round = over_seeds(lambda run: run["rounds"][-1].get(key) if run["rounds"] else None)
        return client_mean(key) or per_round

    difference = None
    if method["name"] != reference:
        mine = {seed: place.score for seed, place in views.view(comparison, reference, "examples").items()}
        difference = paired(mine, by_seed(method, personal_score), higher)
    memory = [
        client["peak_memory_bytes"]
        for run in runs
        for client in participants(run)
        if client.get("peak_memory_bytes") is not None
    ]
    clock = over_seeds(lambda run: run["rounds"][-1].get("virtual_seconds") if run["rounds"] else None)
    return Result(
        name=str(method["name"]),
        personal=over_seeds(personal_score),
        worst=over_seeds(lambda run: worst_decile(views.side_scores(run, "personal"), higher)),
        everybody=over_seeds(lambda run: mean(views.side_scores(run, "global"))),
        loss=over_seeds(lambda run: mean(views.side_scores(run, "personal_loss"))),
        best=over_seeds(best),
        best_rounds=_range(int(run["best_round"]) for run in runs if run["best_round"] is not None),
        picked_on_test=any(run.get("picked_on") == "test" for run in runs),
        difference=difference,
        bytes_up=_middle(traffic("bytes_up")),
        bytes_down=_middle(traffic("bytes_down")),
        client_seconds=_middle(client_mean("client_seconds")),
        memory=max(memory, default=None),
        virtual_seconds=_middle(clock),
        dropped=_dropped(runs),
        is_reference=method["name"] == reference,
        seeds=len(runs),
    )


def personal_score(run: Mapping[str, Any]) -> float | None:
    """The mean over clients of the score on their own test data after the last round."""
    return mean(views.side_scores(run, "personal"))


def participants(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The clients that are not dropped."""
    return [client for client in run["clients"] if client["name"] not in run["dropped"]]


def _dropped(runs: Iterable[Mapping[str, Any]]) -> Dropped:
    given = list(runs)
    counts = [len(run["dropped"]) for run in given] or [0]
    clients = max((len(run["clients"]) for run in given), default=0)
    left_out = [client for run in given for client in run["clients"] if client["name"] in run["dropped"]]

    def largest(key: str) -> float | None:
        return max((client[key] for client in left_out if client.get(key) is not None), default=None)

    return Dropped(min(counts), max(counts), clients, largest("peak_memory_bytes"), largest("available_bytes"))


def _range(values: Iterable[int]) -> tuple[int, int] | None:
    given = list(values)
    return (min(given), max(given)) if given else None


def _middle(value: Interval | None) -> float | None:
    return None if value is None else value.mean


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
