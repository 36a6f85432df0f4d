"""``flexp assets`` on the tiny asset."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexp import assets
from flexp.assets.registry import ASSETS, Asset
from flexp.cli.assets import app
from flexp.errors import AssetError


@pytest.fixture
def run(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    for name in list(ASSETS):
        if name != "tiny":
            monkeypatch.delitem(ASSETS, name)
    monkeypatch.setenv("COLUMNS", "120")
    return CliRunner()


def test_list_shows_what_is_here(run: CliRunner, at_hand: None) -> None:
    before = run.invoke(app, ["list"])
    assert before.exit_code == 0
    assert "absent" in before.stdout
    assert "two words" in before.stdout
    assets.fetch("tiny")
    assert "ready" in run.invoke(app, ["list"]).stdout


@pytest.mark.parametrize("name", ["tiny", "asset:tiny", "all"])
def test_fetch_prints_the_path(run: CliRunner, at_hand: None, name: str, home: Path) -> None:
    result = run.invoke(app, ["fetch", name])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"tiny  {home / 'assets' / 'tiny' / 'rows.txt'}\n"


def test_fetch_of_an_unknown_name_downloads_nothing(run: CliRunner, online: None, tiny: Asset) -> None:
    result = run.invoke(app, ["fetch", "tiny", "other"])
    assert isinstance(result.exception, AssetError)
    assert assets.status(tiny) == "absent"


def test_path_is_for_scripts(run: CliRunner, at_hand: None) -> None:
    absent = run.invoke(app, ["path", "tiny"])
    assert isinstance(absent.exception, AssetError)
    assert "flexp assets fetch tiny" in str(absent.exception)
    path = assets.fetch("tiny")
    assert run.invoke(app, ["path", "tiny"]).stdout == f"{path}\n"


def test_add_takes_a_file(run: CliRunner, wheel: Path) -> None:
    result = run.invoke(app, ["add", "tiny", str(wheel)])
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.split()[1]).read_text() == "one two"


def test_verify_fails_on_damage_and_fetch_mends_it(run: CliRunner, at_hand: None) -> None:
    assert "no assets in" in run.invoke(app, ["verify"]).stdout
    path = assets.fetch("tiny")
    assert run.invoke(app, ["verify"]).stdout == "tiny  intact\n"
    path.write_text("one twO")
    result = run.invoke(app, ["verify", "tiny"])
    assert result.exit_code == 2
    assert "SHA-256 differs" in result.stdout
    assert run.invoke(app, ["fetch", "tiny"]).exit_code == 0
    assert path.read_text() == "one two"
