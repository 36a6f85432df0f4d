"""From a configuration to everything that a method starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from flexp.assets import resolve
from flexp.config import DataConfig, RunConfig
from flexp.data import load_federation, pad_id
from flexp.data.types import Federation
from flexp.errors import ConfigError, ModelError
from flexp.machine import imitates_bfloat16
from flexp.methods.base import World
from flexp.methods.cuts import method_cuts
from flexp.models.loading import ModelKind, load_config, load_stage
from flexp.models.parts import Part, check_cut
from flexp.models.stage import Stage
from flexp.run.planned import with_cuts

Federate = Callable[[DataConfig, Any, int, int | None], Federation]


def build_world(config: RunConfig, federate: Federate = load_federation) -> World:
    """Obtain model and data, divide the data among clients, and give every client its cut.

    Args:
        federate: what makes the clients out of ``config.data``, the processor, the seed and the longest input.

    Raises:
        FlexpError: what is wrong with the model, the data or the configuration.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model_id = str(resolve(config.model.id))
    model_config = load_config(model_id)
    processor = load_processor(model_id, config)
    federation = federate(config.data, processor, config.seed, max_positions(model_config))
    federation = replace(federation, notes=[*federation.notes, *_precision_notes(config)])
    blocks = int(getattr(model_config.get_text_config(), "num_hidden_layers", 0))
    config, notes, plan = with_cuts(config, federation, blocks)  # before anything is loaded
    federation = replace(federation, notes=[*federation.notes, *notes])
    kind = federation.task.model_kind
    source = load_part(config, model_id, kind, federation.task.label_names, own_pad(kind, processor))
    cuts = client_cuts(config, federation, source.anatomy.blocks)
    return World(config, federation, source, method_cuts(config, cuts, source.anatomy.blocks), plan=plan)


def load_part(
    config: RunConfig,
    model_id: str,
    kind: ModelKind,
    labels: Sequence[str] | None,
    pad: int | None,
    part: Part | None = None,
) -> Stage:
    """A part of the pretrained model (``None``: all of it), as ``config`` wants it loaded, not tuned yet.

    Raises:
        ModelError: it cannot be loaded or split.
    """
    return load_stage(config.model.at(model_id), kind, part, labels=labels, pad_token_id=pad, seed=config.seed)


def own_pad(kind: ModelKind, processor: Any) -> int | None:
    """The padding token that a text model is told; images have none."""
    return None if kind == "image-classification" else pad_id(processor)


def client_cuts(config: RunConfig, federation: Federation, blocks: int) -> dict[str, tuple[int, int]]:
    """The cut of each client: ``data.clients.cuts``, a list, in order, repeated when there are more clients.

    Raises:
        ConfigError: a cut does not fit the model, or starts below the base depth.
    """
    cuts, given = {}, config.data.clients.cuts
    assert given != "auto", "with_cuts comes first"
    for index, client in enumerate(federation.clients):
        wanted = given[index % len(given)]
        cuts[client.name] = check_cut(wanted, blocks, where=f"data.clients.cuts of client {client.name}")
    base = config.model.base_depth
    depths = [start for start, _ in cuts.values()] + ([] if base is None else [base])
    if min(depths) == 0 and not config.model.expose_embeddings:
        raise ConfigError(
            "with a cut or a base depth of 0 the clients would send their embeddings as they are, from which the "
            "server can read every token; use s >= 1, or set model.expose_embeddings = true if that is acceptable"
        )
    if base is not None:
        for name, (start, _) in cuts.items():
            if start < base:
                raise ConfigError(
                    f"model.base_depth = {base} is deeper than the cut of client {name}, which starts at {start}; "
                    "leave it out to use the smallest cut"
                )
    return cuts


def load_processor(model_id: str, config: RunConfig) -> Any:
    """The tokenizer of a text model, or the image processor of an image model.

    Raises:
        ModelError: the model has none.
    """
    image = config.data.task == "image-classification"
    auto = transformers.AutoImageProcessor if image else transformers.AutoTokenizer
    kind = "image processor" if image else "tokenizer"
    if model_id.startswith("arch:"):
        raise ModelError(
            f"{model_id} has no {kind}; use a model with one (arch: models are for flexp verify and bench)"
        )
    try:
        processor: Any = auto.from_pretrained(model_id)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{model_id}: its {kind} cannot be loaded ({first})") from error
    if not image:
        processor.padding_side = "right"  # on the left it would shift absolute positions (GPT-2)
    return processor


def max_positions(model_config: Any) -> int | None:
    """The longest input of a model in tokens, if it has one."""
    text = model_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    # RoBERTa counts positions from its padding index on.
    offset = 2 if getattr(text, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0
    return None if positions is None else int(positions) - offset


def _precision_notes(config: RunConfig) -> list[str]:
    notes = []
    if config.model.dtype == "bfloat16" and "full" in (config.model.tuning, config.server.tuning):
        # It has 8 significant bits: next to a weight of 0.02, a step of 1e-5 rounds to nothing.
        notes.append(
            "full tuning in bfloat16 loses the steps that are small beside their weights (at a rate of 1e-5, nearly "
            'all): use model.dtype = "float32" (as fast with model.autocast = "bfloat16"), or LoRA, with float32 '
            "adapters"
        )
    if config.model.autocast == "bfloat16" and imitates_bfloat16() and not torch.cuda.is_available():
        notes.append(
            "this processor has no instructions for bfloat16, so mixed precision is slower here than float32, not "
            'faster: use model.autocast = "off"'
        )
    return notes


def model_folder(config: RunConfig) -> str:
    """Where the configured model is: a local folder, or the id as it stands."""
    found = resolve(config.model.id)
    return str(Path(found).resolve()) if Path(found).exists() else str(found)
