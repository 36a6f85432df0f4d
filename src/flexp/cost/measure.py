"""Measuring a device: seconds of a model's own blocks, forward and backward, and memory that is no tensor.

One block of each kind is loaded (and a second of the first kind), with the ends on a client, without on a server, and
trained for a few steps on random inputs. With one thread the seconds are the process's own, so that whatever else runs
on the machine does not count; with more they are the clock's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from flexp.config import OptimizerConfig
from flexp.cost.choice import Choice
from flexp.cost.counting import noted_forward
from flexp.cost.echo import random_batch
from flexp.cost.memory import memory, overhead
from flexp.cost.model_cost import ModelCost, PieceCost
from flexp.cost.probe import Probe, measure
from flexp.cost.profile import ModelSeconds, PieceSeconds, Role, ShapeSeconds
from flexp.kinds import KINDS, ModelKind
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage
from flexp.models.stage import Stage
from flexp.models.tuning import tune
from flexp.optim import Updater

REPEATS = 12
"""Steps that are timed; each interval counts with the shortest that it took."""


def clock(device: torch.device) -> Callable[[], float]:
    """The process's own seconds with one thread, the clock's with more; on a GPU the clock's once it is done."""
    if device.type == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


def measure_model(
    cost: ModelCost,
    *,
    role: Role = "client",
    examples: int = 8,
    rank: int | None = None,
    memory_too: bool = True,
    repeats: int = REPEATS,
) -> ModelSeconds:
    """Seconds of every piece of ``cost``'s model on this machine, with full tuning or adapters of ``rank``.

    Args:
        examples: of an exchange; a quarter of it is measured as well, since every piece costs something for any size.
        memory_too: measure in a process of its own how much memory is no tensor (a client's, where ``/proc`` tells it).

    Raises:
        ModelError: the model cannot be loaded or split.
        FlexpError: the process that measures memory failed.
    """
    stage = _load(cost, role, rank)
    chosen = sorted(stage.part.blocks)
    sizes = sorted({max(1, examples // 4), examples})
    shapes = []
    update = 0.0
    for size in sizes:
        seconds, update = _time(cost, stage, chosen, role, size, repeats)
        shapes.append(_shape(cost, chosen, role, size, rank, seconds))
    return ModelSeconds(
        model=cost.fingerprint,
        name=cost.config.id.rpartition("/")[2],
        kind=cost.kind,
        dtype=cost.config.dtype,
        autocast=cost.config.autocast,
        rank=rank,
        length=cost.length,
        shapes=shapes,
        update=update,
        overhead_bytes=overhead_bytes(cost, examples, rank) if memory_too and role == "client" else None,
    )


def flops_per_second(measured: ModelSeconds) -> float:
    """Operations a second over all blocks and the head of the largest size: for models that were not measured."""
    shape = max(measured.shapes, key=lambda item: item.examples)
    pieces = [*shape.blocks, shape.head]
    return sum(p.forward_flops + p.backward_flops for p in pieces) / sum(p.forward + p.backward for p in pieces)


def overhead_bytes(cost: ModelCost, examples: int, rank: int | None) -> int:
    """Peak memory of the shallowest client that is no tensor: measured, less what its tensors are predicted to be."""
    cut = (1, cost.blocks)
    probe = Probe(
        model=cost.config.id,
        kind=cost.kind,
        cut=cut,
        examples=examples,
        length=cost.length,
        labels=_labels(cost),
        model_config=cost.config.tuned(rank).model_dump(mode="json"),
        optimizer=OptimizerConfig.model_validate({"name": cost.optimizer}).model_dump(mode="json"),
    )
    tensors = memory(cost, Choice(cut, examples, rank=rank), overhead_bytes=0) - overhead(rank, False, 0)
    return max(0, measure(probe).peak - tensors - overhead(rank, False, 0))


def _labels(cost: ModelCost) -> list[str] | None:
    return [str(number) for number in range(cost.labels)] if KINDS[cost.kind].named else None


def _load(cost: ModelCost, role: Role, rank: int | None) -> Stage:
    firsts = sorted(set(cost.kinds))
    twins = [index for index, first in enumerate(cost.kinds) if first == firsts[0] and index != first]
    chosen = frozenset([*firsts, *twins[:1]])
    model, part = cost.config.tuned(rank), Part(chosen, ends=role == "client")
    labels = None if model.id.startswith("arch:") else _labels(cost)
    stage = load_stage(model, cast(ModelKind, cost.kind), part, labels=labels, pad_token_id=0)
    tune(stage, model)
    stage.model.train()
    return stage


def _time(
    cost: ModelCost, stage: Stage, chosen: list[int], role: Role, examples: int, repeats: int
) -> tuple[list[float], float]:
    """Seconds between a step's notes (see :func:`flexp.cost.counting.noted_forward`), and the optimiser's for each
    parameter."""
    now = clock(stage.model.device)
    updater = Updater(stage.trainable(), OptimizerConfig.model_validate({"name": cost.optimizer, "lr": 1e-9}))
    probe = Probe(cost.config.id, cost.kind, None, examples, cost.length, _labels(cost), {}, {})
    batch = random_batch(probe, stage.model.config) if role == "client" else {}
    best: list[float] = []
    updates: list[float] = []
    for number in range(repeats + 2):  # the first two make the optimiser's state and fill caches
        notes: list[float] = [now()]

        def note(_: Any = None, notes: list[float] = notes) -> None:
            notes.append(now())

        if role == "client":
            loss = noted_forward(stage, chosen, batch, note, below=True)
            note()
            torch.autograd.backward(loss)
        else:
            output, grad = _server_forward(cost, stage, chosen, examples, note)
            note()
            note()  # a server has no head
            torch.autograd.backward(output, grad)
        note()
        began = now()
        if role == "server":  # which looks at every gradient before it takes any
            torch.nn.utils.get_total_norm(
                [value.grad for value in updater.parameters.values() if value.grad is not None]
            )
        updater.step()
        updates.append(now() - began)
        spans = [later - earlier for earlier, later in itertools.pairwise(notes)]
        if number == 2:
            best = spans
        elif number > 2:
            best = [min(pair) for pair in zip(best, spans, strict=True)]
    trained = sum(value.numel() for value in updater.parameters.values())
    return best, min(updates[2:]) / max(1, trained)


def _server_forward(
    cost: ModelCost, stage: Stage, chosen: list[int], examples: int, note: Callable[..., None]
) -> tuple[Tensor, Tensor]:
    tokens = cost.at(examples, still=True).message_bytes // (stage.model.dtype.itemsize * cost.hidden * examples)
    hidden_BTH = torch.randn(examples, tokens, cost.hidden, dtype=stage.model.dtype).to(stage.model.device)
    mask_BT = None if stage.anatomy.image else torch.ones(examples, tokens, dtype=torch.long)
    plan = stage.plan_without_inputs(hidden_BTH, mask_BT)
    hidden_BTH = hidden_BTH.requires_grad_()
    note()
    for index in chosen:
        hidden_BTH.register_hook(note)  # type: ignore[no-untyped-call]
        hidden_BTH = stage.run(hidden_BTH, plan, index, index + 1)
        note()
    return hidden_BTH, torch.ones_like(hidden_BTH)


def _shape(
    cost: ModelCost, chosen: list[int], role: Role, examples: int, rank: int | None, seconds: list[float]
) -> ShapeSeconds:
    counted = cost.at(examples, rank)
    last = 2 * len(chosen) + 3

    def piece(number: int, of: PieceCost) -> PieceSeconds:
        return PieceSeconds(
            forward=seconds[number],
            backward=seconds[last - number],
            forward_flops=of.forward_flops,
            backward_flops=of.backward_flops,
        )

    found = {index: piece(number + 1, counted.blocks[index]) for number, index in enumerate(chosen)}
    of_kind: dict[int, list[PieceSeconds]] = {}
    for index, value in found.items():
        of_kind.setdefault(cost.kinds[index], []).append(value)
    means = {kind: _mean(values) for kind, values in of_kind.items()}
    embed = PieceSeconds(forward=seconds[0], backward=seconds[last] if cost.config.train_embeddings else 0.0)
    nothing = PieceSeconds(forward=0.0, backward=0.0)
    return ShapeSeconds(
        examples=examples,
        embed=embed,
        blocks=[means[kind] for kind in cost.kinds],
        head=piece(len(chosen) + 1, counted.head) if role == "client" else nothing,
    )


def _mean(values: list[PieceSeconds]) -> PieceSeconds:
    dumps = [value.model_dump() for value in values]
    return PieceSeconds(**{key: sum(dump[key] for dump in dumps) / len(dumps) for key in dumps[0]})
