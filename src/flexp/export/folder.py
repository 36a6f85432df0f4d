"""Writing a personal model as a folder that transformers or peft load: there whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from flexp.config import RunConfig
from flexp.errors import ConfigError, ModelError
from flexp.export.adapter import write_adapter
from flexp.export.base import beside
from flexp.export.card import FILE, card, described
from flexp.export.client_folder import ClientModel
from flexp.export.remote import write_remote
from flexp.export.saved import RunModel
from flexp.export.trained import FromCheckpoint, Trained
from flexp.export.whole import merged
from flexp.files import replacing, storage_error, write_json, write_text
from flexp.kinds import KINDS, ModelKind
from flexp.models.fingerprint import weights_fingerprint
from flexp.models.loading import quietly
from flexp.models.pooling import pool_before, saved_as
from flexp.run.settle import model_folder
from flexp.run.store import os_error

Form = Literal["whole", "adapter"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    model: Trained, out: Path, form: Form = "whole", dtype: str | None = None, over: Path | None = None
) -> dict[str, Any]:
    """Write a trained model into the new folder ``out``.

    Args:
        model: of a run, with all of its blocks; or of a client, whose middle is fetched from a server block by block.
        form: ``whole``, adapters merged into the weights; or ``adapter``, without the base model.
        dtype: of the weights, a key of :data:`DTYPES`; ``None``: as they were trained.
        over: of an adapter, the base that it goes on, which has a part of the model (:mod:`flexp.export.base`).

    Returns:
        The facts of the model, as ``flexp.json`` has them.

    Raises:
        ConfigError: ``out`` is taken, there is no such type, or the model has no adapter or was exported already.
        LinkError: a server does not give its blocks, or they are updated all the time.
        StorageError: a checkpoint is damaged, or the disk cannot be written; nothing is left in ``out``.
    """
    check_target(out, dtype)
    refuse_adapter(model.config, form)
    if over is not None and (form != "adapter" or not isinstance(model, RunModel)):
        raise ConfigError("--over BASE goes with --adapter, of a run in a folder")
    config, wanted = model.config, None if dtype is None else DTYPES[dtype]
    facts = described(config, form, dtype or config.model.dtype, model.kind, model.labels) | model.facts()
    if isinstance(model, FromCheckpoint):  # what a run must have whose test data it is scored on
        facts |= {"identity": model.identity(model.client), "pretrained": weights_fingerprint(model_folder(config))}
    with writing(out, config.model.id, ready(model.processor, model.kind), facts) as part:
        if isinstance(model, ClientModel):
            write_remote(part, model, form, wanted)
        elif isinstance(model, RunModel):
            _write(part, model, form, wanted, over)
    return facts


def _write(folder: Path, model: RunModel, form: Form, dtype: torch.dtype | None, over: Path | None) -> None:
    source, weights = (model.source(), model.weights()) if over is None else beside(model, over)
    if form == "adapter":
        cast = {name: value if dtype is None else value.to(dtype) for name, value in weights.items()}
        base = model_folder(model.config) if over is None else str(over.resolve())
        write_adapter(folder, source, cast, model.lora, model.kind, base)
        source.model.config.save_pretrained(folder)
    else:
        whole = merged(source, weights, model.lora.alpha / model.lora.rank, dtype)
        if model.config.privacy.pool:
            pool_before(whole, source.anatomy.path, model.cut[0])
        saved_as(whole).save_pretrained(folder)


def check_target(out: Path, dtype: str | None) -> None:
    """Refuse a folder that is taken and a type that there is not. Raises ConfigError."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; choose another --out, or remove it first")


def refuse_adapter(config: RunConfig, form: str) -> None:
    """Refuse an adapter of a model whose head the pretrained model has no place for: peft would put it elsewhere.

    Raises:
        ConfigError: see above.
    """
    pooling = config.model.pooling
    if form == "adapter" and pooling != "checkpoint":
        raise ConfigError(
            f'an adapter goes on the pretrained model, whose head is not that of model.pooling = "{pooling}"; use '
            "--merge for the whole model"
        )


@contextmanager
def writing(out: Path, model_id: str, processor: Any, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A folder beside ``out`` to write a model in; with processor, facts and card it becomes ``out`` at the end.

    Raises:
        ModelError: transformers does not save this model.
        StorageError: the disk is full or cannot be written; nothing is left in ``out``.
    """
    with replacing(out) as part, quietly():
        part.mkdir()
        try:
            yield part
            processor.save_pretrained(part)
        except SafetensorError as error:
            raise storage_error(out, os_error(error)) from error
        except ValueError as error:  # transformers refuses to save some settings that it loads
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{model_id}: transformers does not save this model ({first})") from error
        write_json(part / FILE, facts)
        write_text(part / "README.md", card(facts))


def ready(processor: Any, kind: ModelKind) -> Any:
    """A tokenizer or image processor, ready for batches of what the model is for."""
    if KINDS[kind].images:
        return processor
    if KINDS[kind].answers == "next-token":
        processor.padding_side = "left"  # generation goes on from the last token
    processor.init_kwargs["padding_side"] = processor.padding_side  # else it is not saved
    if processor.pad_token is None:
        processor.pad_token = processor.eos_token  # what batches were padded with in training
    return processor
