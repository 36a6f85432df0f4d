"""A short name for "the same model", which parties that hold different parts of it can compare."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


@dataclass(frozen=True)
class Entry:
    """A tensor: its type in the format's word, its shape, and its bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(stream: BinaryIO) -> dict[str, Entry]:
    """The tensors of an open safetensors file, by name, without reading one.

    The format: https://github.com/huggingface/safetensors#format
    """
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: Entry(said["dtype"], tuple(said["shape"]), *(8 + length + place for place in said["data_offsets"]))
        for name, said in header.items()
    }


def files_of(source: str) -> list[Path]:
    """The safetensors files of a folder, or of the Hub's cache, that transformers loads: one, or those of an index."""
    folder = Path(source).absolute()
    if not folder.is_dir():
        try:
            known = try_to_load_from_cache(source, "config.json")
        except HFValidationError:  # no name that the Hub could have
            return []
        folder = Path(known).parent if isinstance(known, str) else folder
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]


_IGNORED = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id",
    "num_labels", "problem_type", "use_cache", "_attn_implementation", "attn_implementation", "return_dict",
    "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "quantization_config",
}  # fmt: skip
_SAMPLE = 1024  # bytes, at the start, in the middle and at the end of a tensor


def fingerprint(config: Any) -> str:
    """A hash of all that a model's configuration says of its blocks: 16 hexadecimal digits."""
    facts = {key: value for key, value in config.to_dict().items() if key not in _IGNORED}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tensor_fingerprint(value: Tensor) -> str:
    """A hash of a tensor's type, shape and bytes: BLAKE2b, 32 hexadecimal digits."""
    facts = f"{value.dtype} {tuple(value.shape)}".encode()
    plain = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(facts + b"\n" + plain.tobytes(), digest_size=16).hexdigest()


def weights_fingerprint(folder: str | Path) -> str | None:
    """A hash of the blocks' weights in the files that are loaded: 16 hexadecimal digits.

    Names, types, shapes and some bytes of every tensor, so it costs little whatever the model's size; not how tensors
    are spread over files, nor what other files stand beside them, nor the ends of the model, which are no business of
    a server. ``None``: there are no files.
    """
    files = files_of(str(folder))
    found: dict[str, str] = {}
    for file in files:
        facts = file.stat()
        found |= _tensors(file, facts.st_size, facts.st_mtime_ns)
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16] if found else None


@lru_cache(maxsize=256)
def _tensors(file: Path, size: int, changed: int) -> dict[str, str]:
    """The hash of each block tensor in a file, by its name from the list of blocks on, whatever prefix it has."""
    found: dict[str, str] = {}
    with file.open("rb") as stream:
        for name, entry in read_header(stream).items():
            in_block = re.search(r"[^.]+\.\d+\..*", name)
            if in_block is None:
                continue
            digest = hashlib.sha256(json.dumps([entry.dtype, entry.shape]).encode())
            start, stop = entry.start, entry.stop
            for place in (start, start + (stop - start) // 2, max(start, stop - _SAMPLE)):
                stream.seek(place)
                digest.update(stream.read(min(_SAMPLE, stop - place)))
            found[in_block.group()] = digest.hexdigest()
    return found
