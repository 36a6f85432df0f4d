"""What a client's sums tell a server that asks again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexp.client.meeting import Noise
from flexp.config import MeetConfig
from flexp.errors import StorageError
from flexp.gaussian import kept_key
from flexp.run.gathering import NOISE, NOISE_FILE


def test_who_asks_again_is_given_the_same_noise(tmp_path: Path) -> None:
    """Also after a restart; fresh draws of sixty meetings had told counts to within one example."""
    meet, counts = MeetConfig(noise=20.0, clip=1.0), {"counts": torch.tensor([3.0, 4.0, 5.0])}
    draws = [Noise(meet, kept_key(tmp_path / NOISE_FILE, NOISE))(counts)["counts"] for _ in range(3)]
    assert all(torch.equal(draws[0], each) for each in draws)
    assert float((draws[0] - counts["counts"]).abs().min()) > 0.1
    assert (tmp_path / NOISE_FILE).stat().st_mode & 0o077 == 0
    others = {"counts": torch.tensor([3.0, 4.0, 6.0])}
    other = Noise(meet, kept_key(tmp_path / NOISE_FILE, NOISE))(others)["counts"]
    assert float((other - draws[0])[:2].abs().min()) > 0.1  # of other sums all of it is another
    elsewhere = Noise(meet, kept_key(tmp_path / "elsewhere", NOISE))(counts)["counts"]
    assert float((elsewhere - draws[0]).abs().min()) > 0.1


def test_a_key_that_is_damaged_is_a_line(tmp_path: Path) -> None:
    (tmp_path / NOISE_FILE).write_bytes(b"short")
    with pytest.raises(StorageError, match="cannot be read as the key of this client's noise in sums: it has 5 bytes"):
        kept_key(tmp_path / NOISE_FILE, NOISE)
