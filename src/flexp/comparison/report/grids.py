"""The tables of a comparison as plain text cells, ready for the terminal, Markdown, LaTeX and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexp.comparison import views
from flexp.comparison.report.results import (
    TAKING_PART,
    Dropped,
    Result,
    Standing,
    chosen,
    ordered,
    results,
    settings_text,
    standings,
)
from flexp.comparison.statistics import Interval
from flexp.report import formats

MARK = "*"
"""Beside a difference whose interval excludes zero."""
DROPPED = "†"
"""Beside a method that some clients' devices cannot hold."""


@dataclass(frozen=True)
class Grid:
    """A table: the first column names the row, ``bold`` are the rows of the reference, ``text`` the columns that hold
    words rather than numbers."""

    key: str
    title: str
    caption: str
    headers: list[str]
    rows: list[list[str]]
    bold: frozenset[int] = frozenset()
    text: frozenset[int] = field(default=frozenset({0}))
    details: bool = False  # may be folded away


def grids(comparison: Mapping[str, Any]) -> list[Grid]:
    """Every table for which there is data, in the order of reading."""
    found = results(comparison)
    made = [
        _scores(comparison, found),
        _costs(comparison, found),
        _view(comparison, "bytes"),
        _view(comparison, "time"),
        _settings(comparison),
        _trials(comparison),
    ]
    return [grid for grid in made if grid is not None]


def scores_headers(comparison: Mapping[str, Any]) -> list[str]:
    metric = str(comparison["metric"]).capitalize()
    return [
        "Method",
        f"{metric}, own data",
        "Worst decile",
        f"{metric}, everybody's",
        "Loss, own data",
        "Best round, own data",
        _difference_header(comparison),
    ]


def score(value: Interval | None, metric: str, seeds: int) -> str:
    """``83.9 ± 1.2 %``; ``n`` is said where it is less than the comparison has seeds, and where it is one."""
    return formats.interval(*_parts(value), metric, _note(value, seeds))


def difference(value: Interval | None, metric: str, seeds: int) -> str:
    """``+1.2 ± 0.4*``: signed, marked when the interval excludes zero."""
    text = formats.difference(*_parts(value), metric, _note(value, seeds))
    return text + MARK if value is not None and value.excludes_zero else text


def marked(result: Result) -> str:
    """The method's name, with a mark when clients are dropped."""
    return result.name + (f" {DROPPED}" if result.dropped.most else "")


def dropped_lines(found: list[Result]) -> list[str]:
    """Which methods some devices cannot hold: one sentence for those that lose as many clients."""
    methods: dict[str, list[str]] = {}
    for result in found:
        if result.dropped.most:
            methods.setdefault(str(result.dropped), []).append(result.name)
    return [f"{', '.join(names)}: {dropped}." for dropped, names in methods.items()]


def missing_line(comparison: Mapping[str, Any], found: list[Result]) -> str:
    """Which methods lack runs, whose means are over the others; empty if none does."""
    names = [result.name for result in found if result.seeds < len(comparison["seeds"])]
    if not names:
        return ""
    return f"Runs are missing of: {', '.join(names)}. Their means are over the other runs, which may flatter them."


def reading(comparison: Mapping[str, Any]) -> str:
    """How the scores are to be read, in one paragraph."""
    seeds, reference = len(comparison["seeds"]), comparison["reference"]
    worst = "lowest" if comparison["higher_is_better"] else "highest"
    better = "Higher is better" if comparison["higher_is_better"] else "Lower is better"
    sign = (
        "" if comparison["higher_is_better"] else f" (the sign is turned, as a lower {comparison['metric']} is better)"
    )
    return (
        f"After the last round, on test data: the mean over clients, then over {seeds} seed{'' if seeds == 1 else 's'} "
        f"± 95 % confidence interval (Student's t). {better}. Worst decile: the {worst} 10 % of clients, at least one. "
        f"Differences are paired by seed and positive where {reference} is better{sign}; "
        f"{MARK} marks those whose interval excludes zero."
    )


def _scores(comparison: Mapping[str, Any], found: list[Result]) -> Grid:
    metric, seeds = str(comparison["metric"]), len(comparison["seeds"])
    rows = [
        [
            marked(result),
            score(result.personal, metric, seeds),
            score(result.worst, metric, seeds),
            score(result.everybody, metric, seeds),
            score(result.loss, "loss", seeds),
            _with_rounds(score(result.best, metric, seeds), result.best_rounds),
            "reference" if result.is_reference else difference(result.difference, metric, seeds),
        ]
        for result in found
    ]
    caption = reading(comparison)
    if any(result.picked_on_test for result in found):
        caption += " Best rounds are picked by looking at the test data, hence optimistic."
    else:
        caption += " Best rounds are picked on validation data."
    if missing := missing_line(comparison, found):
        caption += f" {missing}"
    if any(result.dropped.most for result in found):
        caption += (
            f" {DROPPED} Some clients' devices cannot hold this method: they take no part in its training and are "
            "scored with what they have all the same; without any client there is no score. "
            + " ".join(dropped_lines(found))
        )
    return Grid("scores", "Scores", caption, scores_headers(comparison), rows, _references(found))


