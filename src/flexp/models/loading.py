"""Loading a model, or only the part of it that a party owns.

Only the tensors of that part are ever read: ``from_pretrained`` runs on a throw-away subclass whose ``__init__`` takes
out what the party does not own, so that transformers' own renames, fusing of experts and handling of types still apply.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from flexp.config import ModelConfig
from flexp.errors import ModelError
from flexp.kinds import KINDS, ModelKind
from flexp.limits import out_of_memory
from flexp.machine import device_of
from flexp.models.anatomy import Part, dissect, prune, refuse_by_design
from flexp.models.batches import align_padding
from flexp.models.fingerprint import weights_fingerprint
from flexp.models.heads import AUTO, fit_head, name_classes, set_head, trained_classes
from flexp.models.low_memory import low_memory_loading
from flexp.models.packed import give_packed, without_ends
from flexp.models.pooling import put_pooling
from flexp.models.quantized import brought_by, piece_by_piece, quantizer, settle_blocks
from flexp.models.stage import Stage, carve, forget_ties
from flexp.models.stored import PACKED, check_table, give_table, refused, without_table
from flexp.rng import RandomStream

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTOCAST = {"off": None, "bfloat16": torch.bfloat16}


def load_stage(
    model: ModelConfig | str | Path,
    kind: ModelKind,
    part: Part | None = None,
    *,
    labels: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    dropout: float | None = None,
    seed: int = 0,
) -> Stage:
    """Load the ``part`` of a pretrained model that a party owns (``None``: all of it).

    Args:
        model: its ``id`` is a local folder, a Hugging Face id, or ``arch:NAME`` for a tiny model with random weights;
            a name alone stands for the defaults. With ``embeddings = "file"`` and the ends, those of the tokens are
            read row by row where the checkpoint has them (:mod:`flexp.models.stored`), and must not be trained; with
            ``quantize_ends`` they and a language model's head are packed (:mod:`flexp.models.packed`).
        kind: what the model is for.
        labels: the names of the classes, for classifiers. A class that the checkpoint's trained head knows keeps its
            weights, whatever the order; ``None``: those of the checkpoint.
        pad_token_id: what batches are filled up with, for classifiers that look for it and models that name none.
        dropout: the rate of every dropout; ``None``: as the model's configuration says.
        seed: of those weights that the checkpoint does not hold, such as a new classifier; equal for every part.

    Raises:
        ModelError: there is no such model, it is not of that kind, it cannot be split exactly, its embeddings cannot
            stay in their file, or it does not fit on its device.
        ConfigError: there is no such device here.
    """
    wanted = ModelConfig.of(model)
    name, dtype, device = wanted.id, DTYPES[wanted.dtype], device_of(wanted.device)
    has_ends = part is None or part.ends
    in_file, packed = wanted.embeddings == "file" and has_ends, wanted.quantize_ends and has_ends
    if packed and wanted.quantization == "off":
        raise refused('model.quantization is "off", and the ends are packed as the blocks are', PACKED)
    if name.startswith("arch:") and wanted.quantization != "off":
        with tempfile.TemporaryDirectory() as folder, quietly():
            _from_zoo(wanted, kind, labels, 0.0, seed).model.save_pretrained(folder)
            return load_stage(
                wanted.at(folder), kind, part, labels=labels, pad_token_id=pad_token_id, dropout=dropout, seed=seed
            )
    if name.startswith("arch:"):
        whole = _from_zoo(wanted, kind, labels, dropout or 0.0, seed)
        if in_file:
            check_table(whole.model, name, dtype)  # says that it has no file
        return (whole if part is None else carve(whole, part)).to(device)
    config = load_config(name)
    refuse_by_design(f"{name} ({config.model_type})", config)
    head = KINDS[kind]
    if head.answers == "next-token" and has_ends:  # a server without the ends may serve classifiers
        _refuse_bidirectional(name, config)
    set_head(config, kind)
    trained = trained_classes(config, kind, wanted.pooling) if labels is not None and has_ends else []
    if labels is not None:
        # What the checkpoint was trained for does not matter here; where there is a choice, the labels tell.
        config.problem_type = head.problem
        if not trained:
            name_classes(config, labels)
    text = config.get_text_config()
    if pad_token_id is not None and getattr(text, "pad_token_id", 0) is None:
        text.pad_token_id = pad_token_id
    if dropout is not None:
        from flexp.models import zoo  # imports every architecture: only when it is needed

        zoo.set_dropout(config, dropout)
    config.output_hidden_states = config.output_attentions = False  # some checkpoints ask for them; no split can
    original = _class_for(config, kind, name)
    cls = original if part is None else _pruned(original, part)
    if in_file:
        cls = without_table(cls)
    if packed:
        cls = without_ends(cls, embedding=not in_file)
    quantization_config = quantizer(wanted.quantization, original, config, dtype, name)
    given = {} if quantization_config is None else {"quantization_config": quantization_config}
    attention = wanted.attention if original._supports_sdpa else "eager"
    # One at a time: transformers loads by way of globals.
    with RandomStream(seed).active(), quietly(), low_memory_loading(quantised=bool(given)), piece_by_piece(bool(given)):
        loaded, info = _read(cls, name, config=config, dtype=dtype, attn_implementation=attention, **given)
    loaded.__class__ = original
    align_padding(loaded, pad_token_id)
    if in_file:
        give_table(loaded, name, dtype)
    if packed:
        give_packed(loaded, name, brought_by(loaded.config), dtype)
    missing, resized = set(info["missing_keys"]), {key for key, *_ in info["mismatched_keys"]}
    fitted = labels is not None or head.outputs is not None
    replaceable = set() if head.answers == "next-token" else missing | (resized if fitted else set())
    _refuse_incomplete(name, loaded, missing | resized, replaceable)
    if labels is not None and trained:
        resized |= fit_head(loaded, trained, labels, partial(_initialise, seed=seed))
    new = _headed(loaded, wanted, kind, part, missing | resized)
    _initialise(loaded, new, seed)
    anatomy = dissect(loaded)
    if part is not None and not part.blocks <= set(range(anatomy.blocks)):
        raise ModelError(f"{name} has {anatomy.blocks} blocks, so there is no block {max(part.blocks)}")
    if part == Part(frozenset(), ends=False):  # whoever asks for its type and device looks at a parameter
        loaded.register_parameter("nothing", nn.Parameter(torch.empty(0, dtype=dtype)))
    loaded.requires_grad_(False)
    stage = Stage(loaded, anatomy, part or Part.whole(anatomy.blocks))
    stage.autocast = AUTOCAST[wanted.autocast]
    stage.new = frozenset(new)
    stage.weights = weights_fingerprint(name)
    stage.quantization = brought_by(loaded.config)
    settle_blocks(loaded)
    return stage.to(device)


def _read(cls: Any, name: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and which of its weights the checkpoint does not have or has in another shape.

    Raises:
        ModelError: it cannot be read, or does not fit.
    """
    try:
        loaded, info = cls.from_pretrained(
            name,
            **settings,
            use_safetensors=True,  # nothing is ever unpickled
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told by whoever asks, by name
        )
    except ModelError:
        raise
    except Exception as error:
        lacking = out_of_memory(error)
        if lacking is not None:
            raise ModelError(f"{name}: the model cannot be loaded: {lacking}") from error
        if isinstance(error, OSError | SafetensorError | JSONDecodeError):
            raise ModelError(
                f"{name}: the model cannot be loaded ({_first_line(error)}); expected intact safetensors files: "
                "fetch it again, or save it anew with save_pretrained"
            ) from error
        raise ModelError(
            f"{name}: transformers cannot make this {cls.__name__} ({type(error).__name__}: "
            f"{_first_line(error)}); if plain transformers loads it, this is a limit of FlexP: choose another model"
        ) from error
    return loaded, info


