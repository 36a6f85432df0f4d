"""The order of things in a run: whose turn it is in a round, when all are scored, and when all save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from flexp.client.meeting import FIRST, LAST, Meets
from flexp.config import TrainConfig
from flexp.rng import generator


def turns(clients: Sequence[str], config: TrainConfig, seed: int, round_number: int) -> Iterator[str]:
    """The clients' names in the order of their steps in a round; each comes ``steps_per_round`` times.

    With ``turn = "step"`` clients alternate after every step, which is closest to clients that run at the same time;
    with ``turn = "round"`` each does its whole turn at once. ``order = "random"`` draws the order anew each time, from
    the seed.
    """
    passes = config.steps_per_round if config.turn == "step" else 1
    times = 1 if config.turn == "step" else config.steps_per_round
    for number in range(passes):
        order = list(clients)
        if config.order == "random":
            shuffled = generator(seed, "turns", round_number, number).permutation(len(order))
            order = [clients[int(index)] for index in shuffled]
        for client in order:
            for _ in range(times):
                yield client


@dataclass(frozen=True)
class Place:
    """One thing to do: a ``step`` of ``client``; scores of everybody after round ``number`` (``evaluate``); a snapshot
    of everybody (``save``); everybody's meeting ``number`` (``meet``); the average of everybody's weights after round
    ``number`` (``average``); an update of the shared blocks with what waits (``flush``)."""

    what: Literal["step", "evaluate", "meet", "average", "save", "flush"]
    client: str = ""
    number: int = 0


GATHER = ("meet", "average")
"""What all clients do together, in sums that the server still has for who lost them."""


def gatherings(train: TrainConfig, meets: Meets, averages: bool) -> list[Place]:
    """Of :data:`GATHER` all that a run has, in its order."""
    return [
        *([Place("meet", number=FIRST)] if meets.first else []),
        *(Place("average", number=number) for number in range(1, train.rounds + 1) if averages),
        *([Place("meet", number=LAST)] if meets.last else []),
    ]


def steps_before(place: Place, train: TrainConfig) -> int:
    """How many steps each client has done when all come to one of :func:`gatherings`."""
    if place.what == "average":
        return place.number * train.steps_per_round
    return train.total_steps if place.number == LAST else 0


def scored_rounds(train: TrainConfig, every: int) -> list[int]:
    """The rounds after which personal models are scored, 0 being before training."""
    return [0] + [number for number in range(1, train.rounds + 1) if number % every == 0 or number == train.rounds]


def schedule(
    clients: Sequence[str],
    train: TrainConfig,
    seed: int,
    evaluate_every: int,
    save_every: int,
    meets: Meets = Meets(False, False),
    averages: bool = False,
) -> list[Place]:
    """The run that a simulation makes of the same settings, step for step.

    Everybody saves at the beginning, whenever all clients have done a multiple of ``save_every`` steps, and at the end;
    where a round ends with an average, after it.
    """
    scored = set(scored_rounds(train, evaluate_every))
    places = [Place("evaluate"), *([Place("meet", number=FIRST)] if meets.first else []), Place("save")]
    done = dict.fromkeys(clients, 0)
    for number in range(1, train.rounds + 1):
        for client in turns(clients, train, seed, number):
            places.append(Place("step", client))
            done[client] += 1
            steps = set(done.values())
            if len(steps) == 1 and steps.pop() % save_every == 0:
                places.append(Place("save"))
        if averages:
            places.insert(len(places) - (places[-1].what == "save"), Place("average", number=number))
        if number == train.rounds:
            places += [Place("flush"), *([Place("meet", number=LAST)] if meets.last else [])]
        if number in scored:
            places.append(Place("evaluate", number=number))
    return [*places, Place("save")]
