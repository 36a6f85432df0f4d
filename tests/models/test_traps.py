"""What goes wrong silently when a model is split carelessly: each trap is avoided here, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from flexp.client.model import SplitModel
from flexp.errors import ConfigError, ModelError
from flexp.models.architectures import ARCHITECTURES
from flexp.models.parts import Absent, Part, check_cut
from flexp.models.plan import same
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_batch, tiny_model
from tests.models.tools import SPLIT, client_of, equal, parties, tensors_of, whole_of

REFUSED = {
    "t5": "T5ForConditionalGeneration cannot be split: it is an encoder–decoder",
    "deberta_v2": "DebertaV2ForSequenceClassification cannot be split: all blocks share one trainable table",
    "albert": "AlbertForSequenceClassification cannot be split: it applies the same block again and again",
    "gemma3n": "Gemma3nForCausalLM cannot be split: every block reads an embedding of the token ids",
    "gemma4": "Gemma4ForCausalLM cannot be split: every block reads an embedding of the token ids",
}


# What the server holds


@pytest.mark.parametrize("name", SPLIT)
def test_the_server_holds_blocks_and_nothing_else(name: str) -> None:
    """No parameter outside of its blocks, hence nothing that embeds a token or names a class."""
    whole = whole_of(name)
    server = carve(whole, Part.server(1, 3))
    for key, value in server.model.named_parameters(remove_duplicate=False):
        assert server.block_of(key) in (1, 2), key
        assert value is whole.model.get_parameter(key)  # carving copies nothing
    blocks = [value for key, value in whole.model.named_parameters() if whole.block_of(key) in (1, 2)]
    assert sum(v.numel() for v in server.model.parameters()) == sum(v.numel() for v in blocks)
    hidden = torch.zeros(1, 10, 32)
    plan = server.plan_without_inputs(hidden, None)
    with pytest.raises(ModelError, match="without the ends"):
        server.finish(hidden, {}, plan)


@pytest.mark.parametrize("name", SPLIT)
def test_the_servers_plan_needs_shape_and_mask_only(name: str) -> None:
    whole, other = whole_of(name), Stage.whole(tiny_model(name, seed=5))
    server = carve(other, Part.server(1, 3))
    for padding in ("none",) if name == "vit" else ("none", "left", "right"):
        batch = tiny_batch(whole.model, padding=padding)  # type: ignore[arg-type]
        hidden, plan = whole.plan(batch)
        assert plan.same(server.plan_without_inputs(torch.randn_like(hidden), batch.get("attention_mask")))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "modernbert"])
def test_blocks_keep_their_indices(name: str) -> None:
    """Block 2 under index 0 would be another block: a sliding window for a full one, experts for a dense layer."""
    whole = whole_of(name)
    server = carve(whole, Part.server(2, 3))
    assert isinstance(server.blocks[0], Absent)
    assert type(server.blocks[2]) is type(whole.blocks[2])
    batch = tiny_batch(whole.model, padding="left")
    with torch.no_grad():
        hidden, plan = whole.plan(batch)
        right = whole.run(hidden, plan, 2, 3)
        assert torch.equal(server.run(hidden, plan, 2, 3), right)
        if name != "qwen3_moe":
            shifted = copy.copy(plan)
            object.__setattr__(shifted, "calls", (plan.calls[3],) * len(plan.calls))
            assert not torch.allclose(server.run(hidden, shifted, 2, 3), right, atol=1e-3)
    with pytest.raises(ModelError, match="block 0 was asked to run on a party that does not own it"):
        server.run(hidden, plan, 0, 1)


@pytest.mark.parametrize(("name", "padding"), [("llama", "left"), ("gpt2", "left"), ("bert", "right"), ("opt", "left")])
def test_the_mask_matters(name: str, padding: Any) -> None:
    """A server that is not sent the mask attends to padding: the trap that makes the mask part of the protocol."""
    whole = whole_of(name)
    server = carve(whole, Part.server(1, 3))
    batch = tiny_batch(whole.model, padding=padding)
    with torch.no_grad():
        hidden, plan = whole.plan(batch)
        real = batch["attention_mask"].bool()
        right = whole.run(hidden, plan, 1, 3)
        assert torch.equal(server.run(hidden, server.plan_without_inputs(hidden, batch["attention_mask"]), 1, 3), right)
        without = server.run(hidden, server.plan_without_inputs(hidden, None), 1, 3)
        assert (without - right)[real].abs().max() > 0.01
    with pytest.raises(ModelError, match=r"the attention mask has shape \(3, 7\), expected \(3, 10\)"):
        server.plan_without_inputs(hidden, batch["attention_mask"][:, :7])


def test_a_mask_of_ones_is_no_mask() -> None:
    whole = whole_of("gemma3")
    batch = tiny_batch(whole.model)
    ones = torch.ones_like(batch["input_ids"])
    assert whole.plan(batch)[1].same(whole.plan({**batch, "attention_mask": ones})[1])


@pytest.mark.parametrize(("name", "tuples"), [("gptj", True), ("falcon", True), ("bloom", True), ("llama", False)])
def test_blocks_may_give_back_tuples(name: str, tuples: bool) -> None:
    assert whole_of(name).plan(tiny_batch(whole_of(name).model))[1].tuples == tuples


def test_tied_embeddings_stay_tied_when_both_ends_are_trained() -> None:
    _, split = parties("gpt2")
    model: Any = split.model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in split.stage.trainable()
    assert "transformer.wte.weight" in split.stage.trainable()


@pytest.mark.parametrize("name", ["gptj", "granitemoe", "bert"])
def test_no_cache_ever_reaches_a_block(name: str) -> None:
    """A configuration with a cache, as checkpoints have it, would make each replay append to it."""
    model = tiny_model(name) if name in ARCHITECTURES else small(name)
    model.config.use_cache = True
    stage = Stage.whole(model)
    batch = tiny_batch(model)
    hidden, plan = stage.plan(batch)
    assert all("Cache" not in type(value).__name__ for call in plan.calls for value in call.kwargs.values())
    assert torch.equal(stage.run(hidden, plan, 0, 4), stage.run(hidden, plan, 0, 4))


# Random numbers


def train(split: Any, batch: dict[str, Tensor], steps: int = 2) -> dict[str, Tensor]:
    parameters = list(split.stage.trainable().values())
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    for _ in range(steps):
        split(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in split.stage.trainable().items()}


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_equal_seeds_give_equal_training_with_dropout(name: str, memory: str) -> None:
    batch = tiny_batch(tiny_model(name))

    def run(seed: int, memory: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        server, split = parties(name, dropout=0.2, memory=memory, seed=3)
        torch.manual_seed(seed)
        return train(split, batch), dict(server.shared.updater.parameters)

    client, server = run(1, memory)
    for again in (run(1, memory), run(1, "keep")):
        assert equal(client, again[0])
        assert equal(server, again[1])
    assert not equal(client, run(2, memory)[0])


def test_checkpointed_blocks_drop_the_same_again() -> None:
    source = Stage.whole(tiny_model("gpt2", dropout=0.2))
    batch = tiny_batch(source.model)
    gradients = []
    for checkpointing in (False, True):
        server, _ = parties("gpt2", (2, 3), dropout=0.2)
        stage = carve(source, Part.client((2, 3), 4))
        tune(stage, "full", embeddings=True, gradient_checkpointing=checkpointing)
        split = SplitModel(stage, (2, 3), server.connect("b")).train()
        torch.manual_seed(0)
        split(**batch).loss.backward()
        gradients.append({name: value.grad for name, value in stage.trainable().items()})
    assert equal(*gradients)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_server_draws_for_each_client_apart(name: str) -> None:
    """What the server drops for A does not depend on whether B computes there, before or in between."""
    source = Stage.whole(tiny_model(name, dropout=0.3))
    batch = tiny_batch(source.model)

    def forwards(others: int) -> list[Tensor]:
        server, _ = parties(name, dropout=0.3)
        one, other = client_of(server, source, (1, 3), "A"), client_of(server, source, (1, 3), "B")
        seen = []
        for step in range(3):
            for _ in range(others):
                other.head(batch).call.forward()
                server._sessions["B"].drop()
            torch.manual_seed(step)
            seen.append(one.head(batch).call.forward())
            server._sessions["A"].drop()
        return seen

    alone = forwards(0)
    assert not torch.equal(alone[0], alone[1])
    for others in (1, 2):
        assert all(torch.equal(*pair) for pair in zip(alone, forwards(others), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "vit"])
def test_making_a_plan_for_the_server_draws_nothing(name: str) -> None:
    """Dropout on the stub's zeros draws too; in one process those numbers would be missing from the client's."""
    stage = carve(Stage.whole(tiny_model(name, dropout=0.5)), Part.server(1, 3))
    stage.model.train()
    before = torch.get_rng_state()
    stage.plan_without_inputs(torch.zeros(2, 10, 32), None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "vit"])
def test_finishing_draws_no_second_dropout_for_the_embedding(name: str) -> None:
    """Embedding, blocks and head draw as the whole model does, in that order: equal seeds give equal outputs."""
    task = "sequence-classification" if name == "bert" else None
    model: Any = tiny_model(name, task=task, dropout=0.3).train()  # type: ignore[arg-type]
    stage, batch = Stage.whole(copy.deepcopy(model)), tiny_batch(model)
    torch.manual_seed(0)
    expected = model(**batch).loss
    after = torch.get_rng_state()
    stage.plan(batch)  # the first plan looks whether the model can be split, which must not be noticed either
    torch.manual_seed(0)
    hidden, plan = stage.plan(batch)
    hidden = stage.run(hidden, plan, 0, 4)
    assert torch.equal(stage.finish(hidden, batch, plan).loss, expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_the_first_plan_draws_what_every_plan_draws() -> None:
    model: Any = tiny_model("gpt2", dropout=0.3).train()
    stage, batch = Stage.whole(model), tiny_batch(model)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        stage.plan(batch)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# Refusals


def small(model_type: str, **options: Any) -> Any:
    """A tiny text classifier or language model of an architecture that the zoo does not hold."""
    sizes = {
        "hidden_size": 32,
        "embedding_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = AutoConfig.for_model(model_type, vocab_size=97, pad_token_id=0, **sizes, **options)
    config.num_labels = 3
    auto: Any = AutoModelForSequenceClassification
    if type(config) not in auto._model_mapping:
        auto = AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config).eval()


@pytest.mark.parametrize("name", [name for name, spec in ARCHITECTURES.items() if spec.refused])
def test_architectures_that_cannot_be_split_are_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        Stage.whole(tiny_model(name))
    assert str(caught.value).startswith(REFUSED[name])
    assert "; use " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mpnet", "a tensor that is trained outside of the blocks|what a server does not have"),
        ("roformer", "what a server does not have"),
        ("deberta", "its own code failed|what a server does not have"),
        ("squeezebert", "its own code failed"),
    ],
)
def test_blocks_that_need_more_than_the_hidden_state_are_refused(model_type: str, reason: str, frozen: bool) -> None:
    """MPNet's table of relative positions would be zeros on a server, though nothing would ever fail; and so on."""
    model = small(model_type)
    model.requires_grad_(not frozen)
    with pytest.raises(
        ModelError, match=f"cannot be split.*({reason}).*use an architecture that `flexp verify --list`"
    ):
        carve(Stage.whole(model), Part.client((1, 3), 4)).plan(tiny_batch(model))


