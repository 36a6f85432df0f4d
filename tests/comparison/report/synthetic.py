"""Comparisons made up for the tests: ``comparison.json`` (schema 1) as a comparison writes it. Deterministic."""

from __future__ import annotations

import math
import random
from typing import Any

NAMES = ("Tweets", "Amazon reviews", "Movie reviews", "NYT editorials", "Banking", "Travel", "Small talk", "Kitchen")
METHODS = ("flexp-sfl", "local", "fedavg", "fedavg-ft", "fedprox", "pfedme", "ditto", "pretrained")
FULL_MODEL = ("local", "fedavg", "fedavg-ft", "fedprox", "pfedme", "ditto")
TOP = {
    "flexp-sfl": (0.861, 0.742),
    "local": (0.802, 0.661),
    "fedavg": (0.771, 0.758),
    "fedavg-ft": (0.846, 0.701),
    "fedprox": (0.774, 0.757),
    "pfedme": (0.823, 0.718),
    "ditto": (0.839, 0.722),
    "pretrained": (0.512, 0.506),
}
"""Last personal score and everybody's, around which seeds and clients scatter."""


def comparison(
    methods: tuple[str, ...] = METHODS,
    clients: tuple[str, ...] = NAMES,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    metric: str = "accuracy",
    devices: bool = False,
    name: str = "sentiment-8",
) -> dict[str, Any]:
    """A whole comparison; with ``devices`` half the clients cannot hold the full model and there is a clock."""
    return {
        "schema": 1,
        "name": name,
        "metric": metric,
        "higher_is_better": metric == "accuracy",
        "seeds": list(seeds),
        "reference": methods[0],
        "model": {
            "id": "asset:minilm",
            "kind": "sequence-classification",
            "parameters": 22_713_986,
            "blocks": 6,
            "hidden": 384,
            "tuning": "full",
            "dtype": "float32",
        },
        "machine": {"system": "Linux", "processor": "x86-64", "cores": 2, "memory_bytes": 25_000_000_000},
        "versions": {"flexp": "0.2.0", "python": "3.11.7", "torch": "2.13.0"},
        "config": {"name": name, "train": {"rounds": 6}},
        "tuning": {
            "seeds": [0],
            "trials_per_method": 6,
            "measure": "mean validation score at the last round",
        },
        "methods": [_method(label, place, clients, seeds, metric, devices) for place, label in enumerate(methods)],
    }


def tiny(
    scores: dict[str, list[list[float | None]]],
    higher: bool = True,
    metric: str = "accuracy",
) -> dict[str, Any]:
    """A comparison by hand: by method, for each seed, the clients' last personal scores; the first is the reference.

    Everybody's score is one half of it. One round costs each method 100 bytes up, 50 down and 2 seconds.
    """
    made = comparison(tuple(scores), metric=metric)
    made |= {"higher_is_better": higher, "seeds": list(range(max(len(runs) for runs in scores.values())))}
    for method in made["methods"]:
        method["trials"] = []
        method["runs"] = [
            _run_by_hand(seed, {f"c{place}": value for place, value in enumerate(values)})
            for seed, values in enumerate(scores[method["name"]])
        ]
    return made


def _run_by_hand(seed: int, personal: dict[str, float | None]) -> dict[str, Any]:
    half = {name: None if value is None else value / 2 for name, value in personal.items()}
    flat = dict.fromkeys(personal, 0.1)
    entry = {
        "round": 1,
        "personal": personal,
        "global": half,
        "personal_loss": dict.fromkeys(personal, 0.5),
        "global_loss": dict.fromkeys(personal, 0.7),
        "bytes_up": 100,
        "bytes_down": 50,
        "client_seconds": 2.0,
        "virtual_seconds": None,
    }
    return {
        "seed": seed,
        "folder": f"cells/x/seed-{seed}",
        "before": {"personal": flat, "global": flat},
        "dropped": [],
        "rounds": [entry],
        "best_round": 1,
        "picked_on": "validation",
        "clients": [
            {
                "name": name,
                "cut": None,
                "device": None,
                "train_examples": 96,
                "peak_memory_bytes": None,
                "bytes_up": 100,
                "bytes_down": 50,
                "client_seconds": 2.0,
                "client_flops": None,
                "server_flops": None,
                "personal_parameters": 10,
            }
            for name in personal
        ],
    }


