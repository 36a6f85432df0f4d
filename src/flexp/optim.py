"""Optimisers as both sides use them: by name, with a schedule, clipping, and a state that needs no pickle."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from flexp.config import OptimizerConfig
from flexp.errors import StorageError, TrainingError


class Updater:
    """Applies gradients to named parameters.

    Args:
        total_steps: when a schedule reaches zero; needed for ``linear`` and ``cosine``.
        new: names of the parameters whose rate is ``config.new_lr``, if that is set.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        total_steps: int | None = None,
        new: Collection[str] = (),
    ) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.total_steps = total_steps
        self.steps = 0
        self._optimizer = _make(self.parameters, config, new) if self.parameters else None

    @property
    def lr(self) -> float:
        """The learning rate of the next step (of new weights: ``new_lr``, on the same schedule)."""
        return self.config.lr * schedule(self.config, self.steps, self.total_steps)

    def step(self, norm: float | None = None) -> float:
        """Clip the gradients that the parameters hold, apply them, drop them.

        Args:
            norm: their :func:`total`, where it is known.

        Returns:
            The global norm of the gradients before clipping.

        Raises:
            TrainingError: a gradient is not finite; nothing was applied, and the gradients are dropped.
        """
        # Sorted, since a sum's last bits depend on its order, and a checkpoint may come back in another one.
        parameters = [self.parameters[name] for name in sorted(self.parameters)]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = laid_out(parameter.grad, parameter)
        gradients = [value.grad for value in parameters if value.grad is not None]
        if self._optimizer is None or not gradients:
            norm = 0.0
        else:
            norm = total(norms(gradients)) if norm is None else norm
            if not math.isfinite(norm):
                self.forget()
                raise TrainingError(
                    f"step {self.steps + 1}: a gradient is not finite, so nothing was applied; lower train.personal.lr "
                    f"or train.shared.lr (now {self.lr:g}), or use model.dtype = 'float32'"
                )
            if self.config.clip is not None and norm > self.config.clip:
                torch._foreach_mul_(gradients, self.config.clip / (norm + 1e-6))
            factor = schedule(self.config, self.steps, self.total_steps)
            for group in self._optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return norm

    def forget(self) -> None:
        """Drop the gradients that the parameters hold."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def replace(self, replacements: Mapping[str, nn.Parameter]) -> None:
        """Go on with other parameter objects in the place of those of the same names, keeping their state."""
        assert self._optimizer is not None
        swap = {id(self.parameters[name]): new for name, new in replacements.items()}
        for group in self._optimizer.param_groups:
            group["params"] = [swap.get(id(value), value) for value in group["params"]]
        for name, new in replacements.items():
            old = self.parameters[name]
            if old in self._optimizer.state:
                self._optimizer.state[new] = self._optimizer.state.pop(old)
            self.parameters[name] = new

    def move(self, place: Callable[[str], torch.device]) -> None:
        """Go on with copies of the parameters and their state elsewhere (by their names), which hold no gradients."""
        self.replace(
            {
                name: nn.Parameter(value.detach().to(place(name)), requires_grad=value.requires_grad)
                for name, value in self.parameters.items()
            }
        )
        assert self._optimizer is not None
        for parameter, state in self._optimizer.state.items():
            for key, value in state.items():
                state[key] = value.to(parameter.device) if isinstance(value, Tensor) else value

    def change(self, parameters: Mapping[str, nn.Parameter], new: Collection[str] = ()) -> None:
        """Go on with other parameters: those of the same name and object keep their state, others begin without any.

        Args:
            new: as for the constructor.
        """
        kept = {} if self._optimizer is None else dict(self._optimizer.state)
        self.parameters = dict(parameters)
        self._optimizer = _make(self.parameters, self.config, new) if self.parameters else None
        if self._optimizer is not None:
            self._optimizer.state.update({value: kept[value] for value in self.parameters.values() if value in kept})

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Give some parameters the state that they had before, as :meth:`state` names it; without the steps."""
        assert self._optimizer is not None
        for entry, value in state.items():
            key, _, name = entry.partition("/")
            parameter = self.parameters[name]
            self._optimizer.state[parameter][key] = laid_out(value.clone().to(parameter.device), parameter)

    def state(self) -> dict[str, Tensor]:
        """Everything that :meth:`load` needs to go on bit for bit, as flat named tensors."""
        flat = {"steps": torch.tensor(self.steps)}
        if self._optimizer is not None:
            for name, parameter in self.parameters.items():
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        flat[f"{key}/{name}"] = value
        return flat

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`.

        Raises:
            StorageError: the state belongs to other parameters.
        """
        self.steps = int(state["steps"])
        if self._optimizer is None:
            return
        self._optimizer.state.clear()
        for entry, value in state.items():
            key, slash, name = entry.partition("/")
            if not slash:
                continue
            if name not in self.parameters:
                raise StorageError(f"the optimiser's saved state names {name}, which is not trained here")
            parameter = self.parameters[name]
            self._optimizer.state[parameter][key] = laid_out(value.clone().to(parameter.device), parameter)


def norms(values: Sequence[Tensor]) -> Tensor:
    """The norm of each, (N,) in main memory; a GPU is waited for once."""
    return stacked(torch._foreach_norm(list(values)))


def stacked(values: Sequence[Tensor]) -> Tensor:
    """Numbers of tensors, which may be on several devices, (N,) in main memory; each device is waited for once."""
    by_device: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        by_device.setdefault(value.device, []).append(place)
    if len(by_device) <= 1:
        return torch.stack(list(values)).cpu()
    found_N = torch.empty(len(values), dtype=values[0].dtype)
    for places in by_device.values():
        found_N[places] = torch.stack([values[place] for place in places]).cpu()
    return found_N


def total(norms_N: Tensor) -> float:
    """The norm of all values together that have these norms, as :func:`torch.nn.utils.get_total_norm` has it."""
    return float(torch.linalg.vector_norm(norms_N))


def merged(
    names: Sequence[str], norms_N: Tensor, more: Sequence[str], more_N: Tensor | None
) -> tuple[tuple[str, ...], Tensor]:
    """Names with their norms, in the order of the names: a norm's last bits depend on it."""
    if more_N is None:
        return tuple(names), norms_N
    both = [*names, *more]
    order = sorted(range(len(both)), key=both.__getitem__)
    both_N = torch.cat([norms_N.to(more_N.dtype), more_N])[order]
    return tuple(both[place] for place in order), both_N


def laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """``value`` with its elements in memory as those of ``parameter``: torch's fused optimisers pair them by place.

    ``torch.autograd.grad`` gives what an operation left, a transposed one too, unlike ``backward``.
    """
    if value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def schedule(config: OptimizerConfig, step: int, total_steps: int | None) -> float:
    """The factor on the learning rate at ``step`` (0, 1, …): linear warm-up, then constant, linear or cosine decay."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant" or not total_steps:
        return 1.0
    span = max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":  # written as transformers writes it, so that rates are equal to the last bit
        return max(0, total_steps - step) / span
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))


def _make(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, new: Collection[str]
) -> torch.optim.Optimizer:
    fresh = [name for name in parameters if name in new and config.new_lr is not None]
    others = [name for name in parameters if name not in fresh]
    groups = [
        {"params": [parameters[name] for name in names], "peak": rate, "lr": rate}
        for names, rate in ((others, config.lr), (fresh, config.new_lr))
        if names
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    cls = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return cls(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)
