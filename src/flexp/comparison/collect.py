"""From the folders of all cells to ``comparison.json`` (schema 1; docs/compare.md says what is in it)."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexp import finite
from flexp.comparison.cells import Cell, dropped, is_done, validation
from flexp.comparison.config import Comparison, Entry
from flexp.comparison.grid import Settings
from flexp.files import read_json, write_json
from flexp.report.formats import size
from flexp.report.metrics import Record, read
from flexp.report.summary import SIDES, best_round, majorities, scores_by_round

SCHEMA = 1
FILE = "comparison.json"
MEASURE = "mean validation score at the last round"


@dataclass
class Track:
    """One entry's way through the comparison."""

    entry: Entry
    tried: list[Settings]
    tuning: list[Cell]
    chosen: Settings | None = None
    nobody_fits: bool = False  # in no trial could a client's device hold the method: there is nothing to choose
    final: list[Cell] = field(default_factory=list)

    def scores(self, out: Path) -> list[tuple[float, float, bool] | None]:
        """Each trial's :func:`trial_score`."""
        return [trial_score([cell for cell in self.tuning if cell.trial == n], out) for n in range(len(self.tried))]


def gather(comparison: Comparison, out: Path, tracks: Sequence[Track]) -> dict[str, Any]:
    """Write ``comparison.json`` in ``out``, of whatever is finished, and give its content."""
    methods, first, warnings = [], None, []
    for track in tracks:
        runs = [run for cell in track.final if (run := _run(cell, out)) is not None]
        if track.chosen is None and nobody_fits(track.tuning, out):  # no seed's clients would
            runs = [_nobody(track.tuning[0], seed, out) for seed in comparison.seeds]
        _share_memory(runs)
        methods.append(
            {
                "name": track.entry.name,
                "method": track.entry.method,
                "settings": track.chosen or {},
                "trials": [
                    {"settings": settings, "validation": None if score is None else score[0]}
                    for settings, score in zip(track.tried, track.scores(out), strict=True)
                ],
                "problem": _problem(runs),
                "runs": runs,
            }
        )
        scored = [run for run in runs if run["rounds"] or run["before"]["personal"]]
        if first is None and scored:
            first = read_json(out / scored[0]["folder"] / "summary.json")
            warnings = _of_data(first, read(out / scored[0]["folder"] / "metrics.jsonl"))
    summary: Mapping[str, Any] = first or {}
    model = summary.get("model", {})
    keys = ("id", "kind", "parameters", "blocks", "hidden", "tuning", "dtype")
    content = {
        "schema": SCHEMA,
        "name": comparison.base.name,
        "metric": summary.get("metric"),
        "higher_is_better": summary.get("higher_is_better"),
        "seeds": comparison.seeds,
        "reference": comparison.reference,
        "model": {key: model.get(key) for key in keys},
        "machine": summary.get("machine", {}),
        "versions": summary.get("versions", {}),
        "config": comparison.base.resolved(),
        "warnings": [*warnings, *_longer(comparison, tracks)],
        "tuning": {
            "seeds": comparison.tune_seeds if comparison.config.tune else [],
            "trials_per_method": comparison.config.trials if comparison.config.tune else 0,
            "measure": MEASURE,
        },
        "methods": methods,
    }
    write_json(out / FILE, content)
    return content


