"""From a personal model's weights to the two files of a peft adapter over the base model.

The files are written here and not by a ``PeftModel``, so that names stay those that were trained. All layers get one
rank, the largest, with zeros: engines that serve many adapters may know no other (older vLLM passes over
``rank_pattern`` without a word). Whether peft makes the same of them is tried before they are handed out: of a mixture
of experts it would rewrite the targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flexp.config import LoraConfig
from flexp.errors import ConfigError, ModelError
from flexp.export.whole import adapted, let_go, plain
from flexp.kinds import KINDS, ModelKind
from flexp.models.quantized import check_bitsandbytes
from flexp.models.stage import Stage, carve

PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    source: Stage,
    weights: Mapping[str, Tensor],
    lora: LoraConfig,
    kind: ModelKind,
    base: str,
    tried_on: Iterable[Stage] | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``.

    Modules with weights that were trained in full (a classifier), or that no checkpoint holds (a pooler that was drawn
    from the run's seed), go with it whole.

    Args:
        source: the pretrained model; or its ends and some block with an adapter.
        base: where the pretrained model is, as the adapter's configuration names it.
        tried_on: parts of the model, ends and all adapted blocks among them, over which peft is to load it; without,
            ``source``.

    Raises:
        ConfigError: an adapter cannot hold what was trained.
        ModelError: peft would make something else of it, or cannot be imported.
    """
    check_bitsandbytes("an adapter (peft)")
    from peft import LoraConfig as PeftLoraConfig

    adapters, model = adapted(weights), source.model
    if not adapters:
        raise ConfigError(
            "this personal model has no adapters (those come with model.tuning = 'lora'); use --merge instead"
        )
    other = plain(weights)
    inside = [name for name in other if source.block_of(name) is not None]
    if inside:
        raise ConfigError(
            f"besides adapters, whole weights of blocks were trained ({inside[0]}, server.tuning = 'full'?), which an "
            "adapter cannot hold; use --merge for the whole model"
        )
    modules = sorted({_module(source, name) for name in (*other, *source.new)})
    rank = max(len(down) for down, _ in adapters.values())
    adapters = {layer: _padded(down, up, rank) for layer, (down, up) in adapters.items()}
    tensors = {}
    for layer, (down, up) in adapters.items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"], tensors[f"{PREFIX}{layer}.lora_B.weight"] = down, up
    for path in modules:
        for name, value in model.get_submodule(path).state_dict(prefix=f"{path}.").items():
            tensors[PREFIX + name] = other.get(name, value)
    first: nn.Module = model.get_submodule(
        next(layer for layer in adapters if source.block_of(layer) in source.part.blocks)
    )
    PeftLoraConfig(
        task_type=KINDS[kind].peft,
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=lora.alpha * rank / lora.rank,  # its scaling stays alpha / rank
        lora_dropout=lora.dropout,
        target_modules=sorted(adapters),
        modules_to_save=modules or None,
        fan_in_fan_out=isinstance(first, Conv1D),
        inference_mode=True,
    ).save_pretrained(folder)
    whole = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for stage in tried_on or [source]:
        own = {layer: pair for layer, pair in adapters.items() if source.block_of(layer) in stage.part.blocks}
        _try(folder, stage, own, lora.alpha / lora.rank)


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product, of more rows and columns."""
    missing = rank - len(down)
    return nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))


def _try(folder: Path, source: Stage, adapters: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> None:
    """Let peft load what was written over a copy of the base, and look at every adapter."""
    from peft import PeftModel

    problem = ""
    try:
        loaded = PeftModel.from_pretrained(carve(source, source.part).model, str(folder))
        model = loaded.get_base_model()
        found = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
        odd = sorted(found ^ adapters.keys())
        for layer, (down, up) in {} if odd else adapters.items():
            own = model.get_submodule(layer)
            same = torch.equal(own.lora_A["default"].weight, down.to(own.lora_A["default"].weight.dtype))
            same = same and torch.equal(own.lora_B["default"].weight, up.to(own.lora_B["default"].weight.dtype))
            odd += [] if same and abs(own.scaling["default"] - scaling) < 1e-9 else [layer]
        problem = f"{odd[0]} comes back differently" if odd else ""
        let_go(model)
    except Exception as error:  # whatever peft says
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
    if problem:
        raise ModelError(
            f"peft does not load this adapter of a {source.model.config.model_type} model as it was trained "
            f"({problem}); use --merge for the whole model"
        )


def _module(source: Stage, name: str) -> str:
    """What is saved for a weight: outside of the model's base all of the head, inside of it the layer alone."""
    base = source.model.base_model_prefix + "."
    return name.rpartition(".")[0] if name.startswith(base) else name.partition(".")[0]
