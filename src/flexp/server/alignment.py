"""The alignment term and its gradient at the client's activation, in closed form.

FlexP-SFL (arXiv 2508.10349) ties what a client's personal blocks compute, z, to what the server's shared blocks compute
from the same input, z', by KL(softmax(z') ‖ softmax(z)) over the hidden dimension. Nothing flows back into z'. The
server holds both, so it adds the gradient at z to what it sends down anyway; tests prove each equal to autograd's.

Shapes: z and z' are (B, T, H); the mask is (B, T), one for tokens that count; N is the number of those. Every term is
a mean over the N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from flexp.config import AlignConfig
from flexp.links.messages import ForwardRequest
from flexp.models.execution import ExecutionPlan
from flexp.models.stage import Stage
from flexp.registry import ALIGNMENTS

EPSILON = 1e-6


def alignment(
    config: AlignConfig, teacher_BTH: Tensor, student_BTH: Tensor, mask_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The alignment term (without λ; a number) and its gradient at ``student_BTH``.

    Computed in fp32, or in the activations' type where that is finer.
    """
    teacher, student = _fine(teacher_BTH), _fine(student_BTH)
    if mask_BT is None:
        counts = torch.ones(student.shape[:2], dtype=student.dtype, device=student.device)
    else:
        counts = mask_BT.to(student.dtype)
    tokens = counts.sum().clamp(min=1.0)
    deviation: Tensor | None = None
    if config.normalize:
        teacher, _ = _standardise(teacher)
        student, deviation = _standardise(student)
    term_BT, grad_BTH = ALIGNMENTS[config.kind].term(teacher, student, config.temperature)
    if deviation is not None:
        grad_BTH = _through_standardise(grad_BTH, student, deviation)
    return (term_BT * counts).sum() / tokens, grad_BTH * (counts / tokens).unsqueeze(-1)


def teachers(config: AlignConfig, stage: Stage, request: ForwardRequest, start: int) -> list[Tensor]:
    """z' at the aligned boundaries, ``start`` last: the shared blocks [s_min, s), or those of them that are here, run
    on what came as z_base, without gradients and without dropout."""
    assert request.base_BTH is not None
    teacher_BTH, found = request.base_BTH, list[Tensor]()
    plan = stage.plan_without_inputs(teacher_BTH, request.mask_BT, request.positions_BT)
    stage.model.train(False)
    with torch.no_grad():
        for index in range(min(stage.part.blocks), start):
            teacher_BTH = stage.run(teacher_BTH, plan, index, index + 1)
            if config.at == "every-block" or index == start - 1:
                found.append(teacher_BTH)
    return found


def aligned(
    config: AlignConfig, teachers_BTH: Sequence[Tensor], request: ForwardRequest
) -> tuple[Tensor, list[Tensor]]:
    """The alignment terms at the aligned boundaries, whose mean counts, and the gradients at them, the cut last."""
    students, mask_BT = (*request.inner_BTH, request.hidden_BTH), request.mask_BT
    pairs = zip(teachers_BTH, students, strict=True)
    values, grads = zip(
        *(alignment(config, there.to(here.device), here, mask_BT) for there, here in pairs), strict=True
    )
    return torch.stack(values), [grad / len(values) for grad in grads]


