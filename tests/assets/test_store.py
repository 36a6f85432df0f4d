"""Fetching, caching, verifying: through the real pip, from a folder instead of an index."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path

import filelock
import pytest

from flexp import assets
from flexp.assets import store
from flexp.assets.registry import Asset
from flexp.errors import AssetError

from .conftest import change


def test_fetches_converts_and_writes_a_manifest(tiny: Asset, online: None, home: Path) -> None:
    path = assets.resolve("asset:tiny")
    assert path == home / "assets" / "tiny" / "rows.txt"
    assert Path(path).read_text() == "one two"
    manifest = json.loads((home / "assets" / "tiny" / "asset.json").read_text())
    assert manifest["download"] == {
        "package": "flexp-tiny==1.0",
        "file": tiny.file,
        "size": tiny.size,
        "sha256": tiny.sha256,
    }
    assert set(manifest["files"]) == {"rows.txt", "deep/note.txt"}
    assert manifest["facts"] == {"rows": 2}
    assert manifest["licence"] == "CC0-1.0"
    assert sorted(item.name for item in (home / "assets").iterdir()) == [".tiny.lock", "tiny"]


def test_second_call_needs_neither_pip_nor_lock(tiny: Asset, at_hand: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = assets.resolve("asset:tiny")

    def refuse(*_: object) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr(store, "download", refuse)
    monkeypatch.setattr(store, "_workshop", refuse)
    assert assets.resolve("asset:tiny") == first


@pytest.mark.parametrize("reference", ["bert-base-uncased", "./folder", "C:\\data", "assets:tiny", ""])
def test_other_references_come_back_unchanged(reference: str) -> None:
    assert assets.resolve(reference) == reference


def test_main_is_the_folder_when_the_entry_names_no_file(
    tiny: Asset, at_hand: None, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    change(tiny, monkeypatch, main="")
    assert assets.resolve("asset:tiny") == home / "assets" / "tiny"


def test_offline_says_in_one_line_what_to_bring_and_where_to_put_it(tiny: Asset) -> None:
    with pytest.raises(AssetError) as caught:
        assets.resolve("asset:tiny")
    message = str(caught.value)
    assert "\n" not in message
    assert "PIP_NO_INDEX" in message
    assert "pip download --no-deps --ignore-requires-python --only-binary flexp-tiny flexp-tiny==1.0" in message
    assert f"flexp assets add tiny {tiny.file}" in message
    assert store.status(tiny) == "absent"


def test_unreachable_index_is_told(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    with pytest.raises(AssetError, match="the package index cannot be reached"):
        assets.fetch("tiny")


def test_pip_refuses_another_file_than_the_pinned_one(
    tiny: Asset, online: None, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    change(tiny, monkeypatch, sha256="0" * 64)
    with pytest.raises(AssetError, match="another file than the pinned one"):
        assets.fetch("tiny")
    assert not (home / "assets" / "tiny").exists()


def test_add_installs_a_file_brought_from_elsewhere(tiny: Asset, wheel: Path, tmp_path: Path) -> None:
    renamed = wheel.rename(tmp_path / "from-a-stick.bin")
    assert assets.add("tiny", renamed).read_text() == "one two"
    assert renamed.exists()
    assert assets.resolve("asset:tiny") == assets.installed(tiny)


def test_add_refuses_another_file(tiny: Asset, wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(AssetError, match=f"expected {tiny.sha256}"):
        assets.add("tiny", wheel)
    with pytest.raises(AssetError, match="is no file"):
        assets.add("tiny", wheel.with_name("missing.whl"))


def test_truncated_file_is_noticed_and_fetched_again(tiny: Asset, at_hand: None) -> None:
    path = assets.fetch("tiny")
    path.write_text("one")
    assert assets.status(tiny) == "damaged"
    assert assets.fetch("tiny").read_text() == "one two"


def test_verify_finds_a_change_that_keeps_the_size(tiny: Asset, at_hand: None) -> None:
    path = assets.fetch("tiny")
    assert assets.verify("tiny") == []
    path.write_text("one twO")
    assert assets.status(tiny) == "ready"
    assert assets.verify("tiny") == ["rows.txt is not what was converted (its SHA-256 differs)"]
    path.unlink()
    assert assets.verify("tiny") == ["rows.txt is missing"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"rows.txt": {"size": "7"}}}'])
def test_damaged_manifest_counts_as_damaged(tiny: Asset, at_hand: None, text: str) -> None:
    path = assets.fetch("tiny")
    (path.parent / "asset.json").write_text(text)
    assert assets.status(tiny) == "damaged"
    assert assets.verify("tiny") == ["asset.json is missing or damaged"]
    assert assets.fetch("tiny") == path
    assert assets.verify("tiny") == []


def test_verify_of_an_absent_asset_says_how_to_get_it(tiny: Asset) -> None:
    with pytest.raises(AssetError, match="flexp assets fetch tiny"):
        assets.verify("tiny")


def test_newer_converter_makes_the_copy_outdated(tiny: Asset, at_hand: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.fetch("tiny")
    newer = change(tiny, monkeypatch, revision=2)
    assert assets.status(newer) == "outdated"
    assert assets.installed(newer) is None
    assets.fetch("tiny")
    assert assets.status(newer) == "ready"


def test_failing_converter_leaves_nothing_and_keeps_what_was_there(
    tiny: Asset, at_hand: None, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    def fail(source: Path, target: Path) -> dict[str, object]:
        (target / "half.txt").write_text("half")
        raise OSError(28, "No space left on device")

    path = assets.fetch("tiny")
    change(tiny, monkeypatch, revision=2, convert=fail)
    with pytest.raises(AssetError, match=r"No space left on device.*FLEXP_HOME"):
        assets.fetch("tiny")
    assert path.read_text() == "one two"
    assert sorted(item.name for item in (home / "assets").iterdir()) == [".tiny.lock", "tiny"]


def test_leftovers_of_a_killed_process_are_removed(tiny: Asset, at_hand: None, home: Path) -> None:
    for name in (".tiny.work", ".tiny.12ab34cd.part"):
        (home / "assets" / name).mkdir(parents=True)
        (home / "assets" / name / "big.bin").write_bytes(b"x")
    assets.fetch("tiny")
    assert sorted(item.name for item in (home / "assets").iterdir()) == [".tiny.lock", "tiny"]


def test_two_at_once_download_once(tiny: Asset, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inside = threading.Event()
    plain = store.download

    def slow(asset: Asset, folder: Path) -> Path:
        calls.append(asset.name)
        inside.wait(5)
        return plain(asset, folder)

    def say(text: str) -> None:
        if text.startswith("waiting"):
            inside.set()  # the second one has come to the lock while the first one downloads

    monkeypatch.setattr(store, "download", slow)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(assets.fetch("tiny", say))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert calls == ["tiny"]
    assert inside.is_set()
    assert len(found) == 2
    assert found[0] == found[1]


def test_lock_that_is_never_released_is_an_error(tiny: Asset, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    (home / "assets").mkdir(parents=True)
    with (
        filelock.FileLock(home / "assets" / ".tiny.lock"),
        pytest.raises(AssetError, match="another process has been fetching it"),
    ):
        assets.fetch("tiny")


def test_unwritable_home_is_one_line(tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FLEXP_HOME", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set FLEXP_HOME to another folder"):
        assets.fetch("tiny")


def test_missing_extra_is_told_before_anything_is_downloaded(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("no_such_module_of_ours") is None
    change(tiny, monkeypatch, needs=(("no_such_module_of_ours", "gguf"),))
    with pytest.raises(AssetError, match=r"pip install 'flexp\[gguf\]'"):
        assets.fetch("tiny")


def test_missing_pip_is_told(tiny: Asset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("flexp.assets.download.sys.executable", str(fake))
    with pytest.raises(AssetError, match="has no pip"):
        assets.fetch("tiny")


def test_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(AssetError, match="did you mean sentiment"):
        assets.resolve("asset:sentimnt")
    with pytest.raises(AssetError, match="there are: digits, minilm-l6"):
        assets.resolve("asset:zzz")
