"""Frozen blocks that stay in the checkpoint's file: each is in memory while it runs, forward or backward, no longer.

Weights that were loaded in the file's own type are a map of the file (:mod:`flexp.models.low_memory`), so the kernel
reads a page when it is first used. Here pages are given back as soon as a block is through with them: a device that
cannot hold a model's blocks at once can still run them all, reading each twice a step. The numbers are the same, bit
for bit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from flexp.models.stage import Stage
from flexp.models.stored import refused

SETTING = ('model.blocks = "file"', '"memory"')
LIBC: Any = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
_OF_A_FILE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))
"""Bits of an entry of ``/proc/self/pagemap``: the page is one of a file (or shared), swapped out, in memory."""


def keep_in_file(stage: Stage) -> None:
    """Have the frozen weights of the stage's blocks in memory only while their block runs.

    Raises:
        ModelError: they are not a map of a file: they are quantised, of another type than the file's, on another
            device, or this is no Linux.
    """
    if stage.quantization != "off":
        raise refused(f"blocks in {stage.quantization} are made as they are loaded, and are in no file", SETTING)
    if LIBC is None:
        raise refused(f"it needs Linux's /proc/self/pagemap, and this is {sys.platform}", SETTING)
    maps = list(_maps())
    for index in sorted(stage.part.blocks):
        block = stage.blocks[index]
        weights = [value for value in block.parameters() if not value.requires_grad]
        for name, value in block.named_parameters():
            inside = value.device.type == "cpu" and any(
                start <= value.data_ptr() and value.data_ptr() + value.nbytes <= stop for start, stop in maps
            )
            if not value.requires_grad and value.nbytes >= mmap.PAGESIZE and not inside:
                raise refused(
                    f"{name} of block {index} is {str(value.dtype).removeprefix('torch.')} in memory of its own; it "
                    "must be read as a safetensors file has it, of the same type, by the CPU, and without a limit on "
                    "reserved memory",
                    SETTING,
                )
        pages = Pages(weights)
        block.register_forward_pre_hook(pages.enter, with_kwargs=True)
        block.register_forward_hook(pages.leave)
        try:
            pages.release()  # loading looked at them
        except OSError as error:
            raise refused(f"this system gives no memory back ({error})", SETTING) from error
        stage.in_file += tuple(weights)


class Pages:
    """The pages of one block's frozen ``weights``."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights

    def __deepcopy__(self, memo: Any) -> Pages:
        return self  # a copy of the block has weights of its own, or shares these

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: once the gradient of the block's input is there, its backward is over."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda _: self.release())  # type: ignore[no-untyped-call]
                return

    def leave(self, _: nn.Module, __: Any, ___: Any) -> None:
        """After a forward."""
        self.release()

    def release(self) -> None:
        """Give all pages back that are as in the file; one that was written to since would lose what was written."""
        with Path("/proc/self/pagemap").open("rb", buffering=0) as stream:
            for start, stop in _whole_pages(self.weights):
                stream.seek(8 * (start // mmap.PAGESIZE))
                count = (stop - start) // mmap.PAGESIZE
                entries = np.frombuffer(stream.read(8 * count), np.uint64)
                written = (entries & _PRESENT != 0) & (entries & _OF_A_FILE == 0) | (entries & _SWAPPED != 0)
                if len(entries) < count or written.any():
                    continue
                if LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED):
                    raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")


def _whole_pages(weights: list[nn.Parameter]) -> Iterator[tuple[int, int]]:
    """Addresses of the pages that hold nothing but these weights, which may lie one after the other."""
    runs: list[list[int]] = []
    for start, size in sorted((value.data_ptr(), value.nbytes) for value in weights):
        if runs and runs[-1][1] == start:
            runs[-1][1] += size
        else:
            runs.append([start, start + size])
    for start, stop in runs:
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            yield first, last


def _maps() -> Iterator[tuple[int, int]]:
    """Addresses of this process's maps of files."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            start, stop = addresses.split("-")
            yield int(start, 16), int(stop, 16)
