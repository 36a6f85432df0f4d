"""Own against everybody's data: what clients of finished runs answer with less of their own prior, no training.

    python experiments/front.py RUN [RUN …]

A client's classifier has learned how often its classes come. Taking τ times the logarithm of its own class shares out
of its logits (logit adjustment, Menon et al., ICLR 2021, arXiv 2007.07314) leaves τ = 0 as it is and makes every class
equally likely at τ = 1. Printed: mean accuracy on clients' own test data and on everybody's, in percent, over the runs
(with Student's 95 % interval where there are several).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from scipy import stats

from flexp.client.meeting import classifier_of
from flexp.export.saved import open_run
from flexp.methods.parties import seat_of
from flexp.run.runner import sample

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def points(folder: Path) -> dict[float, tuple[float, float]]:
    """τ → (own, everybody's) accuracy, means over clients."""
    method = open_run(folder).method
    world = method.world
    config = world.config
    everybody = sample(world.federation.test, config.evaluation.global_examples, config.seed)
    found: dict[float, list[tuple[float, float]]] = {share: [] for share in SHARES}
    for data in world.federation.clients:
        seat = seat_of(method.clients[data.name], config)
        _, layer = classifier_of(seat.model)
        _, private = replace(seat, examples=data.train).features()
        sides = [replace(seat, examples=examples).features() for examples in (data.test, everybody)]
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        counts = torch.bincount(private, minlength=len(bias)).double() + 0.5  # a class that it never saw stays finite
        prior = torch.log(counts / counts.sum())
        for share in SHARES:
            own, all_ = (((x @ weight.T + bias - share * prior).argmax(1) == y).double().mean() for x, y in sides)
            found[share].append((100 * float(own), 100 * float(all_)))
    return {share: (mean([o for o, _ in pairs]), mean([e for _, e in pairs])) for share, pairs in found.items()}


def mean(values: list[float]) -> float:
    """The plain mean."""
    return sum(values) / len(values)


def told(values: list[float]) -> str:
    """Mean and half of Student's interval."""
    if len(values) < 2:
        return f"{values[0]:5.1f}"
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean(values):5.1f} ± {half:.1f}"


def main(*folders: str) -> None:
    """Print a line for each τ."""
    torch.set_num_threads(1)
    runs = [points(Path(folder)) for folder in folders]
    for share in SHARES:
        own, everybody = ([run[share][side] for run in runs] for side in (0, 1))
        print(f"τ = {share:4}  own {told(own)}  everybody's {told(everybody)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
