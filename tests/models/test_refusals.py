"""What cannot be split exactly is refused: by name, with the reason, in one line, before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from flexp.errors import ModelError
from flexp.models.anatomy import Part
from flexp.models.architectures import ARCHITECTURES
from flexp.models.stage import Stage, carve
from flexp.models.zoo import tiny_batch, tiny_model
from tests.models.tools import parties, small, tensors_of, whole_of

REFUSED = {
    "t5": "T5ForConditionalGeneration cannot be split: it is an encoder–decoder",
    "deberta_v2": "DebertaV2ForSequenceClassification cannot be split: all blocks share one trainable table",
    "albert": "AlbertForSequenceClassification cannot be split: it applies the same block again and again",
    "gemma3n": "Gemma3nForCausalLM cannot be split: every block reads an embedding of the token ids",
    "gemma4": "Gemma4ForCausalLM cannot be split: every block reads an embedding of the token ids",
}


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
        ("squeezebert", "its own code failed"),
        ("rwkv", "its own code failed"),
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
        ("token ids", "block 0 gets another argument 1 there"),
        ("notes", "block [0-9] gets another .* there"),
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
    with pytest.raises(ModelError, match=r"the batch does not fit this GPT2LMHeadModel.*index out of range"):
        whole_of("gpt2").plan({"input_ids": torch.full((1, 4), 1000)})


def test_an_image_of_another_size_is_named() -> None:
    with pytest.raises(ModelError, match=r"the batch does not fit.*\(24\*24\).*images of the size that its config"):
        whole_of("vit").plan({"pixel_values": torch.zeros(1, 3, 24, 24)})


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
