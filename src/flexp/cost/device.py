"""What this machine lets a process use: memory under every limit that holds, and cores."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexp.cost.profile import Profile
from flexp.errors import FlexpError
from flexp.limits import COUNTING, soft_limit
from flexp.machine import device_of, free_memory

UNLIMITED = 2**60
"""A cgroup of version 1 without a limit names a number of this size."""


STACK = 2 * 2**20
"""Of a thread, where ``RLIMIT_STACK`` is unlimited (x86-64)."""

ARENA = 64 * 2**20
"""Addresses that glibc keeps for a thread that allocates."""

OTHER_THREADS = 4
"""gRPC's two that keep time, the one that serves the link's loop, and autograd's."""


@dataclass(frozen=True)
class Limit:
    """How many bytes ``name`` still allows this process, above what it has already; swap is never counted."""

    name: str
    free_bytes: int


def memory_limits(root: Path = Path("/"), rlimits: Mapping[str, int] | None = None) -> list[Limit]:
    """All limits that are known, the tightest first.

    - *available memory*: what the kernel can give without swapping.
    - *cgroup*: the limits of this process's control group and of every one above it, versions 1 and 2, less what is
      used there, without the page cache, which is given back when it is needed.
    - *RLIMIT_AS*, *RLIMIT_DATA*, *RLIMIT_RSS*: this process's own, less what it has. (Linux enforces the first two.)

    Args:
        root: where ``proc`` and ``sys`` are; another one for tests.
        rlimits: soft limits in bytes by name; ``None``: this process's.

    Raises:
        FlexpError: nothing tells how much memory there is.
    """
    found = [*_available(root), *_cgroup2(root), *_cgroup1(root), *_rlimits(root, rlimits)]
    if not found:
        raise FlexpError(
            "this machine does not tell its free memory: expected /proc/meminfo; say it with --memory, or start from "
            "a device class with --class"
        )
    return sorted(found, key=lambda limit: limit.free_bytes)


def training_memory(threads: int = 1, device: str = "cpu") -> Limit:
    """The limit that leaves this process least for training, and how much: see :func:`for_training`. On a GPU that
    tells it, its free memory.

    Raises:
        ConfigError: there is no such device here.
        FlexpError: see :func:`memory_limits`.
    """
    place = device_of(device)
    free = free_memory(place)
    if free is not None:
        return Limit(f"free on {place}", free)
    return host_memory(threads)


def host_memory(threads: int = 1) -> Limit:
    """The same of the machine's own memory, which a client with a GPU needs as well.

    Raises:
        FlexpError: see :func:`memory_limits`.
    """
    found = [Limit(limit.name, for_training(limit, threads)) for limit in memory_limits()]
    return min(found, key=lambda limit: limit.free_bytes)


def host_bytes(threads: int = 1, device: str = "cpu") -> int | None:
    """Of :func:`host_memory`, for a device that has a memory of its own; ``None``: it has none."""
    return None if free_memory(device_of(device)) is None else max(1, host_memory(threads).free_bytes)


def for_training(limit: Limit, threads: int = 1) -> int:
    """What ``limit`` leaves for training in bytes, less what threads to come reserve where that counts.

    A client over a network starts about eight threads on a small machine: gRPC's, one for each core from 4 to 16 and
    some more, and autograd's. ``RLIMIT_DATA`` counts the stack of each, 8 MiB as a rule, whether it is used or not;
    ``RLIMIT_AS`` also the addresses that the allocator keeps for each.

    Args:
        threads: torch's.
    """
    if limit.name not in COUNTING:
        return limit.free_bytes
    each = (soft_limit("RLIMIT_STACK") or STACK) + (ARENA if limit.name == "RLIMIT_AS" else 0)
    coming = OTHER_THREADS + min(16, max(4, os.cpu_count() or 1)) + threads - 1
    return max(0, limit.free_bytes - each * coming)


def this_machine(device: str = "cpu") -> Profile:
    """What this process may use on a device, with the speed and the network of a laptop, which were not measured."""
    import torch

    tightest = training_memory(torch.get_num_threads(), device)
    return Profile.from_class("laptop").model_copy(
        update={
            "name": "this machine",
            "memory_bytes": max(1, tightest.free_bytes),
            "memory_from": f"this machine's memory ({tightest.name})",
            "host_bytes": host_bytes(torch.get_num_threads(), device),
        }
    )


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _available(root: Path) -> Iterator[Limit]:
    found = _table(root / "proc/meminfo").get("MemAvailable")
    if found is not None:
        yield Limit("available memory", found * 1024)
        return
    if root == Path("/"):  # no Linux: psutil knows
        import psutil

        yield Limit("available memory", int(psutil.virtual_memory().available))


def _cgroup2(root: Path) -> Iterator[Limit]:
    path = next((line[3:] for line in _lines(root / "proc/self/cgroup") if line.startswith("0::")), None)
    if path is None:
        return
    for folder in _upwards(root / "sys/fs/cgroup", path):
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            stat = _table(folder / "memory.stat")
            cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
            yield Limit(f"cgroup {folder.name or '/'} (memory.max)", max(0, limit - max(0, used - cache)))


def _cgroup1(root: Path) -> Iterator[Limit]:
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" not in controllers.split(","):
            continue
        for folder in _upwards(root / "sys/fs/cgroup/memory", path):
            limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
            if limit is not None and used is not None and limit < UNLIMITED:
                stat = _table(folder / "memory.stat")
                cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
                yield Limit(f"cgroup {folder.name} (memory.limit_in_bytes)", max(0, limit - max(0, used - cache)))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The control group's folder and those above it; in a container, whose path may be the host's, the mount alone."""
    folder = mount / path.strip("/")
    while folder != mount and mount in folder.parents:
        if folder.is_dir():
            yield folder
        folder = folder.parent
    if mount.is_dir():
        yield mount


def _rlimits(root: Path, rlimits: Mapping[str, int] | None) -> Iterator[Limit]:
    status = _table(root / "proc/self/status")
    for name, key in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData"), ("RLIMIT_RSS", "VmRSS")):
        limit = soft_limit(name) if rlimits is None else rlimits.get(name)
        if limit is not None and key in status:
            yield Limit(name, max(0, limit - 1024 * status[key]))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """What a file holds; ``None`` if it is not there or says ``max``."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number, whatever unit follows."""
    found = {}
    for line in _lines(path):
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdecimal():
            found[words[0]] = int(words[1])
    return found


def free_bytes(device: str = "cpu") -> int:
    """What this process may still take: within the tightest limit, and what its allocator holds ready; on a GPU that
    tells it, of its memory."""
    free = free_memory(device_of(device))
    return free if free is not None else memory_limits()[0].free_bytes + held_ready()


class _Arena(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def held_ready() -> int:
    """Bytes that were freed and that the C library keeps for the next allocation (glibc 2.33 and later; else 0)."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    mallinfo2.restype = _Arena
    return int(mallinfo2().fordblks)
