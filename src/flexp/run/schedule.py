"""A run as a list of places: who steps when, when all are scored, and when all save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flexp.config import TrainConfig
from flexp.methods.turns import turns


@dataclass(frozen=True)
class Place:
    """One thing to do: a ``step`` of ``client``; scores of everybody after round ``number`` (``evaluate``); a snapshot
    of everybody (``save``); an update of the shared blocks with what waits (``flush``)."""

    what: Literal["step", "evaluate", "save", "flush"]
    client: str = ""
    number: int = 0


def scored_rounds(train: TrainConfig, every: int) -> list[int]:
    """The rounds after which personal models are scored, 0 being before training."""
    return [0] + [number for number in range(1, train.rounds + 1) if number % every == 0 or number == train.rounds]


def schedule(
    clients: Sequence[str], train: TrainConfig, seed: int, evaluate_every: int, save_every: int
) -> list[Place]:
    """The run that a simulation makes of the same settings, step for step.

    Everybody saves at the beginning, whenever all clients have done a multiple of ``save_every`` steps, and at the end.
    """
    scored = set(scored_rounds(train, evaluate_every))
    places = [Place("evaluate"), Place("save")]
    done = dict.fromkeys(clients, 0)
    for number in range(1, train.rounds + 1):
        for client in turns(clients, train, seed, number):
            places.append(Place("step", client))
            done[client] += 1
            steps = set(done.values())
            if len(steps) == 1 and steps.pop() % save_every == 0:
                places.append(Place("save"))
        if number == train.rounds:
            places.append(Place("flush"))
        if number in scored:
            places.append(Place("evaluate", number=number))
    return [*places, Place("save")]
