"""The tables of a comparison: all that its page and files show, and the short one for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table as RichTable

from flexp.comparison import views
from flexp.comparison.report.results import (
    TAKING_PART,
    Result,
    Standing,
    checked,
    chosen,
    majority,
    ordered,
    results,
    settings_text,
    standings,
    tested,
)
from flexp.comparison.statistics import Interval
from flexp.report import formats
from flexp.report.tables import DROPPED, Table

MARK = "*"
"""Beside a difference whose interval excludes zero."""
MAJORITY = "majority"
"""The row of whoever always gives the most frequent answer."""


def tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Every table for which there is data, in the order of reading."""
    found = results(comparison)
    made = [
        _scores(comparison, found),
        _costs(found),
        _view(comparison, "bytes"),
        _view(comparison, "time"),
        _settings(comparison),
        _trials(comparison),
    ]
    return [table for table in made if table is not None]


def terminal_table(comparison: Mapping[str, Any]) -> RichTable:
    """The scores and the main costs, about 80 columns wide when names are short; units stand in the titles."""
    comparison = checked(comparison)
    metric, found = str(comparison["metric"]), results(comparison)
    clock = any(result.virtual_seconds is not None for result in found)
    notes = [
        f"Mean over {formats.plural(len(comparison['seeds']), 'seed')} ± 95 % interval. Lead: by how much "
        f"{comparison['reference']} is better (−: worse), paired; {MARK} excludes 0.",
        *filter(None, (missing_line(comparison, found), diverged_line(comparison))),
        *(f"{DROPPED} {line}" for line in dropped_lines(found)),
    ]
    rows = [
        [
            _marked(result),
            score(result.personal, metric),
            formats.score(None if result.worst is None else result.worst.mean, metric),
            score(result.everybody, metric),
            "" if result.is_reference else difference(result.difference, metric),
            formats.size(result.traffic),
            formats.size(result.memory),
            *([formats.seconds(result.virtual_seconds)] if clock else []),
        ]
        for result in found
    ]
    if beside := majority(comparison):
        middle = formats.score(None if beside.worst is None else beside.worst.mean, metric)
        shown = [MAJORITY, score(beside.personal, metric), middle, score(beside.everybody, metric)]
        rows.append(shown + [""] * (len(rows[0]) - len(shown)))
    title = f"{comparison['name']}: {formats.inside(metric)} after the last round, on test data"
    unit = " %" if formats.is_fraction(metric) else ""
    headers = ["Method", f"Own\ndata{unit}", f"Worst\ndecile{unit}", f"Every-\nbody's{unit}", "Lead", "Up and\ndown"]
    headers += ["Peak\nmemory", *(["Virtual\ntime"] if clock else [])]
    return Table("short", title, "\n".join(notes), headers, rows, _references(found)).terminal(headers)


def score(value: Interval | None, metric: str, seeds: int = 0) -> str:
    """``83.9 ± 1.2 %``; ``n`` is said where it is less than ``seeds``, and where it is one."""
    return formats.interval(*_parts(value), metric, _note(value, seeds))


def difference(value: Interval | None, metric: str, seeds: int = 0) -> str:
    """``+1.2 ± 0.4*``: signed, marked when the interval excludes zero."""
    text = formats.difference(*_parts(value), metric, _note(value, seeds))
    return text + MARK if value is not None and value.excludes_zero else text


def lead(reference: str, value: Interval | None, metric: str, seeds: int) -> str:
    """``flexp-sfl leads by 1.2 ± 0.4 points, paired``, or trails."""
    if value is None:
        return f"not comparable with {reference}"
    size = formats.difference(abs(value.mean), value.half, metric, _note(value, seeds)).lstrip("+")
    unit = " points" if formats.is_fraction(metric) else ""
    chance = "" if value.excludes_zero else "; may be chance"
    return f"{reference} {'trails' if value.mean < 0 else 'leads'} by {size}{unit}, paired{chance}"


def dropped_lines(found: Iterable[Result]) -> list[str]:
    """Which methods some devices cannot hold: one sentence for those that lose as many clients."""
    methods: dict[str, list[str]] = {}
    for result in found:
        if result.dropped.most:
            methods.setdefault(str(result.dropped), []).append(result.name)
    return [f"{', '.join(names)}: {dropped}." for dropped, names in methods.items()]


def missing_line(comparison: Mapping[str, Any], found: Iterable[Result]) -> str:
    """Which methods lack runs: all of them, or some, so that their means are over the others; empty if none does."""
    given = list(found)
    none = [result.name for result in given if not result.seeds]
    some = [result.name for result in given if 0 < result.seeds < len(comparison["seeds"])]
    lines = [f"No run is finished of: {', '.join(none)}."] if none else []
    if some:
        lines.append(
            f"Runs are missing of: {', '.join(some)}. Their means are over the other runs, which may flatter them."
        )
    return " ".join(lines)


def diverged_line(comparison: Mapping[str, Any]) -> str:
    """Which methods ended with models that do not answer with finite numbers, so that they have no score; empty if none
    did."""
    found = {
        str(method["name"]): [str(run["seed"]) for run in method["runs"] if run.get("not_finite")]
        for method in ordered(comparison)
    }
    named = [
        f"{name} (seed{'' if len(seeds) == 1 else 's'} {', '.join(seeds)})" for name, seeds in found.items() if seeds
    ]
    if not named:
        return ""
    return (
        f"Diverged, so that scores after the last round are missing: {', '.join(named)}. There some client's model "
        "answers with numbers that are not finite."
    )


