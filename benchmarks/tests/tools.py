"""A folder of four small files in MNIST's form: pictures whose brightest row says which class they are."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np


def picture_folder(folder: Path, train: int = 150, test: int = 50) -> Path:
    """Ten classes, ``train`` + ``test`` pictures; two of the files are gzipped."""
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
