"""With the server's help a client minimises task + λ · align, as one process that holds all weights would.

The reference runs the whole model with plain autograd: the personal blocks where the client has them, the shared ones
elsewhere, and a detached teacher of shared blocks over z_base.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexp.client.exchange import Piece
from flexp.client.model import SplitModel
from flexp.config import AlignConfig, OptimizerConfig, ServerConfig
from flexp.links.asking import PullReply, PullRequest
from flexp.links.messages import Abort, BackwardReply, ForwardReply, ForwardRequest
from flexp.models.stage import Stage
from tests.harness import KINDS, RecordingLink, World, copied, disturb, equal, gradients, shared_weights, world

SGD = OptimizerConfig(name="sgd", lr=0.1, clip=None)
KINDS_OF_TERMS: list[Any] = ["kl", "mse", "cosine"]


def term(config: AlignConfig, teacher: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """The term by torch's own functions."""
    if config.normalize:
        teacher, student = (F.layer_norm(value, value.shape[-1:], eps=1e-6) for value in (teacher, student))
    if config.kind == "kl":
        tau = config.temperature
        logs = (student / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
        each = tau**2 * F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    elif config.kind == "mse":
        each = (student - teacher).square().mean(-1)
    else:
        each = 1 - F.cosine_similarity(student, teacher, dim=-1)
    return each.mean() if mask is None else each[mask.bool()].mean()


def whole_of(here: World, model: SplitModel) -> tuple[Stage, Stage]:
    """The client's personal model in one piece, trainable where it is personal; and the server's whole copy."""
    personal, teacher = copy.deepcopy(here.whole), copy.deepcopy(here.whole)
    start, stop = model.cut
    with torch.no_grad():
        for name, value in shared_weights(here.server).items():
            for stage in (personal, teacher):
                stage.model.get_parameter(name).copy_(value)
        for name, value in model.stage.trainable().items():
            assert not start <= (model.stage.block_of(name) or 0) < stop or model.stage.block_of(name) is None
            personal.model.get_parameter(name).copy_(value)
            personal.model.get_parameter(name).requires_grad_()
    return personal, teacher


def reference(here: World, model: SplitModel, batch: dict[str, Tensor]) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, alignment term and personal gradients from one graph."""
    personal, teacher = whole_of(here, model)
    config, mask = model.align, batch.get("attention_mask")
    base_depth, start = here.server.blocks[0], model.cut[0]
    embedded, plan = personal.plan(batch)
    base_BTH = z_BTH = personal.run(embedded, plan, 0, base_depth)
    with torch.no_grad():
        target_BTH = base_BTH.detach()
    terms: list[Tensor] = []
    for index in range(base_depth, start):
        z_BTH = personal.run(z_BTH, plan, index, index + 1)
        with torch.no_grad():
            target_BTH = teacher.run(target_BTH, plan, index, index + 1)
        if config.at == "every-block" or index == start - 1:
            terms.append(term(config, target_BTH, z_BTH, mask))
    align = torch.stack(terms).mean()
    h_BTH = personal.run(z_BTH, plan, start, personal.anatomy.blocks)
    loss = personal.finish(h_BTH, batch, plan).loss
    (loss + config.weight * align).backward()
    return loss.item(), align.item(), gradients(dict(personal.model.named_parameters()))


PLACES = [("cut", "keep"), ("every-block", "recompute")]
TERMS = [("kl", 1.0), ("kl", 4.0), ("mse", 1.0), ("cosine", 1.0)]
PADDED = [("llama", "left"), ("gpt2", "none"), ("bert", "right")]
CASES = [  # every term in every form at either place; over them every model meets each of these
    (*PADDED[(number + normalize + 2 * place) % 3], *of, normalize, *PLACES[place])
    for number, of in enumerate(TERMS)
    for normalize in (False, True)
    for place in (0, 1)
]


@pytest.mark.parametrize(("name", "padding", "kind", "temperature", "normalize", "at", "memory"), CASES)
def test_split_gradients_are_those_of_one_process(
    name: str, padding: str, kind: Any, temperature: float, normalize: bool, at: Any, memory: Any
) -> None:
    align = AlignConfig(kind=kind, weight=0.7, temperature=temperature, normalize=normalize, at=at)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        here = world(name, optimizer=SGD, dtype=dtype, config=ServerConfig(memory=memory))
        model = here.client("a", (3, 4), align)
        disturb(model.stage.trainable(), seed=1)
        disturb(here.server.shared.updater.parameters, seed=2)
        batch = here.batch(padding=padding, seed=3)
        loss, value, expected = reference(here, model, batch)
        output = model(**batch)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(loss, rel=tolerance)
        assert model.last_align == pytest.approx(value, rel=tolerance)
        assert value > 1e-4
        given = gradients(model.stage.trainable())
        assert given.keys() == expected.keys()
        for parameter, grad in given.items():
            scale = expected[parameter].abs().max().item()
            torch.testing.assert_close(grad, expected[parameter], rtol=0, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_alignment_changes_no_shared_gradient(name: str) -> None:
    results = []
    for kind in ("off", "kl"):
        here = world(name, optimizer=SGD)
        model = here.client("a", (2, 4), AlignConfig(kind=kind, weight=3.0))  # type: ignore[arg-type]
        disturb(model.stage.trainable())
        model(**here.batch()).loss.backward()
        results.append(shared_weights(here.server))
    assert equal(*results)


def sent_down(combine: Any, weight: float = 1.0, tilt: float = 1.0) -> Tensor:
    """The gradient at z that comes down when the server's blocks have moved by ``tilt``."""
    here = world("gpt2", optimizer=SGD)
    link = RecordingLink(here.server.connect("a"))
    kind = "mse" if weight else "off"
    align = AlignConfig(kind=kind, weight=weight, combine=combine)  # type: ignore[arg-type]
    model = here.client("a", (2, 4), align, link=link)
    disturb(here.server.shared.updater.parameters, spread=0.1)
    if tilt < 0:  # a student that sits on the other side of its teacher
        disturb(model.stage.trainable(), spread=0.2, seed=11)
    model(**here.batch()).loss.backward()
    (reply,) = link.sent(BackwardReply)
    return reply.grad_BTH


def test_project_is_sum_without_conflict_and_by_hand_with_one() -> None:
    seen = set()
    for tilt in (1.0, -1.0):
        for weight in (0.01, 5.0):
            task = sent_down("sum", 0.0, tilt)
            added = sent_down("sum", weight, tilt) - task
            projected = sent_down("project", weight, tilt)
            inner = (task * added).sum()
            conflict = bool(inner < 0)
            seen.add(conflict)
            expected = task + added - (inner / (task * task).sum() * task if conflict else 0.0)
            torch.testing.assert_close(projected, expected, rtol=1e-5, atol=1e-6)
            if not conflict:
                assert torch.equal(projected, sent_down("sum", weight, tilt))
    assert seen == {True, False}


@pytest.mark.parametrize("every", [1, 2, 3])
def test_base_goes_up_only_when_alignment_is_due(every: int) -> None:
    here = world("bert", optimizer=SGD)
    link = RecordingLink(here.server.connect("a"))
    model = here.client("a", (3, 4), AlignConfig(kind="kl", every=every, at="every-block"), link=link)
    due = []
    for number in range(6):
        model.train()
        for half in range(2):  # two micro-batches of one step are alike
            with model.part_of_step(Piece(half + 1, 2, 0.5, 0.5)):
                model(**here.batch(seed=number)).loss.backward()
            due.append(model.last_align is not None)
        with torch.no_grad():
            model.eval()(**here.batch())
    requests = [request for request in link.sent(ForwardRequest) if request.train]
    assert [request.base_BTH is not None for request in requests] == due
    assert [len(request.inner_BTH) for request in requests] == [int(now) for now in due]
    assert due == [step % every == 0 for step in range(6) for _ in range(2)]
    replies = list(link.sent(BackwardReply))
    assert [len(reply.inner_BTH) == 1 for reply in replies] == due
    evaluations = [request for request in link.sent(ForwardRequest) if not request.train]
    assert len(evaluations) == 6
    assert all(request.base_BTH is None and not request.inner_BTH for request in evaluations)


@pytest.mark.parametrize(
    "align",
    [
        AlignConfig(kind="kl", weight=0.0),
        AlignConfig(kind="mse", weight=0.0, at="every-block"),
        AlignConfig(kind="off", weight=1.0),
    ],
)
def test_without_alignment_nothing_extra_crosses_and_nothing_changes(align: AlignConfig) -> None:
    results = []
    for config in (AlignConfig(kind="off"), align):
        here = world("llama", optimizer=SGD)
        link = RecordingLink(here.server.connect("a"))
        model = here.client("a", (3, 4), config, link=link)
        for number in range(2):
            model(**here.batch(seed=number, padding="left")).loss.backward()
            model.after_step()
        assert all(request.base_BTH is None and not request.inner_BTH for request in link.sent(ForwardRequest))
        assert all(reply.align is None for reply in link.sent(ForwardReply))
        assert not list(link.sent(PullRequest))
        traffic = link.meter.training
        results.append((traffic.bytes_up, traffic.bytes_down, gradients(model.stage.trainable())))
    assert results[0][:2] == results[1][:2]
    assert equal(results[0][2], results[1][2])


def test_a_client_at_the_base_depth_has_nothing_to_align() -> None:
    for kind in ("kl", "weights"):
        here = world("llama")
        link = RecordingLink(here.server.connect("a"))
        model = here.client("a", (1, 4), AlignConfig(kind=kind), link=link)  # type: ignore[arg-type]
        model(**here.batch()).loss.backward()
        model.after_step()
        assert model.last_align is None
        assert not list(link.sent(PullRequest))
        assert all(request.base_BTH is None for request in link.sent(ForwardRequest))


@pytest.mark.parametrize(
    ("name", "tuning", "pull"),
    [
        *[("llama", "full", 0.0), ("gpt2", "full", 0.25), ("bert", "full", 1.0)],
        *[("gpt2", "lora", 0.0), ("bert", "lora", 0.25), ("llama", "lora", 1.0)],
    ],
)
def test_pulling_the_aligned_blocks(name: str, tuning: str, pull: float) -> None:
    here = world(name, tuning=tuning, optimizer=SGD)
    link = RecordingLink(here.server.connect("a"))
    model = here.client("a", (3, 4), AlignConfig(kind="weights", pull=pull, every=2), link=link)
    personal = model.stage.trainable()
    disturb(personal, seed=1)
    disturb(here.server.shared.updater.parameters, seed=2)
    for step in (1, 2, 3, 4):
        model(**here.batch(seed=step)).loss.backward()
        before, shared = copied(personal), shared_weights(here.server)
        model.after_step()
        pulls = list(link.sent(PullReply))
        assert len(pulls) == step // 2
        aligned = {key for key in shared if here.whole.block_of(key) in (1, 2)}
        if step % 2:
            assert equal(copied(personal), before)
            continue
        assert pulls[-1].weights.keys() == aligned  # only the aligned blocks' weights come down
        assert aligned <= personal.keys()
        for key, value in personal.items():
            if key not in aligned or pull == 0.0:
                assert torch.equal(value, before[key])
            elif pull == 1.0:
                assert torch.equal(value, shared[key])
            else:
                expected = before[key] + pull * (shared[key] - before[key])
                torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=1e-7)
    assert all(request.base_BTH is None for request in link.sent(ForwardRequest))


