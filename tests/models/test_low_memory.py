"""Where a limit counts maps, a part is read tensor by tensor: the same numbers, and no map of the file stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexp import limits
from flexp.cost.echo import reset_peak, resident
from flexp.errors import FullError, ModelError
from flexp.limits import out_of_memory
from flexp.models import loading, low_memory
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage
from tests.models.tools import equal, save, tensors_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps tells what is mapped")


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["bert", "llama-tied", "gpt2"])
def test_the_same_numbers_without_a_map(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(name, tmp_path)
    kind = "sequence-classification" if name == "bert" else "causal-lm"
    part = Part.client((1, 3), 4)
    as_a_rule = load_stage(folder, kind, part)
    assert mapped(folder)
    wanted = {key: value.clone() for key, value in tensors_of(as_a_rule.model).items()}
    del as_a_rule
    monkeypatch.setattr(low_memory, "reserves_count", lambda: True)
    monkeypatch.delenv(low_memory.ONE_THREAD, raising=False)
    found = load_stage(folder, kind, part)
    assert not mapped(folder)
    assert equal(tensors_of(found.model), wanted)
    assert low_memory.ONE_THREAD not in low_memory.os.environ
    assert low_memory.modeling_utils.safe_open is low_memory.safetensors.safe_open


def test_no_table_is_held_twice(tmp_path: Path) -> None:
    size = 64 << 20
    table = torch.ones(size // 4)
    save_file({"table": table, "few": table[:9].clone()}, tmp_path / "model.safetensors")

    with low_memory._without_a_map(tmp_path / "model.safetensors", framework="pt") as file:
        reset_peak()
        before, part = resident("VmRSS"), file.get_slice("table")
        assert (part.get_shape(), part.get_dtype()) == ([size // 4], "F32")
        assert torch.equal(part[:9], table[:9])
        assert torch.equal(part[...], table)
        assert resident("VmHWM") - before < 1.5 * size
        assert sorted(file.keys()) == ["few", "table"]


def test_running_out_of_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("bert", tmp_path)
    monkeypatch.setattr(limits, "soft_limit", lambda name: 750 * 2**20 if name == "RLIMIT_DATA" else None)
    assert limits.reserves_count()

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 157 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(loading, "dissect", full)
    with pytest.raises(ModelError, match="memory ran out under RLIMIT_DATA = 750 MiB; give it more") as told:
        load_stage(folder, "sequence-classification", Part.client((1, 3), 4))
    assert "\n" not in str(told.value)
    assert out_of_memory(MemoryError()) is not None
    assert out_of_memory(torch.OutOfMemoryError("the device's allocator has no more")) is not None
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")) is not None
    assert out_of_memory(FullError("the server's memory ran out")) == "the server's memory ran out"
    assert out_of_memory(RuntimeError("shapes do not match")) is None
    assert out_of_memory(ValueError("cannot allocate memory")) is None


def test_arrow_is_told_to_reserve_nothing_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ARROW_DEFAULT_MEMORY_POOL"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(limits, "soft_limit", lambda _: None)
    limits.reserve_less()
    assert name not in limits.os.environ
    monkeypatch.setattr(limits, "soft_limit", lambda _: 2**30)
    limits.reserve_less()
    assert limits.os.environ[name] == "system"
    monkeypatch.delenv(name)
