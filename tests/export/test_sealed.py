"""A sealed file opens with its passphrase alone, and only whole; each failure is one line."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest

from flexp.errors import ConfigError, StorageError
from flexp.export import sealed
from flexp.export.sealed import is_sealed, seal, unseal

CONTENT = bytes(range(256)) * 3


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "CHUNK", 100)
    monkeypatch.setattr(sealed, "LOG_N", 4)  # the cost is in the head


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 768])
def test_a_round_trip_at_every_edge(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    seal(path, CONTENT[:size], "pä ss")
    assert unseal(path, "pä ss") == CONTENT[:size]
    assert is_sealed(path)
    assert path.stat().st_size == 35 + 16 + size + 16 * -(-size // 100)
    assert size < 20 or CONTENT[:20] not in path.read_bytes()


def test_two_files_of_one_content_have_nothing_in_common(tmp_path: Path) -> None:
    for name in "ab":
        seal(tmp_path / name, CONTENT, "p")
    assert (tmp_path / "a").read_bytes()[35:] != (tmp_path / "b").read_bytes()[35:]
    assert (
        sealed._HEAD.unpack((tmp_path / "a").read_bytes()[:35])[5:]
        != sealed._HEAD.unpack((tmp_path / "b").read_bytes()[:35])[5:]
    )


def test_another_passphrase_is_told_from_damage(tmp_path: Path) -> None:
    path = tmp_path / "x"
    seal(path, CONTENT, "right")
    with pytest.raises(StorageError, match="the passphrase does not open it") as caught:
        unseal(path, "wrong")
    assert "\n" not in str(caught.value)
    whole = path.read_bytes()
    frame = 116
    for damaged in (
        whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],  # a bit of a frame
        whole[:-1],  # cut off inside a frame
        whole[: 35 + 16],  # all frames but the empty one are gone
        whole[: 35 + 16 + frame],  # cut off between frames
        whole + b"x",
        whole[:51] + whole[51 + frame : 51 + 2 * frame] + whole[51 : 51 + frame] + whole[51 + 2 * frame :],  # exchanged
    ):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match="is damaged or not whole"):
            unseal(path, "right")


@pytest.mark.parametrize("place", range(35))
def test_no_bit_of_the_head_can_change(tmp_path: Path, place: int) -> None:
    path = tmp_path / "x"
    seal(path, CONTENT, "right")
    head = bytearray(path.read_bytes())
    head[place] ^= 1
    path.write_bytes(head)
    with pytest.raises(StorageError):
        unseal(path, "right")


def test_a_head_cannot_ask_for_any_memory(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(sealed._HEAD.pack(sealed.MAGIC, 1, 24, 255, 1, b"s" * 16, b"n" * 7) + b"t" * 16)
    with pytest.raises(StorageError, match="scrypt's costs"):
        unseal(path, "p")


def test_what_cannot_be_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the passphrase is empty"):
        seal(tmp_path / "x", CONTENT, "")
    with pytest.raises(StorageError, match="cannot be read"):
        is_sealed(tmp_path / "nowhere")
    (tmp_path / "short").write_bytes(b"FLEXPSEA")
    with pytest.raises(StorageError, match="is not whole"):
        unseal(tmp_path / "short", "p")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flexp.files._sync", full)
        with pytest.raises(StorageError, match="the disk is full"):
            seal(tmp_path / "x", CONTENT, "p")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match=r"pip install 'flexp\[encryption\]'"):
        seal(tmp_path / "x", CONTENT, "p")
    assert [path.name for path in tmp_path.iterdir()] == ["short"]