def _method(
    label: str, place: int, clients: tuple[str, ...], seeds: tuple[int, ...], metric: str, devices: bool
) -> dict[str, Any]:
    rates = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
    draw = random.Random(f"{place}")
    trials = [
        {
            "settings": {"train.personal.lr": rate},
            "validation": _score(0.8 - 0.02 * abs(at - 2) + draw.gauss(0, 0.003), metric),
        }
        for at, rate in enumerate(rates)
    ]
    base = METHODS[place % len(METHODS)]
    trained = base != "pretrained"
    return {
        "name": label,
        "method": base,
        "settings": {"train.personal.lr": 2e-4, "train.rounds": 6} if trained else {},
        "trials": trials if trained else [],
        "runs": [_run(label, base, place, seed, clients, metric, devices) for seed in seeds],
    }


def _run(
    label: str, base: str, place: int, seed: int, clients: tuple[str, ...], metric: str, devices: bool
) -> dict[str, Any]:
    draw = random.Random(f"{place} {seed}")
    luck = random.Random(f"{seed}").gauss(0, 0.012) + draw.gauss(0, 0.006)  # what a seed does to all, and to one
    whole = base in FULL_MODEL
    dropped = list(clients[: len(clients) // 2]) if devices and whole else []
    own, everybody = TOP[base]
    up = 0 if base in ("local", "pretrained") else 91_000_000 if whole else 13_400_000
    seconds = 0.0 if base == "pretrained" else 9.5 if whole else 4.1
    rounds = []
    for round in range(1, 7):
        gain = 1 - math.exp(-round / 1.6) if base != "pretrained" else 0.0
        personal = {
            name: _score(
                0.51 + (own - 0.51) * gain + luck + 0.02 * ((at * 5) % 7 - 3) * gain + draw.gauss(0, 0.01), metric
            )
            for at, name in enumerate(clients)
        }
        shared = {
            name: _score(0.50 + (everybody - 0.50) * gain + luck + draw.gauss(0, 0.004), metric) for name in clients
        }
        rounds.append(
            {
                "round": round,
                "personal": personal,
                "global": shared,
                "personal_loss": {name: 0.7 - 0.35 * gain + draw.gauss(0, 0.01) for name in clients},
                "global_loss": dict.fromkeys(clients, 0.7 - 0.2 * gain),
                "bytes_up": up * round,
                "bytes_down": up * round,
                "client_seconds": seconds * round * (1 + 0.05 * seed),
                "virtual_seconds": seconds * round * 31.0 if devices else None,
            }
        )
    before = {name: _score(0.51 + luck, metric) for name in clients}
    return {
        "seed": seed,
        "folder": f"cells/{place}/seed-{seed}",
        "before": {"personal": before, "global": dict(before)},
        "dropped": dropped,
        "rounds": rounds,
        "best_round": 6 - (seed % 3),
        "picked_on": "validation",
        "clients": [_client(at, name, base, up, seconds, devices, dropped) for at, name in enumerate(clients)],
    }


def _client(
    at: int, name: str, base: str, up: int, seconds: float, devices: bool, dropped: list[str]
) -> dict[str, Any]:
    gone = name in dropped
    memory = 316_000_000 if base in FULL_MODEL else 92_000_000 + 21_000_000 * (at % 3)
    return {
        "name": name,
        "cut": [1 + at % 3, 6 - at % 2] if base == "flexp-sfl" else None,
        "device": ("phone" if at % 2 else "laptop") if devices else None,
        "train_examples": 96 + at,
        "peak_memory_bytes": None if base == "pretrained" else memory,
        "bytes_up": 0 if gone else up * 6,
        "bytes_down": 0 if gone else up * 6,
        "client_seconds": 0.0 if gone else seconds * 6,
        "client_flops": 3.1e12,
        "server_flops": 2.2e12 if base == "flexp-sfl" else 0.0,
        "personal_parameters": 12_000_000,
    }


def _score(accuracy: float, metric: str) -> float:
    """An accuracy, or a perplexity that is low where it is high."""
    accuracy = min(max(accuracy, 0.01), 0.99)
    return accuracy if metric == "accuracy" else math.exp(6 * (1 - accuracy))
