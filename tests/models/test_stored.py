"""Embeddings that stay in their file: the same numbers as in memory, and a clear word where they cannot."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from flexp.config import ModelConfig
from flexp.errors import ConfigError, ModelError
from flexp.models import fingerprint, low_memory, stored
from flexp.models.anatomy import Part
from flexp.models.architectures import ARCHITECTURES
from flexp.models.loading import load_stage
from flexp.models.stage import carve
from flexp.models.stored import StoredEmbedding, token_embedding
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_batch, tiny_model
from flexp.planner.fleet import TaskShape
from tests import warm
from tests.models.tools import SPLIT, equal, save, tensors_of
from tests.run.test_runner import same
from tests.tiny import bert_folder, config

CUT = (1, 3)
UNTIED = ["bert", "distilbert", "gpt2-untied", "gpt_neox", "gptj", "llama", "mistral", "modernbert", "phi3", "qwen2",
          "qwen3", "qwen3_moe", "roberta"]  # fmt: skip


def kind_of(name: str) -> Any:
    return ARCHITECTURES[name].task


@pytest.mark.parametrize("name", UNTIED)
def test_a_client_computes_the_same(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    whole = load_stage(folder, kind_of(name))
    part = Part.client(CUT, whole.anatomy.blocks)
    usual, lean = (
        load_stage(ModelConfig.of(folder, embeddings=where), kind_of(name), part) for where in ("memory", "file")
    )  # type: ignore[arg-type]
    assert isinstance(token_embedding(lean.model), StoredEmbedding)
    assert equal(tensors_of(lean.model), tensors_of(usual.model))  # whoever asks for all of it still gets it
    batch = tiny_batch(whole.model, padding="left")
    for stage in (lean, carve(lean, part)):
        assert torch.equal(stage.plan(batch)[0], usual.plan(batch)[0])


@pytest.mark.parametrize("name", sorted(set(SPLIT) - set(UNTIED)))
def test_what_cannot_stay_is_said(name: str, tmp_path: Path) -> None:
    folder, server = save(name, tmp_path), Part.server(*CUT)
    with pytest.raises(ModelError, match=r'"file" is not possible: .*(tied to its|a way of its own).*; use "memory"'):
        load_stage(ModelConfig.of(folder, embeddings="file"), kind_of(name), Part.client(CUT, 4))
    load_stage(ModelConfig.of(folder, embeddings="file"), kind_of(name), server)  # a server has none


def test_a_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    from flexp.run import runner

    bert_folder(tmp_path / "model", dropout=True)
    for where in ("memory", "file"):
        runner.run(config(tmp_path, model={"embeddings": where}, train={"rounds": 1}), tmp_path / where)
    same(tmp_path / "memory", tmp_path / "file")


def test_a_checkpoint_of_the_bare_encoder_has_other_names(tmp_path: Path) -> None:
    whole = save("bert", tmp_path)
    tensors = {key.removeprefix("bert."): value for key, value in load_file(whole / "model.safetensors").items()}
    tensors = {key: value for key, value in tensors.items() if not key.startswith("classifier")}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    stage = load_stage(ModelConfig.of(tmp_path, embeddings="file"), "sequence-classification", labels=["a", "b"])
    ids = torch.tensor([[3, 3, 9], [1, 0, 3]])
    module = token_embedding(stage.model)
    assert torch.equal(module(ids), module.weight[ids])
    assert module(ids[:0]).shape == (0, 3, module.embedding_dim)


def test_where_reserves_count_the_map_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("bert", tmp_path)
    wanted = {
        key: value.clone() for key, value in tensors_of(load_stage(folder, "sequence-classification").model).items()
    }
    for module in (low_memory, stored):
        monkeypatch.setattr(module, "reserves_count", lambda: True)
    lean = load_stage(ModelConfig.of(folder, embeddings="file"), "sequence-classification")
    assert equal(tensors_of(lean.model), wanted)
    if os.path.exists("/proc/self/maps"):  # noqa: PTH110
        maps = [line for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if str(folder) in line]
        assert maps
        assert {line.split()[1] for line in maps} <= {"r--s", "r--p"}


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is enforced by Linux")
def test_a_limit_that_the_table_alone_would_break(tmp_path: Path) -> None:
    """Under 40 MiB a client whose table has 61 MB loads and computes only if that stays in its file."""
    sizes = {"vocab_size": 60_000, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path)
    code = """
