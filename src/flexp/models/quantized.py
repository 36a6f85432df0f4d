"""Blocks whose linear layers are held in 8 or 4 bits, by bitsandbytes, which transformers calls while it loads.

Each weight is read, quantised and let go of before the next, so that loading takes hardly more than what stays. Ends of
the model, norms and biases stay as they are, for a whole model as for a part of it: so all parts agree on what is
quantised. What is trained are adapters beside it (Dettmers et al., 2023, arXiv 2305.14314).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flexp.errors import ModelError
from flexp.models.anatomy import dissect
from flexp.models.packed import plain_ends


def quantizer(quantization: str, original: Any, config: Any, dtype: torch.dtype, name: str) -> Any:
    """What ``from_pretrained`` of the class ``original`` takes as ``quantization_config``; ``None``: nothing.

    Args:
        quantization: ``model.quantization``.
        dtype: what matrix products compute in.
        name: of the model, for messages.

    Raises:
        ModelError: bitsandbytes is not installed, or the checkpoint is quantised already, in another way.
    """
    brought = brought_by(config)
    if quantization == "off" or brought == quantization:
        if brought != "off" and "bitsandbytes" in _method(config):
            _refuse_missing(name)
        return None
    if brought != "off":
        raise ModelError(
            f"{name}: this checkpoint is quantised already ({brought}), so model.quantization = {quantization!r} "
            "cannot be had of it; leave it off, or use the checkpoint that is not quantised"
        )
    _refuse_missing(name)
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        bare = original(config)
    inside = dissect(bare).path + "."
    outside = [path for path, module in bare.named_modules() if isinstance(module, nn.Linear)]
    kept = [path for path in outside if not path.startswith(inside)] or ["-"]  # an empty list means the library's own
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def brought_by(config: Any) -> str:
    """How a checkpoint is quantised, by its configuration: ``off``, ``int8``, ``nf4``, or another method's name."""
    facts = getattr(config, "quantization_config", None)
    if facts is None:
        return "off"
    told = facts if isinstance(facts, dict) else facts.to_dict()
    if told.get("load_in_8bit"):
        return "int8"
    if told.get("load_in_4bit"):
        return str(told.get("bnb_4bit_quant_type", "fp4"))
    return _method(config)


PIECE = 1 << 20
"""Numbers of a weight that are quantised at once, at most: whole rows in 8 bits, a multiple of any block in 4."""


@contextlib.contextmanager
def piece_by_piece(wanted: bool = True) -> Iterator[None]:
    """While this lasts, bitsandbytes quantises one piece of a weight after the other, with the same bits.

    By itself it takes several copies in float32 on a processor: 1.5 GB for the largest of an 8B model. For one thread
    at a time.
    """
    if not wanted:
        yield
        return
    import bitsandbytes  # noqa: F401  # brings the operators

    operators: Any = torch.ops.bitsandbytes
    four, eight = operators.quantize_4bit, operators.int8_vectorwise_quant

    def in_four(weight: Tensor, *how: Any) -> tuple[Tensor, ...]:
        found = [four.default(piece, *how) for piece in torch.split(weight.reshape(-1), PIECE)]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def in_eight(rows: Tensor, threshold: float = 0.0) -> tuple[Tensor | None, ...]:
        if threshold > 0:  # activations
            return eight.default(rows, threshold)  # type: ignore[no-any-return]
        found = [eight.default(piece) for piece in torch.split(rows, max(1, PIECE // rows.shape[-1]))]
        return (*(torch.cat(parts) for parts in zip(*(both[:2] for both in found), strict=True)), None)

    try:
        operators.quantize_4bit = SimpleNamespace(default=in_four)
        operators.int8_vectorwise_quant = SimpleNamespace(default=in_eight)
        yield
    finally:
        operators.quantize_4bit, operators.int8_vectorwise_quant = four, eight


def settle_blocks(model: nn.Module) -> None:
    """Put what bitsandbytes would do on a first forward behind a model just loaded, so that parties may share weights.

    An 8-bit layer takes the scales off its weight then, which another party's layer could no longer find. A 4-bit layer
    repacks its weight on some processors when it is first evaluated, and no gradient goes through it afterwards.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each product of matrices
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
        if getattr(getattr(module, "weight", None), "CB", None) is not None:
            module.init_8bit_state()  # type: ignore[operator]


def scales(model: nn.Module) -> dict[int, Any]:
    """What belongs to quantised weights without being a tensor of the model, by identity: parties share it as well."""
    found = (vars(module).get(name) for module in model.modules() for name in ("state", "quant_state"))
    return {id(value): value for value in found if type(value).__name__ in ("MatmulLtState", "QuantState")}


def unpacked(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model plain linear layers again, in place, with the numbers that the quantised ones stand for."""
    if getattr(model, "quantization_method", None) is None:
        return
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    plain_ends(model)
    for path, module in list(model.named_modules()):
        if type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
            continue
        weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).to(dtype)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)
    for attribute in ("quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        vars(model).pop(attribute, None)
    vars(model.config).pop("quantization_config", None)


def held_bytes(module: nn.Module, quantization: str) -> tuple[int, int]:
    """What quantising the linear layers of ``module`` saves, and the largest of their weights when it is unpacked.

    In bytes; 4 bits have a scale of 8 bits for each 64 numbers, and one of 32 bits for each 256 of those.
    """
    if quantization == "off":
        return 0, 0
    each = 1.0 if quantization == "int8" else 0.5 + 1 / 64 + 4 / (64 * 256)
    weights = [child.weight for child in module.modules() if isinstance(child, nn.Linear)]
    frozen = [value for value in weights if not value.requires_grad]
    saved = sum(value.numel() * value.element_size() - int(value.numel() * each) for value in frozen)
    return saved, max((value.numel() * value.element_size() for value in frozen), default=0)


def _method(config: Any) -> str:
    facts = config.quantization_config
    told = facts if isinstance(facts, dict) else facts.to_dict()
    method = told.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def check_bitsandbytes(what: str) -> None:
    """Refuse to go on where bitsandbytes is installed and cannot be imported, which transformers and peft try.

    Raises:
        ModelError: see above; ``what`` needs it.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    try:
        with _fetching_nothing():
            importlib.import_module("bitsandbytes")
    except Exception as error:
        said = " ".join(str(error).split())
        raise ModelError(
            f"{what}: bitsandbytes is installed and cannot be imported ({type(error).__name__}: {said}); install it "
            "anew, or remove it where nothing is quantised (pip uninstall bitsandbytes)"
        ) from error


@contextlib.contextmanager
def _fetching_nothing() -> Iterator[None]:
    """While this lasts the package ``kernels`` cannot be imported: where it is installed, bitsandbytes fetches compiled
    code from a hub with it, as it is imported (some processors) or on first use (Apple's), and runs that."""
    known = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it says so
    try:
        yield
        if (lazy := sys.modules.get("bitsandbytes.backends.mps.ops")) is not None:
            vars(lazy)["_kernel_load_failed"] = True
    finally:
        del sys.modules["kernels"]
        sys.modules.update(known)


def _refuse_missing(name: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'{name}: quantised blocks need bitsandbytes; pip install "flexp[quantized]", or set model.quantization = '
            '"off"'
        )
    check_bitsandbytes(name)
