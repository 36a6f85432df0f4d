"""Taking single members out of a wheel or a source distribution, and nothing else.

Members are written under their own names below one folder; links, devices and names that lead elsewhere are
refused, for the whole archive, whether they were asked for or not.
"""

from __future__ import annotations

import fnmatch
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO

from flexp.errors import AssetError


def unpack(archive: Path, patterns: tuple[str, ...], target: Path) -> list[Path]:
    """Write the members of ``archive`` that match a pattern below ``target``; return their paths, sorted.

    Raises:
        AssetError: the archive is damaged, holds an unsafe name, or lacks a pattern's members.
    """
    try:
        if zipfile.is_zipfile(archive):
            written = _unpack_zip(archive, patterns, target)
        else:
            written = _unpack_tar(archive, patterns, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AssetError(f"{archive.name}: cannot be unpacked ({error}); download it again") from error
    return sorted(written)


def _unpack_zip(archive: Path, patterns: tuple[str, ...], target: Path) -> list[Path]:
    with zipfile.ZipFile(archive) as file:
        names = [item.filename for item in file.infolist()]
        chosen = _choose(archive, names, patterns)
        written = []
        for item in file.infolist():
            if item.filename not in chosen or item.is_dir():
                continue
            if stat.S_ISLNK(item.external_attr >> 16):
                raise AssetError(f"{archive.name}: member {item.filename!r} is a link, which is not unpacked")
            with file.open(item) as source:
                written.append(_write(source, target / item.filename))
        return written


def _unpack_tar(archive: Path, patterns: tuple[str, ...], target: Path) -> list[Path]:
    with tarfile.open(archive) as file:
        items = file.getmembers()
        chosen = _choose(archive, [item.name for item in items], patterns)
        written = []
        for item in items:
            if item.name not in chosen or item.isdir():
                continue
            source = file.extractfile(item) if item.isreg() else None
            if source is None:
                raise AssetError(f"{archive.name}: member {item.name!r} is no plain file and is not unpacked")
            with source:
                written.append(_write(source, target / item.name))
        return written


def _choose(archive: Path, names: Iterable[str], patterns: tuple[str, ...]) -> set[str]:
    names = list(names)
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
            raise AssetError(f"{archive.name}: member {name!r} would be written outside its folder; refused")
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise AssetError(f"{archive.name}: holds no member {pattern!r}; it is not the file that was expected")
        chosen.update(found)
    return chosen


def _write(source: IO[bytes], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(source, file, length=1 << 20)
    return path
