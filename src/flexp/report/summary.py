"""From evaluation records to the scores of ``summary.json``: pure functions, no files, no clocks.

* **personal**: the score of a client's personal model on its own test data; **global**: on everybody's test
  data.
* **mean** is the plain mean over clients, each counting the same whatever its number of examples
  (perplexities are averaged arithmetically); **worst** is the lowest accuracy or the highest perplexity of
  any client.
* **before** is round 0, **last** the latest round in which every client was scored. *Last is the headline.*
* **best** is one round for all clients, so that its means belong together; ties go to the earlier round.
  With validation data (``data.validation_fraction``) it is the trained round with the best mean score on
  each client's own: an honest way to stop early. Without, it is the one with the best mean personal score,
  **picked by looking at test data** and therefore optimistic: quote it only beside *last*, and never
  compare one method's best with another's last. ``scores.picked_on`` says which it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexp import finite
from flexp.report.metrics import Record

SCHEMA = 1
SIDES = ("personal", "global")
VALIDATION = "validation"
UNKNOWN = "not audited"
"""What is said of what the server can read, where nobody looked."""

Scores = dict[str, dict[str, Any]]
"""Client name → ``{"personal": score, "global": score}``, and ``validation`` where there is such data; ``undefined``:
those of them whose examples define no such score, where there are any."""


def scores_of(sides: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One client's entry of :data:`Scores`, from what was found on each side; ``None`` of what is not finite."""
    found: dict[str, Any] = {}
    undefined = []
    for side in (*SIDES, VALIDATION) if VALIDATION in sides else SIDES:
        value = (sides.get(side) or {}).get(metric)
        found[side] = value if value is not None and math.isfinite(value) else None
        if metric in (sides.get(side) or {}).get(finite.UNDEFINED, ()):
            undefined.append(side)
    return {**found, finite.UNDEFINED: undefined} if undefined else found


def scores_by_round(records: Iterable[Record], clients: Sequence[str], metric: str) -> dict[int, Scores]:
    """The scores of every round in which all ``clients`` were evaluated, by ascending round.

    Records of other kinds and of other clients are ignored. A client scored twice in a round counts with
    the later record.
    """
    rounds: dict[int, Scores] = {}
    for record in records:
        if record.get("kind") == "eval" and record["client"] in clients:
            rounds.setdefault(int(record["round"]), {})[record["client"]] = scores_of(record, metric)
    return {number: rounds[number] for number in sorted(rounds) if len(rounds[number]) == len(set(clients))}


def majorities(records: Iterable[Record], clients: Sequence[str]) -> dict[str, dict[str, float]]:
    """Client name → the majority's share of its own test data and of everybody's, where there are right answers.

    It is what a model reaches that always gives the most frequent answer, and has learned nothing else.
    """
    found: dict[str, dict[str, float]] = {}
    for record in records:
        if record.get("kind") == "eval" and record["client"] in clients:
            shares = {side: record[side]["majority"] for side in SIDES if "majority" in (record.get(side) or {})}
            if len(shares) == len(SIDES):
                found[record["client"]] = shares
    return found


def aggregate(scores: Scores, higher_is_better: bool) -> dict[str, float | None]:
    """Mean and worst over clients: ``personal_mean``, ``personal_worst``, ``global_mean``, ``global_worst``, and
    ``validation_mean``, ``validation_worst`` where every client has validation data.

    A value is None when any client's score is missing or was not a number: a mean without the failed client
    would flatter. A client whose examples define no such score is in none of them.
    """
    result: dict[str, float | None] = {}
    validated = bool(scores) and all(VALIDATION in score for score in scores.values())
    for side in (*SIDES, VALIDATION) if validated else SIDES:
        values = [score[side] for score in scores.values() if side not in score.get(finite.UNDEFINED, ())]
        present = [value for value in values if value is not None]
        complete = bool(values) and len(present) == len(values)
        result[f"{side}_mean"] = sum(present) / len(present) if complete else None
        result[f"{side}_worst"] = (min if higher_is_better else max)(present) if complete else None
    return result


