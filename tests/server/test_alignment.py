"""The closed forms of the alignment gradient are autograd's, and the terms are what they are called."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexp.config import AlignConfig
from flexp.server.alignment import EPSILON, alignment, combine

CASES = [
    AlignConfig(kind=kind, temperature=temperature, normalize=normalize)  # type: ignore[arg-type]
    for kind, temperature in [("kl", 0.5), ("kl", 1.0), ("kl", 4.0), ("mse", 1.0), ("cosine", 1.0)]
    for normalize in (False, True)
]
IDS = [f"{case.kind}-{case.temperature:g}{'-normalized' if case.normalize else ''}" for case in CASES]


def plain(config: AlignConfig, teacher: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """The term from torch's own functions, which autograd can differentiate."""
    teacher = teacher.detach()
    if config.normalize:
        teacher, student = (F.layer_norm(value, value.shape[-1:], eps=EPSILON) for value in (teacher, student))
    if config.kind == "kl":
        tau = config.temperature
        log_q, log_p = F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1)
        term = tau**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    elif config.kind == "mse":
        term = F.mse_loss(student, teacher, reduction="none").mean(-1)
    else:
        term = 1 - F.cosine_similarity(student, teacher, dim=-1)
    if mask is None:
        return term.mean()
    return term[mask.bool()].mean()


def pair(dtype: torch.dtype, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = scale * torch.randn(2, 3, 6, 16, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2, :3] = 0
    return teacher, student, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_closed_form_is_autograd(config: AlignConfig, dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    teacher, student, mask = pair(dtype)
    student.requires_grad_()
    expected = plain(config, teacher, student, mask if masked else None)
    (grad_expected,) = torch.autograd.grad(expected, student)
    value, grad = alignment(config, teacher, student.detach(), mask if masked else None)
    assert grad.dtype == dtype
    assert value == pytest.approx(expected.item(), rel=tolerance * 10, abs=tolerance)
    torch.testing.assert_close(grad, grad_expected, rtol=0, atol=tolerance)
    assert grad.abs().max() > 1e3 * tolerance
    if masked:
        assert (grad[mask == 0] == 0).all()


@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_bfloat16_is_computed_in_float32(config: AlignConfig) -> None:
    teacher, student, mask = pair(torch.bfloat16)
    value, grad = alignment(config, teacher, student, mask)
    same, grad_same = alignment(config, teacher.float(), student.float(), mask)
    assert value == same
    assert torch.equal(grad, grad_same)


@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_equal_activations_are_aligned(config: AlignConfig) -> None:
    teacher, _, mask = pair(torch.float64)
    value, grad = alignment(config, teacher, teacher.clone(), mask)
    assert abs(value) < 1e-12
    assert grad.abs().max() < 1e-12


def test_kl_at_temperature_one_is_the_papers() -> None:
    """(q − p) / N at every token."""
    teacher, student, mask = pair(torch.float64)
    _, grad = alignment(AlignConfig(kind="kl"), teacher, student, mask)
    expected = (student.softmax(-1) - teacher.softmax(-1)) / mask.sum() * mask.unsqueeze(-1)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_what_is_padded_does_not_count(config: AlignConfig) -> None:
    teacher, student, mask = pair(torch.float64)
    value, grad = alignment(config, teacher, student, mask)
    hole = mask.unsqueeze(-1) == 0
    other, grad_other = alignment(config, teacher.masked_fill(hole, 3.0), student.masked_fill(hole, -1.0), mask)
    assert float(value) == pytest.approx(float(other), abs=1e-14)
    torch.testing.assert_close(grad, grad_other, rtol=0, atol=1e-15)


@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_extreme_activations_stay_finite(config: AlignConfig) -> None:
    for teacher, student in [
        (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)),
        (1e4 * torch.ones(1, 2, 8), torch.zeros(1, 2, 8)),
    ]:
        student[0, 0, 0] = 3e4
        value, grad = alignment(config, teacher, student, torch.zeros(1, 2, dtype=torch.long))
        assert value == 0.0  # no token counts
        value, grad = alignment(config, teacher, student, None)
        assert math.isfinite(value)
        assert torch.isfinite(grad).all()


def test_sum_is_the_sum() -> None:
    task, align, _ = pair(torch.float32)
    assert torch.equal(combine(task, align, "sum"), task + align)


def test_project_by_hand() -> None:
    task = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    conflicting = torch.tensor([[[-3.0, 2.0, 0.0, 1.0]]])
    assert combine(task, conflicting, "project").tolist() == [[[1.0, 2.0, 0.0, 1.0]]]
    agreeing = torch.tensor([[[3.0, 2.0, 0.0, 1.0]]])
    assert torch.equal(combine(task, agreeing, "project"), task + agreeing)
    assert torch.equal(combine(torch.zeros_like(task), conflicting, "project"), conflicting)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(-2.0, 2.0))
def test_project_never_works_against_the_task(seed: int, tilt: float) -> None:
    task, align, _ = pair(torch.float64, seed)
    align = align + tilt * task
    inner = (task * align).sum()
    total = combine(task, align, "project")
    if inner >= 0:
        assert torch.equal(total, task + align)
    else:
        added = total - task
        assert abs((added * task).sum()) < 1e-9 * task.square().sum()
        by_hand = align - (inner / (task * task).sum()) * task
        torch.testing.assert_close(added, by_hand, rtol=0, atol=1e-12)
    assert (total * task).sum() >= (task * task).sum() * (1 - 1e-9)


def test_bfloat16_comes_back_as_bfloat16() -> None:
    task, align, _ = pair(torch.bfloat16)
    for how in ("sum", "project"):
        assert combine(task, -task + 0.1 * align, how).dtype == torch.bfloat16
        assert combine(task, align.float(), how).dtype == torch.bfloat16
