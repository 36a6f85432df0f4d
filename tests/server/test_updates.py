"""What an update of the shared blocks is: every step, or the weighted mean of several; and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexp import kinds
from flexp.client.exchange import Piece
from flexp.config import AlignConfig, OptimizerConfig, ServerConfig
from flexp.errors import TrainingError
from flexp.kinds import unmasked_tokens
from flexp.models.anatomy import Part
from flexp.optim import Updater
from flexp.server.shared import SharedBlocks
from tests.harness import (
    ADAMW,
    KINDS,
    SGD,
    World,
    copied,
    disturb,
    equal,
    gradients,
    party,
    plain_optimizer,
    shared_weights,
    world,
)


def blocks(here: World, config: ServerConfig, optimizer: OptimizerConfig) -> SharedBlocks:
    return SharedBlocks(party(here.whole, Part.server(1, 4), "full"), config, optimizer)


def drawn(shared: SharedBlocks, of_blocks: set[int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in sorted(shared.updater.parameters.items())
        if shared.stage.block_of(name) in of_blocks
    }


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_every_step_is_one_update_and_leaves_the_rest_untouched(optimizer: OptimizerConfig) -> None:
    here = world(optimizer=optimizer)
    shared = blocks(here, ServerConfig(update="every"), optimizer)
    weights = party(here.whole, Part.server(1, 4), "full").trainable()
    plain = plain_optimizer(list(weights.values()), optimizer)
    for seed, reached in enumerate([{1, 2, 3}, {3}, {2, 3}, {1}, {3}]):
        before = copied(shared.updater.parameters)
        grads = drawn(shared, reached, seed)
        assert shared.add(copied(grads), weight=1.0 + seed)
        for name, grad in grads.items():
            weights[name].grad = grad
        plain.step()
        plain.zero_grad(set_to_none=True)
        assert equal(copied(shared.updater.parameters), copied(weights))
        moved = {
            shared.stage.block_of(name)
            for name, value in shared.updater.parameters.items()
            if not torch.equal(value, before[name])
        }
        assert moved == reached  # weight decay and momentum included


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(1, 3), min_size=1), st.floats(0.5, 4000.0)),
        min_size=1,
        max_size=7,
    ),
    st.integers(1, 4),
)
def test_mean_is_the_token_weighted_mean_of_the_steps_that_reached_a_parameter(
    steps: list[tuple[set[int], float]], mean_over: int
) -> None:
    here = world()
    optimizer = OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.1, clip=None)
    shared = blocks(here, ServerConfig(update="mean", mean_over=mean_over), optimizer)
    expected = {name: value.double() for name, value in copied(shared.updater.parameters).items()}
    group: list[tuple[dict[str, Tensor], float]] = []
    for seed, (reached, weight) in enumerate(steps):
        grads = drawn(shared, reached, seed)
        updated = shared.add(copied(grads), weight)
        group.append((grads, weight))
        assert updated == (len(group) == mean_over)
        if not updated:
            continue
        for name in expected:
            here_too = [(part[name].double(), w) for part, w in group if name in part]
            if here_too:
                mean = sum(w * g for g, w in here_too) / sum(w for _, w in here_too)
                expected[name] = expected[name] - 0.5 * (mean + 0.1 * expected[name])
        group = []
    for name, value in shared.updater.parameters.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)
        if not any(
            shared.stage.block_of(name) in reached for reached, _ in steps[: len(steps) // mean_over * mean_over]
        ):
            assert torch.equal(value.double(), expected[name])
    assert shared.version == len(steps) // mean_over


def test_mean_over_clients_keeps_the_learning_rate_of_one() -> None:
    """Equal gradients of n clients move the weights as one client's does: a mean, not a sum."""
    here = world()
    optimizer = OptimizerConfig(name="sgd", lr=0.1, clip=None)
    one = blocks(here, ServerConfig(), optimizer)
    many = blocks(here, ServerConfig(update="mean", mean_over=4), optimizer)
    grads = drawn(one, {1, 2, 3}, seed=0)
    one.add(copied(grads), 1.0)
    for weight in (10.0, 20.0, 5.0, 1.0):
        many.add(copied(grads), weight)
    for name, value in one.updater.parameters.items():
        torch.testing.assert_close(many.updater.parameters[name], value, rtol=1e-6, atol=1e-6)


