"""Which gradients of a client's step are out of proportion, and how far large ones are scaled down."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from flexp.config import GuardConfig
from flexp.errors import BadValuesError

SMALL = 1.0
"""A median below this counts as this: where training has converged, an ordinary gradient is many times the median."""
OWN = 16
"""Norms of each client that ``clip = "median"`` looks at: a client has one vote, however many steps it does."""


class Bounds:
    """Judges gradients by their global norm, and remembers the norms that it accepted."""

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        self._norms: deque[float] = deque(maxlen=self.config.median_over)
        self._own: dict[str, deque[float]] = {}  # the last of each client's, for clip = "median"

    @property
    def most(self) -> float | None:
        """The largest norm that is accepted now; ``None``: any that is finite."""
        limits = [] if self.config.max_norm is None else [self.config.max_norm]
        if self.config.explode is not None and len(self._norms) >= min(self.config.settle, self.config.median_over):
            limits.append(self.config.explode * max(SMALL, statistics.median(self._norms)))
        return min(limits, default=None)

    def judge(self, client: str, step: int, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A whole step's gradient as it may reach the shared weights, clipped if that is asked for.

        Raises:
            BadValuesError: its norm is not finite, or beyond a bound.
        """
        if not gradients:
            return gradients
        norm = float(torch.nn.utils.get_total_norm([gradients[name] for name in sorted(gradients)]))
        most = self.most
        if not norm < float("inf"):
            raise BadValuesError(f"client {client}: the gradient of step {step} is not finite")
        if most is not None and norm > most:
            raise BadValuesError(
                f"client {client}: the gradient of step {step} has the norm {norm:.3g}, the server takes at most "
                f"{most:.3g} ({self._why(most)}), so the shared blocks were not updated; lower train.personal.lr"
            )
        clip = self._clip(client)
        self._norms.append(norm)
        if self.config.clip == "median":
            self._own.setdefault(client, deque(maxlen=OWN)).append(norm)
        if clip is None or norm <= clip:
            return gradients
        return {name: value * (clip / norm) for name, value in gradients.items()}

    def state(self) -> dict[str, Tensor]:
        """The norms accepted last; nothing before the first."""
        own = {f"norms/{name}": torch.tensor(list(norms), dtype=torch.float64) for name, norms in self._own.items()}
        return own | ({"norms": torch.tensor(list(self._norms), dtype=torch.float64)} if self._norms else {})

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self._norms.clear()
        self._norms.extend(float(value) for value in state.get("norms", ()))
        found = {key.removeprefix("norms/"): value for key, value in state.items() if key.startswith("norms/")}
        self._own = {name: deque(map(float, value), maxlen=OWN) for name, value in found.items()}

    def _clip(self, client: str) -> float | None:
        """What a larger norm of this client is scaled down to."""
        if self.config.clip != "median":
            return self.config.clip
        others = [statistics.median(norms) for name, norms in self._own.items() if name != client]
        return statistics.median(others) if others else None

    def _why(self, most: float) -> str:
        if most == self.config.max_norm:
            return "server.guard.max_norm"
        return f"server.guard.explode = {self.config.explode:g} times the median of the last {len(self._norms)}"
