"""``python -m benchmarks embeddings`` on a small model whose table is most of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.embeddings import embeddings


@pytest.mark.slow
def test_the_file_saves_the_table_on_either_side(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60_000, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path)
    found = embeddings(str(tmp_path), examples=2, length=8, pairs=4)
    assert found["table_bytes"] == 60_000 * 128 * 4
    assert found["cut"] == [1, 2]
    for who in ("client", "whole"):
        assert found[who]["memory"] - found[who]["file"] == pytest.approx(found["table_bytes"], rel=0.15)
    assert found["ratio"] > 0