def _reading(comparison: Mapping[str, Any]) -> str:
    """How the scores are to be read, in one paragraph."""
    higher, reference = comparison["higher_is_better"], comparison["reference"]
    turned = "" if higher else f" (the sign is turned, as a lower {comparison['metric']} is better)"
    return (
        "After the last round, on test data: the mean over clients, then over "
        f"{formats.plural(len(comparison['seeds']), 'seed')} ± 95 % confidence interval (Student's t). "
        f"{'Higher' if higher else 'Lower'} is better. Worst decile: the {'lowest' if higher else 'highest'} 10 % of "
        f"clients, at least one. The lead of {reference} is paired by seed, and positive where {reference} is "
        f"better{turned}; {MARK} marks those whose interval excludes zero."
    )


def _scores(comparison: Mapping[str, Any], found: list[Result]) -> Table:
    metric, seeds = str(comparison["metric"]), len(comparison["seeds"])
    rows = [
        [
            _marked(result),
            score(result.personal, metric, seeds),
            score(result.worst, metric, seeds),
            score(result.everybody, metric, seeds),
            score(result.loss, "loss", seeds),
            _with_rounds(score(result.best, metric, seeds), result.best_rounds),
            "reference" if result.is_reference else difference(result.difference, metric, seeds),
        ]
        for result in found
    ]
    caption = _reading(comparison)
    if beside := majority(comparison):
        shares = [score(share, metric, seeds) for share in (beside.personal, beside.worst, beside.everybody)]
        rows.append([MAJORITY, *shares, "", "", ""])
        caption += f" {MAJORITY.capitalize()}: always the most frequent answer of the test data."
    if counts := tested(comparison):
        caption += f" A client has {_rounds(counts)} test examples."
    if any(result.picked_on_test for result in found):
        caption += " Best rounds are picked by looking at the test data, hence optimistic."
    else:
        caption += " Best rounds are picked on validation data."
    for line in filter(None, (missing_line(comparison, found), diverged_line(comparison))):
        caption += f" {line}"
    if any(result.dropped.most for result in found):
        caption += (
            f" {DROPPED} Some clients' devices cannot hold this method: they take no part in its training and are "
            "scored with what they have all the same; without any client there is no score. "
            + " ".join(dropped_lines(found))
        )
    name = formats.name(metric)
    headers = ["Method", f"{name}, own data", "Worst decile", f"{name}, everybody's", "Loss, own data"]
    headers += ["Best round, own data", _lead_header(comparison)]
    return Table("scores", "Scores", caption, headers, rows, _references(found))


def _costs(found: Sequence[Result]) -> Table:
    clock = any(result.virtual_seconds is not None for result in found)
    rows = []
    for result in found:
        time = [formats.seconds(result.virtual_seconds)] if clock else []
        rows.append(
            [
                _marked(result),
                formats.size(result.bytes_up),
                formats.size(result.bytes_down),
                formats.seconds(result.client_seconds),
                formats.size(result.memory),
                *time,
                str(result.dropped).replace(" clients", "").replace(" client", "")
                or ("all take part" if result.seeds else "–"),
            ]
        )
    headers = ["Method", "Up per client", "Down per client", "Client compute", "Peak memory"]
    headers += [*(["Virtual time"] if clock else []), "Clients"]
    caption = (
        f"Of the whole training, means over seeds and over {TAKING_PART}; peak memory is the highest of "
        "any of them. Client compute was measured on the machine that ran the comparison."
    )
    if clock:
        caption += (
            " Virtual time is when the last round would have ended on the clients' devices, the adaptation of personal "
            "models included."
        )
    return Table("costs", "Costs", caption, headers, rows, _references(found), (0, len(headers) - 1))


def _view(comparison: Mapping[str, Any], axis: views.Axis) -> Table | None:
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
    if line := diverged_line(comparison):
        caption += f" {line}"
    headers = ["Method", f"{formats.name(metric)}, own data", "After round", _lead_header(comparison)]
    return Table(f"equal-{axis}", f"At equal {axis}", caption, headers, rows, _references(found))


def _settings(comparison: Mapping[str, Any]) -> Table:
    metric, methods = str(comparison["metric"]), ordered(comparison)
    rows = [
        [
            str(method["name"]),
            str(method["method"]),
            settings_text(method["settings"]),
            str(len(method["trials"])) if method["trials"] else "not tuned",
            formats.score(next((t["validation"] for t in method["trials"] if chosen(method, t)), None), metric),
        ]
        for method in methods
    ]
    bold = [index for index, method in enumerate(methods) if method["name"] == comparison["reference"]]
    headers = ["Method", "Kind", "Settings", "Trials", "Validation score"]
    caption = "What each method ran with: chosen on validation data where it was tuned, else as given."
    tuning = comparison.get("tuning") or {}
    if tuning.get("measure"):
        seeds = list(tuning.get("seeds") or [])
        which = f" (seed{'' if len(seeds) == 1 else 's'} {', '.join(str(seed) for seed in seeds)})" if seeds else ""
        caption += f" Chosen by: {tuning['measure']}{which}."
    return Table("settings", "Settings", caption, headers, rows, bold, (0, 1, 2))


def _trials(comparison: Mapping[str, Any]) -> Table | None:
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
    bold = [index for index, row in enumerate(rows) if row[-1]]
    caption = "Everything that was tried, on validation data only."
    return Table("trials", "Trials", caption, headers, rows, bold, (0, 1, 3), details=True)


def _marked(result: Result) -> str:
    return result.name + (f" {DROPPED}" if result.dropped.most else "")


def _lead_header(comparison: Mapping[str, Any]) -> str:
    unit = " (points)" if formats.is_fraction(str(comparison["metric"])) else ""
    return f"Lead of {comparison['reference']}{unit}"


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


def _references(found: Sequence[Result | Standing]) -> list[int]:
    return [index for index, result in enumerate(found) if result.is_reference]
