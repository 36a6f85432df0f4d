"""5,000 digits of MNIST (LeCun et al. 1998) as a table of images that :mod:`datasets` reads."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

_SIDE = 28


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Write ``digits.parquet``: image (PNG, 28 x 28, grey) and label ("0" to "9"); no natural clients."""
    import datasets
    from PIL import Image

    images, labels = [], []
    with gzip.open(next(source.rglob("mnist_5k.csv.gz")), "rt", encoding="ascii", newline="") as file:
        for *pixels, label in csv.reader(file):
            picture = Image.frombytes("L", (_SIDE, _SIDE), bytes(map(int, pixels)))
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
            labels.append(str(int(label)))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table.to_parquet(target / "digits.parquet")
    finally:
        if not hidden:
            datasets.enable_progress_bars()
    return {"rows": len(labels), "columns": ["image", "label"], "size": [_SIDE, _SIDE]}
