"""Packed ends: what bitsandbytes makes of these tables, never unpacked whole; split as whole; and plain again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from flexp.config import ModelConfig, RunConfig
from flexp.cost.model_cost import model_cost
from flexp.errors import ConfigError, ModelError
from flexp.export.whole import merged
from flexp.models import packed
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage, quietly
from flexp.models.packed import PackedEmbedding, PackedHead, table_of
from flexp.models.stage import carve
from flexp.models.zoo import tiny_batch
from flexp.run.verify import Setup, verify

from .test_quantized import as_if_trained

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs flexp[quantized]; make test has it")

HOW = ("nf4", "int8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A small Llama as transformers saves it, its head tied (``True``) or not."""
    out: dict[bool, Path] = {}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    for tied in (False, True):
        out[tied] = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **shape, num_key_value_heads=2, vocab_size=999, pad_token_id=0, tie_word_embeddings=tied
        )
        with quietly():
            transformers.LlamaForCausalLM(config).save_pretrained(out[tied])
    return out


def ends(folder: Path, how: str, **settings: Any) -> Any:
    config = ModelConfig.of(folder, quantization=how, quantize_ends=True, tuning="lora", **settings)
    return load_stage(config, "causal-lm", Part.client((1, 3), 4)).model


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("name", "padding"), [("llama", "left"), ("gpt2", "right"), ("bert", "right")])
def test_split_is_whole(how: str, name: str, padding: Any) -> None:
    """0.0 in logits, gradients, losses and weights over three steps: own head, tied head, classifier."""
    outcome = verify(Setup.of(f"arch:{name}", tuning="lora", quantization=how, quantize_ends=True, padding=padding))
    assert outcome.exact, outcome


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOW)
def test_an_embedding_and_a_head_are_those_of_bitsandbytes(
    folders: dict[bool, Path], how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows bit for bit as its own embeddings unpack them; logits and gradients as with the unpacked table at once."""
    monkeypatch.setattr(packed, "PIECE", 16 * 640)  # many pieces, the last one shorter
    model = ends(folders[False], how, dtype=str(dtype).removeprefix("torch."))
    with quietly():
        plain = transformers.LlamaForCausalLM.from_pretrained(folders[False], dtype=dtype)
    kind = bitsandbytes.nn.EmbeddingNF4 if how == "nf4" else bitsandbytes.nn.Embedding8bit
    theirs = kind(999, 64, dtype=dtype)
    theirs.load_state_dict(plain.model.embed_tokens.state_dict())
    ids = torch.tensor([[4, 998], [0, 4]])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedHead)
    got = embedding(ids)
    assert got.dtype == dtype
    if how == "nf4":
        assert torch.equal(got, theirs.to("cpu")(ids))
    whole = table_of(head)
    exact = plain.lm_head.weight.detach()
    most = (0.16 if how == "nf4" else 1 / 254) + torch.finfo(dtype).eps  # half of the widest step, and rounding
    assert float((whole.float() - exact.float()).abs().max()) <= most * float(exact.abs().max())
    x_one, x_other = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    one, other = head(x_one.requires_grad_()), nn.functional.linear(x_other.requires_grad_(), whole)
    assert torch.equal(one, other)
    for logits in (one, other):
        logits.float().logsumexp(-1).sum().backward()
    assert x_one.grad is not None
    assert x_other.grad is not None
    assert float((x_one.grad - x_other.grad).abs().max()) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tied", [False, True])
def test_tied_ends_are_packed_once_and_predicted_as_held(folders: dict[bool, Path], tied: bool, how: str) -> None:
    model, config = ends(folders[tied], how), ModelConfig.of(folders[tied], quantization=how, tuning="lora")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (head.weight is embedding.weight) is tied
    assert (head.scales is embedding.scales) is tied
    held = {id(value): value.nbytes for module in (embedding, head) for value in (module.weight, module.scales)}
    packed_cost = model_cost(config.model_copy(update={"quantize_ends": True}), "causal-lm", length=16).at(2, 8).head
    saved = model_cost(config, "causal-lm", length=16).at(2, 8).head.weight_bytes - packed_cost.weight_bytes
    assert saved == (1 if tied else 2) * 999 * 64 * 4 - sum(held.values())
    split = carve(load_stage(config.model_copy(update={"quantize_ends": True}), "causal-lm"), Part.client((1, 3), 4))
    assert (split.model.get_output_embeddings().weight is split.model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_model_is_plain_and_answers_as_trained(
    folders: dict[bool, Path], tied: bool, how: str, tmp_path: Path
) -> None:
    config = ModelConfig.of(folders[tied], quantization=how, quantize_ends=True, tuning="lora")
    source, trained, weights = as_if_trained(config)
    whole = merged(source, weights, config.lora.alpha / config.lora.rank)
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) is tied
    with quietly():
        whole.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = tiny_batch(source.model, batch=2, length=7)
    with torch.no_grad():
        expected, got = trained.model.eval()(**batch).logits, again.eval()(**batch).logits
    # LLM.int8() rounds activations in the blocks as well, which a plain model does not.
    assert float((expected - got).abs().max()) < (1e-4 if how == "nf4" else 0.05)


def test_a_table_in_its_file_leaves_the_head_to_be_packed(folders: dict[bool, Path]) -> None:
    model = ends(folders[False], "nf4", embeddings="file")
    assert not isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert isinstance(model.get_output_embeddings(), PackedHead)


def test_what_cannot_be_is_refused_in_one_line(folders: dict[bool, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'quantize_ends = true packs the ends.*"off".*set it to "nf4" or "int8"'):
        RunConfig.checked({"model": {"id": "m", "quantize_ends": True}, "data": {"source": "d"}}, "here")
    with pytest.raises(ModelError, match=r'model\.quantization is "off".*use false'):
        load_stage(ModelConfig.of(folders[True], quantize_ends=True), "causal-lm")
    odd = transformers.LlamaConfig(
        hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, pad_token_id=0
    )
    with quietly():
        transformers.LlamaForCausalLM(odd).save_pretrained(tmp_path)
    narrow = ModelConfig.of(tmp_path, quantization="nf4", quantize_ends=True)
    with pytest.raises(ModelError, match=r"rows of 40 numbers do not divide into nf4's blocks of 32; use false"):
        load_stage(narrow, "causal-lm", Part.client((0, 1), 2))
