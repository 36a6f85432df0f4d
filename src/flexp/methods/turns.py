"""Whose turn it is: a deterministic order of all clients' steps in a round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flexp.config import TrainConfig
from flexp.data.ordering import generator


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
