"""A device that is not there: tensors on it say so, and behave as on a GPU, but their numbers are in main memory.

So what a program does on a GPU can be looked at without one: an operation whose tensors are on two devices fails as it
would there, whatever waits for the device (a copy to the host, a value that Python asks for) is written down, and all
numbers equal those of the CPU bit for bit.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta:7"
DEVICE, SECOND = torch.device(NAME), torch.device("meta:8")
"""Of torch's own kind for tensors without numbers, so that it takes nothing for a processor."""
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "tolist"}
"""Operations whose result Python, or the shape of a tensor, needs at once."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class There(Tensor):
    """A tensor on the device; ``raw`` has its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device = DEVICE) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=device
        )
        made.raw = raw
        return made

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"There({tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["raw"], self.device

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], device: torch.device, *_: Any) -> There:
        return There(parts["raw"], device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, [])


class Elsewhere(TorchDispatchMode):
    """While this is on, tensors can be made on the device; ``reads`` are what waited for it: what, where, how much."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.reads)


@contextmanager
def elsewhere() -> Iterator[Elsewhere]:
    """Have the device inside the ``with`` block."""
    autocast = torch.autocast

    def autocasting(kind: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if kind == DEVICE.type else autocast(kind, *args, **kwargs)

    fused = "_get_fused_kernels_supported_devices"
    with (
        patch.object(torch, "autocast", autocasting),
        patch.object(import_module("torch.optim.optimizer"), fused, lambda: ["cpu", DEVICE.type]),
        Elsewhere() as mode,
    ):
        yield mode


def _run(func: Any, args: Any, kwargs: dict[str, Any], reads: list[tuple[str, str, int]]) -> Any:
    name = func.overloadpacket.__name__
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = [value for value in given if isinstance(value, There)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    if not there and wanted not in (DEVICE, SECOND):
        return func(*args, **kwargs)
    place = wanted if wanted in (DEVICE, SECOND) else next((value.device for value in there if value.dim()), None)
    place = place or there[0].device
    comes = wanted is not None and wanted.type == "cpu" and bool(there)
    if name == "copy_":
        comes = not isinstance(args[0], There)
    elif (there and wanted is None) or (there and name != "_to_copy"):
        for value in given:
            alone = value.dim() == 0 or (name in INDEXED and value is not args[0] and value.dtype == torch.long)
            alone = alone or _made_there(value)
            if value.device != place and not (alone and not isinstance(value, There)) and "_foreach" not in name:
                raise RuntimeError(f"{func}: a tensor {tuple(value.shape)} is on {value.device}, another one is not")
    if comes or name in READS or (name in INDEXED and any(v is not None and v.dtype == torch.bool for v in args[1])):
        size = sum(value.numel() * value.element_size() for value in there)
        reads.append((name, _where(), size))
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    back = {id(value.raw): value for value in there}
    raw_args, raw_kwargs = tree_map(_raw, (args, kwargs))
    out = func(*raw_args, **raw_kwargs)
    if comes and name == "copy_":
        return args[0]
    if comes:
        return out

    def wrapped(value: Any) -> Any:
        return back[id(value)] if id(value) in back else There(value, place) if isinstance(value, Tensor) else value

    return tree_map(wrapped, out)


def _made_there(value: Any) -> bool:
    """Whether it is ``torch.tensor([], device=…)``, which asks no mode."""
    return isinstance(value, Tensor) and not isinstance(value, There) and value.is_meta and not value.numel()


def _raw(value: Any) -> Any:
    if _made_there(value):
        return torch.empty(value.shape, dtype=value.dtype)
    return value.raw if isinstance(value, There) else value


def _where() -> str:
    """The line of FlexP that asked, and what it called for it."""
    own = [frame for frame in traceback.extract_stack() if "/flexp/" in frame.filename]
    return "" if not own else f"{own[-1].filename.rpartition('/flexp/')[2]}:{own[-1].lineno}"
