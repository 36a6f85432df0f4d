"""``[deployment]`` and ``--set deployment.…`` mean the same to every command; a key that there is not is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexp.cli.main import app
from flexp.errors import ConfigError
from flexp.links.grpc.tokens import issue
from flexp.run.fleet import Fleet
from flexp.run.settle import settle
from tests.tiny import CLIENTS, bert_folder, config, content


@pytest.mark.parametrize(
    "command", ["run", "fleet", "compare", "server --config", "client --server 127.0.0.1:1 --config"]
)
@pytest.mark.parametrize("how", ["set", "file"])
def test_a_key_that_there_is_not_is_refused(tmp_path: Path, command: str, how: str) -> None:
    written = {"deployment": {"pacience": 3}} if how == "file" else {}
    (tmp_path / "c.json").write_text(json.dumps(content(tmp_path, **written)), encoding="utf-8")
    asked = [*command.split(), str(tmp_path / "c.json")]
    done = CliRunner().invoke(app, asked if how == "file" else [*asked, "--set", "deployment.pacience=3"])
    assert isinstance(done.exception, ConfigError), done.output
    assert "unknown key deployment.pacience; did you mean 'patience'?" in str(done.exception)


def test_a_server_says_who_has_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexp.run.server.rise", lambda *_, **__: None)
    table = content(tmp_path, deployment={"clients": ["north", "south"]})
    (tmp_path / "c.json").write_text(json.dumps(table), encoding="utf-8")
    issue(tmp_path / "tokens", "south")
    done = CliRunner().invoke(
        app, ["server", "--config", str(tmp_path / "c.json"), "--tokens", str(tmp_path / "tokens")]
    )
    assert done.output == f"flexp server: {tmp_path}/tokens has no valid token of north, who cannot join\n"


def test_a_fleet_takes_all_of_the_table(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    found = settle(config(tmp_path))
    Fleet(found, tmp_path / "fleet", keep=7, patience=9.0, save_every=2, allow_export=True)
    table = json.loads((tmp_path / "fleet/fleet.json").read_text(encoding="utf-8"))["deployment"]
    assert table.pop("clients") == list(found.cuts)
    assert table == {"schedule": "deterministic", "keep": 7, "patience": 9.0, "save_every": 2, "allow_export": True}
    with pytest.raises(ConfigError, match=r"deployment.clients names north, and the data have north, south, west"):
        Fleet(found, tmp_path / "other", clients=[CLIENTS[0]])


@pytest.mark.parametrize(
    ("link", "settings", "crosses"),
    [
        ({}, [], None),
        ({"rows": "all"}, [], None),
        ({"codec": {"activation": "int8-row"}}, [], "int8-row"),
        ({}, ["--set", 'link.codec={activation="off"}'], "off"),
    ],
)
def test_a_codec_that_is_named_is_used_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: dict[str, Any], settings: list[str], crosses: str | None
) -> None:
    """In the file or after ``--set``; else the network's default stays, whatever else of ``[link]`` is said."""
    bert_folder(tmp_path / "model")
    table = content(tmp_path, **({"link": link} if link else {}))
    (tmp_path / "c.json").write_text(json.dumps(table), encoding="utf-8")
    asked: list[Any] = []

    def ran(*_: Any, codec: Any) -> bool:
        asked.append(codec)
        return True

    monkeypatch.setattr("flexp.run.client.run_client", ran)
    where = ["client", "--server", "127.0.0.1:1", "--config", str(tmp_path / "c.json"), "--name", CLIENTS[0]]
    done = CliRunner().invoke(app, [*where, *settings], catch_exceptions=False)
    assert done.exit_code == 0
    (codec,) = asked
    assert (None if codec is None else codec.activation) == crosses
