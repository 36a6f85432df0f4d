"""Blocks that stay in their file: the same numbers, no memory between uses, and nothing lost that was written."""

from __future__ import annotations

import copy
import mmap
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexp.config import ModelConfig
from flexp.errors import ConfigError, ModelError
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage
from flexp.models.paged import Pages, keep_in_file
from flexp.models.stage import Stage
from flexp.models.tuning import tune
from flexp.run import runner
from tests.run.test_runner import same
from tests.tiny import bert_folder, config

AROUND = 1 << 20
"""Bytes of the blocks beside one that is read, which the kernel maps as well: as much as it has read in one piece."""
LORA: dict[str, Any] = {"tuning": "lora", "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks of 2.6 MB each."""
    place = tmp_path_factory.mktemp("llama")
    settings = LlamaConfig(
        vocab_size=50, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(place)
    return place


def opened(folder: Path, where: str, part: Part | None = None, **settings: Any) -> Stage:
    model = ModelConfig.of(folder, blocks=where, **LORA, **settings)
    stage = load_stage(model, "causal-lm", part)
    tune(stage, model)
    stage.model.train()
    return stage


def step(stage: Stage) -> tuple[float, list[torch.Tensor]]:
    ids = torch.arange(24).view(2, 12) % 50
    loss = stage.model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), [value.grad for value in stage.trainable().values()]  # type: ignore[misc]


def there(stage: Stage) -> list[int]:
    """Of each block, the bytes of its frozen matrices that are in memory, by the kernel."""
    found = []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as stream:
        for block in stage.blocks:
            count = 0
            for value in block.parameters():
                first, last = -(-value.data_ptr() // mmap.PAGESIZE), (value.data_ptr() + value.nbytes) // mmap.PAGESIZE
                for page in range(first, last) if not value.requires_grad else ():
                    stream.seek(8 * page)
                    count += int.from_bytes(stream.read(8), "little") >> 63
            found.append(count * mmap.PAGESIZE)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_the_same_and_leaves_no_block_in_memory(folder: Path, checkpointing: bool) -> None:
    usual, paged = (opened(folder, where, gradient_checkpointing=checkpointing) for where in ("memory", "file"))
    (loss, gradients), (other, others) = step(usual), step(paged)
    assert loss == other
    assert all(map(torch.equal, gradients, others))
    assert min(there(usual)) > 2_500_000
    # Nothing tells when the first block's backward is over: no gradient goes further down.
    assert max(there(paged)[1:]) <= AROUND
    with torch.no_grad():
        paged.model(input_ids=torch.arange(4).view(1, 4))
    assert max(there(paged)) <= AROUND


def test_only_one_block_is_there_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, release = [], Pages.release

    def watched(self: Pages) -> None:
        seen.append([size > AROUND for size in there(stage)])
        release(self)

    stage = opened(folder, "file")
    monkeypatch.setattr(Pages, "release", watched)
    step(stage)
    blocks = [0, 1, 2, 2, 1]  # three forwards, and two backwards that hand a gradient down
    assert seen == [[index == block for index in range(3)] for block in blocks]


def test_a_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model", dropout=True)
    for where in ("memory", "file"):
        runner.run(config(tmp_path, model={"blocks": where, **LORA}, train={"rounds": 1}), tmp_path / where)
    same(tmp_path / "memory", tmp_path / "file")


@pytest.mark.parametrize("write", [lambda weight: weight.data.mul_(2), lambda weight: weight.detach().fill_(1.0)])
def test_what_was_written_since_is_kept(folder: Path, write: Any) -> None:
    stage = opened(folder, "file")
    weight = stage.blocks[1].mlp.up_proj.base_layer.weight
    write(weight)
    expected = weight.detach().clone()
    step(stage)
    assert torch.equal(weight, expected)


def test_copies_have_memory_of_their_own(folder: Path) -> None:
    stage = opened(folder, "file")
    for model in (copy.deepcopy(stage.model), pickle.loads(pickle.dumps(stage.model))):
        before = [value.detach().clone() for value in model.parameters()]
        model(input_ids=torch.arange(4).view(1, 4)).logits.sum().backward()
        assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat16"}, r"blocks = \"file\" is not possible: .*weight of block 0 is bfloat16 in memory of its"),
        ({"quantization": "int8"}, r"is not possible: blocks in int8 are made as they are loaded"),
    ],
)
def test_what_cannot_stay_is_said(folder: Path, settings: dict[str, str], message: str) -> None:
    model = ModelConfig.of(folder, **LORA, dtype=settings.get("dtype", "float32"))
    stage = load_stage(model, "causal-lm")
    stage.quantization = settings.get("quantization", "off")
    with pytest.raises(ModelError, match=message):
        keep_in_file(stage)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"blocks": "file"}}, 'model.tuning = "full" does not; set model.tuning = "lora"'),
        ({"model": {"blocks": "file", "quantization": "nf4", **LORA}}, 'model.quantization = "nf4" does not'),
        ({"model": {"blocks": "file", **LORA}, "recut": {"on": True}}, 'blocks = "file" is for one cut'),
    ],
)
def test_settings_that_contradict_it_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    bert_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)
