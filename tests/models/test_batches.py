"""What a later batch brings is looked at like the first: it is exact, or refused before anything crosses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from flexp.client.model import SplitModel
from flexp.client.pretrained import SPLIT_MODELS
from flexp.config import ModelConfig, ServerConfig
from flexp.errors import ModelError
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import save_tiny, tiny_model
from flexp.server import Server
from tests.models.tools import parties

IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18]])
CAUSAL = torch.ones(6, 6).tril().bool()[None, None].expand(2, 1, 6, 6)


@pytest.mark.parametrize(
    ("name", "brings", "message"),
    [
        ("llama", {"is_causal": False}, "this batch brings is_causal, which blocks need and a server is not told"),
        ("llama", {"attention_mask": CAUSAL}, r"attention_mask has shape \(2, 1, 6, 6\).* \(B, T\)"),
        ("llama", {"attention_mask": {"full_attention": CAUSAL}}, "attention_mask has type dict"),
        ("llama", {"cache_position": torch.arange(3, 9)}, "this batch brings cache_position"),
        ("gpt2", {"encoder_hidden_states": torch.zeros(2, 3, 32)}, "this batch brings encoder_hidden_states"),
        ("gemma3", {"output_hidden_states": True}, "output_hidden_states=True was asked for"),
    ],
)
def test_what_a_later_batch_asks_of_the_blocks_is_refused(name: str, brings: dict[str, Any], message: str) -> None:
    _, split = parties(name)
    split(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ModelError, match=message) as caught:
        split(**{"input_ids": IDS, "labels": IDS, **brings})
    assert "\n" not in str(caught.value)
    split(input_ids=IDS, labels=IDS).loss.backward()  # nothing was left behind


@pytest.mark.parametrize(
    "brings",
    [
        {"cache_position": torch.arange(6)},
        {"position_ids": torch.arange(3, 9)[None]},
        {"labels": None, "shift_labels": torch.nn.functional.pad(IDS, (0, 1), value=-100)[:, 1:]},
        {"labels": IDS, "shift_labels": torch.nn.functional.pad(IDS, (0, 2), value=-100)[:, 2:].contiguous()},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])},
    ],
)
def test_what_a_batch_may_bring_is_exact_at_once_and_later(brings: dict[str, Any]) -> None:
    _, split = parties("llama")
    whole = tiny_model("llama").train()
    for more in (brings, {}, brings):
        batch = {key: value for key, value in {"input_ids": IDS, "labels": IDS, **more}.items() if value is not None}
        expected, given = whole(**batch), split(**batch)
        assert torch.equal(expected.logits, given.logits)
        assert expected.loss is None or torch.equal(expected.loss, given.loss)


def test_other_loss_items_weigh_as_many_as_they_are() -> None:
    server, split = parties("llama")
    shifted = torch.tensor([[8, -100, -100, 11, 12, -100], [-100] * 6])
    split(input_ids=IDS, labels=IDS, shift_labels=shifted).loss.backward()
    seen: list[float] = []
    add = server.shared.add
    server.shared.add = lambda gradients, weight, norm, **_: (seen.append(weight), add(gradients, weight, norm))[1]  # type: ignore[method-assign]
    split(input_ids=IDS, labels=IDS, shift_labels=shifted).loss.backward()
    assert seen == [3.0]


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize(("rope", "exact"), [("dynamic", 16), ("longrope", 40), ("yarn", 40)])
def test_a_rotary_table_does_not_depend_on_what_others_sent(rope: str, exact: int, memory: Any) -> None:
    """With ``dynamic``, transformers' tables remember the longest text of whoever used the server."""
    config = tiny_model("llama").config
    config.rope_parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0}
    config.max_position_embeddings = 16 if rope == "dynamic" else 64
    if rope != "dynamic":
        config.rope_parameters["original_max_position_embeddings"] = 16
    if rope == "longrope":
        config.rope_parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    whole = auto.from_config(config, attn_implementation="sdpa")
    source = Stage.whole(copy.deepcopy(whole))
    shared = carve(source, Part.server(1, 3))
    tune(shared, ModelConfig(id="any"))
    server = Server(shared, config=ServerConfig(memory=memory))
    clients = [_client(server, source, name) for name in ("a", "b")]
    wholes = [copy.deepcopy(whole).train(), copy.deepcopy(whole).train()]
    for length in (10, exact, 12, exact - 4, exact):
        for number, tokens in ((0, length), (1, exact + 10 - length)):
            ids = torch.randint(5, 90, (2, tokens))
            given, expected = clients[number](input_ids=ids, labels=ids), wholes[number](input_ids=ids, labels=ids)
            assert torch.equal(given.logits, expected.logits)
    if rope == "dynamic":
        with pytest.raises(ModelError, match=r"17 tokens are more than the 16 .*dynamic NTK"):
            clients[0](input_ids=torch.randint(5, 90, (2, 17)))


def _client(server: Server, source: Stage, name: str) -> SplitModel:
    stage = carve(source, Part.client((1, 3), 4))
    tune(stage, ModelConfig(id="any"))
    return SPLIT_MODELS["causal-lm"](stage, (1, 3), server.connect(name)).train()


def _classifier(name: str) -> tuple[SplitModel, Any]:
    """A decoder that classifies, and the same in plain transformers; both look for the padding token 0."""
    whole: Any = tiny_model(name, task="sequence-classification")
    source = Stage.whole(copy.deepcopy(whole))
    server = Server(carve(source, Part.server(1, 3)))
    return SPLIT_MODELS["sequence-classification"](
        carve(source, Part.client((1, 3), 4)), (1, 3), server.connect("a")
    ), whole


def _padded(pad: int) -> dict[str, Tensor]:
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, 4:], mask[0, 4:] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_padding_that_a_classifier_would_read_is_refused(name: str) -> None:
    split, whole = _classifier(name)
    own = whole.config.pad_token_id
    with torch.no_grad():
        alone = whole(input_ids=IDS[:1, :4]).logits
        torch.testing.assert_close(split(**_padded(own)).logits[:1], alone, rtol=1e-5, atol=1e-5)
        wrong = whole(**_padded(90)).logits[:1]  # what plain transformers answers: that of a token of padding
        assert (wrong - alone).abs().max() > 0.01
        with pytest.raises(ModelError, match=f"looks for the padding token {own}.*model.config.pad_token_id ="):
            split(**_padded(90))
        split.config.pad_token_id = 90
        torch.testing.assert_close(split(**_padded(90)).logits[:1], alone, rtol=1e-5, atol=1e-5)
        split.config.pad_token_id = None
        with pytest.raises(ModelError, match="knows no padding token"):
            split(**_padded(90))
        split(input_ids=IDS[:1])  # of one text it is clear where it ends


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_classifier_looks_for_the_tokenizers_padding(name: str, tmp_path: Any) -> None:
    save_tiny(name, tmp_path, task="sequence-classification")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    model = load_stage(str(tmp_path), "sequence-classification", pad_token_id=90).model.eval()
    with torch.no_grad():
        alone, together = plain(input_ids=IDS[:1, :4]).logits, model(**_padded(90)).logits[:1]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_positions_of_an_encoder_do_not_move_with_the_tokenizers_padding(tmp_path: Any) -> None:
    """RoBERTa counts them from its padding token on, whatever batches are filled up with."""
    save_tiny("roberta", tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    model = load_stage(str(tmp_path), "sequence-classification", pad_token_id=90).model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert model.config.pad_token_id == plain.config.pad_token_id == 1
