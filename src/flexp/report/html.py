"""A run's report: one HTML file that holds everything it needs, works offline and loads nothing from
anywhere.

The page is a pure function of the run folder: equal folders give equal pages. Whatever comes from the run
(names, configuration, versions) is escaped (``page.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flexp.errors import StorageError
from flexp.files import read_json, write_text
from flexp.report import formats, metrics, page, plots, tables
from flexp.report.metrics import Record
from flexp.report.summary import SCHEMA

FILE = "report.html"
NARROW = ("traffic", "time")
"""Plots that share a row on a wide screen."""


def write_report(run_dir: Path) -> Path:
    """Build ``report.html`` from a run folder alone and return its path.

    Needs ``summary.json``; ``metrics.jsonl`` and ``config.json`` are used where they exist.

    Raises:
        StorageError: the folder holds no readable summary of this version, or the page cannot be written.
    """
    run_dir = Path(run_dir)
    source = run_dir / "summary.json"
    if not source.is_file():
        raise StorageError(f"{run_dir}: has no summary.json; expected the folder of a run that has been evaluated")
    summary = read_json(source)
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        found = summary.get("schema") if isinstance(summary, dict) else None
        raise StorageError(
            f"{source}: has schema {found!r}, expected {SCHEMA}; "
            "use the version of FlexP that wrote it, or run it again"
        )
    diary, config = run_dir / "metrics.jsonl", run_dir / "config.json"
    records = metrics.read(diary) if diary.is_file() else []
    resolved = read_json(config) if config.is_file() else None
    try:
        text = render(summary, records, resolved)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StorageError(
            f"{run_dir}: summary.json or metrics.jsonl is not as FlexP writes it "
            f"({type(error).__name__}: {error}); restore them, or run again"
        ) from error
    target = run_dir / FILE
    write_text(target, text)
    return target


def render(summary: Mapping[str, Any], records: Sequence[Record], config: Any | None) -> str:
    """The whole page as text, about 5 MB of which nearly all is plotly.js."""
    body = "".join(
        (
            _head(summary),
            _cards(summary),
            _table(summary),
            page.plots(plots.all_plots(summary, records), NARROW),
            _notes(summary),
            page.machine(summary["machine"], summary["versions"]),
            page.config(config),
        )
    )
    return page.document(str(summary["name"]), body, "the run folder", str(summary["versions"].get("flexp", "")))


def _head(summary: Mapping[str, Any]) -> str:
    model, clients = summary["model"], summary["clients"]
    facts = [
        f"method {summary['method']}",
        f"model {model['id']} ({model['blocks']} blocks, {formats.count(model['parameters'])} parameters)",
        f"{model['tuning']} tuning in {model['dtype']}",
        f"{len(clients)} client{'' if len(clients) == 1 else 's'}",
        f"{summary['rounds']} round{'' if summary['rounds'] == 1 else 's'}",
        f"seed {summary['seed']}",
    ]
    warning = ""
    if not summary["finished"]:
        warning = (
            "<strong>This run is not finished.</strong> The page shows what was recorded until its last evaluation."
        )
    return page.head(str(summary["name"]), facts, warning)


def _cards(summary: Mapping[str, Any]) -> str:
    metric, scores, totals = str(summary["metric"]), summary["scores"], summary["totals"]
    before, last = scores["before"], scores["last"]
    cards = [
        _score_card(f"Mean {metric}, own test data", before, last, "personal_mean", summary),
        _score_card("Worst client, own test data", before, last, "personal_worst", summary),
        _score_card("Mean, everybody's test data", before, last, "global_mean", summary),
    ]
    sent, received = totals.get("bytes_up"), totals.get("bytes_down")
    if sent or received:
        detail = f"{formats.size(sent)} up, {formats.size(received)} down, all clients"
        cards.append(page.card("Traffic of training", formats.size((sent or 0) + (received or 0)), detail))
    largest = max((client["personal_parameters"] for client in summary["clients"]), default=0)
    share = 100 * largest / summary["model"]["parameters"] if summary["model"]["parameters"] else 0
    detail = f"of {formats.count(summary['model']['parameters'])} ({share:.2g} %), largest client"
    cards.append(page.card("Personal parameters", formats.count(largest), detail))
    memory = [client["peak_memory_bytes"] for client in summary["clients"] if client.get("peak_memory_bytes")]
    if memory:
        detail = "highest of any client; lowest " + formats.size(min(memory))
        cards.append(page.card("Peak memory on a client", formats.size(max(memory)), detail))
    if totals.get("seconds") is not None:
        updates = summary["server"].get("updates")
        detail = "whole run" if updates is None else f"whole run, {formats.count(updates)} server updates"
        cards.append(page.card("Time", formats.seconds(totals["seconds"]), detail))
    return page.cards(cards)


def _score_card(
    label: str, before: Mapping[str, Any], last: Mapping[str, Any], key: str, summary: Mapping[str, Any]
) -> str:
    metric = str(summary["metric"])
    if before[key] is None:
        return page.card(label, formats.score(last[key], metric), "after the last round")
    points = " points" if formats.is_fraction(metric) else ""
    difference = formats.change(before[key], last[key], metric)
    detail = f"{difference}{points}, from {formats.score(before[key], metric)} before training"
    return page.card(label, formats.score(last[key], metric), detail)


def _table(summary: Mapping[str, Any]) -> str:
    metric, higher = str(summary["metric"]), bool(summary["higher_is_better"])
    lines = []
    for row in tables.rows(summary):
        cells = [escape(cell) for cell in row.cells(metric)]
        for place, scores in ((3, row.personal), (4, row.everybody)):
            cells[place] += _delta(scores, metric, higher)
        lines.append((cells, "total" if row.total else ""))
    unit = "in points" if formats.is_fraction(metric) else "of the score"
    worst = "lowest" if higher else "highest"
    caption = (
        f"{metric.capitalize()} before → after training (change {unit}). "
        f"Worst: the {worst} score, the fewest examples and the highest cost of any client."
    )
    return page.section("Clients", caption, page.table(tables.headers(metric), lines))


def _delta(scores: tables.Pair, metric: str, higher: bool) -> str:
    before, after = scores
    if before is None or after is None:
        return ""
    text = formats.change(before, after, metric)
    kind = "same" if text == "±0" else "up" if (after > before) == higher else "down"
    return f'<span class="delta {kind}">{escape(text)}</span>'


def _notes(summary: Mapping[str, Any]) -> str:
    metric, scores, totals = str(summary["metric"]), summary["scores"], summary["totals"]
    last, best = scores["last"], scores["best"]

    def both(means: Mapping[str, Any]) -> str:
        own, everybody = means["personal_mean"], means["global_mean"]
        return f"{formats.score(own, metric)} own, {formats.score(everybody, metric)} everybody's"

    notes = [
        "Scores are those after the last round. A personal model is a client's own head and tail around the "
        "server's shared blocks; own test data is that client's, everybody's that of all clients together.",
        "Means count every client the same, whatever its number of examples.",
    ]
    if best.get("round") is not None and best["personal_mean"] is not None:
        if scores.get("picked_on") == "validation":
            notes.append(
                f"The best round on validation data was round {best['round']}: {both(best)} on test data (last round: "
                f"{both(last)}). Its checkpoint is kept."
            )
        elif best["personal_mean"] == last["personal_mean"]:
            notes.append("The last round was also the best one on own test data.")
        else:
            notes.append(
                f"The best round on own test data was round {best['round']}: {both(best)} (last round: "
                f"{both(last)}). It is picked by looking at the test data, hence optimistic."
            )
    tests = [client["test_examples"] for client in summary["clients"]]
    if tests and formats.is_fraction(metric):
        widest = 50 / max(min(tests), 1) ** 0.5
        notes.append(
            f"The smallest client has {min(tests)} test examples: the standard error of its score is up to "
            f"{widest:.1f} points. One run is one seed; compare methods over several."
        )
    if totals.get("eval_bytes_up") or totals.get("eval_bytes_down"):
        notes.append(
            f"Evaluation sent a further {formats.size(totals.get('eval_bytes_up'))} up and "
            f"{formats.size(totals.get('eval_bytes_down'))} down, not counted in the traffic of training."
        )
    if all(client.get("peak_memory_bytes") is None for client in summary["clients"]):
        notes.append("Peak memory was not measured.")
    return page.notes(notes)
