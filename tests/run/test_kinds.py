"""Every kind of head is split exactly: the same loss, logits, gradients and weights as plain transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from flexp.kinds import KINDS
from flexp.models.loading import load_stage
from flexp.models.zoo import save_tiny, tiny_batch, tiny_model
from flexp.run.verify import Setup, kind_of, verify

TEXT = [kind for kind, told in KINDS.items() if not told.images]


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in ("bert", "llama") for kind in TEXT if (name, kind) != ("bert", TEXT[0])]
)
def test_it_is_split_exactly(name: str, kind: str) -> None:
    found = verify(Setup.of(f"arch:{name}", task=kind, padding="right", steps=2, cut=(1, 3)))  # type: ignore[arg-type]
    assert found.exact
    assert found.tensors > 20


@pytest.mark.parametrize("kind", [kind for kind in TEXT if kind != "causal-lm"])
def test_its_loss_and_items_are_those_of_plain_transformers(tmp_path: Path, kind: str) -> None:
    folder = save_tiny("bert", tmp_path, task="sequence-classification")  # another head, of three classes
    names = ["a", "b", "c", "d"] if KINDS[kind].named else None
    stage = load_stage(str(folder), kind, labels=names, pad_token_id=0, dropout=0.0)  # type: ignore[arg-type]
    batch = tiny_batch(stage.model, padding="right")
    output = stage.model(**batch)
    plain = {
        "sequence-classification": (transformers.BertForSequenceClassification, 4, "single_label_classification"),
        "multi-label-classification": (transformers.BertForSequenceClassification, 4, "multi_label_classification"),
        "regression": (transformers.BertForSequenceClassification, 1, "regression"),
        "token-classification": (transformers.BertForTokenClassification, 4, None),
        "question-answering": (transformers.BertForQuestionAnswering, 2, None),
    }
    cls, outputs, problem = plain[kind]
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=outputs, problem_type=problem)
    model = cls(config)
    model.load_state_dict(stage.model.state_dict())
    assert torch.equal(model.train()(**batch).loss, output.loss)
    both = [{key: value[some] for key, value in batch.items()} for some in (slice(0, 1), slice(1, 3))]
    items = [KINDS[kind].items(half) for half in both]
    parts = sum(stage.model(**half).loss * count for half, count in zip(both, items, strict=True)) / sum(items)
    assert torch.allclose(parts, output.loss, atol=1e-6)


def test_a_checkpoint_says_what_kind_it_is(tmp_path: Path) -> None:
    for kind in TEXT:
        tiny_model("llama", task=kind).save_pretrained(tmp_path / kind)  # type: ignore[arg-type]
        assert kind_of(str(tmp_path / kind)) == kind
