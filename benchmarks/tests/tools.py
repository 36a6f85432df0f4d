"""Calling ``python -m benchmarks``, and small data: pictures in MNIST's form."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import app
from flexp.cli.main import main


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code of ``python -m benchmarks`` with these words, and what it printed (for a failure, its error)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(app(arguments[:1]), prog="python -m benchmarks")
    shown = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, shown.out if left.value.code == 0 else shown.err


def picture_folder(folder: Path, train: int = 150, test: int = 50) -> Path:
    """Four files, two of them gzipped: ten classes, told by a picture's brightest row; ``train`` + ``test`` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = draw.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for picture, label in zip(pixels, labels, strict=True):
            picture[2 * label + 3 : 2 * label + 5] = 250
        for content, dimensions, kind in ((pixels, 3, "images"), (labels, 1, "labels")):
            head = bytes([0, 0, 8, dimensions]) + np.array(content.shape, dtype=">u4").tobytes()
            name = f"{part}-{kind}-idx{dimensions}-ubyte"
            if part == "train":
                (folder / f"{name}.gz").write_bytes(gzip.compress(head + content.tobytes()))
            else:
                (folder / name).write_bytes(head + content.tobytes())
    return folder