def best_round(rounds: Mapping[int, Scores], higher_is_better: bool) -> int | None:
    """The trained round with the best mean score on validation data, if there is any, else on the clients' own test
    data; the earliest of equals, and 0 if there is no other.
    """
    key = "validation_mean" if picked_on(rounds) == VALIDATION else "personal_mean"
    means = {number: aggregate(scores, higher_is_better)[key] for number, scores in rounds.items()}
    candidates = {number: mean for number, mean in means.items() if mean is not None}
    trained = {number: mean for number, mean in candidates.items() if number > 0} or candidates
    if not trained:
        return None
    sign = -1.0 if higher_is_better else 1.0
    return min(trained, key=lambda number: (sign * trained[number], number))


def picked_on(rounds: Mapping[int, Scores]) -> str:
    """Which data the best round is chosen on: ``validation`` if every client was scored there, else ``test``."""
    scores = [score for clients in rounds.values() for score in clients.values()]
    return VALIDATION if scores and all(VALIDATION in score for score in scores) else "test"


def build_summary(
    *,
    name: str,
    method: str,
    seed: int,
    finished: bool,
    metric: str,
    higher_is_better: bool,
    model: Mapping[str, Any],
    clients: Sequence[Mapping[str, Any]],
    records: Iterable[Record],
    server: Mapping[str, Any],
    totals: Mapping[str, Any],
    machine: Mapping[str, Any],
    versions: Mapping[str, Any],
    warnings: Sequence[str] = (),
    server_reads: str = UNKNOWN,
    rounds: int | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json`` (schema 1).

    Args:
        clients: what is known of each client besides scores, in the order to show: ``name``, ``cut``,
            ``train_examples``, ``test_examples``, ``personal_parameters``, ``bytes_up``, ``bytes_down``,
            ``client_seconds``, ``server_seconds``, ``peak_memory_bytes``; further keys are kept.
        records: records of ``metrics.jsonl``; only those of kind ``eval`` are used.
        warnings: what is suspicious about the data; models that do not answer with finite numbers are added.
        server_reads: what an audit says that the server can read.
        rounds: rounds trained; None: the latest fully evaluated one.

    Returns:
        JSON-ready values. Scores that do not exist (yet) are None.
    """
    names, records = [str(client["name"]) for client in clients], list(records)
    majority = majorities(records, names)
    everybody = [record["global"].get("n") for record in records if record.get("kind") == "eval" and "global" in record]
    by_round = scores_by_round(records, names, metric)
    last = max(by_round, default=None)
    best = best_round(by_round, higher_is_better)
    chosen = {"before": 0 if 0 in by_round else None, "last": last, "best": best}
    nothing: Scores = {client: dict.fromkeys(SIDES) for client in names}

    def at(which: str) -> Scores:
        number = chosen[which]
        return nothing if number is None else by_round[number]

    return {
        "schema": SCHEMA,
        "name": name,
        "method": method,
        "seed": seed,
        "finished": finished,
        "warnings": [*warnings, *finite.warnings(records, names)],
        "not_finite": finite.broken_at_end(records, names),
        "server_reads": server_reads,
        "test_examples": everybody[-1] if everybody else None,
        "rounds": (last or 0) if rounds is None else rounds,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "model": dict(model),
        "clients": [
            {
                **client,
                **({"majority": majority[str(client["name"])]} if client["name"] in majority else {}),
                "before": dict(at("before")[str(client["name"])]),
                "last": dict(at("last")[str(client["name"])]),
                "best": {"round": best, **at("best")[str(client["name"])]},
            }
            for client in clients
        ],
        "scores": {
            "before": aggregate(at("before"), higher_is_better),
            "last": aggregate(at("last"), higher_is_better),
            "best": {"round": best, **aggregate(at("best"), higher_is_better)},
            "picked_on": picked_on(by_round),
        },
        "server": dict(server),
        "totals": dict(totals),
        "machine": dict(machine),
        "versions": dict(versions),
    }