import os, resource, sys, torch, traceback
from flexp.config import ModelConfig
from flexp.models.loading import load_config, load_stage
from flexp.models.anatomy import Part
torch.set_num_threads(1)
load_stage("arch:bert", "sequence-classification")  # imports what loading needs
used = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")][0]
for where in ("file", "memory"):
    if os.fork() == 0:
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + 40 * 2**20,) * 2)
            model = ModelConfig(id=sys.argv[1], embeddings=where)
            stage = load_stage(model, "sequence-classification", Part.client((1, 2), 2))
            batch = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4)}
            print(where, tuple(stage.plan(batch)[0].shape), flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.wait()
"""
    done = warm.run(["-c", code, str(tmp_path)])
    assert done.stdout == "file (2, 4, 256)\n", done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: os.utime(file, ns=(1, 1)), "was changed while its embeddings were in use"),
        (lambda file: os.truncate(file, 100), "was changed while"),
        (lambda file: file.unlink(), "the embeddings cannot be read"),
    ],
)
def test_a_file_that_changes_is_noticed(tmp_path: Path, damage: Any, message: str) -> None:
    stage = load_stage(ModelConfig.of(save("bert", tmp_path), embeddings="file"), "sequence-classification")
    damage(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        token_embedding(stage.model)(torch.tensor([[1, 2]]))


def test_ids_outside_of_the_vocabulary(tmp_path: Path) -> None:
    module = token_embedding(
        load_stage(ModelConfig.of(save("bert", tmp_path), embeddings="file"), "sequence-classification").model
    )
    for wrong in (-1, module.num_embeddings):
        with pytest.raises(IndexError, match="expected 0 to"):
            module(torch.tensor([[0, wrong]]))


def test_another_type_another_size_or_no_file(tmp_path: Path) -> None:
    folder = save("bert", tmp_path)
    with pytest.raises(ModelError, match=r"has the embeddings in float32, and model\.dtype is bfloat16; use"):
        load_stage(ModelConfig.of(folder, dtype="bfloat16", embeddings="file"), "sequence-classification")
    with pytest.raises(ModelError, match="arch:bert has no file"):
        load_stage(ModelConfig.of("arch:bert", embeddings="file"), "sequence-classification")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}), "utf-8")
    with pytest.raises(ModelError, match=r"has .* with \(\d+, 32\) numbers, and this model \(\d+, 32\)"):
        load_stage(ModelConfig.of(folder, embeddings="file"), "sequence-classification")


def test_a_checkpoint_in_bfloat16_and_in_several_files(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    usual, lean = (
        load_stage(ModelConfig.of(tmp_path, dtype="bfloat16", embeddings=where), "causal-lm")
        for where in ("memory", "file")
    )  # type: ignore[arg-type]
    batch = tiny_batch(usual.model, padding="left")
    assert torch.equal(lean.plan(batch)[0], usual.plan(batch)[0])


@pytest.mark.parametrize("foreign", ["model_other.safetensors", "model-00001-of-00009.safetensors", "a.safetensors"])
@pytest.mark.parametrize("bare", [False, True])
def test_only_the_files_that_transformers_loads_count(tmp_path: Path, foreign: str, bare: bool) -> None:
    file = save("bert", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    save_file({key: value + 1 for key, value in tensors.items()}, tmp_path / foreign)
    if bare:
        save_file({key.removeprefix("bert."): value for key, value in tensors.items()}, file, {"format": "pt"})
    lean = load_stage(ModelConfig.of(tmp_path, embeddings="file"), "sequence-classification", labels=["a", "b", "c"])
    wanted = tensors["bert.embeddings.word_embeddings.weight"]
    ids = torch.arange(len(wanted))
    assert torch.equal(token_embedding(lean.model)(ids), wanted)


def test_of_two_tables_the_one_with_the_longer_name_in_common(tmp_path: Path) -> None:
    file = save("bert", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    wanted = tensors["bert.embeddings.word_embeddings.weight"]
    others = {f"{place}.word_embeddings.weight": wanted + 1 for place in ("decoder", "other.embeddings")}
    save_file(tensors | others, file, {"format": "pt"})
    lean = load_stage(ModelConfig.of(tmp_path, embeddings="file"), "sequence-classification")
    assert torch.equal(token_embedding(lean.model)(torch.arange(len(wanted))), wanted)
    same = {key: value for key, value in tensors.items() if "word_embeddings" not in key} | others
    others["third.embeddings.word_embeddings.weight"] = wanted
    save_file(same | others, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"2 tensors in the safetensors files of .* may be bert"):
        stored.find_table(tiny_model("bert"), str(tmp_path), torch.float32)


def test_a_relative_folder_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("bert", tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    module = token_embedding(load_stage(ModelConfig.of("model", embeddings="file"), "sequence-classification").model)
    monkeypatch.chdir(tmp_path / "elsewhere")
    ids = torch.tensor([5, 2])
    assert torch.equal(module(ids), module.weight[ids])


@pytest.mark.parametrize("limited", [False, True])
def test_a_state_of_ones_own_takes_the_place_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    monkeypatch.setattr(stored, "reserves_count", lambda: limited)  # then the map must not be written
    model = load_stage(ModelConfig.of(save("bert", tmp_path), embeddings="file"), "sequence-classification").model
    module, ids = token_embedding(model), torch.tensor([[4, 2], [0, 4]])
    place = module.weight.data_ptr()
    model.load_state_dict(model.state_dict())
    assert module.weight.data_ptr() == place  # equal numbers: still the file's
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(module(ids), state["bert.embeddings.word_embeddings.weight"][ids])
    with pytest.raises(RuntimeError, match=r"Missing key.*word_embeddings\.weight"):
        model.load_state_dict({key: value for key, value in state.items() if "word" not in key})


def test_changed_moved_or_trained_it_is_an_ordinary_embedding(tmp_path: Path) -> None:
    folder, ids = save("bert", tmp_path), torch.tensor([[4, 2]])

    def fresh() -> torch.nn.Embedding:
        return token_embedding(load_stage(ModelConfig.of(folder, embeddings="file"), "sequence-classification").model)

    @torch.no_grad()
    def add(one: torch.nn.Embedding) -> None:
        one.weight.add_(1)

    for change in (add, lambda one: one.to(torch.bfloat16), lambda one: one.double()):
        module = fresh()
        before = module(ids)
        change(module)
        assert torch.equal(module(ids), module.weight[ids])
        assert module(ids).dtype == module.weight.dtype
        assert not torch.equal(module(ids), before) or module.weight.dtype == torch.float64
    module = fresh().requires_grad_(True)
    module(ids).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad[4].sum() == 32
    with pytest.raises(IndexError, match="expected 0 to"):
        module.table.read([0, module.num_embeddings])  # type: ignore[union-attr,operator]


def test_a_norm_that_lookups_change_is_refused() -> None:
    model = tiny_model("bert")
    model.get_input_embeddings().max_norm = 1.0
    with pytest.raises(ModelError, match="a way of its own"):
        token_embedding(model)


def test_trained_embeddings_stay_nowhere(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model\.train_embeddings = true trains them: choose one"):
        config(tmp_path, model={"embeddings": "file", "train_embeddings": True})
    stage = load_stage(ModelConfig.of(tmp_path / "model", embeddings="file"), "sequence-classification")
    with pytest.raises(ConfigError, match="train_embeddings needs embeddings"):
        tune(stage, ModelConfig(id="any", train_embeddings=True))
    with pytest.raises(ValueError, match="train_embeddings trains them: choose one"):
        TaskShape(embeddings="file", train_embeddings=True)


def test_a_file_of_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    monkeypatch.setattr(fingerprint, "try_to_load_from_cache", lambda repo, name: str(tmp_path / name))
    assert stored.files_of("somebody/something") == [tmp_path / "model.safetensors"]
    monkeypatch.setattr(fingerprint, "try_to_load_from_cache", lambda repo, name: None)
    assert stored.files_of("somebody/something") == []
