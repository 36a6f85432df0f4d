"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from flexp import __version__
from flexp.errors import ConfigError


def machine() -> dict[str, Any]:
    """What this machine is, for reports."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def device_of(name: str) -> torch.device:
    """The device that ``model.device`` names; ``auto``: a GPU of this machine, or else its processor.

    Raises:
        ConfigError: it is not here.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name in ("auto", "cpu"):
        return torch.device("cpu") if found is None or name == "cpu" else torch.device(found.type, 0)
    wanted = torch.device(name)
    count = torch.accelerator.device_count() if found is not None and found.type == wanted.type else 0
    if (wanted.index or 0) < count:
        return torch.device(wanted.type, wanted.index or 0)
    here = ["auto", "cpu"]
    if found is not None:
        here += [f"{found.type}:{index}" for index in range(torch.accelerator.device_count())]
    raise ConfigError(f"there is no device {name!r} here; expected {' or '.join(here)} (--device, model.device, "
                      "server.device)")  # fmt: skip


def gpu_of(device: torch.device) -> Any:
    """torch's module of a GPU (such as ``torch.cuda``); ``None``: it is none."""
    try:
        return None if device.type == "cpu" else torch.get_device_module(device)
    except RuntimeError:  # tensors without content
        return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, and what torch's allocator keeps of it for what comes; ``None``: it cannot tell."""
    gpu = gpu_of(device)
    if not hasattr(gpu, "mem_get_info"):
        return None
    return int(gpu.mem_get_info(device)[0] + gpu.memory_reserved(device) - gpu.memory_allocated(device))


def device_map(blocks: Sequence[nn.Module], room: Sequence[int | None]) -> list[int] | None:
    """Which of several devices each block goes to, in their order: balanced, and within each device's ``room`` in bytes
    (``None``: not known, so without end), by accelerate. ``None``: they do not fit."""
    from accelerate import infer_auto_device_map  # not for whoever has one device
    from accelerate.utils import get_balanced_memory

    whole = sorted({type(block).__name__ for block in blocks})  # no block is divided
    modules = nn.ModuleList(blocks)
    limits: dict[int | str, int | str] = {
        index: sys.maxsize if free is None else free for index, free in enumerate(room)
    }
    limits = get_balanced_memory(modules, max_memory=limits, no_split_module_classes=whole)
    found = infer_auto_device_map(modules, max_memory=limits, no_split_module_classes=whole)
    places = [found.get(str(index), found.get("")) for index in range(len(blocks))]
    return [int(place) for place in places] if all(isinstance(place, int) for place in places) else None


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("torch", "transformers", "peft", "datasets", "flwr-datasets")
    return {"flexp": __version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in names
    }


def imitates_bfloat16(facts: Mapping[str, str] | None = None) -> bool:
    """Whether this processor has no instructions for bfloat16, so that its matrix products take longer in it than in
    float32 (a step of MiniLM 2.5 times on a Xeon with AVX-512 alone, 14 to 22 on an EPYC with AVX2, whose backward
    products are the slow ones); ``False`` where that is not known.

    Args:
        facts: of one processor, as ``/proc/cpuinfo`` names them; ``None``: this machine's.
    """
    found = _facts() if facts is None else facts
    flags = (found.get("flags") or found.get("Features") or "").split()  # x86 and ARM
    return bool(flags) and not any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _processor() -> str:
    return _facts().get("model name") or platform.processor() or platform.machine()


def _facts() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