def _of_data(summary: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    """The warnings of a run that are true of the others: not how its own models ended."""
    own = finite.warnings(records, [client["name"] for client in summary["clients"]])
    return [line for line in summary.get("warnings", []) if line not in own]


def diverged(content: Mapping[str, Any]) -> list[str]:
    """A line for each run of a ``comparison.json`` whose models do not answer with finite numbers after the last round:
    it has no score, which is missing from its method."""
    return [
        f"{method['name']}, seed {run['seed']}: diverged: {finite.many(run['not_finite'])} with numbers that are not "
        "finite after the last round"
        for method in content["methods"]
        for run in method["runs"]
        if run.get("not_finite")
    ]


def _longer(comparison: Comparison, tracks: Sequence[Track]) -> list[str]:
    """Who has another budget than the others."""
    usual = comparison.base.train.total_steps
    steps = {track.entry.name: track.final[0].config.train.total_steps for track in tracks if track.final}
    return [
        f"{name} trains {own} steps a client, the comparison {usual}" for name, own in steps.items() if own != usual
    ]


def trial_score(cells: Sequence[Cell], out: Path) -> tuple[float, float, bool] | None:
    """A trial's score and loss on validation data, mean over its seeds, and whether a higher score is better.

    ``None`` if it could not be finished with any one of them.
    """
    found = []
    for cell in cells:
        result = validation(cell, out) if is_done(cell, out) else None
        if result is None:
            return None
        found.append(result)
    higher = bool(read_json(out / cells[0].folder / "summary.json")["higher_is_better"])
    return statistics.fmean(score for score, _ in found), statistics.fmean(loss for _, loss in found), higher


def nobody_fits(cells: Sequence[Cell], out: Path) -> bool:
    """Whether there are cells, and no client's device can hold the method in any of them."""
    return bool(cells) and all(dropped(cell, out) for cell in cells)


def _problem(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a method that is done has no scores: no client's device can hold it."""
    if not runs or any(len(run["dropped"]) < len(run["clients"]) for run in runs):
        return None
    clients = [client for run in runs for client in run["clients"]]
    need, have = (max(client[key] for client in clients) for key in ("peak_memory_bytes", "available_bytes"))
    return f"all {len(runs[0]['clients'])} clients dropped: need {size(need)}, have {size(have)}"


def _run(cell: Cell, out: Path) -> dict[str, Any] | None:
    """One entry of ``runs``; None if the cell is not finished."""
    if not is_done(cell, out):
        return None
    if dropped(cell, out):
        return _nobody(cell, cell.seed, out)
    folder = out / cell.folder
    summary, records = read_json(folder / "summary.json"), read(folder / "metrics.jsonl")
    metric, left_out = summary["metric"], {client["name"]: client for client in summary.get("dropped") or []}
    takes_part = len(summary["clients"]) - len(left_out)
    ends = (summary.get("virtual") or {}).get("rounds")
    before = [record for record in records if record["kind"] == "eval" and record["round"] == 0]
    names = [client["name"] for client in summary["clients"]]
    majority = majorities(records, names)
    return {
        "seed": cell.seed,
        "folder": cell.folder.as_posix(),
        "before": {
            side: {r["client"]: r[side][metric] for r in before if not _undefined(r[side], metric)} for side in SIDES
        },
        "majority": {side: {name: shares[side] for name, shares in majority.items()} for side in SIDES},
        "dropped": list(left_out),
        "rounds": _rounds(records, metric, takes_part, ends),
        "not_finite": finite.broken_at_end(records, names),
        "best_round": best_round(scores_by_round(records, names, metric), summary["higher_is_better"]),
        "picked_on": summary["scores"]["picked_on"],
        "clients": [_client({**client, **_memory(left_out.get(client["name"]))}) for client in summary["clients"]],
    }


def _nobody(cell: Cell, seed: int, out: Path) -> dict[str, Any]:
    """A run that no client's device can hold: all are dropped, and nothing is scored."""
    left_out = dropped(cell, out)
    return {
        "seed": seed,
        "folder": cell.folder.as_posix(),
        "before": {"personal": {}, "global": {}},
        "dropped": [client["name"] for client in left_out],
        "rounds": [],
        "best_round": None,
        "picked_on": None,
        "clients": [_client({**client, **_memory(client)}) for client in left_out],
    }


def _memory(left_out: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a dropped client would need, and what its device has."""
    if left_out is None:
        return {}
    return {"peak_memory_bytes": left_out["needed_bytes"], "available_bytes": left_out["available_bytes"]}


def _rounds(records: Sequence[Record], metric: str, clients: int, ends: Sequence[float] | None) -> list[dict[str, Any]]:
    """The evaluated rounds; what the diary sums over clients becomes a mean over the ``clients`` that take part.

    (Who does not take part adds nothing to the sums.)

    ``ends``: of every round, on the virtual clock.
    """
    totals = {int(record["round"]): record for record in records if record["kind"] == "round"}
    rounds: dict[int, dict[str, Any]] = {}
    steps = Counter(int(record["round"]) for record in records if record["kind"] == "step")
    for record in records:
        number = int(record["round"])
        if record["kind"] != "eval" or number not in totals:
            continue
        total = totals[number]
        found = rounds.setdefault(
            number,
            {
                "round": number,
                **{key: {} for key in ("personal", "global", "personal_loss", "global_loss")},
                "bytes_up": total["bytes_up"] / clients,
                "bytes_down": total["bytes_down"] / clients,
                "client_seconds": total.get("client_seconds"),
                "steps": sum(count for place, count in steps.items() if place <= number),
                "virtual_seconds": ends[number - 1] if ends else None,
            },
        )
        for side in ("personal", "global"):
            if not _undefined(record[side], metric):
                found[side][record["client"]] = record[side][metric]
            found[f"{side}_loss"][record["client"]] = record[side]["loss"]
    return [rounds[number] for number in sorted(rounds)]


def _undefined(scores: Mapping[str, Any], metric: str) -> bool:
    """Whether the client's examples define no such score, so that it is in no mean."""
    return metric in scores.get(finite.UNDEFINED, ())


def _client(client: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("name", "cut", "device", "train_examples", "test_examples", "peak_memory_bytes", "bytes_up", "bytes_down")
    later = ("client_seconds", "client_flops", "server_flops", "personal_parameters", "available_bytes")
    return {key: client.get(key) for key in (*keys, *later)}


def _share_memory(runs: Sequence[dict[str, Any]]) -> None:
    """Peak memory is measured with one seed of a method, and holds for the others: same cuts, same sizes."""
    known = {
        client["name"]: client["peak_memory_bytes"]
        for run in runs
        for client in run["clients"]
        if client["peak_memory_bytes"] is not None
    }
    for run in runs:
        for client in run["clients"]:
            if client["peak_memory_bytes"] is None:
                client["peak_memory_bytes"] = known.get(client["name"])
