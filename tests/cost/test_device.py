"""Limits are read from files that say what kernels say."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from flexp.cost import device
from flexp.cost.device import Limit, cores, memory_limits
from flexp.errors import FlexpError

MIB = 2**20


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\nSwapFree: 99999999 kB\n"}
STATUS = {"proc/self/status": "VmSize:\t  2048 kB\nVmRSS:\t 1024 kB\nVmData:\t 512 kB\n"}


def test_available_memory_without_swap(tmp_path: Path) -> None:
    assert memory_limits(machine(tmp_path, MEMINFO), {}) == [Limit("available memory", 4096 * MIB)]


def test_cgroup_2_counts_no_page_cache_and_looks_upwards(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup"
    root = machine(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{folder}/outer/inner/memory.max": "max\n",
            f"{folder}/outer/inner/memory.current": "0\n",
            f"{folder}/outer/memory.max": f"{1024 * MIB}\n",
            f"{folder}/outer/memory.current": f"{300 * MIB}\n",
            f"{folder}/outer/memory.stat": f"anon 5\ninactive_file {150 * MIB}\nactive_file {50 * MIB}\n",
        },
    )
    found = memory_limits(root, {})
    assert found[0] == Limit("cgroup outer (memory.max)", (1024 - 100) * MIB)
    assert [limit.name for limit in found[1:]] == ["available memory"]


def test_cgroup_1_and_its_number_for_no_limit(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    files = MEMINFO | {
        "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/job\n0::/\n",
        f"{folder}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{folder}/memory.usage_in_bytes": "1000\n",
        f"{folder}/job/memory.limit_in_bytes": f"{512 * MIB}\n",
        f"{folder}/job/memory.usage_in_bytes": f"{500 * MIB}\n",
        f"{folder}/job/memory.stat": f"total_inactive_file {100 * MIB}\n",
    }
    found = memory_limits(machine(tmp_path, files), {})
    assert found[0] == Limit("cgroup job (memory.limit_in_bytes)", 112 * MIB)
    assert len(found) == 2


def test_a_container_that_names_its_hosts_cgroup(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/not/there\n",
            "sys/fs/cgroup/memory.max": f"{64 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{80 * MIB}\n",
        },
    )
    assert memory_limits(root, {}) == [Limit("cgroup cgroup (memory.max)", 0)]


def test_rlimits_less_what_the_process_has(tmp_path: Path) -> None:
    root = machine(tmp_path, MEMINFO | STATUS)
    found = memory_limits(root, {"RLIMIT_AS": 12 * MIB, "RLIMIT_RSS": 4 * MIB, "RLIMIT_DATA": 20 * MIB})
    assert found == [
        Limit("RLIMIT_RSS", 3 * MIB),
        Limit("RLIMIT_AS", 10 * MIB),
        Limit("RLIMIT_DATA", 20 * MIB - 512 * 1024),
        Limit("available memory", 4096 * MIB),
    ]


def test_this_process_and_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    assert memory_limits()[0].free_bytes > 0
    assert cores() >= 1
    with pytest.raises(FlexpError, match="--memory"):
        memory_limits(tmp_path, {})


def test_free_memory_is_what_the_limits_leave_and_what_the_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory_limits", lambda: [Limit("a", 1000), Limit("b", 2000)])
    monkeypatch.setattr(device, "held_ready", lambda: 50)
    assert device.free_bytes() == 1050


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_what_was_freed_and_kept_is_counted() -> None:
    kept = [bytearray(64 << 10) for _ in range(200)]
    full = device.held_ready()
    del kept[::2]  # holes, which cannot be given back to the system
    assert device.held_ready() - full > 50 * (64 << 10)
