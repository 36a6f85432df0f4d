"""``model.pooling``: exact when split, plain transformers' hidden states pooled, exported as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from flexp.config import ModelConfig
from flexp.errors import ConfigError, ModelError
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.export.saved import RunModel, open_run
from flexp.models.loading import load_stage
from flexp.models.pooled import pool
from flexp.models.zoo import save_tiny
from flexp.run.verify import Setup, verify
from tests import warm
from tests.export.tools import answer, batch_of, train

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
CHOSEN = {"last": [2, 3, 3], "cls": [0, 1, 0]}


@pytest.mark.parametrize("how", ["mean", "last", "cls"])
def test_padding_is_not_pooled(how: str) -> None:
    hidden = torch.randn(3, 4, 5, dtype=torch.float64)
    rows = [row[mask.bool()] for row, mask in zip(hidden, MASK, strict=True)]
    right = {"mean": [row.mean(0) for row in rows], "last": [row[-1] for row in rows], "cls": [row[0] for row in rows]}
    assert torch.allclose(pool(hidden, MASK, how), torch.stack(right[how]), atol=1e-15)
    assert torch.equal(pool(hidden, torch.ones_like(MASK), how), pool(hidden, None, how))


@pytest.mark.parametrize(
    ("arch", "how", "padding"),
    [
        ("bert", "mean", "right"),
        ("gpt2", "last", "left"),
        ("opt-projected", "mean", "left"),
        ("modernbert", "cls", "none"),
    ],
)
def test_split_is_whole(arch: str, how: str, padding: Any) -> None:
    setup = Setup.of(f"arch:{arch}", task="sequence-classification", pooling=how, padding=padding, steps=2)
    assert verify(setup).exact


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_the_head_is_one_layer_on_the_plain_models_hidden_states(arch: str, tmp_path: Path) -> None:
    """Also where the checkpoint has a classifier of its own: it belongs to another head, and is not taken over."""
    save_tiny(arch, tmp_path, task="sequence-classification")
    stage = load_stage(ModelConfig(id=str(tmp_path), pooling="mean"), "sequence-classification", labels="abc")
    assert stage.new == {"classifier.weight", "classifier.bias"}
    ids, mask = torch.randint(5, 90, (3, 4)), MASK[[0, 2, 0]]
    base: Any = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    hidden: Tensor = base(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    labels = torch.tensor([0, 2, 1])
    with torch.no_grad():
        stage.model.classifier.bias.copy_(torch.randn(3))
        said = stage.model.eval()(input_ids=ids, attention_mask=mask, labels=labels)
        logits = torch.nn.functional.linear(mean, stage.model.classifier.weight, stage.model.classifier.bias)
    assert torch.allclose(said.logits, logits, atol=1e-6)
    assert torch.allclose(said.loss, torch.nn.functional.cross_entropy(logits, labels), atol=1e-6)


@pytest.mark.parametrize("kind", ["causal-lm", "image-classification"])
def test_other_models_are_refused(kind: Any) -> None:
    with pytest.raises(ModelError, match="is for classifiers of texts"):
        load_stage(ModelConfig(id="arch:gpt2" if kind == "causal-lm" else "arch:vit", pooling="mean"), kind)


PLAIN = """
import sys, torch, transformers
from transformers import dynamic_module_utils
auto, where = transformers.AutoModelForSequenceClassification, sys.argv[1]
dynamic_module_utils.HF_MODULES_CACHE = sys.argv[3]
try:
    auto.from_pretrained(where)
    sys.exit("it was loaded as something else")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
model = auto.from_pretrained(where, trust_remote_code=True).eval()
assert "flexp" not in sys.modules
batch = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save((model(**batch).logits, model.config.id2label), sys.argv[2])
"""


def test_an_exported_model_is_the_trained_one_or_is_refused(tmp_path: Path) -> None:
    """Plain transformers needs the word to run the code in the folder, and never makes another model of it."""
    run = open_run(train(tmp_path, "bert", model={"id": str(tmp_path / "model"), "pooling": "mean"}))
    export(RunModel(run, "north"), tmp_path / "out")
    batch, expected = batch_of(run, "north"), answer(run.method.personal("north"), batch_of(run, "north"))
    assert torch.equal(answer(open_trained(tmp_path / "out").generator, batch), expected)
    assert "trust_remote_code=True" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    torch.save(batch, tmp_path / "batch")
    done = warm.run(["-c", PLAIN, *(str(tmp_path / name) for name in ("out", "batch", "modules"))])
    assert done.returncode == 0, done.stderr
    logits, names = torch.load(tmp_path / "batch")
    assert torch.equal(logits, expected)
    assert names == {0: "no", 1: "yes"}
    again = load_stage(
        ModelConfig(id=str(tmp_path / "out"), pooling="mean"), "sequence-classification", labels=["no", "yes"]
    )
    assert not again.new  # its own head, to go on with
    with torch.no_grad():
        assert torch.equal(again.model.eval()(**batch).logits, expected)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    tables = {"id": str(tmp_path / "model"), "pooling": "mean", "tuning": "lora"}
    run = open_run(train(tmp_path, "bert", model=tables))
    with pytest.raises(ConfigError, match="use --merge"):
        export(RunModel(run, "north"), tmp_path / "out", "adapter")
    export(RunModel(run, "north"), tmp_path / "out")
    batch = batch_of(run, "north")
    assert torch.allclose(
        answer(open_trained(tmp_path / "out").generator, batch), answer(run.method.personal("north"), batch), atol=1e-5
    )