def load_config(name: str) -> Any:
    """The configuration of a model.

    Raises:
        ModelError: there is none under that name.
    """
    if name.startswith("arch:"):
        from flexp.models import zoo

        return zoo.tiny_model(name.removeprefix("arch:")).config
    try:
        with quietly():
            return transformers.AutoConfig.from_pretrained(name)
    except Exception as error:
        if (Path(name) / "config.json").is_file():
            raise ModelError(
                f"{name}: its config.json cannot be used ({_first_line(error)}); fetch the model again, or save it "
                "anew with save_pretrained"
            ) from error
        raise ModelError(
            f"model {name!r} was not found: expected a local folder with a config.json, a Hugging Face id that can be "
            f"reached, asset:NAME or arch:NAME ({_first_line(error)})"
        ) from error


def load_processor(model_id: str, *, images: bool) -> Any:
    """The tokenizer of a text model, or the image processor of an image model.

    Raises:
        ModelError: the model has none.
    """
    auto = transformers.AutoImageProcessor if images else transformers.AutoTokenizer
    kind = "image processor" if images else "tokenizer"
    if model_id.startswith("arch:"):
        raise ModelError(
            f"{model_id} has no {kind}; use a model with one (arch: models are for flexp verify and bench)"
        )
    try:
        processor: Any = auto.from_pretrained(model_id)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{model_id}: its {kind} cannot be loaded ({first})") from error
    if not images:
        processor.padding_side = "right"  # on the left it would shift absolute positions (GPT-2)
    return processor


