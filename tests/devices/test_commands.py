"""Where commands compute."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from flexp.cli.main import app
from flexp.cli.settings import overrides, placed
from flexp.config import ModelConfig
from flexp.config.loading import load
from flexp.cost.device import free_bytes, this_machine
from flexp.cost.echo import highest
from flexp.cost.profile import Profile
from flexp.errors import ConfigError
from flexp.machine import device_of
from flexp.models.anatomy import Part
from flexp.models.stage import Stage, carve
from flexp.models.zoo import tiny_model
from tests.cli.test_commands import toml
from tests.devices.elsewhere import DEVICE, NAME, elsewhere
from tests.tiny import bert_folder

COMPUTE = ("run", "server", "client", "fleet", "generate", "chat", "serve", "predict", "evaluate", "verify", "profile")


def test_a_run_and_what_reads_it_take_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert_folder(tmp_path / "model")
    path, out = toml(tmp_path, train={"rounds": 1, "steps_per_round": 1}), str(tmp_path / "out")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    call("run", str(path), "--out", out, "--device", "cpu,cpu")
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["model"]["device"] == "cpu"
    assert said["server"]["device"] == ["cpu", "cpu"]
    call("evaluate", out, "--client", "north", "--device", "cpu")
    with pytest.raises(ConfigError, match=r"there is no device 'cuda:77' here; expected auto or cpu"):
        call("evaluate", out, "--client", "north", "--device", "cuda:77")
    with pytest.raises(ConfigError, match=r"model.device = 'gpu' is not allowed: expected 'auto', 'cpu', 'mps'"):
        call("run", str(path), "--device", "gpu")
    with pytest.raises(ConfigError, match=r"there is no device 'xpu:77' here"):
        call("verify", "arch:gpt2", "--device", "xpu:77")
    call("verify", "arch:gpt2", "--steps", "1", "--device", "cpu")


def test_of_several_devices_the_server_has_all_and_all_else_the_first(tmp_path: Path) -> None:
    path = toml(tmp_path)
    loaded = load(path, overrides(None, **placed("cuda:0,cuda:1")))
    for each in (loaded, load(path).on("cuda:0,cuda:1")):
        assert (each.model.device, each.server.device) == ("cuda:0", ["cuda:0", "cuda:1"])
    assert loaded.on("cpu").server.device is None
    with pytest.raises(ConfigError, match=r"several kinds"):
        loaded.on("cuda:0,cpu")
    with pytest.raises(ConfigError, match=r"model\.device = 'gpu' is not allowed"):
        loaded.on("cuda:0,gpu")


def test_every_command_that_computes_has_the_option() -> None:
    found: Any = get_command(app)
    for name in COMPUTE:
        assert "device" in {option.name for option in found.commands[name].params}, name


def test_auto_is_the_processor_where_there_is_nothing_else() -> None:
    if not torch.accelerator.is_available():
        assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    else:
        assert device_of("auto").type == torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    assert ModelConfig.of("any", device="cuda:1").device == "cuda:1"


def test_a_party_that_moves_leaves_shared_tensors_where_they_are() -> None:
    source = Stage.whole(tiny_model("gpt2").requires_grad_(False))
    with elsewhere():
        moved = carve(source, Part.server(1, 3)).to(DEVICE)
        assert {value.device for value in moved.model.parameters()} == {DEVICE}
        assert {value.device for value in source.model.parameters()} == {torch.device("cpu")}


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_gpu_is_profiled_by_its_own_memory_and_when_it_is_done(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is not there: its clock is read after it was waited for, and a plan knows what it has free."""
    waits = list[torch.device]()
    gpu = SimpleNamespace(
        mem_get_info=lambda _: (3 * 2**30, 2**40), memory_reserved=lambda _: 2**30, memory_allocated=lambda _: 2**28
    )
    for name, answer in (
        ("is_available", lambda: True), ("current_accelerator", lambda **_: torch.device(DEVICE.type)),
        ("device_count", lambda: 8), ("synchronize", waits.append),
    ):  # fmt: skip
        monkeypatch.setattr(torch.accelerator, name, answer)
    monkeypatch.setattr(torch, "get_device_module", lambda _: gpu)
    out = tmp_path / "gpu.json"
    with elsewhere():
        done = CliRunner().invoke(app, [
            "profile", "arch:bert", "--kind", "sequence-classification", "--labels", "3", "--length", "10",
            "--batch", "2", "--as", side, "--no-probe", "--device", NAME, "--out", str(out),
        ], catch_exceptions=False)  # fmt: skip
    assert done.exit_code == 0, done.output
    found = Profile.read(out)
    free = 4 * 2**30 - 2**28
    assert (found.memory_bytes, found.memory_from) == (free, f"free on {NAME}")
    assert found.host_bytes is not None  # as its machine's memory does
    assert 0 < found.host_bytes != free
    assert found.flops > 0
    assert set(waits) == {DEVICE}
    assert this_machine(NAME).host_bytes
    assert this_machine("cpu").host_bytes is None
    assert this_machine(NAME).memory_bytes == free_bytes(NAME) == free
    gpu.reset_peak_memory_stats, gpu.max_memory_allocated = (lambda _: None), (lambda _: 2**29)
    assert highest(DEVICE)() == 2**29 - 2**28
