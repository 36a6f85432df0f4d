"""Which completed steps of clients train the shared blocks, and what several of them come to.

Several are against clients that do not mean well; ``python -m benchmarks poisoning`` measures what each gives.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flexp.config import ServerConfig
from flexp.errors import StorageError
from flexp.gaussian import drawn, key_as_tensor, key_of, secret_key
from flexp.optim import norms, stacked, total

DECAY = 0.9
"""Of the direction that the last steps took."""


class Mean:
    """For every parameter the mean of several steps' gradients, weighted by their items. Sums are fp32 at least."""

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, gradients: Mapping[str, Tensor], weight: float, client: str = "") -> None:
        """One step more."""
        for name, gradient in gradients.items():
            if name in self._sums:
                self._sums[name].add_(gradient, alpha=weight)
            else:
                self._sums[name] = _fine(gradient) * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight
        self.steps += 1

    def take(self) -> dict[str, Tensor]:
        """What they come to; then it begins anew."""
        means = {name: total / self._weights[name] for name, total in self._sums.items()}
        self.steps, self._sums, self._weights = 0, {}, {}
        return means

    def state(self) -> dict[str, Tensor]:
        """As flat named tensors."""
        weights = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._weights.items()}
        return _named("sums", self._sums) | _named("sum-weights", weights) | {"waiting": torch.tensor(self.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, which may stand among others."""
        self._sums = {name: value.clone() for name, value in _under("sums", state).items()}
        self._weights = {name: float(value) for name, value in _under("sum-weights", state).items()}
        self.steps = int(state["waiting"])


class Covered(Mean):
    """A mean in which steps count alike and whose sum gaussian noise covers, so that nobody who sees the weights learns
    much of one client (Abadi et al., 2016, arXiv 1607.00133; by client, McMahan et al., 2018, arXiv 1710.06963).

    The noise follows from a secret key and the sum: a sum that comes again, since a server goes back to a snapshot,
    has the same noise, and another sum other noise, so that no difference of two is bare.

    Args:
        sigma: its standard deviation ÷ C; ``clip``: C, the norm that no step exceeds.
    """

    def __init__(self, sigma: float, clip: float) -> None:
        super().__init__()
        self._sigma, self._clip, self._key, self._taken = sigma, clip, secret_key(), 0
        self._now: Counter[str] = Counter()  # steps of each client in the next update
        self._told: dict[str, float] = {}  # by client, the square of what :attr:`told` is

    def add(self, gradients: Mapping[str, Tensor], weight: float, client: str = "") -> None:
        """One step more."""
        super().add(gradients, 1.0)
        self._now[client] += 1

    def take(self) -> dict[str, Tensor]:
        """As of :class:`Mean`."""
        for name, value in self._sums.items():
            self._sums[name] = value + self._sigma * self._clip * self._drawn(name, value)
        for client, steps in self._now.items():
            self._told[client] = self._told.get(client, 0.0) + (2 * steps / self._sigma) ** 2
        self._taken += 1
        self._now.clear()
        return super().take()

    @property
    def told(self) -> float:
        """Of the client that is told most: how far two gaussians of deviation 1 are apart that are as hard to tell from
        each other as all updates are from those with other steps of its own (each at most 2C away)."""
        return math.sqrt(max(self._told.values(), default=0.0))

    def state(self) -> dict[str, Tensor]:
        """As of :class:`Mean`."""
        counts = {name: torch.tensor(count) for name, count in self._now.items()}
        told = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._told.items()}
        own = {"noise-key": key_as_tensor(self._key), "noise-taken": torch.tensor(self._taken)}
        return super().state() | own | _named("noise-now", counts) | _named("noise-told", told)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """As of :class:`Mean`.

        Raises:
            StorageError: nothing covered the steps so far.
        """
        if "noise-key" not in state:
            raise StorageError("the saved shared blocks were trained without server.noise, so no ε holds for them: "
                               "leave it out, or begin anew")  # fmt: skip
        super().load(state)
        self._key, self._taken = key_of(state["noise-key"]), int(state["noise-taken"])
        self._now = Counter({name: int(count) for name, count in _under("noise-now", state).items()})
        self._told = {name: float(value) for name, value in _under("noise-told", state).items()}

    def _drawn(self, name: str, value: Tensor) -> Tensor:
        own = value.cpu().flatten().view(torch.uint8).numpy().tobytes()
        return drawn(value.shape, self._key, f"{self._taken} {name} ".encode(), own).to(value)


class Trimmed:
    """For every number the mean over several steps, without the ``trim`` largest and smallest (Yin et al., 2018, arXiv
    1803.01498); fewer are left out where fewer steps reached a parameter. Steps count alike, whatever they claim.
    """

    def __init__(self, trim: int) -> None:
        self._trim = trim
        self._steps: list[dict[str, Tensor]] = []

    @property
    def steps(self) -> int:
        return len(self._steps)

    def add(self, gradients: Mapping[str, Tensor], weight: float, client: str = "") -> None:
        """One step more."""
        self._steps.append(dict(gradients))

    def take(self) -> dict[str, Tensor]:
        """What they come to; then it begins anew."""
        steps, self._steps = self._steps, []
        found = {}
        for name in {name: None for step in steps for name in step}:
            values = torch.stack([_fine(step[name]) for step in steps if name in step])
            trim = min(self._trim, (len(values) - 1) // 2)
            found[name] = values.sort(0).values[trim : len(values) - trim].mean(0)
        return found

    def state(self) -> dict[str, Tensor]:
        """As flat named tensors."""
        flat = {"waiting": torch.tensor(self.steps)}
        for number, step in enumerate(self._steps):
            flat |= _named(f"step-{number}", step)
        return flat

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, which may stand among others."""
        self._steps = [_under(f"step-{number}", state) for number in range(int(state["waiting"]))]


class Past:
    """Compares a step's gradient with the direction that the last steps took.

    Args:
        least: the cosine between them that a step must have.
        settle: steps before it is asked for.
    """

    def __init__(self, least: float, settle: int) -> None:
        self._least, self._settle = least, settle
        self._steps = 0
        self._direction: dict[str, Tensor] = {}

    def fits(self, gradients: Mapping[str, Tensor]) -> bool:
        """Whether it goes on in that direction, as far as they have parameters in common; if so, it is part of it."""
        norm = total(norms([*gradients.values()])) if gradients else 0.0
        if not norm:
            return True
        common = [name for name in gradients if name in self._direction]
        if self._steps >= self._settle and common:
            there, here = ([own[name] for name in common] for own in (self._direction, gradients))
            product = sum(stacked([(one * two).sum() for one, two in zip(there, here, strict=True)]).tolist())
            if product < self._least * total(norms(there)) * total(norms(here)):
                return False
        for name, gradient in gradients.items():
            fresh = _fine(gradient) * ((1 - DECAY) / norm)
            known = self._direction.get(name)
            self._direction[name] = fresh if known is None else known.mul_(DECAY).add_(fresh)
        self._steps += 1
        return True

    def state(self) -> dict[str, Tensor]:
        """As flat named tensors."""
        return _named("past", self._direction) | {"past-steps": torch.tensor(self._steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, which may stand among others, or may not be there."""
        self._direction = {name: value.clone() for name, value in _under("past", state).items()}
        self._steps = int(state.get("past-steps", 0))


class Quota:
    """Lets no client train the shared blocks much more than the others do.

    Args:
        ratio: a client's steps count up to so many times the median of the others' …
        ahead: … and so many more.
        most: that count of any client; ``None``: any number.
        say: told once when a client's steps no longer count.
    """

    def __init__(self, ratio: float, ahead: int, most: int | None, say: Callable[[str], None]) -> None:
        self._ratio, self._ahead, self._most, self._say = ratio, ahead, most, say
        self._taken: Counter[str] = Counter()
        self._told: set[str] = set()

    def take(self, client: str) -> bool:
        """Whether one step more of this client counts."""
        others = [count for name, count in self._taken.items() if name != client]
        taken = self._taken[client]
        why = ""
        if self._most is not None and taken >= self._most:
            why = "all that the run has: further ones are answered, and train the shared blocks no more"
        elif others and taken >= self._ahead + self._ratio * statistics.median(others):
            why = (f"and others {statistics.median(others):g} (their median): further ones are answered, and train the "
                   "shared blocks only when the others have come nearer")  # fmt: skip
        if why:
            if client not in self._told:
                self._told.add(client)
                self._say(f"{client} has done {taken} steps, {why} (deployment.quota)")
            return False
        self._taken[client] += 1
        self._told.discard(client)
        return True

    def state(self) -> dict[str, Tensor]:
        """As flat named tensors."""
        return _named("quota", {name: torch.tensor(count) for name, count in self._taken.items()})

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, which may stand among others."""
        self._taken = Counter({name: int(count) for name, count in _under("quota", state).items()})


def _fine(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))  # many small gradients would be lost in bf16


def _named(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}/{name}": value for name, value in tensors.items()}


def _under(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): value for name, value in state.items() if name.startswith(f"{kind}/")}


def rule_of(config: ServerConfig) -> Mean | Trimmed:
    """How a server gathers steps (``server.update``, ``server.noise``)."""
    if config.noise:
        assert isinstance(config.guard.clip, float)
        return Covered(config.noise, config.guard.clip)
    return Trimmed(config.trim) if config.update == "trimmed" else Mean()
