"""Loading a part from disk gives the very tensors of the whole, reads nothing else, and names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertLMHeadModel, BertModel

from flexp.config import ModelConfig
from flexp.errors import ModelError
from flexp.models.anatomy import Part
from flexp.models.architectures import ARCHITECTURES
from flexp.models.loading import load_config, load_stage
from flexp.models.stage import carve
from flexp.models.zoo import tiny_batch, tiny_model
from tests import warm
from tests.models.tools import SPLIT, equal, save, tensors_of

CUT = (1, 3)
LABELS = ["benign", "malignant", "unclear"]


@pytest.mark.parametrize("name", SPLIT)
def test_a_loaded_part_is_the_carved_part(name: str, tmp_path: Path) -> None:
    kind: Any = ARCHITECTURES[name].task
    folder = save(name, tmp_path)
    before = torch.get_rng_state()
    whole = load_stage(folder, kind)
    blocks = whole.anatomy.blocks
    assert equal(tensors_of(whole.model), tensors_of(tiny_model(name)))
    loaded = {}
    for part in (Part.client(CUT, blocks), Part.server(*CUT), Part.server(0, blocks)):
        loaded[part] = load_stage(folder, kind, part)
        assert type(loaded[part].model) is type(whole.model)
        assert equal(tensors_of(loaded[part].model), tensors_of(carve(whole, part).model))
        assert not loaded[part].trainable()
    assert torch.equal(torch.get_rng_state(), before)

    client, server = loaded[Part.client(CUT, blocks)], loaded[Part.server(*CUT)]
    batch = tiny_batch(whole.model, padding="none" if name == "vit" else "left")
    if hasattr(whole.model.config, "use_cache"):
        whole.model.config.use_cache = False
    with torch.no_grad():
        hidden, plan = client.plan(batch)
        hidden = client.run(hidden, plan, 0, 1)
        theirs = server.plan_without_inputs(hidden, batch.get("attention_mask"))
        hidden = server.run(hidden, theirs, *CUT)
        hidden = client.run(hidden, plan, CUT[1], blocks)
        assert torch.equal(client.finish(hidden, batch, plan).logits, whole.model(**batch).logits)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "bloom", "gemma3"])
def test_tied_embeddings_are_one_tensor_at_both_ends(name: str, tmp_path: Path) -> None:
    client: Any = load_stage(save(name, tmp_path), "causal-lm", Part.client(CUT, 4)).model
    assert client.get_input_embeddings().weight is client.get_output_embeddings().weight


@pytest.mark.parametrize(("name", "task"), [("llama", "sequence-classification"), ("bert", None), ("roberta", None)])
def test_every_part_draws_the_same_new_classifier(name: str, task: Any, tmp_path: Path) -> None:
    """The checkpoint holds no classifier: a whole and a part must begin with the same one, which the seed decides."""
    model: Any = tiny_model(name, task=task)
    model.base_model.save_pretrained(tmp_path)
    lose("pooler", tmp_path)

    def load(part: Part | None, **settings: Any) -> dict[str, torch.Tensor]:
        stage = load_stage(tmp_path, "sequence-classification", part, labels=LABELS, pad_token_id=0, **settings)
        return tensors_of(stage.model)

    whole = load(None)
    torch.manual_seed(1)
    for part in (Part.client(CUT, 4), Part.client((0, 4), 4), Part.server(*CUT)):
        mine = load(part)
        assert equal(mine, {key: whole[key] for key in mine})
    head = [key for key in whole if key.startswith(("score", "classifier"))]
    assert head
    other = load(None, seed=1)
    for key in whole:
        new = key in head or "pooler" in key
        assert torch.equal(whole[key], other[key]) == (not new or key.endswith("bias")), key


def test_a_classifier_of_another_size_is_replaced(tmp_path: Path) -> None:
    save("bert", tmp_path)
    model: Any = load_stage(tmp_path, "sequence-classification", labels=["a", "b", "c", "d", "e"]).model
    assert model.classifier.weight.shape == (5, 32)
    assert model.config.id2label[4] == "e"
    assert torch.equal(model.bert.pooler.dense.weight, tiny_model("bert").get_parameter("bert.pooler.dense.weight"))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "vit"])
def test_checkpoints_in_several_files(name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    whole = tensors_of(model)
    for part in (Part.client(CUT, 4), Part.server(*CUT)):
        mine = tensors_of(load_stage(tmp_path, ARCHITECTURES[name].task, part).model)  # type: ignore[arg-type]
        assert equal(mine, {key: whole[key] for key in mine})


@pytest.mark.parametrize("name", ["gemma2", "gpt_neo", "gptj", "bloom"])
def test_a_family_without_sdpa_runs_eager_on_both_sides(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    for part in (None, Part.client(CUT, 4), Part.server(*CUT)):
        stage = load_stage(ModelConfig.of(tmp_path, attention="sdpa"), "causal-lm", part)
        assert stage.model.config._attn_implementation == "eager"
    assert load_stage(save("llama", tmp_path), "causal-lm").model.config._attn_implementation == "sdpa"


def test_types_and_dropout(tmp_path: Path) -> None:
    save("gpt2", tmp_path, dropout=0.25)
    stage = load_stage(ModelConfig.of(tmp_path, dtype="bfloat16"), "causal-lm", Part.server(*CUT))
    assert {value.dtype for value in stage.model.parameters()} == {torch.bfloat16}
    assert stage.model.transformer.h[1].attn.resid_dropout.p == 0.25
    for rate in (0.0, 0.5):
        stage = load_stage(tmp_path, "causal-lm", dropout=rate)
        assert stage.model.transformer.drop.p == stage.model.transformer.h[2].mlp.dropout.p == rate


def test_settings_that_only_a_whole_model_can_follow_are_switched_off(tmp_path: Path) -> None:
    model: Any = tiny_model("bert", attention="eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    model.save_pretrained(tmp_path)
    stage = load_stage(tmp_path, "sequence-classification", Part.client(CUT, 4))
    assert not stage.model.config.output_hidden_states
    assert not stage.model.config.output_attentions


def test_a_classifier_that_does_not_fit_its_configuration_is_refused(tmp_path: Path) -> None:
    save("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {str(index): str(index) for index in range(5)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"2 weights.*have another shape there, for instance classifier\.bias"):
        load_stage(tmp_path, "sequence-classification")


def test_only_the_own_part_is_read(tmp_path: Path) -> None:
    """In a process of its own: what loading one of 8 blocks adds to the peak is far below the checkpoint's size."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=4000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    own = 4 * (4 * 512**2 + 3 * 512 * 2048 + 2 * 512)
    code = """
import json, resource, sys
from flexp.models.loading import load_config, load_stage
from flexp.models.anatomy import Part
load_stage("arch:llama", "causal-lm", Part.server(1, 3))  # imports what loading needs
load_config(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
stage = load_stage(sys.argv[1], "causal-lm", Part.server(3, 4))
total = sum(value.clone().nbytes for value in stage.model.parameters())  # touch all that was mapped
print(json.dumps([total, peak() - before]))
"""
    done = warm.run(["-c", code, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    total, grown = json.loads(done.stdout.splitlines()[-1])
    assert total == own
    assert size > 8 * own
    assert grown < 2 * own + 16e6 < size / 2


Damage = Callable[[Path], None]


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4000)


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    remove(folder)


def lose(what: str, folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if what not in key}
    save_file(tensors, file, metadata={"format": "pt"})


def lose_a_block(folder: Path) -> None:
    lose(".layers.2.", folder)


def another_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def lose_a_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    model: Any = tiny_model("llama")
    model.save_pretrained(folder, max_shard_size="30KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "damage",
    [truncate, garble, remove, only_pickle, lose_a_block, another_width, lose_a_shard, broken_config],
)
@pytest.mark.parametrize("part", [None, Part.client((1, 2), 4), Part.server(*CUT)])
def test_damage_is_one_line(damage: Damage, part: Part | None, tmp_path: Path) -> None:
    damage(save("llama", tmp_path / "model"))
    with pytest.raises(ModelError) as caught:
        load_stage(tmp_path / "model", "causal-lm", part)
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_matters_to_who_owns_it(tmp_path: Path) -> None:
    lose("embed_tokens", save("llama", tmp_path))
    load_stage(tmp_path, "causal-lm", Part.server(*CUT))
    with pytest.raises(ModelError, match=r"1 weights of this LlamaForCausalLM are not in the checkpoint.*embed_tokens"):
        load_stage(tmp_path, "causal-lm", Part.client(CUT, 4))


def test_no_head_of_a_language_model_is_made_up(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load_stage(tmp_path, "causal-lm", Part.client(CUT, 4))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "bert-generation", "xlm"])
def test_a_model_that_sees_what_comes_next_is_no_language_model(model_type: str, tmp_path: Path) -> None:
    """Transformers makes a causal model of every BERT, whose earlier logits follow the later tokens."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    for part in (None, Part.client((1, 2), 4)):
        with pytest.raises(ModelError, match=r"attends in both directions.*use a decoder"):
            load_stage(tmp_path, "causal-lm", part)


@pytest.mark.parametrize("setting", ["is_causal", "use_bidirectional_attention"])
def test_a_decoder_made_bidirectional_is_no_language_model(setting: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, setting: setting != "is_causal"}))
    with pytest.raises(ModelError, match="attends in both directions"):
        load_stage(tmp_path, "causal-lm")


def test_a_bert_that_is_a_decoder_is_one(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 9}
    BertLMHeadModel(BertConfig(is_decoder=True, **sizes)).save_pretrained(tmp_path)
    model = load_stage(tmp_path, "causal-lm").model.eval()
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 8]])
    assert torch.equal(model(one).logits[:, :3], model(other).logits[:, :3])


def test_what_the_checkpoint_was_trained_for_does_not_choose_the_loss(tmp_path: Path) -> None:
    save("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    stage = load_stage(tmp_path, "sequence-classification", labels=LABELS)
    batch = tiny_batch(stage.model)
    output = stage.model(**batch)
    assert torch.equal(output.loss, torch.nn.functional.cross_entropy(output.logits, batch["labels"]))


def test_a_broken_configuration_is_not_a_missing_model(tmp_path: Path) -> None:
    broken_config(save("llama", tmp_path / "model"))
    with pytest.raises(ModelError, match=r"its config\.json cannot be used"):
        load_config(str(tmp_path / "model"))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"was not found: expected a local folder with a config\.json"):
        load_config(str(tmp_path / "nothing"))
    BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=9)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="a bert model cannot be used for image-classification"):
        load_stage(tmp_path, "image-classification")
    with pytest.raises(ModelError, match="has 2 blocks, so there is no block 4"):
        load_stage(tmp_path, "sequence-classification", Part.server(1, 5))
    with pytest.raises(ModelError, match="arch:vit has no task 'causal-lm'"):
        load_stage("arch:vit", "causal-lm")
    with pytest.raises(ModelError, match="has 3 classes, but the data have 2"):
        load_stage("arch:bert", "sequence-classification", labels=["a", "b"])
