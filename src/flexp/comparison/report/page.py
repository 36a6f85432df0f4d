"""A comparison's page: one HTML file, a pure function of ``comparison.json``; whatever comes from there is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from flexp.comparison.report import curves, dots
from flexp.comparison.report.grids import Grid, difference, dropped_lines, grids, missing_line, score
from flexp.comparison.report.results import Result, results
from flexp.report import formats, page
from flexp.report.figures import Plot


def render(comparison: Mapping[str, Any]) -> str:
    """The whole page as text."""
    found = results(comparison)
    tables = {grid.key: grid for grid in grids(comparison)}
    plots = {plot.key: plot for plot in all_plots(comparison)}

    def drawn(*keys: str) -> str:
        return page.plots(plots[key] for key in keys if key in plots)

    def shown(*keys: str) -> str:
        return "".join(_grid(tables[key]) for key in keys if key in tables)

    body = "".join(
        (
            _head(comparison, found),
            page.cards(_cards(comparison, found)),
            shown("scores"),
            drawn("differences"),
            shown("costs"),
            drawn("learning-personal", "learning-global"),
            drawn("against-bytes"),
            shown("equal-bytes"),
            drawn("against-time"),
            shown("equal-time"),
            drawn("against-memory", "clients"),
            shown("settings"),
            drawn("trials"),
            shown("trials"),
            page.notes(_notes(comparison)),
            page.machine(comparison["machine"], comparison["versions"]),
            page.config(comparison.get("config"), "Resolved configuration that all methods start from"),
        )
    )
    version = str(comparison["versions"].get("flexp", ""))
    return page.document(str(comparison["name"]), body, "comparison.json", version, "comparison")


def all_plots(comparison: Mapping[str, Any]) -> list[Plot]:
    """Every figure for which there is data."""
    made = (
        dots.differences(comparison),
        curves.learning(comparison, "personal"),
        curves.learning(comparison, "global"),
        curves.against_cost(comparison, "bytes"),
        curves.against_cost(comparison, "time"),
        curves.against_memory(comparison),
        dots.clients(comparison),
        dots.trials(comparison),
    )
    return [plot for plot in made if plot is not None]


def _head(comparison: Mapping[str, Any], found: list[Result]) -> str:
    model, seeds = comparison["model"], comparison["seeds"]
    number = max((result.dropped.clients for result in found), default=0)
    model_facts = []
    if model.get("id") is not None:  # known as soon as one run is finished
        size = f"{model['blocks']} blocks, {formats.count(model['parameters'])} parameters"
        model_facts = [f"model {model['id']} ({size})", f"{model['tuning']} tuning in {model['dtype']}"]
    facts = [
        f"{len(found)} method{'' if len(found) == 1 else 's'}",
        f"reference {comparison['reference']}",
        *model_facts,
        f"{number} client{'' if number == 1 else 's'}",
        f"seed{'' if len(seeds) == 1 else 's'} {', '.join(str(seed) for seed in seeds)}",
    ]
    warnings = [escape(line) for line in dropped_lines(found)]
    if missing := missing_line(comparison, found):
        warnings.insert(0, f"<strong>This comparison is not finished.</strong> {escape(missing)}")
    return page.head(str(comparison["name"]), facts, "<br>".join(warnings), "comparison")


def _cards(comparison: Mapping[str, Any], found: list[Result]) -> list[str]:
    metric, seeds = str(comparison["metric"]), len(comparison["seeds"])
    reference = next((result for result in found if result.is_reference), None)
    if reference is None:
        return []
    others = [result for result in found if not result.is_reference and result.personal is not None]
    sign = 1.0 if comparison["higher_is_better"] else -1.0
    best = max(others, key=lambda result: sign * result.personal.mean if result.personal else 0.0, default=None)
    label = f"{metric.capitalize()}, own test data"
    made = [page.card(reference.name, score(reference.personal, metric, seeds), label)]
    if best is not None:
        ahead = difference(best.difference, metric, seeds)
        unit = " points" if formats.is_fraction(metric) else ""
        sure = best.difference is not None and best.difference.excludes_zero
        detail = f"{reference.name} better by {ahead}{unit}, paired" + ("" if sure else "; may be chance")
        made.append(page.card(f"Best other: {best.name}", score(best.personal, metric, seeds), detail))
    for title, values in (
        ("Peak memory on a client", [result.memory for result in (reference, *others)]),
        ("Sent and received by a client", [_traffic(result) for result in (reference, *others)]),
    ):
        if values[0] is not None:
            known = sorted({value for value in values[1:] if value is not None})
            ends = dict.fromkeys(formats.size(value) for value in (known[:1] + known[-1:]))
            detail = reference.name + (f"; others {' to '.join(ends)}" if ends else "")
            made.append(page.card(title, formats.size(values[0]), detail))
    return made


def _traffic(result: Result) -> float | None:
    if result.bytes_up is None or result.bytes_down is None:
        return None
    return result.bytes_up + result.bytes_down


def _grid(grid: Grid) -> str:
    rows = [
        ([escape(cell) for cell in row], "total" if index in grid.bold else "") for index, row in enumerate(grid.rows)
    ]
    table = page.table(grid.headers, rows, grid.text)
    if grid.details:
        return page.folded(grid.title, f'<p class="caption">{escape(grid.caption)}</p>\n{table}')
    return page.section(grid.title, grid.caption, table)


def _notes(comparison: Mapping[str, Any]) -> Iterable[str]:
    yield (
        "All methods of one seed have the same clients, private examples and test data; a client that takes part in a "
        "method's training computes on as many examples as in every other's."
    )
    yield (
        "Means count every client the same. Intervals are over seeds: they say nothing about other data sets, models "
        "or numbers of clients."
    )
    yield "With many methods a few differences exclude zero by chance: intervals are not corrected for their number."
    if all(
        client.get("peak_memory_bytes") is None
        for method in comparison["methods"]
        for run in method["runs"]
        for client in run["clients"]
    ):
        yield "Peak memory was not measured."
