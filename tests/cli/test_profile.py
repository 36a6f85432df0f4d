"""``flexp profile`` as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexp.cli.main import app, main
from flexp.config import ModelConfig
from flexp.cost.profile import Profile
from flexp.links.grpc import serve
from flexp.models.anatomy import Part
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_model
from flexp.server import Server


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["flexp", "profile", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (0, None)


COMMON = ("arch:bert", "--kind", "sequence-classification", "--labels", "3", "--length", "10", "--threads", "1")


def test_a_client_whose_network_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = carve(Stage.whole(tiny_model("bert")), Part.server(1, 4))
    tune(stage, ModelConfig(id="any"))
    out = tmp_path / "p.json"
    with serve(Server(stage)) as serving:
        address = str(serving.address)
        call(
            monkeypatch, *COMMON, "--no-probe", "--server", address, "--uplink", "5", "--memory", "64",
            "--class", "phone", "--name", "mine", "--out", str(out),
        )  # fmt: skip
    found = Profile.read(out)
    assert (found.name, found.role, found.memory_bytes, found.memory_from) == ("mine", "client", 64 * 2**20, "--memory")
    assert found.link_from == "measured; uplink_bps from options"
    assert found.uplink_bps == 5e6
    assert found.downlink_bps > 5e6  # this machine's own
    assert 0 <= found.latency_s < 1.0
    assert found.watts == 4.0
    assert len(found.measured[0].shapes[0].blocks) == 4
    shown = capsys.readouterr().out
    assert "a block" in shown
    assert "ms backward" in shown


@pytest.mark.parametrize("option", ["--uplink", "--latency"])
def test_figures_that_are_none_are_refused_before_anything_is_measured(option: str) -> None:
    found = CliRunner().invoke(app, ["profile", "arch:bert", option, "inf"])
    assert str(found.exception) == f"{option} inf: expected a number"


def test_a_server_has_no_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s.json"
    call(monkeypatch, *COMMON, "--as", "server", "--class", "server", "--out", str(out))
    found = Profile.read(out)
    assert found.role == "server"
    assert found.link_from == "device class server"
    assert found.measured[0].overhead_bytes is None
    assert found.measured[0].shapes[0].head.forward == 0