def _costs(comparison: Mapping[str, Any], found: list[Result]) -> Grid:
    clock = any(result.virtual_seconds is not None for result in found)
    rows = []
    for result in found:
        time = [formats.seconds(result.virtual_seconds)] if clock else []
        rows.append(
            [
                marked(result),
                formats.size(result.bytes_up),
                formats.size(result.bytes_down),
                formats.seconds(result.client_seconds),
                formats.size(result.memory),
                *time,
                str(result.dropped).replace(" clients", "").replace(" client", "") or "all take part",
            ]
        )
    headers = ["Method", "Up per client", "Down per client", "Client compute", "Peak memory"]
    headers += ["Virtual time"] if clock else []
    caption = (
        f"Of the whole training, means over seeds and over {TAKING_PART}; peak memory is the highest of "
        "any of them. Client compute was measured on the machine that ran the comparison."
    )
    if clock:
        caption += (
            " Virtual time is when the last round would have ended on the clients' devices, the adaptation of personal "
            "models included."
        )
    return Grid(
        "costs",
        "Costs",
        caption,
        [*headers, "Clients"],
        rows,
        _references(found),
        frozenset({0, len(headers)}),
    )


def _view(comparison: Mapping[str, Any], axis: views.Axis) -> Grid | None:
    found = standings(comparison, axis)
    if not found:
        return None
    metric, seeds = str(comparison["metric"]), len(comparison["seeds"])
    spent = list(views.budgets(comparison, axis).values())
    middle = sum(spent) / len(spent)
    clock = views.has_clock(comparison)
    shown = formats.size(middle) if axis == "bytes" else formats.seconds(middle)
    measure = {
        "bytes": f"sent and received, mean over {TAKING_PART} and over seeds",
        "time": "on the virtual clock, mean over seeds"
        if clock
        else f"of computing, mean over {TAKING_PART} and over seeds",
    }[axis]
    rows = [
        [
            standing.name,
            score(standing.score, metric, seeds),
            _rounds(standing.rounds),
            "reference" if standing.is_reference else difference(standing.difference, metric, seeds),
        ]
        for standing in found
    ]
    caption = (
        f"Own test data after the last evaluated round within what {comparison['reference']} spent: {shown} {measure} "
        "(each seed has its own budget). Round 0 is before training."
    )
    headers = ["Method", f"{metric.capitalize()}, own data", "After round", _difference_header(comparison)]
    bold = frozenset(index for index, standing in enumerate(found) if standing.is_reference)
    return Grid(f"equal-{axis}", f"At equal {axis}", caption, headers, rows, bold)


def _settings(comparison: Mapping[str, Any]) -> Grid:
    metric = str(comparison["metric"])
    rows, bold = [], set()
    for index, method in enumerate(ordered(comparison)):
        trials = method["trials"]
        values = [trial["validation"] for trial in trials if chosen(method, trial)]
        rows.append(
            [
                str(method["name"]),
                str(method["method"]),
                settings_text(method["settings"]),
                str(len(trials)) if trials else "not tuned",
                formats.score(values[0] if values else None, metric),
            ]
        )
        if method["name"] == comparison["reference"]:
            bold.add(index)
    headers = ["Method", "Kind", "Settings", "Trials", "Validation score"]
    caption = "What each method ran with: chosen on validation data where it was tuned, else as given."
    tuning = comparison.get("tuning") or {}
    if tuning.get("measure"):
        seeds = list(tuning.get("seeds") or [])
        which = f" (seed{'' if len(seeds) == 1 else 's'} {', '.join(str(seed) for seed in seeds)})" if seeds else ""
        caption += f" Chosen by: {tuning['measure']}{which}."
    return Grid("settings", "Settings", caption, headers, rows, frozenset(bold), frozenset({0, 1, 2}))


def _trials(comparison: Mapping[str, Any]) -> Grid | None:
    metric = str(comparison["metric"])
    rows = [
        [
            str(method["name"]),
            settings_text(trial["settings"]),
            formats.score(trial["validation"], metric),
            "chosen" if chosen(method, trial) else "",
        ]
        for method in ordered(comparison)
        for trial in method["trials"]
    ]
    if not rows:
        return None
    headers = ["Method", "Settings tried", "Validation score", "Chosen"]
    bold = frozenset(index for index, row in enumerate(rows) if row[-1])
    caption = "Everything that was tried, on validation data only."
    return Grid("trials", "Trials", caption, headers, rows, bold, frozenset({0, 1, 3}), details=True)


def _difference_header(comparison: Mapping[str, Any]) -> str:
    unit = " (points)" if formats.is_fraction(str(comparison["metric"])) else ""
    return f"{comparison['reference']} better by{unit}"


def _parts(value: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if value is None else (value.mean, value.half)


def _note(value: Interval | None, seeds: int) -> str:
    return f"n = {value.n}" if value is not None and (value.n == 1 or value.n < seeds) else ""


def _with_rounds(text: str, rounds: tuple[int, int] | None) -> str:
    return text if rounds is None or text == formats.MISSING else f"{text}, round {_rounds(rounds)}"


def _rounds(rounds: tuple[int, int] | None) -> str:
    if rounds is None:
        return formats.MISSING
    return str(rounds[0]) if rounds[0] == rounds[1] else f"{rounds[0]}–{rounds[1]}"


def _references(found: list[Result]) -> frozenset[int]:
    return frozenset(index for index, result in enumerate(found) if result.is_reference)


__all__ = ["DROPPED", "MARK", "Dropped", "Grid", "Standing", "difference", "dropped_lines", "grids", "marked", "score"]
