"""Checkpoints of real shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.tools import big_model
from flexp.errors import FlexpError
from flexp.models.loading import quietly


def test_what_is_written_shard_by_shard_is_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(big_model, "SHARD", 40_000)
    folder = big_model.write_random("small", tmp_path / "model")
    assert len(list(folder.glob("*.safetensors"))) > 3
    with quietly():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    deviations = [float(value.detach().std()) for value in model.parameters() if value.dim() == 2]
    assert all(spread == pytest.approx(0.02, rel=0.1) for spread in deviations)
    assert big_model.write_random("small", folder) == folder  # once there, it stays


def test_fewer_blocks_are_the_first_ones(tmp_path: Path) -> None:
    folder = big_model.write_random("small", tmp_path / "model", 2)
    with quietly():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2


def test_a_checkpoint_of_another_shape_is_not_taken_for_it(tmp_path: Path) -> None:
    folder = big_model.write_random("small", tmp_path / "model", 2)
    assert big_model.write_random("small", folder, 2) == folder
    with pytest.raises(FlexpError, match=r"its num_hidden_layers is 2, small has 4; name another folder"):
        big_model.write_random("small", folder)
    with pytest.raises(FlexpError, match=r"another shape: its hidden_size is 64, llama-3.2-1b with 2 blocks has 2048"):
        big_model.write_random("llama-3.2-1b", folder, 2)
