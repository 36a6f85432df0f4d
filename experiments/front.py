"""Own against everybody's data: what clients of finished runs answer with less of their own, no training.

    python experiments/front.py RUN [RUN …]

Two ways to give up some of what is personal, from 0, as the run left it, to 1:

- *prior*: a client's classifier has learned how often its classes come. τ times the logarithm of its own class shares
  is taken out of its logits (logit adjustment, Menon et al., ICLR 2021, arXiv 2007.07314); τ = 1: every class is as
  likely as another.
- *ends*: all that a client has trained (blocks and classifier) moves by λ towards the mean over clients; λ = 1:
  one model for all, as averaging the ends at the end of a run would leave.

Printed: mean accuracy on clients' own test data and on everybody's, in percent, over the runs (with Student's 95 %
interval where there are several), and in brackets what is gained over 0, paired.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor

from flexp.client.meeting import Seat, classifier_of
from flexp.export.saved import open_run
from flexp.methods.parties import seat_of
from flexp.run.runner import sample

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
Point = tuple[str, float]


def points(folder: Path) -> dict[Point, tuple[float, float]]:
    """What is given up, and how much of it → (own, everybody's) accuracy, means over clients."""
    method = open_run(folder).method
    config, federation = method.world.config, method.world.federation
    everybody = sample(federation.test, config.evaluation.global_examples, config.seed)
    seats = {data.name: seat_of(method.clients[data.name], config) for data in federation.clients}
    ends = {name: method.clients[name].model.stage.own() for name in seats}
    trained = {name: {key: value.detach().clone() for key, value in own.items()} for name, own in ends.items()}
    first = next(iter(trained.values()))
    means = {key: torch.stack([own[key] for own in trained.values()]).mean(0) for key in first}
    found: dict[Point, list[tuple[float, float]]] = {}
    for data in federation.clients:
        seat = seats[data.name]
        sides = (data.test, everybody)
        for share, scores in zip(SHARES, without_prior(seat, data.train, sides), strict=True):
            found.setdefault(("prior", share), []).append(scores)
        for share in SHARES:
            with torch.no_grad():
                for key, value in ends[data.name].items():
                    value.copy_(torch.lerp(trained[data.name][key], means[key], share))
            found.setdefault(("ends", share), []).append(next(without_prior(seat, data.train, sides)))
    return {point: (mean([o for o, _ in pairs]), mean([e for _, e in pairs])) for point, pairs in found.items()}


def without_prior(seat: Seat, train: list, sides: tuple[list, list]) -> Iterator[tuple[float, float]]:  # type: ignore[type-arg]
    """Accuracy on both sides, in percent, with each of :data:`SHARES` of the prior taken out."""
    _, layer = classifier_of(seat.model)
    _, private_N = replace(seat, examples=train).features()
    features = [replace(seat, examples=examples).features() for examples in sides]
    weight_CH, bias_C = layer.weight.detach().double(), layer.bias.detach().double()
    counts_C = torch.bincount(private_N, minlength=len(bias_C)).double() + 0.5  # a class it never saw stays finite
    prior_C = torch.log(counts_C / counts_C.sum())

    def right(side: tuple[Tensor, Tensor], share: float) -> float:
        x_NH, y_N = side
        return 100 * float(((x_NH @ weight_CH.T + bias_C - share * prior_C).argmax(1) == y_N).double().mean())

    for share in SHARES:
        yield right(features[0], share), right(features[1], share)


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
    """Print a line for each point of both fronts."""
    torch.set_num_threads(1)
    runs = [points(Path(folder)) for folder in folders]
    for what, share in runs[0]:
        sides = [[run[what, share][side] for run in runs] for side in (0, 1)]
        gained = [[run[what, share][side] - run[what, 0.0][side] for run in runs] for side in (0, 1)]
        own, everybody = (f"{told(values)} ({told(more)})" for values, more in zip(sides, gained, strict=True))
        print(f"{what} {share:4}  own {own}  everybody's {everybody}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