def taught(
    stage: Stage,
    run: Callable[[Tensor, ExecutionPlan, int, int], Tensor],
    request: ForwardRequest,
    start: int,
    parameters: Mapping[str, nn.Parameter],
    task_BTH: Tensor,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Gradients of the shared blocks [s_min, s), of which the client trains copies of its own, on its data; and that at
    what came as z_base, if it is to have one.

    The server's z' = server[s_min, s)(z_base) goes nowhere, so it has no gradient; ∂task/∂z at the client's z, which is
    here, stands for it. Where the copies are equal it is exact. Without, shared blocks would learn only from clients
    that cut below them. ``run`` runs blocks, as :meth:`Stage.run` does, and with the exchange's dropout.
    """
    base_BTH = request.base_BTH
    assert base_BTH is not None
    names = [name for name in parameters if stage.within(name, min(stage.part.blocks), start)]
    if not names and not base_BTH.requires_grad:
        return {}, None  # they are frozen, and none before them learns by them
    own_BTH, ends = pupil(stage, run, request, start), [base_BTH] if base_BTH.requires_grad else []
    wanted = [*ends, *(parameters[name] for name in names)]
    gradients = torch.autograd.grad(own_BTH, wanted, task_BTH.to(own_BTH.device), allow_unused=True)
    found = {name: value for name, value in zip(names, gradients[len(ends) :], strict=True) if value is not None}
    return found, gradients[0] if ends else None


def pupil(
    stage: Stage, run: Callable[[Tensor, ExecutionPlan, int, int], Tensor], request: ForwardRequest, start: int
) -> Tensor:
    """What the blocks that are :func:`taught` make of z_base."""
    assert request.base_BTH is not None
    plan = stage.plan_without_inputs(request.base_BTH, request.mask_BT, request.positions_BT)
    stage.model.train(True)
    return run(request.base_BTH, plan, min(stage.part.blocks), start)


def combine(task_BTH: Tensor, align_BTH: Tensor, how: str) -> Tensor:
    """The gradient that goes down to the client.

    ``sum`` is the paper's. ``project`` removes from the alignment gradient, where the two conflict (their inner product
    over the whole activation is negative), its component along the task gradient, as gradient surgery does between
    tasks (Yu et al., 2020, arXiv 2001.06782).
    """
    if how == "project":
        task, align = _fine(task_BTH), _fine(align_BTH)
        inner = (task * align).sum().clamp(max=0.0)  # where they agree, nothing is taken away
        align_BTH = align - inner / task.square().sum().clamp(min=1e-30) * task
    return task_BTH + align_BTH.to(task_BTH.dtype)


def _fine(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


class Alignment:
    """A kind of alignment that is a term of the loss; another package may add one (:mod:`flexp.registry`).

    What crosses is the same for all terms: the client sends z_base, and gets the term's gradient in ∂total/∂z.
    """

    name: ClassVar[str]

    @staticmethod
    def term(teacher_BTH: Tensor, student_BTH: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The term of every token (B, T), and its gradient at ``student_BTH``, the client's z; the server's z' has
        none."""
        raise NotImplementedError


class Kl(Alignment):
    """τ²·KL(p ‖ q) with p = softmax(z'/τ), q = softmax(z/τ): the gradient at z is τ·(q − p). τ = 1 is the paper's."""

    name = "kl"

    @staticmethod
    def term(teacher_BTH: Tensor, student_BTH: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(teacher_BTH / temperature, dim=-1)
        log_q = torch.log_softmax(student_BTH / temperature, dim=-1)
        p = log_p.exp()
        term_BT = (p * (log_p - log_q)).sum(-1)
        return temperature**2 * term_BT, temperature * (log_q.exp() - p)


class Mse(Alignment):
    """mean over H of (z − z')²."""

    name = "mse"

    @staticmethod
    def term(teacher_BTH: Tensor, student_BTH: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        difference = student_BTH - teacher_BTH
        return difference.square().mean(-1), 2.0 / student_BTH.shape[-1] * difference


class Cosine(Alignment):
    """1 − cos(z, z')."""

    name = "cosine"

    @staticmethod
    def term(teacher_BTH: Tensor, student_BTH: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        norm = student_BTH.norm(dim=-1, keepdim=True).clamp(min=EPSILON)
        unit = student_BTH / norm
        target = teacher_BTH / teacher_BTH.norm(dim=-1, keepdim=True).clamp(min=EPSILON)
        cosine = (unit * target).sum(-1, keepdim=True)
        return 1.0 - cosine.squeeze(-1), -(target - cosine * unit) / norm


def _standardise(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance over H, and the deviation that it was divided by."""
    deviation = (hidden.var(-1, unbiased=False, keepdim=True) + EPSILON).sqrt()
    return (hidden - hidden.mean(-1, keepdim=True)) / deviation, deviation


def _through_standardise(grad: Tensor, standard: Tensor, deviation: Tensor) -> Tensor:
    """The gradient at z, from the gradient at the standardised z."""
    centred = grad - grad.mean(-1, keepdim=True)
    return (centred - standard * (grad * standard).mean(-1, keepdim=True)) / deviation
