"""Writing files so that nothing which was saved before is ever lost.

Everything is written beside its destination, flushed to the disk and then renamed: a reader sees the old file or the
new one, never half of either, also when the process is killed or the disk is full. What somebody else has written is
left alone, and a client's name makes a folder's name in one way only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flexp.errors import ConfigError, StorageError

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,59}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block ends without an exception.

    Works for files and for folders. A folder that stood at ``path`` is replaced by rename as well.

    Raises:
        StorageError: the disk is full, or the place cannot be written; what stood at ``path`` is untouched.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        if part.is_dir() and path.is_dir():
            old = part.with_suffix(".old")
            path.rename(old)
            part.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def folder_name(name: str) -> str:
    """What a client's folder is called: its name, where any file system takes that and it can lead nowhere else; or
    else what is readable of it, ``~`` and a part of its SHA-256. Two names never get the same."""
    if _PLAIN.fullmatch(name) and not name.endswith("."):
        return name
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40]
    return f"{readable}~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def check_new(
    path: Path | None, option: str = "--out", *, force: bool = False, read: Iterable[str | Path] = ()
) -> None:
    """Refuse to write over a file that is there already, unless with ``force``, and over what is ``read`` in any case.

    Raises:
        ConfigError: see above.
    """
    if path is None:
        return
    if any(path.resolve() == Path(one).resolve() for one in read):
        raise ConfigError(f"{option} {path}: is what is read; choose another {option}")
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; expected a file")
    if path.exists() and not force:
        raise ConfigError(f"{option} {path}: exists already; choose another {option}, or say --force to replace it")


def check_free(folder: Path, names: Iterable[str], what: str, option: str = "--out") -> None:
    """Refuse a folder in which somebody else has files of the names that ``what`` (a run, say) would write there.

    Raises:
        ConfigError: see above.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option} {folder}: is a file; expected a folder")
    taken = next((name for name in names if (folder / name).exists()), None)
    if taken is not None:
        raise ConfigError(f"{folder} holds {taken}, which is not of {what}; choose another {option}")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_private(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically, readable by its owner alone."""
    with replacing(path) as part:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb") as file:  # noqa: PTH123 - a file that is open
            file.write(content)


def kept(path: Path, make: Callable[[], bytes], what: str) -> bytes:
    """What ``path`` holds, a secret of its owner's: made and written when it is first asked for, the same ever after.

    Raises:
        StorageError: it cannot be read as ``what``, or not be written.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        made = make()
        write_private(path, made)
        return made
    except OSError as error:
        raise StorageError(f"{path}: cannot be read as {what} ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically. NaN and infinities become ``null``."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON from ``path``.

    Raises:
        StorageError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read as JSON ({error}); restore it or start a new run") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def storage_error(path: Path, error: OSError) -> StorageError:
    """One line for an ``OSError`` met while writing ``path``."""
    if error.errno == errno.ENOSPC:
        return StorageError(
            f"{path}: the disk is full; what was saved before is intact: free some space, then resume the run"
        )
    return StorageError(
        f"{path}: cannot be written ({error.strerror or error}); choose another place (--out, or a server's --state)"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0.0:
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _sync(path: Path) -> None:
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