def test_what_is_left_at_the_end_is_flushed_once() -> None:
    """Six steps with mean_over = 4: an update of four, and at the end one of the mean of two."""
    here = world()
    optimizer = OptimizerConfig(name="sgd", lr=0.1, clip=None)
    shared = blocks(here, ServerConfig(update="mean", mean_over=4), optimizer)
    start = copied(shared.updater.parameters)
    grads = [drawn(shared, {1, 2, 3}, seed) for seed in range(6)]
    for grad in grads:
        shared.add(copied(grad), 2.0)
    assert shared.version == 1
    assert shared.flush()
    assert not shared.flush()
    assert shared.version == 2
    for name, value in shared.updater.parameters.items():
        moved = sum(grad[name] for grad in grads[:4]) / 4 + sum(grad[name] for grad in grads[4:]) / 2
        torch.testing.assert_close(value.detach(), start[name] - 0.1 * moved, rtol=1e-5, atol=1e-6)


def test_sums_of_half_precision_gradients_are_in_full_precision() -> None:
    """300 equal gradients have their own value as mean; a bf16 sum of ones stops at 256."""
    here = world(dtype=torch.bfloat16)
    optimizer = OptimizerConfig(name="sgd", lr=1.0, clip=None)
    shared = blocks(here, ServerConfig(update="mean", mean_over=300), optimizer)
    start = copied(shared.updater.parameters)
    for _ in range(300):
        shared.add({name: torch.ones_like(value) for name, value in start.items()}, 1.0)
    for name, value in shared.updater.parameters.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value.detach(), start[name] - 1.0)


def test_schedule_of_mean_counts_updates() -> None:
    optimizer = OptimizerConfig(lr=1.0, schedule="linear")
    here = world(optimizer=optimizer, config=ServerConfig(update="mean", mean_over=4), total_steps=10)
    assert here.server.shared.updater.total_steps == 3


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clipping_is_torchs(clip: float) -> None:
    here = world()
    optimizer = OptimizerConfig(name="sgd", lr=1.0, clip=clip)
    shared = blocks(here, ServerConfig(), optimizer)
    weights = party(here.whole, Part.server(1, 4), "full").trainable()
    grads = drawn(shared, {2, 3}, seed=3)
    for name, grad in grads.items():
        weights[name].grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), clip)
    shared.add(copied(grads), 1.0)
    torch.optim.SGD(weights.values(), lr=1.0).step()
    for name, value in shared.updater.parameters.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-6, atol=1e-7)
    assert norm > 1.0


