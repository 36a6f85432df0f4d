"""What may cross a link, proved on everything that crosses in whole runs: activations, their gradients, masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.client.exchange import Piece
from flexp.client.model import SplitModel
from flexp.config import AlignConfig
from flexp.errors import ConfigError
from flexp.links.asking import (
    EndGeneration,
    ExtendReply,
    ExtendRequest,
    FetchReply,
    FetchRequest,
    PullReply,
    PullRequest,
    SumReply,
    SumRequest,
)
from flexp.links.declaring import MESSAGES, tensors
from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    Done,
    ForwardReply,
    ForwardRequest,
    Join,
    KeptForwardRequest,
    Leave,
    Order,
    Ready,
    Refusal,
    Welcome,
)
from flexp.links.passing import Behind, Keep, Lead, PassedBackward, PassedReply, Settle, Update
from tests.harness import RecordingLink, World, copied, disturb, world

# The whole vocabulary of the protocol: a new field must be argued for here.
VOCABULARY = {
    Join: {
        "client",
        "fingerprint",
        "cut",
        "dtype",
        "autocast",
        "tuning",
        "align",
        "lora",
        "weights",
        "numbering",
        "codec",
        "quantization",
        "examples_key",  # drawn for this, and of no use elsewhere: the server keeps nothing that it did not get
    },
    Welcome: {"base_depth", "blocks", "hidden", "max_in_flight", "max_tokens", "frame_bytes", "trained"},
    Refusal: {"error", "again", "leave", "full"},
    ForwardRequest: {
        "exchange",
        "hidden_BTH",
        "mask_BT",
        "positions_BT",
        "base_BTH",
        "inner_BTH",
        "train",
        "step",
        "rows_BT",
    },
    KeptForwardRequest: {"exchange", "hidden_BTH", "mask_BT", "examples_B", "fresh_B", "step", "rows_BT"},
    ForwardReply: {"hidden_BTH", "align", "kept", "teachers"},
    BackwardRequest: {"exchange", "grad_BTH", "step", "exchanges", "tokens", "weight", "back"},
    BackwardReply: {"grad_BTH", "inner_BTH"},
    Abort: set(),
    Done: set(),
    # known: hashes of copies of shared weights that the client does not train, by names that both sides know
    PullRequest: {"start", "stop", "step", "first", "most", "known"},
    PullReply: {"total", "weights", "same"},
    SumRequest: {"number", "values_N", "note"},  # only in runs that say so: method.meet, model.head
    SumReply: {"values_N", "notes"},
    FetchRequest: {"block", "first", "most", "known"},
    FetchReply: {"version", "total", "weights", "same"},
    ExtendRequest: {"generation", "past", "hidden_BTH", "mask_BT", "positions_BT", "rows_B"},
    ExtendReply: {"hidden_BTH"},
    EndGeneration: {"generation"},
    Leave: set(),
    Ready: {"steps", "done", "run", "snapshots", "saved", "facts", "planned", "met"},
    Order: {"what", "run", "place", "number", "count", "save"},
    # from one server to the next, which have nothing of a client but what it sent them
    PassedBackward: {"exchange", "grad_BTH", "base_BTH", "step", "exchanges", "tokens", "weight"},
    PassedReply: {"grad_BTH", "base_BTH", "names", "norms_N", "all_names", "all_N"},
    Lead: {"settings", "run"},
    Settle: {"client", "step", "take", "reaches", "weight", "scale", "norm"},
    Update: {"norm"},
    Keep: {"number", "run", "back", "over", "held"},
    Behind: {"end", "run", "snapshots", "names", "norms_N", "facts"},
}
UP = {Join, ForwardRequest, BackwardRequest, Abort, PullRequest, FetchRequest}
ACTIVATIONS = {"hidden_BTH", "base_BTH", "inner_BTH", "grad_BTH"}
WINDOW = 4  # values in a row that no two unrelated tensors share


def test_messages_have_no_other_fields() -> None:
    assert set(VOCABULARY) == set(MESSAGES.values())
    for kind, names in VOCABULARY.items():
        assert {field.name for field in fields(kind)} == names


def windows(value: Tensor) -> set[bytes]:
    """Every run of ``WINDOW`` values along each of the last two dimensions, as bytes; constant runs tell nothing."""
    found: set[bytes] = set()
    value = value.detach().to(torch.float32)
    for view in (value, value.transpose(-1, -2)) if value.dim() > 1 else (value,):
        if view.shape[-1] < WINDOW:
            continue
        runs = view.contiguous().unfold(-1, WINDOW, 1).reshape(-1, WINDOW)
        runs = runs[(runs != runs[:, :1]).any(1)].contiguous()
        found.update(row.tobytes() for row in runs.numpy())
    return found


def run(here: World, align: AlignConfig, cut: tuple[int, int], padding: str) -> tuple[SplitModel, Any, Any, Any]:
    """Two steps with two micro-batches each, an evaluation, and another step: everything that was ever private."""
    link = RecordingLink(here.server.connect("a"))
    model = here.client("a", cut, align, link=link)
    personal = model.stage.trainable()
    disturb(personal, spread=0.02)
    optimizer = torch.optim.SGD(personal.values(), lr=0.01)
    weights, batches = [copied(dict(model.model.named_parameters()))], []
    for step in range(3):
        for half in range(2):
            batch = here.batch(seed=2 * step + half, padding=padding, batch=5)
            batches.append(batch)
            with model.part_of_step(Piece(half + 1, 2, 0.5, 0.5)):
                (model(**batch).loss * 0.5).backward()
        weights.append({name: value.grad.clone() for name, value in personal.items() if value.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        weights.append(copied(personal))
        batches.append(here.batch(seed=100 + step, padding=padding, batch=5))
        with torch.no_grad():
            model.eval()(**batches[-1])
        model.train()
    return model, link, batches, weights


def uploads(link: RecordingLink) -> Iterator[tuple[Any, str, Tensor]]:
    for way, message in link.messages:
        if way == "up":
            yield from ((message, name, value) for name, value in tensors(message))


ALIGNMENTS = [
    AlignConfig(kind="off"),
    AlignConfig(kind="kl"),
    AlignConfig(kind="mse", at="every-block", normalize=True),
    AlignConfig(kind="cosine", every=2, combine="project"),
    AlignConfig(kind="weights"),
]


MODELS = [
    ("llama", "causal-lm", "left"),
    ("gpt2", "sequence-classification", "none"),
    ("bert", "sequence-classification", "right"),
    ("vit", "image-classification", "none"),
]


@pytest.mark.parametrize(
    ("name", "kind", "padding", "tuning", "align"),
    [  # every model with every alignment, half of them in `make soak`; each of them with both tunings
        pytest.param(
            *model,
            ("full", "lora")[(row + column) % 2],
            align,
            id=f"{model[0]}-{align.kind}",
            marks=[pytest.mark.slow] * ((row // 2 + column) % 2),
        )
        for row, model in enumerate(MODELS)
        for column, align in enumerate(ALIGNMENTS)
    ],
)
def test_nothing_private_goes_up(name: str, kind: str, padding: str, tuning: str, align: AlignConfig) -> None:
    here = world(name, kind, tuning=tuning)
    model, link, batches, weights = run(here, align, (3, 4), padding)
    assert {type(message) for way, message in link.messages if way == "up"} <= UP
    assert {type(message) for _, message in link.messages} <= set(VOCABULARY)

    private: set[bytes] = set()
    for batch in batches:
        for key, value in batch.items():
            if key != "attention_mask":
                private |= windows(value)
    for values in weights:
        for value in values.values():
            private |= windows(value)
    assert len(private) > 1000

    hidden, seen = here.whole.anatomy.hidden, set()
    masks = [batch.get("attention_mask") for batch in batches]
    for message, field, value in uploads(link):
        seen.add(field)
        assert not value.requires_grad
        if field == "mask_BT":
            assert set(value.unique().tolist()) <= {0, 1}
            assert any(mask is not None and torch.equal(value, mask) for mask in masks)
            continue
        if field == "rows_BT":
            assert value.dtype == torch.bool
            assert value.sum(1).tolist() == [1] * 5  # a classifier's; a language model's are on its labels in a run
            continue
        assert field in ACTIVATIONS
        assert value.is_floating_point()
        assert value.dim() == 3
        assert value.shape[0] in (1, 5)  # with and without padding
        assert value.shape[2] == hidden
        assert not windows(value) & private, (type(message).__name__, field)
    assert ("mask_BT" in seen) == (padding != "none")
    assert ("base_BTH" in seen) == (align.kind in ("kl", "mse", "cosine"))
    assert ("inner_BTH" in seen) == (align.at == "every-block")
    for message in link.sent(Join):
        assert isinstance(message.client, str)
        assert len(message.fingerprint) == 16
    if align.kind == "weights":  # what comes down is the server's, of the aligned blocks alone
        for reply in link.sent(PullReply):
            assert {here.whole.block_of(key) for key in reply.weights} == {1, 2}
    else:
        assert not list(link.sent(PullRequest))
    assert model.last_align is None or align.kind in ("kl", "mse", "cosine")


@pytest.mark.parametrize(
    ("cut", "base_depth", "align", "words"),
    [
        ((0, 4), 0, AlignConfig(kind="off"), r"cut = \(0, …\)"),
        ((2, 4), 0, AlignConfig(kind="kl"), "base depth of 0"),
        ((2, 4), 0, AlignConfig(kind="mse", at="every-block"), "base depth of 0"),
    ],
)
def test_bare_embeddings_go_up_only_if_one_says_so(
    cut: tuple[int, int], base_depth: int, align: AlignConfig, words: str
) -> None:
    here = world(base_depth=base_depth)
    with pytest.raises(ConfigError, match=words + r".*read every token.*expose_embeddings=True"):
        here.client("a", cut, align)
    here.client("a", cut, align, expose_embeddings=True)(**here.batch()).loss.backward()


@pytest.mark.parametrize("align", [AlignConfig(kind="off"), AlignConfig(kind="weights"), AlignConfig(weight=0.0)])
def test_a_base_depth_of_0_alone_exposes_nothing(align: AlignConfig) -> None:
    here = world(base_depth=0)
    link = RecordingLink(here.server.connect("a"))
    here.client("a", (2, 4), align, link=link)(**here.batch()).loss.backward()
    assert all(request.base_BTH is None for request in link.sent(ForwardRequest))


def test_the_windows_would_find_a_leak() -> None:
    """The proof above is worth something: it finds rows, columns and slices that are smuggled into an activation."""
    here = world("bert")
    batch = here.batch(batch=5)
    weight = here.whole.model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").detach()
    for secret in (batch["input_ids"], batch["labels"], weight, weight.T, weight[3], weight[:, 5]):
        carrier = torch.randn(2, 6, 32)
        flat = secret.reshape(-1)[: min(secret.numel(), 8)].float()
        assert len(flat.unique()) > 1
        carrier[1, 2, 4 : 4 + len(flat)] = flat
        assert windows(carrier) & windows(secret)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_forwards_do_not_depend_on_labels(name: str) -> None:
    """Not even in what cannot be read off a value: other labels, the same forward message bit for bit."""
    messages = []
    for shift in (0, 1):
        here = world(name)
        link = RecordingLink(here.server.connect("a"))
        model = here.client("a", (2, 4), AlignConfig(kind="kl"), link=link)
        batch = here.batch()
        if shift:
            batch["labels"] = (batch["labels"] + 1) % 3
        model(**batch).loss.backward()
        messages.append([value for request in link.sent(ForwardRequest) for _, value in tensors(request)])
    assert all(torch.equal(left, right) for left, right in zip(*messages, strict=True))


@pytest.mark.parametrize("padding", ["none", "left"])
def test_explicit_positions_are_the_only_other_integers(padding: str) -> None:
    here = world("llama")
    link = RecordingLink(here.server.connect("a"))
    model = here.client("a", (2, 4), link=link)
    batch = here.batch(padding=padding)
    positions = torch.arange(10).expand(3, 10)
    model(**batch, position_ids=positions).loss.backward()
    integers = {field: value for _, field, value in uploads(link) if not value.is_floating_point()}
    assert integers.keys() == {"positions_BT"} | ({"mask_BT"} if padding != "none" else set())
    assert torch.equal(integers["positions_BT"], positions)


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "causal-lm"),
        ("gpt2", "causal-lm"),
        ("gpt2", "sequence-classification"),
        ("bert", "sequence-classification"),
        ("vit", "image-classification"),
    ],
)
def test_the_server_holds_blocks_and_nothing_else(name: str, kind: str, tuning: str) -> None:
    here = world(name, kind, tuning=tuning, base_depth=1, end=3)
    stage = here.server.shared.stage
    names = [key for key, _ in stage.model.named_parameters()]
    assert names
    assert {stage.block_of(key) for key in names} == {1, 2}
    for key, value in stage.model.named_buffers():  # rotary tables and positions: made from the configuration alone
        made = "inv_freq" in key or value.dtype == torch.long or value.numel() == 0
        assert stage.block_of(key) in (1, 2) or made, key


def test_personal_weights_of_two_clients_stay_apart() -> None:
    """No client's personal parameter changes because another trains, and the server never averages them."""
    here = world("bert")
    a, b = here.client("a", (2, 4)), here.client("b", (2, 4))
    before = copied(b.personal_state())
    optimizer = torch.optim.SGD(a.stage.trainable().values(), lr=0.1)
    a(**here.batch()).loss.backward()
    optimizer.step()
    after = b.personal_state()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert any(not torch.equal(value, after[key]) for key, value in a.personal_state().items())


@pytest.mark.parametrize(("base_depth", "reads"), [(0, True), (1, False)])
def test_only_a_base_depth_of_zero_sends_what_the_embedding_alone_made(base_depth: int, reads: bool) -> None:
    """The known limit: with s_min = 0, z_base is the embedded input, which the pretrained model's table reads back."""
    here = world("llama", base_depth=base_depth)
    link = RecordingLink(here.server.connect("a"))
    model = here.client("a", (2, 4), AlignConfig(kind="kl"), link=link, expose_embeddings=reads)
    batch = here.batch()
    model(**batch).loss.backward()
    (request,) = link.sent(ForwardRequest)
    table = here.whole.model.get_input_embeddings().weight
    nearest = torch.cdist(request.base_BTH, table.expand(3, -1, -1)).argmin(-1)
    assert torch.equal(nearest, batch["input_ids"]) == reads
