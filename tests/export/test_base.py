"""One base and an adapter for each client, as engines that serve many adapters load them (docs/export.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flexp.cli.main import app
from flexp.export.saved import open_run

from .tools import answer, batch_of, train

LORA = {"tuning": "lora", "lora": {"rank": 4, "alpha": 12.0}}


def flexp(*arguments: Any) -> str:
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    return done.output if done.exception is None else str(done.exception)


def served(folder: Path, base: Path) -> tuple[Any, dict[str, Any], set[int]]:
    """The model that an engine with one rank, one scaling and nothing but adapters would have; and what it read."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert not config["modules_to_save"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    tensors = load_file(folder / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base)
    blocks = set()
    for name, down in tensors.items():
        layer, adapter, _ = name.removeprefix("base_model.model.").partition(".lora_A.weight")
        if not adapter:
            assert name.endswith(".lora_B.weight")
            continue
        up = tensors[name.replace("lora_A", "lora_B")]
        assert down.shape[0] == up.shape[1] == config["r"]
        model.get_submodule(layer).weight.data += config["lora_alpha"] / config["r"] * (up @ down)
        blocks.add(int(layer.split("layers.")[1].partition(".")[0]))
    return model, config, blocks


def test_a_base_and_the_ends_of_each_client(tmp_path: Path) -> None:
    place = train(tmp_path, "llama", model={"id": str(tmp_path / "model"), **LORA}, train={"rounds": 2})
    run, base = open_run(place), tmp_path / "base"
    assert "a base in" in flexp(place, "--base", "--out", base)
    for client in ("north", "south"):
        batch, out = batch_of(run, client), tmp_path / client
        flexp(place, "--client", client, "--adapter", "--over", base, "--out", out)
        expected = answer(run.method.personal(client), batch)
        model, _, blocks = served(out, base)
        assert blocks == set(range(run.world.source.anatomy.blocks)) - {2}  # of cuts [1, 3) and [2, …)
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
        for found in (model, peft):
            assert torch.allclose(answer(found, batch), expected, atol=2e-5)
    assert not torch.allclose(answer(AutoModelForCausalLM.from_pretrained(base), batch), expected, atol=1e-3)
    said = flexp(place, "--client", "north", "--adapter", "--over", base, "--out", tmp_path / "no", "--round", 1)
    assert "no base of 'north' after round 1" in said
    said = flexp(place, "--client", "north", "--adapter", "--over", tmp_path / "model", "--out", tmp_path / "no")
    assert "it has nothing of it" in said
    assert "goes with --adapter" in flexp(place, "--client", "north", "--over", base, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_ranks_of_ones_own_become_the_largest(tmp_path: Path) -> None:
    own = {"method": {"name": "splitft", "splitft": {"cut_rank": 2}}}
    place = train(tmp_path, "llama", model={"id": str(tmp_path / "model"), **LORA}, **own)
    run = open_run(place)
    assert {len(value) for name, value in run.method.trained_weights("north").items() if "lora_A" in name} == {2, 4}
    flexp(place, "--client", "north", "--adapter", "--out", tmp_path / "out")
    model, config, _ = served(tmp_path / "out", tmp_path / "model")
    assert (config["r"], config["lora_alpha"]) == (4, 12.0)
    batch = batch_of(run, "north")
    assert torch.allclose(answer(model, batch), answer(run.method.personal("north"), batch), atol=2e-5)
