"""Quantised blocks: split as whole, and whole as plain transformers and peft would have it.

bitsandbytes makes peft's import slow wherever it is found, so it has a place of its own, which ``make test`` names.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from transformers import BitsAndBytesConfig

import flexp
from flexp.config import ModelConfig, RunConfig, ServerConfig
from flexp.cost.choice import Choice
from flexp.cost.memory import memory
from flexp.cost.model_cost import model_cost
from flexp.errors import ConfigError, LinkError, ModelError
from flexp.export.whole import merged
from flexp.models import quantized
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage, quietly
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import save_tiny, tiny_batch
from flexp.run.verify import Setup, verify

pytest.importorskip("bitsandbytes", reason="needs flexp[quantized]; make test has it")

HOW = ("nf4", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as transformers saves it."""
    out: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2, vocab_size=99, pad_token_id=0)
    with quietly():
        transformers.LlamaForCausalLM(config).save_pretrained(out)
    return out


def plain(folder: Path, how: str, **settings: Any) -> Any:
    """What plain transformers loads with the settings of QLoRA, the head left out."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four["bnb_4bit_compute_dtype"] = torch.float32
    chosen = four if how == "nf4" else {"load_in_8bit": True}
    wanted = BitsAndBytesConfig(**chosen, llm_int8_skip_modules=["lm_head"])
    with quietly():
        return transformers.LlamaForCausalLM.from_pretrained(
            folder, quantization_config=wanted, dtype=torch.float32, **settings
        )


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("name", "memory_", "padding"), [
    ("llama", "keep", "left"), ("bert", "recompute", "right"), ("gpt2", "keep", "right"),
])  # fmt: skip
def test_split_is_whole(how: str, name: str, memory_: Any, padding: Any) -> None:
    """0.0 in logits, gradients, losses and weights over three steps."""
    setup = Setup.of(f"arch:{name}", tuning="lora", quantization=how, memory=memory_, padding=padding)
    outcome = verify(setup)
    assert outcome.exact, outcome


@pytest.mark.parametrize("how", HOW)
def test_a_step_is_that_of_plain_transformers_and_peft(folder: Path, how: str) -> None:
    """Loss and gradients of a split model, whose parties load their parts alone, as of a ``PeftModel``."""
    reference = get_peft_model(plain(folder, how), PeftLora(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    lora = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}
    settings: dict[str, Any] = {"tuning": "lora", "quantization": how, "lora": lora}
    server = flexp.Server.from_pretrained(folder, "causal-lm", base_depth=1, end=3, **settings)
    split = flexp.SplitModelForCausalLM.from_pretrained(folder, cut=(1, 3), link=server.connect("a"), **settings)
    own = {**split.stage.trainable(), **server.shared.updater.parameters}
    adapters = {name: value for name, value in reference.named_parameters() if "lora_" in name}
    for name, value in adapters.items():
        value.data.copy_(own[name.removeprefix("base_model.model.")])
    batch = tiny_batch(split.model, padding="left", batch=3, length=9, seed=1)
    expected, got = reference.train()(**batch), split.train()(**batch)
    assert torch.equal(expected.logits, got.logits)
    expected.loss.backward()
    got.loss.backward()
    for name, value in split.stage.trainable().items():
        assert torch.equal(value.grad, adapters["base_model.model." + name].grad), name
    assert any(float(value.grad.abs().max()) > 0 for value in split.stage.trainable().values())


@pytest.mark.parametrize("how", HOW)
def test_a_part_is_quantised_as_the_whole_is(folder: Path, how: str) -> None:
    whole, config = plain(folder, how), ModelConfig.of(folder, quantization=how, tuning="lora")
    for part in (Part.client((1, 3), 4), Part.server(1, 3)):
        stage = load_stage(config, "causal-lm", part)
        assert stage.quantization == how
        for name, value in stage.model.named_parameters():
            assert torch.equal(value, whole.get_parameter(name)), name
        inside = {value.dtype for name, value in stage.model.named_parameters() if stage.block_of(name) is not None}
        assert inside == {torch.float32, torch.uint8 if how == "nf4" else torch.int8}
        assert all(
            value.dtype == torch.float32
            for name, value in stage.model.named_parameters()
            if stage.block_of(name) is None
        )


@pytest.mark.parametrize("how", HOW)
def test_parties_that_share_weights_compute_as_if_they_had_their_own(folder: Path, how: str) -> None:
    """Also after one of them was evaluated, which makes bitsandbytes move and repack what they share."""
    config = ModelConfig.of(folder, quantization=how, tuning="lora")
    source = load_stage(config, "causal-lm")
    first, second = carve(source, Part.whole(4)), carve(source, Part.whole(4))
    batch = tiny_batch(source.model, batch=2, length=7)
    with torch.no_grad():
        alone = first.model.eval()(**batch).logits
        assert torch.equal(alone, second.model.eval()(**batch).logits)
    tune(second, config)
    second.model.train()(**batch).loss.backward()
    assert all(value.grad is not None for value in second.trainable().values())
    with torch.no_grad():
        assert torch.equal(alone, first.model.eval()(**batch).logits)
    mine, theirs = dict(first.model.named_parameters()), dict(source.model.named_parameters())
    assert all(value is theirs[name] for name, value in mine.items())


def test_either_side_by_itself_and_only_as_agreed(folder: Path) -> None:
    server = flexp.Server.from_pretrained(
        folder, "causal-lm", base_depth=1, end=3, tuning="lora", config=ServerConfig(quantization="nf4")
    )
    assert server.shared.stage.quantization == "nf4"
    batch = {"input_ids": torch.arange(1, 9)[None], "labels": torch.arange(1, 9)[None]}
    split = flexp.SplitModelForCausalLM.from_pretrained(folder, cut=(1, 3), link=server.connect("a"), tuning="lora")
    assert split.stage.quantization == "off"
    assert torch.isfinite(split(**batch).loss)
    other: dict[str, Any] = {"tuning": "lora", "quantization": "nf4", "link": server.connect("b")}
    with pytest.raises(LinkError, match=r"quantization is nf4.*clients off.*same model\.quantization"):
        flexp.SplitModelForCausalLM.from_pretrained(folder, cut=(1, 3), **other)


def failing(name: str, *package: Any, found: Any = importlib.import_module) -> Any:
    if name == "bitsandbytes":
        raise OSError("no libbitsandbytes\n  here")
    return found(name, *package)


def test_importing_it_fetches_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels.py").write_text("def get_kernel(name):\n    raise SystemExit('fetched ' + name)\n")
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(
        "try:\n    from kernels import get_kernel\nexcept ImportError:\n    pass\nelse:\n    get_kernel('code')\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bitsandbytes", "kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    kernels = importlib.import_module("kernels")
    quantized.check_bitsandbytes("a test")
    assert sys.modules["bitsandbytes"].__file__ == str(tmp_path / "bitsandbytes" / "__init__.py")
    assert sys.modules["kernels"] is kernels


def test_what_is_exported_as_an_adapter_fetches_no_code(tmp_path: Path) -> None:
    """In an interpreter of its own, whose peft imports bitsandbytes, as the real one does. Transformers comes first: it
    imports the package kernels where there is one, which fetches nothing by itself."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('fetched')\n")
    (tmp_path / "bitsandbytes.py").write_text("try:\n    import kernels\nexcept ImportError:\n    pass\n")
    (tmp_path / "peft.py").write_text("import bitsandbytes\n\nLoraConfig, PeftModel = 'theirs', 'theirs'\n")
    code = (
        "import sys, transformers.modeling_utils\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import flexp.export.folder, flexp.export.opening\n"
        "from flexp.export import adapter\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "adapter.adapted = lambda weights: sys.exit(0 if sys.modules['peft'].LoraConfig == 'theirs' else 1)\n"
        "adapter.write_adapter(None, None, {}, None, None, '')\n"
    )
    path = {"PYTHONPATH": str(Path(flexp.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-500:]


def test_what_cannot_be_is_refused_in_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r'model\.quantization = "nf4" keeps whole numbers.*model\.tuning = "lora"'):
        RunConfig.checked({"model": {"id": "m", "quantization": "nf4"}, "data": {"source": "d"}}, "here")
    stage = load_stage(ModelConfig.of(folder, quantization="int8"), "causal-lm", Part.server(1, 2))
    with pytest.raises(ConfigError, match=r"cannot train blocks that are quantised \(int8\)"):
        tune(stage, ModelConfig.of(folder))
    with quietly():
        plain(folder, "nf4").save_pretrained(tmp_path)
    brought = load_stage(ModelConfig.of(tmp_path), "causal-lm", Part.client((1, 3), 4))
    assert brought.quantization == "nf4"
    with pytest.raises(ModelError, match=r"quantised already \(nf4\)"):
        load_stage(ModelConfig.of(tmp_path, quantization="int8"), "causal-lm")
    with monkeypatch.context() as broken:
        broken.delitem(sys.modules, "bitsandbytes")
        broken.setattr(quantized.importlib, "import_module", failing)
        with pytest.raises(ModelError, match=r"bitsandbytes is installed and cannot be imported \(OSError: no lib"):
            load_stage(ModelConfig.of(folder, quantization="nf4"), "causal-lm")
        with pytest.raises(ModelError, match=r'model.tuning = "lora" \(peft\): bitsandbytes is installed and cannot'):
            tune(load_stage(ModelConfig.of(folder), "causal-lm"), ModelConfig.of(folder, tuning="lora"))
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r'pip install "flexp\[quantized\]"'):
        load_stage(ModelConfig.of(folder, quantization="nf4"), "causal-lm")


