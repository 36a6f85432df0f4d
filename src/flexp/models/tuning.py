"""What a party trains: all of its blocks, or low-rank adapters in them; and its own copy of just that."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flexp.config import LoraConfig, ModelConfig
from flexp.errors import ConfigError, ModelError
from flexp.models.loading import named_generator
from flexp.models.paged import keep_in_file
from flexp.models.quantized import check_bitsandbytes
from flexp.models.stage import Stage
from flexp.models.stored import stored


def tune(
    stage: Stage,
    model: ModelConfig,
    tuning: Literal["full", "lora", "frozen"] | None = None,
    *,
    seed: int = 0,
    ranks: Mapping[int, int] | None = None,
    frozen: int = 0,
) -> None:
    """Make ``stage`` ready for training, in place. What it trains becomes its own: copied if another stage lent it.

    How is ``model.tuning``, or ``tuning`` where a server has its own:

    - ``full``: the blocks, and with the ends also final norm and head; the embeddings, and a head tied to them, only
      with ``model.train_embeddings``.
    - ``lora``: adapters in the blocks' linear layers (fused experts are none); a classifier's head is trained as well,
      since it is new.
    - ``frozen``: nothing.

    ``model.gradient_checkpointing`` and ``model.blocks`` are for who has the ends, too: a server's blocks are neither
    checkpointed nor kept in their file.

    Args:
        seed: of the adapters' weights, which depend on it and on their names alone.
        ranks: of the adapters in some blocks, by the blocks' indices, where they are not ``model.lora.rank``. The
            scaling stays alpha / ``model.lora.rank``, so that an adapter padded with zeros to the full rank is the same
            function; and the first rows of A are those that the full rank would have.

        frozen: so many of the first blocks are left as they are, by a party that has a part of the model alone.

    Raises:
        ConfigError: embeddings are to be trained without full tuning, or where they stay in their file; or quantised
            blocks are to be trained in full.
        ModelError: LoRA finds no linear layer with the wanted names, the model knows no gradient checkpointing, or its
            blocks cannot stay in their file.
    """
    tuning = tuning or model.tuning
    embeddings = model.train_embeddings and stage.part.ends
    if embeddings and tuning != "full":
        raise ConfigError(f"train_embeddings needs full tuning: {tuning} leaves the embeddings as they are")
    if embeddings and next(stored(stage.model), None) is not None:
        raise ConfigError('train_embeddings needs embeddings = "memory": those that stay in their file are not trained')
    if stage.quantization != "off" and tuning == "full":
        raise ConfigError(
            f"full tuning cannot train blocks that are quantised ({stage.quantization}); set model.tuning (and "
            'server.tuning) to "lora", or quantization to "off"'
        )
    stage.model.requires_grad_(False)
    if tuning == "lora" and stage.part.blocks:
        _inject(stage, model.lora, seed, ranks or {})
        stage.model.requires_grad_(False)  # adapters come in as trained, in blocks that are left as they are as well
    whole = len(stage.part.blocks) == stage.anatomy.blocks
    chosen = _chooser(stage, tuning, embeddings, 0 if whole else frozen)
    copies: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for path, module in stage.model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, prefix=path):
            if not chosen(name):
                continue
            if not stage.lent:
                parameter.requires_grad_(True)  # mapped from a file, pages are copied when they are written
                continue
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
            module._parameters[name.rpartition(".")[2]] = copies[id(parameter)]
    if model.gradient_checkpointing and stage.part.ends:
        _checkpoint(stage.model)
    if model.blocks == "file" and stage.part.ends:
        keep_in_file(stage)


def _checkpoint(model: Any) -> None:
    name = "activation_checkpointing_enable"  # since transformers 5.2x; the older name warns there
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"{type(model).__name__} knows no gradient checkpointing; switch it off") from error


def _chooser(stage: Stage, tuning: str, embeddings: bool, frozen: int) -> Callable[[str], bool]:
    """Which parameters, by name, this party trains."""
    model, prefix = stage.model, stage.anatomy.path + "."
    embedding = embedding_names(stage)

    def full(name: str) -> bool:
        if name.startswith(prefix):
            block = stage.block_of(name)
            return block in stage.part.blocks and block not in range(frozen)
        return stage.part.ends and (embeddings or name not in embedding)

    def lora(name: str) -> bool:
        if name.startswith(prefix):
            return "lora_" in name and stage.block_of(name) not in range(frozen)
        if not stage.part.ends or not hasattr(model, "num_labels") or _is_language_model(model):
            return False
        return name not in embedding and not name.startswith(model.base_model_prefix + ".")

    rules: dict[str, Callable[[str], bool]] = {"full": full, "lora": lora, "frozen": lambda _: False}
    return rules[tuning]


def _is_language_model(model: Any) -> bool:
    return model.get_output_embeddings() is not None


def embedding_names(stage: Stage) -> set[str]:
    """The names of all parameters that come before the blocks, and of those tied to them.

    What comes before the blocks is told by calling order in the model's code, which cannot be seen from outside; what
    belongs to an embedding is told by type and by name.
    """
    found: set[int] = set()
    for path, module in stage.model.named_modules():
        if path.startswith(stage.anatomy.path + "."):
            continue
        if isinstance(module, nn.Embedding) or "embed" in path.rpartition(".")[2]:
            found |= {id(parameter) for parameter in module.parameters()}
    return {name for name, parameter in stage.model.named_parameters(remove_duplicate=False) if id(parameter) in found}


_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""Types whose kernels read the weight of ``out_proj`` past any adapter; peft loads none there."""


def _inject(stage: Stage, config: LoraConfig, seed: int, ranks: Mapping[int, int]) -> None:
    check_bitsandbytes('model.tuning = "lora" (peft)')
    from peft import LoraConfig as PeftLoraConfig  # brings bitsandbytes and a compiler along, which take seconds
    from peft import inject_adapter_in_model

    # peft is shown the blocks, not the model: of a mixture of experts it would rewrite the targets, and otherwise for
    # every party, by what other linear layers that party has.
    blocks = stage.blocks
    linear = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    wanted = config.targets
    if stage.model.config.model_type in _STATE_SPACE:
        linear = [name for name in linear if name.rpartition(".")[2] != "out_proj"]
    if wanted != "all-linear":
        names = [wanted] if isinstance(wanted, str) else wanted
        linear_all, linear = linear, [name for name in linear if name.rpartition(".")[2] in names]
        if not linear:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear_all}))
            raise ModelError(
                f"model.lora.targets = {wanted!r}: no linear layer of that name in the blocks; expected some of {known}"
            )
    if not linear:
        raise ModelError("LoRA found no linear layer in this party's blocks; use model.tuning = 'full'")
    fan = isinstance(blocks.get_submodule(linear[0]), Conv1D)
    own = {f"^{re.escape(name)}": ranks[block] for name in linear if (block := int(name.partition(".")[0])) in ranks}
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        rank_pattern=own,
        alpha_pattern={name: config.alpha * rank / config.rank for name, rank in own.items()},
        lora_dropout=config.dropout,
        target_modules=linear,
        fan_in_fan_out=fan,
        bias="none",
    )
    inject_adapter_in_model(peft_config, blocks)
    for name, parameter in stage.model.named_parameters():
        if "lora_A" in name:  # Hu et al. 2021: A is random (here as peft draws it), B is zero
            draw = torch.rand(parameter.shape, generator=named_generator(seed, name))
            parameter.data = ((draw * 2 - 1) / math.sqrt(parameter.shape[1])).to(parameter.device)
        elif "lora_B" in name:
            parameter.data = torch.zeros(parameter.shape, device=parameter.device)
