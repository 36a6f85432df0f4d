"""Writing a personal model as a folder that transformers or peft load: there whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from flexp.data.types import ModelKind
from flexp.errors import ConfigError, ModelError
from flexp.export.adapter import write_adapter
from flexp.export.card import card
from flexp.export.facts import FILE, gather
from flexp.export.saved import SavedRun
from flexp.export.whole import merged
from flexp.files import replacing, storage_error, write_json, write_text
from flexp.models.loading import quietly
from flexp.run.setup import load_processor, model_folder
from flexp.run.store import os_error

Form = Literal["whole", "adapter"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    run: SavedRun, client: str | None, out: Path, form: Form = "whole", dtype: str | None = None
) -> dict[str, Any]:
    """Write the personal model of ``client`` into the new folder ``out``.

    Args:
        form: ``whole``, adapters merged into the weights; or ``adapter``, without the base model.
        dtype: of the weights, a key of :data:`DTYPES`; ``None``: as they were trained.

    Returns:
        The facts of the model, as ``flexp.json`` has them.

    Raises:
        ConfigError: ``out`` is taken, there is no such client or type, or the model has no adapter.
        StorageError: the disk is full or cannot be written; nothing is left in ``out``.
    """
    data = run.client(client)
    check_target(out, dtype)
    source, kind = run.world.source, run.world.federation.task.model_kind
    lora, weights = run.method.world.config.model.lora, run.method.trained_weights(data.name)
    wanted = None if dtype is None else DTYPES[dtype]
    facts = gather(run, data, form, dtype or run.config.model.dtype)
    processor = ready(load_processor(model_folder(run.config), run.config), kind)
    with writing(out, run.config.model.id, processor, facts) as part:
        if form == "adapter":
            cast = {name: value if wanted is None else value.to(wanted) for name, value in weights.items()}
            write_adapter(part, source, cast, lora, kind, model_folder(run.config))
            source.model.config.save_pretrained(part)
        else:
            merged(source, weights, lora.alpha / lora.rank, wanted).save_pretrained(part)
    return facts


def check_target(out: Path, dtype: str | None) -> None:
    """Refuse a folder that is taken and a type that there is not.

    Raises:
        ConfigError: see above.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; choose another --out, or remove it first")


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
    if kind == "image-classification":
        return processor
    if kind == "causal-lm":
        processor.padding_side = "left"  # generation goes on from the last token
    processor.init_kwargs["padding_side"] = processor.padding_side  # else it is not saved
    if processor.pad_token is None:
        processor.pad_token = processor.eos_token  # what batches were padded with in training
    return processor