def as_if_trained(config: ModelConfig) -> tuple[Stage, Stage, dict[str, torch.Tensor]]:
    """A model of four blocks, the same with adapters, and these, which are drawn."""
    source = load_stage(config, "causal-lm")
    trained = carve(source, Part.whole(4))
    tune(trained, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in trained.trainable().values():
            value.normal_(std=0.05)
    weights = {name: value.detach() for name, value in trained.trainable().items()}
    return source, trained, weights


@pytest.mark.parametrize("how", HOW)
def test_the_merged_model_is_plain_and_answers_as_trained(folder: Path, how: str, tmp_path: Path) -> None:
    config = ModelConfig.of(folder, quantization=how, tuning="lora")
    source, trained, weights = as_if_trained(config)
    whole = merged(source, weights, config.lora.alpha / config.lora.rank)
    with quietly():
        whole.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    batch = tiny_batch(source.model, batch=2, length=7)
    with torch.no_grad():
        expected, got = trained.model.eval()(**batch).logits, again.eval()(**batch).logits
    # LLM.int8() rounds activations as well, which a plain model does not.
    assert float((expected - got).abs().max()) < (1e-4 if how == "nf4" else 0.05)
    assert source.quantization == how
    assert torch.equal(source.model.eval()(**batch).logits, carve(source, source.part).model.eval()(**batch).logits)


@pytest.mark.parametrize("how", HOW)
def test_a_weight_is_quantised_in_pieces_as_at_once(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, double quantisation included, where the last piece is no whole block and rows are odd."""
    import bitsandbytes

    kinds = {"nf4": bitsandbytes.nn.Params4bit, "int8": bitsandbytes.nn.Int8Params}
    options = {"nf4": {"compress_statistics": True, "quant_type": "nf4"}, "int8": {}}[how]
    monkeypatch.setattr(quantized, "PIECE", 1024)
    for shape in ((300, 192), (77, 33)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        found = []
        for wanted in (False, True):
            with quantized.piece_by_piece(wanted):
                value = kinds[how](weight.clone(), requires_grad=False, **options)._quantize("cpu")
            state = getattr(value, "quant_state", None)
            scales = (value.SCB,) if state is None else (state.absmax, state.offset, state.state2.absmax)
            found.append((value.data, *scales))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.ops.bitsandbytes.quantize_4bit.default is not None


@pytest.mark.parametrize("how", HOW)
def test_a_trained_head_in_another_order_leaves_the_blocks_alone(tmp_path: Path, how: str) -> None:
    folder = save_tiny("llama", tmp_path, task="sequence-classification")
    config = ModelConfig.of(folder, quantization=how, tuning="lora")
    before, after = (
        load_stage(config, "sequence-classification", labels=[f"LABEL_{row}" for row in order], pad_token_id=0).model
        for order in ((0, 1, 2), (2, 0, 1))
    )
    assert torch.equal(after.score.weight, before.score.weight[[2, 0, 1]])
    for name, value in before.named_parameters():
        assert name == "score.weight" or torch.equal(value, after.get_parameter(name)), name


@pytest.mark.parametrize("how", ["off", *HOW])
def test_predicted_weights_are_those_that_are_held(folder: Path, how: str) -> None:
    config = ModelConfig.of(folder, quantization=how, tuning="lora")
    piece = model_cost(config, "causal-lm", length=16).at(2, 8).blocks[1]
    stage = load_stage(config, "causal-lm", Part.server(1, 2))
    tune(stage, config)
    held = sum(value.numel() * value.element_size() for value in stage.model.parameters())
    for module in stage.model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held += sum(value.numel() * value.element_size() for value in (state.absmax, state.state2.absmax))
        if type(module).__name__ == "Linear8bitLt":
            held += module.state.SCB.numel() * 4  # type: ignore[union-attr,operator]
    assert piece.weight_bytes == pytest.approx(held, rel=0.03)
    if how != "off":
        with pytest.raises(ModelError, match=rf"full tuning of blocks in {how}.*say the rank of the adapters"):
            memory(model_cost(config, "causal-lm", length=16), Choice((1, 3), 2))
