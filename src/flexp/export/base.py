"""Many personal models served by one engine: what all of a run's clients have alike is merged into the pretrained model
once, and a client's adapter is what is its own.

vLLM and SGLang load such adapters beside one base: one rank, one scaling, and nothing but adapters (docs/export.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flexp.errors import ConfigError
from flexp.export.saved import RunModel, SavedRun
from flexp.export.whole import adapted, merged
from flexp.files import replacing
from flexp.models.loading import load_config, quietly
from flexp.models.pooling import saved_as
from flexp.models.stage import Stage
from flexp.run.settle import load_part, own_pad


def write_base(run: SavedRun, out: Path, dtype: torch.dtype | None = None) -> int:
    """Write the pretrained model, with what all clients have alike merged into it, into the new folder ``out``.

    Args:
        dtype: of its weights; ``None``: as they are.

    Returns:
        How many of its weights have something merged into them.

    Raises:
        ConfigError: there is nothing that all clients have alike.
        StorageError: the checkpoint is damaged, or the disk cannot be written.
    """
    if run.config.privacy.pool:
        raise ConfigError(f"{run.folder}: privacy.pool puts a mean between the blocks, which no engine's base has; "
                          "leave out --base")  # fmt: skip
    found = alike(run)
    if not found:
        raise ConfigError(f"{run.folder}: its clients have nothing alike that was trained; leave out --base")
    lora = run.method.world.config.model.lora
    with replacing(out) as part, quietly():
        saved_as(merged(run.world.source, found, lora.alpha / lora.rank, dtype)).save_pretrained(part)
        RunModel(run, run.world.federation.clients[0].name).processor.save_pretrained(part)
    return len({_merged_into(name) for name in found})


def alike(run: SavedRun) -> dict[str, Tensor]:
    """What was trained and is alike for all clients, bit for bit: whole blocks, and single layers outside of them."""
    source = run.world.source

    def unit(name: str) -> int | str:
        block = source.block_of(name)
        return _merged_into(name).rpartition(".")[0] if block is None else block

    first, *others = [client.name for client in run.world.federation.clients]
    found, odd = run.method.trained_weights(first), set[int | str]()
    for client in others:
        theirs = run.method.trained_weights(client)
        odd |= {unit(name) for name in found.keys() ^ theirs.keys()}
        odd |= {unit(name) for name in found.keys() & theirs.keys() if not torch.equal(found[name], theirs[name])}
    return {name: value for name, value in found.items() if unit(name) not in odd}


def beside(model: RunModel, base: Path) -> tuple[Stage, dict[str, Tensor]]:
    """The ``base`` that :func:`write_base` wrote, and what of the model is not in it.

    Raises:
        ConfigError: it is no base of this model, or has all of its adapters.
        ModelError: it cannot be loaded.
    """
    run, weights, scaling = model.run, model.weights(), model.lora.alpha / model.lora.rank
    dtype = load_config(str(base)).dtype or run.config.model.dtype
    settings = {"dtype": str(dtype).removeprefix("torch."), "quantization": "off", "quantize_ends": False}
    config = run.config.model_copy(update={"model": run.config.model.model_copy(update=settings)})
    stage = load_part(config, str(base), model.kind, model.labels, own_pad(model.kind, model.processor))
    there = dict(stage.model.named_parameters())
    whole = dict(merged(run.world.source, weights, scaling, stage.model.dtype).named_parameters())
    before = dict(merged(run.world.source, {}, scaling, stage.model.dtype).named_parameters())
    trained = {_merged_into(name) for name in weights}
    has = {name for name in trained if _same(there.get(name), whole[name])}
    strange = sorted(name for name in trained - has if not _same(there.get(name), before[name]))
    if strange or not has:
        why = f"{strange[0]} is another" if strange else "it has nothing of it"
        raise ConfigError(
            f"--over {base}: no base of {model.client!r} after round {model.round} ({why}); make it with flexp export "
            "--base of the same run and round"
        )
    own = {name: value for name, value in weights.items() if _merged_into(name) not in has}
    if not adapted(own):
        raise ConfigError(f"--over {base}: has all adapters of {model.client!r}: serve it as it is")
    return stage, own


def _same(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and found.shape == expected.shape and torch.equal(found, expected)


def _merged_into(name: str) -> str:
    """The parameter of a plain model that a trained one ends in."""
    layer, adapter, _ = name.partition(".lora_")
    return f"{layer}.weight" if adapter else name.replace(".base_layer.", ".")