def _from_zoo(wanted: ModelConfig, kind: ModelKind, labels: Sequence[str] | None, dropout: float, seed: int) -> Stage:
    from flexp.models import zoo

    settings: Any = {"attention": wanted.attention, "dtype": DTYPES[wanted.dtype], "dropout": dropout}
    model: Any = zoo.tiny_model(wanted.id.removeprefix("arch:"), task=kind, seed=seed, **settings)
    if labels is not None and len(labels) != model.config.num_labels:
        raise ModelError(
            f"{wanted.id} has {model.config.num_labels} classes, but the data have {len(labels)}; use a real model"
        )
    new = _headed(model, wanted, kind, None, set())
    _initialise(model, new, seed)
    model.requires_grad_(False)
    stage = Stage.whole(model)
    stage.autocast = AUTOCAST[wanted.autocast]
    stage.new = frozenset(new)
    return stage


def _headed(model: Any, wanted: ModelConfig, kind: ModelKind, part: Part | None, missing: set[str]) -> set[str]:
    """Put in the head that ``model.pooling`` asks for, where the part has one; gives what is to be drawn now."""
    if part is not None and not part.ends:
        return missing
    drawn = put_pooling(model, wanted.pooling, kind, wanted.id)
    there = {name for name, _ in model.named_parameters()} if drawn else missing
    return missing & there | set(drawn)


def _class_for(config: Any, kind: ModelKind, name: str) -> Any:
    mapping = AUTO[kind]._model_mapping
    if type(config) not in mapping:
        raise ModelError(
            f"{name}: a {config.model_type} model cannot be used for {kind}; choose another model or another data.task"
        )
    cls = mapping[type(config)]
    return cls[0] if isinstance(cls, tuple) else cls


def _refuse_bidirectional(name: str, config: Any) -> None:
    """A language model whose tokens see those after them learns to copy: its loss falls to nothing, and says nothing.

    Transformers makes one of every BERT-like checkpoint, with no more than a warning.
    """
    text: Any = config.get_text_config()
    like_bert = type(config) in transformers.AutoModelForMaskedLM._model_mapping or text.model_type == "bert-generation"
    sees_all = (
        (like_bert and getattr(text, "is_decoder", None) is False)
        or getattr(text, "causal", None) is False  # XLM, FlauBERT
        or getattr(text, "is_causal", None) is False
        or getattr(text, "use_bidirectional_attention", None) in (True, "all")
    )
    if sees_all:
        raise ModelError(
            f"{name}: this {text.model_type} model attends in both directions, so it would see the tokens that it is "
            "to predict; use a decoder (GPT-2, Llama, Qwen, ...), or a classifier (data.task, --kind)"
        )


def _pruned(original: Any, part: Part) -> Any:
    """A subclass of ``original`` that owns nothing but ``part``, made to be thrown away after loading."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, config, *args, **kwargs)
        prune(self, dissect(self), part)
        if not part.ends:
            forget_ties(self)

    def _init_weights(self: Any, module: nn.Module) -> None:
        # Some containers initialise what they hold by name, where stubs are now; rotary tables are made here too.
        if part.ends or [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            original._init_weights(self, module)

    names = {"__init__": __init__, "_init_weights": _init_weights}
    names |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), names)


def _refuse_incomplete(name: str, model: Any, missing: set[str], replaceable: set[str]) -> None:
    """A new classifier, and a pooler under it, may be made up; nothing else of a checkpoint may be missing."""
    base = model.base_model_prefix + "."
    new = {key for key in replaceable if not key.startswith(base) or ".pooler." in key}
    lost = sorted(missing - new) + [key for key, value in model.named_parameters() if value.is_meta]
    if lost:
        raise ModelError(
            f"{name}: {len(lost)} weights of this {type(model).__name__} are not in the checkpoint or have another "
            f"shape there, for instance {lost[0]}; fetch it again, or choose another model or another data.task"
        )


def _initialise(model: nn.Module, missing: Iterable[str], seed: int) -> None:
    """Draw the weights that no checkpoint holds from a generator of their own name, so that every part agrees."""
    spread = float(getattr(model.config, "initializer_range", None) or 0.02)
    for name in sorted(missing):
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            continue
        with torch.no_grad():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=named_generator(seed, name)) * spread)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator that depends on a seed and a name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bar and its report of keys that a part does not own."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
