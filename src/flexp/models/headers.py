"""What a safetensors file says of its tensors, without reading one (https://github.com/huggingface/safetensors#format)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import BinaryIO


@dataclass(frozen=True)
class Entry:
    """A tensor: its type in the format's word, its shape, and its bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(stream: BinaryIO) -> dict[str, Entry]:
    """The tensors of an open file, by name."""
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: Entry(said["dtype"], tuple(said["shape"]), *(8 + length + place for place in said["data_offsets"]))
        for name, said in header.items()
    }
