"""One label for an image."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexp.config import DataConfig
from flexp.data.survey import Column, column_of, label_column
from flexp.data.tasks.base import OneClass, place
from flexp.data.types import Batch, Example, Row
from flexp.errors import DataError
from flexp.kinds import ModelKind

_AT_ONCE = 64


class ImageClassification(OneClass):
    """A classifier over ``label_names``. Images are files, or bytes inside a table; all become RGB."""

    name = "image-classification"
    model_kind: ModelKind = "image-classification"
    images = True

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        image, label = column_of(columns, "image"), label_column(columns)
        return None if image is None or label is None else {"image": image, "label": label}

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        return {config.image: "data.image"}

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """``pixel_values`` of shape (channels, height, width) as the processor makes them, and ``labels``."""
        examples: list[Example] = []
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            pictures = [_open(row[self.config.image], place(row)) for row in some]
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            examples += [
                {"pixel_values": values.clone(), "labels": self._number[row[self.config.label]]}
                for values, row in zip(pixels, some, strict=True)
            ]
        return examples

    def collate(self, examples: Sequence[Example]) -> Batch:
        """``pixel_values`` (B, channels, height, width) and ``labels`` (B,)."""
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples], dtype=torch.long),
        }

    @classmethod
    def gaps(cls, config: DataConfig) -> Collection[str]:
        return [config.image]  # what is no image is said when it is opened


def _open(value: Any, where: str) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    content = value.get("bytes") if isinstance(value, dict) else None
    path = value.get("path") if isinstance(value, dict) else value
    try:
        with Image.open(io.BytesIO(content) if content is not None else Path(str(path))) as image:
            return _eight_bits(ImageOps.exif_transpose(image), where).convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{where}: there is no image {path}; paths are relative to the table's own folder") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: the image cannot be read ({error}); replace or remove it") from error


def _eight_bits(image: Any, where: str) -> Any:
    """``image`` with 8 bits a channel: a plain conversion would cut off what 16 bits hold beyond 255.

    Raises:
        DataError: its numbers have no known range.
    """
    from PIL import Image

    if image.mode == "F":
        raise DataError(
            f"{where}: the image holds floating-point numbers, whose range is not known; save it with 8 bits"
        )
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"{where}: the image holds numbers outside 0 to 65535; save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
