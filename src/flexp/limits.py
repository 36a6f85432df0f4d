"""Limits of this process's memory that count what is reserved, not only what is used; and how to reserve less.

``RLIMIT_DATA`` and ``RLIMIT_AS`` count a file that is mapped with every byte of it (the first only if it may be
written), a thread with its whole stack, and what an allocator keeps for later. A control group, and the kernel that
runs short, count none of these.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

from flexp.errors import FullError

M_MMAP_THRESHOLD, LARGE = -3, 1 << 20
"""glibc's name for what larger allocations (bytes) get a mapping of their own; set, it does not grow by itself."""

COUNTING = ("RLIMIT_DATA", "RLIMIT_AS")

_SIGNS = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory",
    "could not create a primitive",  # oneDNN has no room for a kernel
    "status_alloc_failed",  # nor has cuBLAS, or cuDNN
)  # fmt: skip


def soft_limit(name: str) -> int | None:
    """This process's soft limit ``name`` (``RLIMIT_…``) in bytes; ``None``: there is none."""
    try:
        import resource
    except ImportError:  # no Unix
        return None
    soft = resource.getrlimit(getattr(resource, name))[0]
    return None if soft == resource.RLIM_INFINITY else soft


def reserves_count() -> bool:
    """Whether one of :data:`COUNTING` holds for this process."""
    return any(soft_limit(name) is not None for name in COUNTING)


def maps_count() -> bool:
    """Whether even a map that is only read counts as memory, as it does under ``RLIMIT_AS``."""
    return soft_limit("RLIMIT_AS") is not None


def reserve_less() -> None:
    """Where reserves count: let Arrow allocate as the rest does (its own pool reserves up to 1 GiB when made), and let
    the C library give large tensors back when they are freed, instead of keeping their place for later ones.

    Call it before anything imports Arrow.
    """
    if not reserves_count():
        return
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def allow_many_files() -> None:
    """Raise this process's soft limit of open files to its hard one: every connection is one, also a silent one."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def out_of_memory(error: BaseException) -> str | None:
    """One line for a user where ``error`` means that memory ran out; ``None``: it means something else."""
    if isinstance(error, FullError):  # another party's memory
        return str(error)
    text = str(error).lower()
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, of any device
    if not known and not (isinstance(error, RuntimeError | OSError) and any(sign in text for sign in _SIGNS)):
        return None
    found = [f"{name} = {soft / 2**20:.0f} MiB" for name in COUNTING if (soft := soft_limit(name)) is not None]
    under = f" under {' and '.join(found)}" if found else ""
    return (
        f'memory ran out{under}; give it more, let FlexP choose what fits (data.clients.cut = "auto"), or train less: '
        "shallower cuts, smaller micro-batches, model.gradient_checkpointing, LoRA"
    )
