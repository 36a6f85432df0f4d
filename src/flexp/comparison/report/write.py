"""The files of a comparison's report: tables for papers, CSV for programs (plain numbers in base units, one line a
method, or one a client and run), and one HTML page.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexp.comparison import views
from flexp.comparison.report import curves, dots
from flexp.comparison.report.results import Result, checked, ordered, results, settings_text, standings
from flexp.comparison.report.tables import diverged_line, dropped_lines, lead, missing_line, score, tables
from flexp.comparison.statistics import Interval
from flexp.errors import StorageError
from flexp.files import write_text
from flexp.report import formats, pages
from flexp.report.figures import Plot
from flexp.report.tables import Table

TABLE_MD, TABLE_CSV, TABLE_TEX = "table.md", "table.csv", "table.tex"
CLIENTS_CSV, PAGE = "clients.csv", "comparison.html"
PAGES = (TABLE_MD, TABLE_CSV, TABLE_TEX, CLIENTS_CSV, PAGE)


def write_all(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``table.tex``, ``clients.csv`` and ``comparison.html`` into ``folder``.

    Args:
        comparison: the contents of ``comparison.json``, schema 1.

    Returns:
        The paths, in that order.

    Raises:
        StorageError: ``comparison`` is not of that schema, or a file cannot be written. All is made before anything
            is written, so that files never disagree with one another because of a mistake in the data.
    """
    comparison = checked(comparison)
    try:
        made, name = tables(comparison), str(comparison["name"])
        texts = {
            TABLE_MD: pages.markdown(name, made),
            TABLE_CSV: methods_csv(comparison),
            TABLE_TEX: pages.latex(name, made),
            CLIENTS_CSV: clients_csv(comparison),
            PAGE: _page(comparison, made),
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StorageError(
            f"comparison.json is not as FlexP writes it ({type(error).__name__}: {error}); restore it, or compare again"
        ) from error
    for file, text in texts.items():
        write_text(folder / file, text)
    return [folder / file for file in texts]


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


def _page(comparison: Mapping[str, Any], made: Sequence[Table]) -> str:
    """A pure function of ``comparison.json``."""
    found, model, seeds = results(comparison), comparison["model"], comparison["seeds"]
    model_facts = []
    if model.get("id") is not None:  # known as soon as one run is finished
        size = f"{model['blocks']} blocks, {formats.count(model['parameters'])} parameters"
        model_facts = [f"model {model['id']} ({size})", f"{model['tuning']} tuning in {model['dtype']}"]
    missing = missing_line(comparison, found)
    return pages.page(
        "comparison.html.j2",
        "flexp.comparison.report",
        kind="comparison",
        name=comparison["name"],
        facts=[
            formats.plural(len(found), "method"),
            f"reference {comparison['reference']}",
            *model_facts,
            formats.plural(max((result.dropped.clients for result in found), default=0), "client"),
            f"seed{'' if len(seeds) == 1 else 's'} {', '.join(str(seed) for seed in seeds)}",
        ],
        warnings=[
            *([f"This comparison is not finished. {missing}"] if missing else []),
            *([ended] if (ended := diverged_line(comparison)) else []),
            *dropped_lines(found),
            *comparison.get("warnings", []),
        ],
        cards=_cards(comparison, found),
        tables={table.key: table for table in made},
        figures=all_plots(comparison),
        measured=any(
            client.get("peak_memory_bytes") is not None
            for method in comparison["methods"]
            for run in method["runs"]
            for client in run["clients"]
        ),
        machine={**comparison["machine"], **comparison["versions"]},
        config=comparison.get("config"),
        version=comparison["versions"].get("flexp", ""),
        source="comparison.json",
    )


def _cards(comparison: Mapping[str, Any], found: Sequence[Result]) -> Iterator[tuple[str, str, str]]:
    """A number, what it is of, and what to say beside it: of the reference, and of the best of the others."""
    metric, seeds = str(comparison["metric"]), len(comparison["seeds"])
    reference = next((result for result in found if result.is_reference), None)
    if reference is None:
        return
    sign = 1.0 if comparison["higher_is_better"] else -1.0
    others = [(sign * other.personal.mean, other) for other in found if not other.is_reference and other.personal]
    yield reference.name, score(reference.personal, metric, seeds), f"{formats.name(metric)}, own test data"
    if others:
        best = max(others, key=lambda pair: pair[0])[1]
        detail = lead(reference.name, best.difference, metric, seeds)
        yield f"Best other: {best.name}", score(best.personal, metric, seeds), detail
    for title, of in (("Peak memory on a client", "memory"), ("Sent and received by a client", "traffic")):
        if (own := getattr(reference, of)) is not None:
            known = sorted(value for _, other in others if (value := getattr(other, of)) is not None)
            ends = dict.fromkeys(formats.size(value) for value in (known[:1] + known[-1:]))
            yield title, formats.size(own), reference.name + (f"; others {' to '.join(ends)}" if ends else "")


Cell = str | int | float | None
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def methods_csv(comparison: Mapping[str, Any]) -> str:
    """One line a method: scores as fractions, bytes, seconds; ``_ci`` is half the 95 % interval, empty if unknown."""
    lines = []
    at = {axis: {row.name: row for row in standings(comparison, axis)} for axis in ("bytes", "time")}
    for method, result in zip(ordered(comparison), results(comparison), strict=True):
        line: dict[str, Cell] = {"method": result.name, "kind": str(method["method"]), "seeds": result.seeds}
        line["seeds_diverged"] = sum(bool(run.get("not_finite")) for run in method["runs"])
        line |= _interval("personal", result.personal) | _interval("worst_decile", result.worst)
        line |= _interval("global", result.everybody) | _interval("personal_loss", result.loss)
        line |= _interval("best", result.best)
        first, last = result.best_rounds or (None, None)
        line |= {"best_round_first": first, "best_round_last": last}
        line |= _interval("reference_better_by", result.difference)
        line |= {
            "bytes_up": result.bytes_up,
            "bytes_down": result.bytes_down,
            "client_seconds": result.client_seconds,
            "peak_memory_bytes": result.memory,
            "virtual_seconds": result.virtual_seconds,
            "clients": result.dropped.clients,
            "clients_dropped": result.dropped.most,
            "dropped_need_bytes": result.dropped.need,
        }
        for axis, rows in at.items():
            row = rows.get(result.name)
            line |= _interval(f"equal_{axis}", None if row is None else row.score)
        lines.append(line | {"settings": settings_text(method["settings"])})
    return _written(lines)


def clients_csv(comparison: Mapping[str, Any]) -> str:
    """One line for each client in each run."""
    lines = []
    keys = ("train_examples", "personal_parameters", "peak_memory_bytes", "bytes_up", "bytes_down", "client_seconds")
    for method in ordered(comparison):
        for run in method["runs"]:
            before, last, best = run["before"], _round(run, views.last_round(run)), _round(run, run["best_round"])
            for client in run["clients"]:
                name, cut = client["name"], client.get("cut")
                line: dict[str, Cell] = {
                    "method": str(method["name"]),
                    "seed": run["seed"],
                    "client": str(name),
                    "device": client.get("device"),
                    "cut": None if cut is None else f"{cut[0]}:{cut[1]}",
                    "dropped": int(name in run["dropped"]),
                }
                for side in ("personal", "global"):
                    line[f"{side}_before"] = (before.get(side) or {}).get(name)
                    line[f"{side}_last"] = (last.get(side) or {}).get(name)
                    line[f"{side}_best"] = (best.get(side) or {}).get(name)
                    line[f"{side}_loss"] = (last.get(f"{side}_loss") or {}).get(name)
                line |= {key: client.get(key) for key in (*keys, "client_flops", "server_flops")}
                lines.append(line)
    return _written(lines)


def _round(run: Mapping[str, Any], round: int | None) -> Mapping[str, Any]:
    for entry in run["rounds"]:
        if int(entry["round"]) == round:
            found: Mapping[str, Any] = entry
            return found
    return run["before"] if round == views.BEFORE else {}


def _interval(name: str, value: Interval | None) -> dict[str, Cell]:
    if value is None:
        return {f"{name}": None, f"{name}_ci": None, f"{name}_n": 0}
    return {f"{name}": value.mean, f"{name}_ci": value.half, f"{name}_n": value.n}


def _written(lines: Iterable[Mapping[str, Cell]]) -> str:
    rows = list(lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["method"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _safe(value) for key, value in row.items()})
    return text.getvalue()


def _safe(value: Cell) -> Cell:
    """Text that a spreadsheet would run as a formula gets an apostrophe in front, so that it stays text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
