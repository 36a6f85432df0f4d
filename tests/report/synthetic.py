"""Run folders made up for the tests: as a run writes them, without a run. Deterministic."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from flexp.files import write_json
from flexp.report.metrics import Record, write_records
from flexp.report.summary import build_summary

NAMES = ("Tweets", "Amazon reviews", "Movie reviews", "NYT editorials", "Banking", "Travel", "Small talk", "Kitchen")
BLOCKS = 6


def records(
    clients: tuple[str, ...] = NAMES,
    rounds: int = 5,
    steps: int = 10,
    metric: str = "accuracy",
    seed: int = 0,
) -> list[Record]:
    """A diary: evaluation before training, then rounds of steps in turn, each with its evaluation."""
    draw = random.Random(seed)
    diary: list[Record] = [_eval(0, name, place, metric, draw) for place, name in enumerate(clients)]
    for round in range(1, rounds + 1):
        for step in range((round - 1) * steps + 1, round * steps + 1):
            for place, name in enumerate(clients):
                loss = 0.25 + 0.45 * math.exp(-step / 18) + 0.02 * place + draw.gauss(0, 0.05)
                diary.append(
                    {
                        "kind": "step",
                        "round": round,
                        "client": name,
                        "step": step,
                        "loss": max(loss, 0.01),
                        "align": 0.02 * math.exp(-step / 30) + 0.002 * draw.random() if place % 3 else None,
                        "tokens": 400 + draw.randrange(80),
                        "lr": 1e-4,
                        "seconds": 0.2 + 0.02 * draw.random(),
                    }
                )
        diary += [_eval(round, name, place, metric, draw) for place, name in enumerate(clients)]
        scale = round * steps * len(clients)
        diary.append(
            {
                "kind": "round",
                "round": round,
                "seconds": 0.3 * scale,
                "bytes_up": 1_600_000 * scale,
                "bytes_down": 1_600_000 * scale,
            }
        )
    return diary


def client_facts(clients: tuple[str, ...] = NAMES) -> list[dict[str, Any]]:
    """What is known of each client besides its scores."""
    return [
        {
            "name": name,
            "cut": [1 + place % 3, BLOCKS - place % 2],
            "train_examples": 96 + 7 * place,
            "test_examples": 120 + 11 * place,
            "personal_parameters": 12_000_000 + 1_774_464 * (place % 3),
            "bytes_up": 78_000_000 + 9_000_000 * place,
            "bytes_down": 77_000_000 + 5_000_000 * place,
            "client_seconds": 6.0 + 2.2 * (place % 3) + 0.1 * place,
            "server_seconds": 8.5 - 2.0 * (place % 3),
            "peak_memory_bytes": 210_000_000 + 60_000_000 * (place % 3),
        }
        for place, name in enumerate(clients)
    ]


def summary(
    diary: list[Record] | None = None,
    clients: tuple[str, ...] = NAMES,
    metric: str = "accuracy",
    finished: bool = True,
    name: str = "sentiment-8",
) -> dict[str, Any]:
    """A summary that belongs to ``diary`` (default: :func:`records`)."""
    return build_summary(
        name=name,
        method="flexp-sfl",
        seed=0,
        finished=finished,
        metric=metric,
        higher_is_better=metric == "accuracy",
        model={
            "id": "asset:minilm",
            "kind": "sequence-classification",
            "blocks": BLOCKS,
            "hidden": 384,
            "parameters": 22_713_986,
            "tuning": "full",
            "dtype": "float32",
        },
        clients=client_facts(clients),
        records=records(clients, metric=metric) if diary is None else diary,
        server={"parameters": 8_872_320, "updates": 400, "compute_seconds": 52.5},
        totals={
            "bytes_up": 876_000_000,
            "bytes_down": 756_000_000,
            "seconds": 131.4,
            "eval_bytes_up": 42_000_000,
            "eval_bytes_down": 42_000_000,
        },
        machine={"system": "Linux", "processor": "x86-64", "cores": 2, "memory_bytes": 25_000_000_000},
        versions={"flexp": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
    )


def run_folder(
    folder: Path,
    clients: tuple[str, ...] = NAMES,
    rounds: int = 5,
    steps: int = 10,
    metric: str = "accuracy",
    finished: bool = True,
    name: str = "sentiment-8",
) -> Path:
    """Write a run folder and return it."""
    diary = records(clients, rounds, steps, metric)
    write_records(folder / "metrics.jsonl", diary)
    write_json(folder / "summary.json", summary(diary, clients, metric, finished, name))
    config = {"name": name, "seed": 0, "model": {"id": "asset:minilm", "tuning": "full"}, "train": {"rounds": rounds}}
    write_json(folder / "config.json", config)
    return folder


def _eval(round: int, client: str, place: int, metric: str, draw: random.Random) -> Record:
    gain = 1 - math.exp(-round / 1.5)
    if metric == "accuracy":
        personal = 0.52 + 0.03 * (place % 3) + (0.27 + 0.015 * place) * gain + draw.gauss(0, 0.006)
        everybody = 0.50 + (0.20 - 0.02 * (place % 3)) * gain + draw.gauss(0, 0.004)
    else:
        personal = 12 + 900 * math.exp(-round * 1.1) + 3 * place
        everybody = 31 + 900 * math.exp(-round * 1.1) + 2 * place
    beside = {"majority": 0.51 + 0.01 * place} if metric == "accuracy" else {}
    return {
        "kind": "eval",
        "round": round,
        "client": client,
        "personal": {metric: personal, "loss": 0.7 - 0.4 * gain, "n": 120 + 11 * place, **beside},
        "global": {metric: everybody, "loss": 0.7 - 0.2 * gain, "n": 1268, **beside},
    }
