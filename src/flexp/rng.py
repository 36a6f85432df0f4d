"""One stream of random numbers per party, so that dropout does not depend on who else computes in this process.

torch draws dropout from one generator per device, which all threads share. So a party takes a *turn* at it: its own
state is put in, and the generator's is back when the turn is over. One party has a turn at a time; while it waits for
another (a client for its server) its turn rests.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


def derived_seed(seed: int, *purpose: str) -> int:
    """A seed for one purpose, independent of every other's: a hash of ``seed`` and the words."""
    words = "\0".join([str(seed), *purpose])
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A fresh generator for ``purpose``: equal seed and purpose give equal numbers, whatever else was drawn.

    A client's split therefore does not change when another client joins or leaves.
    """
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16]))


class RandomStream:
    """A state of torch's generators that belongs to one party.

    Args:
        devices: where the party computes; the state is that of the CPU and of every GPU's generator among them.
    """

    def __init__(self, seed: int, *devices: torch.device) -> None:
        self.devices = devices
        places = [CPU, *filter(_draws, devices)]
        states = [torch.Generator(where).manual_seed(seed).get_state() for where in places]
        self.state: Tensor = torch.cat(states)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside the ``with`` block, and go on from there the next time."""
        with drawing_from(self.state, *self.devices) as turn:
            try:
                yield
            finally:
                self.state = turn.state()

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Around :meth:`active`: if the ``with`` block fails, what was drawn is drawn again the next time."""
        before = self.state
        try:
            yield
        except BaseException:
            self.state = before
            raise


class Turn:
    """A party's turn at the generators of its devices."""

    def __init__(self, *devices: torch.device) -> None:
        self.devices = devices
        self.running = False

    def begin(self, state: Tensor) -> None:
        _lock.acquire()
        self._outer = self.state()
        try:
            self._put(state)
        except BaseException:
            _lock.release()
            raise
        self.running = True

    def end(self) -> Tensor:
        """Put the generators back; gives where the party has got to."""
        state = self.state()
        self._put(self._outer)
        self.running = False
        _lock.release()  # perhaps in another thread than the one that began: autograd has one for each GPU
        return state

    def state(self) -> Tensor:
        """Where the generators are."""
        return drawn(*self.devices)

    def _put(self, state: Tensor) -> None:
        draw_from_here(state, *self.devices)


_lock = threading.Lock()
_thread = threading.local()


def current_turn() -> Turn | None:
    """The turn that this thread's computation is part of."""
    return getattr(_thread, "turn", None)


@contextmanager
def drawing_from(state: Tensor, *devices: torch.device) -> Iterator[Turn]:
    """Draw from a copy of ``state`` inside the ``with`` block; the generator's own state is restored after it."""
    outer, turn = current_turn(), Turn(*devices)
    with resting(outer):
        turn.begin(state)
        _thread.turn = turn
        try:
            yield turn
        finally:
            _thread.turn = outer
            turn.end()


@contextmanager
def resting(turn: Turn | None) -> Iterator[None]:
    """Inside the ``with`` block others may have their turn, in this thread or another; then ``turn`` goes on."""
    if turn is None or not turn.running:
        yield
        return
    state = turn.end()
    try:
        yield
    finally:
        turn.begin(state)


def drawn(*devices: torch.device) -> Tensor:
    """The state of the generators that computing on ``devices`` draws from: the CPU's and every GPU's own."""
    states = [torch.get_rng_state()]
    for device in filter(_draws, devices):
        module: Any = torch.get_device_module(device)
        states.append(module.get_rng_state(*_which(device)))
    return states[0] if len(states) == 1 else torch.cat(states)


def draw_from_here(state: Tensor, *devices: torch.device) -> None:
    """Set those generators to :func:`drawn`."""
    places, own = [*filter(_draws, devices)], len(torch.get_rng_state())
    # What was saved beside a GPU is longer. Else not even a slice: models are counted on tensors without content.
    torch.set_rng_state(state[:own] if len(state) > own else state)
    if not places:
        return
    for device, part in zip(places, state[own:].chunk(len(places)), strict=True):  # they are all of one kind
        module: Any = torch.get_device_module(device)
        module.set_rng_state(part.clone(), *_which(device))


def seed_here(seed: int, device: torch.device = CPU) -> None:
    """Let the generators that computing on ``device`` draws from begin anew from a seed."""
    draw_from_here(RandomStream(seed, device).state, device)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were: what is drawn inside the ``with`` block is not missed after it."""
    state = drawn(device)
    try:
        yield
    finally:
        draw_from_here(state, device)


class BlockDraws:
    """What the blocks draw for one exchange of a client: each from a seed of its own, so the same whenever the exchange
    is tried again, whatever ran before, and on whichever server the block is."""

    def __init__(self, seed: int, exchange: int, *, watched: bool = False) -> None:
        self._seed, self._exchange, self._watched = seed, exchange, watched
        self._begun: tuple[torch.device, Tensor] | None = None
        self._drew = False

    def begin(self, block: int, place: torch.device) -> None:
        """That block computes next, there."""
        self._look()
        seed_here(derived_seed(self._seed, str(self._exchange), str(block)), place)
        self._begun = (place, drawn(place)) if self._watched else None

    @property
    def drew(self) -> bool:
        """Whether any block has drawn, where this is ``watched``."""
        self._look()
        return self._drew

    def _look(self) -> None:
        if self._begun is not None:
            place, before = self._begun
            self._drew |= not torch.equal(before, drawn(place))


def _which(device: torch.device) -> list[torch.device]:
    return [] if device.type == "mps" else [device]  # which has one alone


def _draws(device: torch.device) -> bool:
    """Whether the device has a generator of its own."""
    return device.type not in ("cpu", "meta")