def test_a_shared_table_that_is_zero_is_refused_while_it_is_trained() -> None:
    """A server's zeros equal such a table, so that only its gradient betrays it."""
    model = small("mpnet")
    with torch.no_grad():
        model.mpnet.encoder.relative_attention_bias.weight.zero_()
    with pytest.raises(ModelError, match="trained outside of the blocks, so its gradient would be lost"):
        Stage.whole(model).plan(tiny_batch(model))


class Toy(nn.Module):
    """The least that looks like a model: an embedding, blocks, a head; ``how`` says what is odd about it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.config: Any = AutoConfig.for_model(
            "bert", hidden_size=8, num_attention_heads=2, num_hidden_layers=3, vocab_size=20
        )
        self.config._attn_implementation = "eager"
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([ToyBlock() for _ in range(3)])
        if how == "two lists":
            self.more = nn.ModuleList([ToyBlock() for _ in range(3)])
        elif how == "one shared by two":
            self.layers[2].linear.weight = self.layers[0].linear.weight
        elif how == "shared with the head":
            self.head = nn.Linear(8, 8)
            self.head.weight = self.layers[1].linear.weight
        elif how == "weights beside the blocks":
            self.inner = nn.Module()
            self.inner.scale = nn.Parameter(torch.ones(8))
            self.inner.layers = self.layers
            del self.layers

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Any:
        hidden = self.embed(input_ids)
        layers = self.inner.layers if self.how == "weights beside the blocks" else self.layers
        order = reversed(layers) if self.how == "backwards" else layers
        notes: list[Tensor] = []
        for layer in order:
            if self.how == "scaled between":
                hidden = hidden * 2
            extra = {
                "token ids": input_ids,
                "notes": notes,
                "gradient": self.embed.weight.sum(),
            }.get(self.how)
            hidden = layer(hidden, extra) if self.how != "same twice" else layer(layer(hidden))
        return hidden


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, extra: Any = None) -> Tensor:
        return self.linear(hidden)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("two lists", r"found 2 \(layers, more\)"),
        ("one shared by two", "some of its blocks share one parameter"),
        ("shared with the head", "a block shares a parameter with the embeddings or the head"),
        ("backwards", "changes the hidden state between its blocks, or does not call each of them once and in order"),
        ("same twice", "changes the hidden state between its blocks, or does not call each of them once and in order"),
        ("scaled between", "changes the hidden state between its blocks"),
        ("token ids", "they would get other arguments there"),
        ("notes", "they would get other arguments there"),
        ("gradient", "block 0 gets, besides the hidden state, a tensor that is trained outside of the blocks"),
        ("weights beside the blocks", "inner, which holds its blocks, has weights of its own"),
    ],
)
def test_odd_models_are_refused(how: str, reason: str) -> None:
    ids = {"input_ids": torch.arange(1, 11).view(2, 5)}
    with pytest.raises(ModelError, match=f"Toy cannot be split.*{reason}"):
        Stage.whole(Toy(how)).plan(ids)
    hidden, plan = Stage.whole(Toy("plain")).plan(ids)
    assert hidden.shape == (2, 5, 8)
    assert len(plan.calls) == 3


@pytest.mark.parametrize(
    ("name", "key", "value", "reason"),
    [
        ("opt", "layerdrop", 0.1, "its config.layerdrop is 0.1, and blocks that are left out at random"),
        (
            "qwen3_moe",
            "output_router_logits",
            True,
            "its config.output_router_logits is True, and the loss on the load of experts needs all blocks",
        ),
        ("llama", "_attn_implementation_internal", None, "its attention implementation was never set"),
    ],
)
def test_settings_that_no_split_can_follow_are_refused(name: str, key: str, value: Any, reason: str) -> None:
    model: Any = tiny_model(name)
    setattr(model.config, key, value)
    with pytest.raises(ModelError, match=f"cannot be split: {reason}"):
        Stage.whole(model)


@pytest.mark.parametrize("key", ["output_hidden_states", "output_attentions", "output_router_logits"])
def test_outputs_of_all_blocks_are_refused(key: str) -> None:
    _, split = parties("qwen3_moe")
    with pytest.raises(ModelError, match=f"{key}=True was asked for, but a split model has its blocks in several"):
        split(**tiny_batch(split.model), **{key: True})


def test_a_batch_that_does_not_fit_is_no_endless_riddle() -> None:
    with pytest.raises(ModelError, match=r"or the batch does not fit it.*index out of range"):
        whole_of("gpt2").plan({"input_ids": torch.full((1, 4), 1000)})


def test_carving_what_is_not_there_is_refused() -> None:
    server = carve(whole_of("llama"), Part.server(1, 3))
    assert carve(server, Part.server(2, 3)).part.blocks == {2}
    with pytest.raises(ModelError, match=r"cannot carve blocks \[0\] out of a stage that does not hold them"):
        carve(server, Part.server(0, 3))
    with pytest.raises(ModelError, match="cannot carve"):
        carve(server, Part(frozenset({1}), ends=True))


def test_the_models_classes_and_names_survive() -> None:
    whole = whole_of("vit")
    client = carve(whole, Part.client((1, 3), 4))
    assert type(client.model) is type(whole.model)
    assert tensors_of(client.model).keys() < tensors_of(whole.model).keys()
    assert [client.block_of(key) for key in ("vit.layers.3.x", "vit.embeddings.y", "classifier.weight")] == [
        3,
        None,
        None,
    ]


# Cuts, and equality of arguments


@given(blocks=st.integers(1, 64), start=st.integers(-2, 66), stop=st.none() | st.integers(-2, 66))
def test_every_cut_is_complete_or_refused(blocks: int, start: int, stop: int | None) -> None:
    end = blocks if stop is None else stop
    if 0 <= start < end <= blocks:
        cut = check_cut((start, stop), blocks)
        client, server = Part.client(cut, blocks), Part.server(*cut)
        assert cut == (start, end)
        assert client.blocks | server.blocks == Part.whole(blocks).blocks
        assert not client.blocks & server.blocks
        assert (client.ends, server.ends) == (True, False)
    else:
        with pytest.raises(ConfigError, match=rf"cut = \({start}, {end}\) does not fit a model of {blocks} blocks"):
            check_cut((start, stop), blocks)


def test_arguments_are_compared_bit_for_bit() -> None:
    one = torch.tensor([1.0, 2.0])
    assert same((one, None, {"a": [one, 1]}), (one.clone(), None, {"a": [one.clone(), 1]}))
    for other in (one + 1e-7, one.double(), one[:1], None, 1.0, torch.tensor([1.0, float("nan")])):
        assert not same((one,), (other,))
    assert not same(1, True)
    assert not same({}, {})  # might be a cache that blocks fill
    assert not same([], [])
    assert not same(object(), object())