def test_clipping_does_not_depend_on_the_order_of_the_parameters() -> None:
    """Those of a checkpoint come back sorted by name."""
    grads = {f"w{index}": torch.randn(50, generator=torch.Generator().manual_seed(index)) for index in range(40)}
    results = []
    for names in (list(grads), list(grads)[::-1]):
        parameters = {name: torch.nn.Parameter(torch.zeros(50)) for name in names}
        for name, value in parameters.items():
            value.grad = grads[name].clone()
        updater = Updater(parameters, OptimizerConfig(name="sgd", lr=1.0, clip=0.1))
        results.append((updater.step(), copied(parameters)))
    assert results[0][0] == results[1][0]
    assert equal(results[0][1], results[1][1])


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_applied(bad: float, clip: float | None) -> None:
    """Even where the loss was finite; and what is thrown away does not come back in the next step."""
    parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in "ab"}
    updater = Updater(parameters, OptimizerConfig(lr=0.1, clip=clip))
    parameters["a"].grad, parameters["b"].grad = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    with pytest.raises(TrainingError, match=r"step 1: a gradient is not finite, so nothing was applied.*0\.1"):
        updater.step()
    assert all(torch.equal(value.detach(), torch.ones(3)) for value in parameters.values())
    assert all(value.grad is None for value in parameters.values())
    assert updater.steps == 0
    assert list(updater.state()) == ["steps"]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_start_whole_and_end_at_nothing(name: Any, warmup: int) -> None:
    config = OptimizerConfig(name="sgd", lr=2.0, schedule=name, warmup_steps=warmup, clip=None)
    parameter = torch.nn.Parameter(torch.zeros(1))
    updater = Updater({"w": parameter}, config, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(updater.lr)
        before = parameter.item()
        parameter.grad = torch.ones(1)
        updater.step()
        assert before - parameter.item() == pytest.approx(rates[-1], abs=1e-6)
    assert rates[warmup] == 2.0
    assert rates[:warmup] == pytest.approx([2.0 * (k + 1) / (warmup + 1) for k in range(warmup)])
    if name == "constant":
        assert set(rates[warmup:]) == {2.0}
    else:
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
        assert updater.lr == pytest.approx(0.0, abs=1e-12)


def split_rows(batch: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    parts = {key: value.split(sizes) for key, value in batch.items()}
    return [{key: values[index] for key, values in parts.items()} for index in range(len(sizes))]


@pytest.mark.parametrize("align", ["off", "kl"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("sizes", [[2, 2], [1, 3], [1, 2, 1]])
def test_micro_batches_are_one_big_batch(name: str, sizes: list[int], align: Any) -> None:
    """k exchanges with their shares train both sides as one exchange does, whatever their numbers of tokens."""

    def run(parts: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        optimizer = OptimizerConfig(name="sgd", lr=0.1, clip=None)
        here = world(name, optimizer=optimizer)
        model = here.client("a", (3, 4), AlignConfig(kind=align, weight=0.5))
        disturb(here.server.shared.updater.parameters)
        batch = here.batch(batch=4, padding="right", seed=2)
        if KINDS[name] == "causal-lm":
            batch["labels"][0, :6] = -100
        micro = split_rows(batch, parts)
        counts = [kinds.KINDS[KINDS[name]].items(part) for part in micro]
        if KINDS[name] == "causal-lm" and len(parts) > 1:
            assert len({count / size for count, size in zip(counts, parts, strict=True)}) > 1
        for index, (part, count) in enumerate(zip(micro, counts, strict=True)):
            share, tokens = count / sum(counts), unmasked_tokens(part) / unmasked_tokens(batch)
            with model.part_of_step(Piece(index + 1, len(micro), share, tokens, count)):
                (model(**part).loss * share).backward()
            assert here.server.shared.version == int(index == len(micro) - 1)
        personal = model.stage.trainable()
        grads = gradients(personal)
        Updater(personal, optimizer).step()
        return grads, copied(personal), shared_weights(here.server)

    for big, small in zip(run([4]), run(sizes), strict=True):
        assert big.keys() == small.keys()
        for name_of, value in big.items():
            torch.testing.assert_close(small[name_of], value, rtol=1e-6, atol=1e-6)


def test_mean_weighs_a_step_by_the_items_of_all_its_micro_batches() -> None:
    here = world(config=ServerConfig(update="mean", mean_over=2))
    model = here.client("a", (2, 4))
    for number, weight in ((1, 3.0), (2, 5.0)):
        with model.part_of_step(Piece(number, 2, 0.5, 0.5, weight)):
            model(**here.batch()).loss.backward()
    assert set(here.server.shared._gathered._weights.values()) == {8.0}


def test_a_loop_of_ones_own_is_weighed_by_the_items_of_its_labels() -> None:
    """Tokens with a loss, not examples: rows with long answers count for more in the mean."""
    here = world(config=ServerConfig(update="mean", mean_over=2))
    model, batch = here.client("a", (2, 4)), here.batch(batch=3, length=10)
    batch["labels"][:, :6] = -100
    model(**batch).loss.backward()
    assert set(here.server.shared._gathered._weights.values()) == {12.0}  # 3 rows × 4 predicted tokens


def test_frozen_shared_blocks_pass_gradients_and_never_move() -> None:
    here = world(tuning="frozen")
    before = {name: value.clone() for name, value in here.server.shared.stage.model.state_dict().items()}
    model = here.client("a", (2, 4), tuning="full")
    model(**here.batch()).loss.backward()
    assert all(value.abs().sum() > 0 for value in gradients(model.stage.trainable()).values())
    assert equal(here.server.shared.stage.model.state_dict(), before)