def test_pulled_weights_are_copies() -> None:
    here = world("llama")
    model = here.client("a", (2, 4))
    before = shared_weights(here.server)
    for value in model.link.call(PullRequest(1, 2)).result().weights.values():
        value.zero_()
    assert equal(shared_weights(here.server), before)


def test_every_kind_helps_where_it_is_told_to() -> None:
    """A few steps on the alignment alone bring the student nearer to its teacher."""
    for kind in KINDS_OF_TERMS:
        here = world("gpt2", optimizer=OptimizerConfig(name="sgd", lr=1e-9, clip=None))
        model = here.client("a", (2, 4), AlignConfig(kind=kind, weight=100.0, normalize=True))
        disturb(here.server.shared.updater.parameters)
        optimizer = torch.optim.SGD(model.stage.trainable().values(), lr=1e-3)
        values = []
        for _ in range(6):
            (model(**here.batch()).loss * 1e-6).backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(model.last_align)
        assert values == sorted(values, reverse=True), kind
    assert KINDS["gpt2"] == "causal-lm"


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_teacher_has_no_dropout_and_moves_no_stream(tuning: str) -> None:
    """What the client is to come near to is one value, and aligning changes nothing of the client's own dropout."""
    here = world("bert", tuning=tuning, dropout=0.4)
    here.join("a", (2, 4), align=AlignConfig(kind="mse"))
    base_BTH, z_BTH = torch.randn(2, 3, 6, 32, generator=torch.Generator().manual_seed(5))
    replies = [here.server.answer("a", ForwardRequest(k, z_BTH, base_BTH=base_BTH, train=True)) for k in range(4)]
    assert len({reply.align for reply in replies}) == 1
    assert not torch.equal(replies[0].hidden_BTH, replies[1].hidden_BTH)  # the task's own path does have dropout
    here.server.answer("a", Abort())
    plain = [here.server.answer("a", ForwardRequest(k, z_BTH, train=True)) for k in range(4)]
    for with_align, without in zip(replies, plain, strict=True):
        assert torch.equal(with_align.hidden_BTH, without.hidden_BTH)
