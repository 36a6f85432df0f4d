"""The comparison as CSV for other programs: plain numbers in base units, one line a method, or one a client and run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from flexp.comparison import views
from flexp.comparison.report.results import ordered, results, settings_text, standings
from flexp.comparison.statistics import Interval

Cell = str | int | float | None
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def methods_csv(comparison: Mapping[str, Any]) -> str:
    """One line a method: scores as fractions, bytes, seconds; ``_ci`` is half the 95 % interval, empty if unknown."""
    lines = []
    at = {axis: {row.name: row for row in standings(comparison, axis)} for axis in ("bytes", "time")}
    for method, result in zip(ordered(comparison), results(comparison), strict=True):
        line: dict[str, Cell] = {"method": result.name, "kind": str(method["method"]), "seeds": result.seeds}
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
