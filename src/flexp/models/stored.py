"""Token embeddings that stay in the checkpoint's file: every batch reads just the rows of its own tokens.

A client always holds the embeddings, mostly without training them, and on small devices they are most of what it holds:
half of a MiniLM, a gigabyte of a model with a large vocabulary. A batch needs a few hundred of their rows. The weights
stay a map of the file, which costs nothing until it is read, and here nobody reads it: reading *through* the map would
bring in its neighbours, up to 64 KiB a row. The numbers are the same, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from flexp.errors import ModelError
from flexp.limits import reserves_count

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of the safetensors format (https://github.com/huggingface/safetensors#format)."""


@dataclass(frozen=True)
class StoredTable:
    """Where in a safetensors file a table (rows, H) is.

    Attributes:
        offset: of the first row, in bytes from the beginning of the file.
        facts: the file's size in bytes and time of its last change in ns, when the table was found in it.
    """

    file: Path
    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype
    facts: tuple[int, int]

    def read(self, rows: Sequence[int]) -> Tensor:
        """Some rows, in the order in which they are asked for: (len(rows), H).

        Raises:
            ModelError: the file is gone, or is another one by now.
        """
        found = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        if not rows:
            return found
        content: Any = found.view(torch.uint8).numpy()  # (len(rows), bytes of a row)
        try:
            with self.file.open("rb", buffering=0) as stream:
                if _facts(os.fstat(stream.fileno())) != self.facts:
                    raise ModelError(f"{self.file} was changed while its embeddings were in use; start again")
                for row, place in zip(rows, content, strict=True):
                    stream.seek(self.offset + row * place.nbytes)
                    if stream.readinto(place) != place.nbytes:
                        raise ModelError(f"{self.file} ends within its embeddings; fetch the model again")
        except OSError as error:
            raise ModelError(
                f"{self.file}: the embeddings cannot be read ({error.strerror}); they stay there"
            ) from error
        return found

    def mapped(self) -> Tensor:
        """All of it (rows, H), as a map of the file that costs nothing until it is read."""
        size = math.prod(self.shape) * self.dtype.itemsize
        # Copied where it is written; but such maps count with every byte where reserves do, so there none may write.
        mode: Any = "r" if reserves_count() else "c"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            content = torch.from_numpy(np.memmap(self.file, np.uint8, mode, self.offset, (size,)))
        return content.view(self.dtype).view(self.shape)


class StoredEmbedding(nn.Embedding):
    """A frozen embedding whose rows are read from ``table``; ``weight`` is there for whoever needs all of it."""

    table: StoredTable

    def forward(self, input: Tensor) -> Tensor:
        """The rows (…, H) of token ids (…)."""
        ids, places = torch.unique(input, return_inverse=True)
        wanted = ids.tolist()
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.num_embeddings:
            raise IndexError(f"token ids from {wanted[0]} to {wanted[-1]}, expected 0 to {self.num_embeddings - 1}")
        return self.table.read(wanted).to(input.device)[places]


def token_embedding(model: Any) -> nn.Embedding:
    """The embedding that may stay in its file.

    Raises:
        ModelError: there is none, because the model embeds something else, in its own way, or shares it with its head.
    """
    name = type(model).__name__
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        found = None
    if type(found) not in (nn.Embedding, StoredEmbedding) or found.max_norm is not None:
        raise _refused(f"{name} embeds its inputs in a way of its own")
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if f"{_path(model, found)}.weight" in {*tied, *tied.values()}:
        raise _refused(f"the head of this {name} is tied to its embeddings, so every step reads all of them")
    return found  # type: ignore[no-any-return]


def without_table(cls: Any) -> Any:
    """A subclass of a model's class, made to be thrown away after loading, that never has its token embeddings."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        module = token_embedding(self)
        module.__class__ = StoredEmbedding
        del module.weight
        module.register_buffer("weight", torch.zeros(0), persistent=False)  # some models ask it for its device
        vars(module)["_is_hf_initialized"] = True  # or transformers would fill it, too

    names = {"__init__": __init__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names)


def give_table(model: Any, source: str, dtype: torch.dtype) -> None:
    """Let the token embeddings of a ``model`` that was loaded without them be those in the files of ``source``.

    Raises:
        ModelError: no file of safetensors has them as they are to be here.
    """
    module = token_embedding(model)
    name, shape = f"{_path(model, module)}.weight", (module.num_embeddings, module.embedding_dim)
    found = {key: table for key, table in _tables(source) if _alike(key, name) >= 2}  # such as embed_tokens.weight
    best = max((_alike(key, name) for key in found), default=0)
    tables = [table for key, table in found.items() if _alike(key, name) == best]
    if len(tables) != 1 or (tables[0].shape, tables[0].dtype) != (shape, dtype):
        raise _refused(
            f"no safetensors file of {source} has {name} with {shape} numbers of {str(dtype).removeprefix('torch.')}, "
            "as model.dtype wants it"
        )
    module.table = tables[0]  # type: ignore[assignment]
    del module.weight
    module.weight = nn.Parameter(tables[0].mapped(), requires_grad=False)


def stored(model: nn.Module) -> Iterator[Tensor]:
    """The weights of ``model`` that are in a file and not in memory."""
    return (module.weight for module in model.modules() if isinstance(module, StoredEmbedding))


def _path(model: nn.Module, module: nn.Module) -> str:
    names: dict[int, str] = {id(value): path for path, value in model.named_modules()}
    return names[id(module)]


def _alike(key: str, name: str) -> int:
    """How many last parts two names have in common: a bare encoder's lack the first ones."""
    pairs = zip(reversed(key.split(".")), reversed(name.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _tables(source: str) -> Iterator[tuple[str, StoredTable]]:
    """All tables in the files of ``source``, by name."""
    for file in _files(source):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__" and len(entry["shape"]) == 2 and entry["dtype"] in DTYPES:
                rows, width = entry["shape"]
                start = 8 + length + entry["data_offsets"][0]
                yield name, StoredTable(file, start, (rows, width), DTYPES[entry["dtype"]], _facts(file.stat()))


def _files(source: str) -> list[Path]:
    folder = Path(source)
    if not folder.is_dir():  # of the Hub: where its cache has it
        known = try_to_load_from_cache(source, "config.json")
        folder = Path(known).parent if isinstance(known, str) else folder
    return sorted(folder.glob("*.safetensors"))


def _facts(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _refused(why: str) -> ModelError:
    return ModelError(f'model.embeddings = "file" is not possible: {why}; use "memory"')
