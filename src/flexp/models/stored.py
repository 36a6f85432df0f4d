"""Token embeddings that stay in the checkpoint's file: every batch reads just the rows of its own tokens.

A client always holds the embeddings, mostly without training them, and on small devices they are most of what it holds:
half of a MiniLM, a gigabyte of a model with a large vocabulary. A batch needs a few hundred of their rows. The weights
stay a map of the file, which costs nothing until it is read, and here nobody reads it: reading *through* the map would
bring in its neighbours, up to 64 KiB a row. The numbers are the same, bit for bit.
"""

from __future__ import annotations

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
from torch import Tensor, nn

from flexp.errors import ModelError
from flexp.limits import reserves_count
from flexp.models.fingerprint import files_of, read_header

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of the safetensors format."""


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
            IndexError: there is no such row.
            ModelError: the file is gone, or is another one by now.
        """
        if rows and not 0 <= min(rows) <= max(rows) < self.shape[0]:
            raise IndexError(f"rows from {min(rows)} to {max(rows)}, expected 0 to {self.shape[0] - 1}")
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
        # Copied where it is written; but RLIMIT_DATA counts such maps with every byte, so there none may write.
        mode: Any = "r" if reserves_count() else "c"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            content = torch.from_numpy(np.memmap(self.file, np.uint8, mode, self.offset, (size,)))
        return content.view(self.dtype).view(self.shape)


class StoredEmbedding(nn.Embedding):
    """A frozen embedding whose rows are read from ``table``.

    ``weight`` is there for whoever needs all of it; whoever changes, moves or trains it has an ordinary embedding.
    """

    table: StoredTable
    _mapped: tuple[Any, ...] = ()  # the weight's state as it was mapped

    def use(self, table: StoredTable) -> None:
        """Have the rows of ``table``."""
        del self.weight
        self.table, self.weight = table, nn.Parameter(table.mapped(), requires_grad=False)
        self._mapped = self._state()

    def forward(self, input: Tensor) -> Tensor:
        """The rows (…, H) of token ids (…)."""
        if self.weight.requires_grad or self._state() != self._mapped:
            return super().forward(input)
        ids, places = torch.unique(input, return_inverse=True)
        return self.table.read(ids.tolist()).to(input.device)[places]

    def _state(self) -> tuple[Any, ...]:
        weight = self.weight
        return weight.data_ptr(), weight.dtype, weight.shape, weight._version

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, *others: Any
    ) -> None:
        """Take over other values into memory of their own; the map may be one that must not be written."""
        given = state_dict.get(f"{prefix}weight")
        same = self._state() == self._mapped
        if given is not None and given.shape == self.weight.shape and same:
            if self._holds(given):
                return
            self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)

    def _holds(self, given: Tensor) -> bool:
        """Whether these are the table's numbers, a piece at a time."""
        pieces = (range(start, min(start + 1024, len(given))) for start in range(0, len(given), 1024))
        return all(torch.equal(self.table.read(piece), given[piece.start : piece.stop].cpu()) for piece in pieces)


FILE = ('model.embeddings = "file"', '"memory"')
PACKED = ("model.quantize_ends = true", "false")
"""A setting that a model may not be able to have, and what to set instead."""


def token_embedding(model: Any, setting: tuple[str, str] = FILE) -> nn.Embedding:
    """The embedding that may stay in its file, or be packed.

    Raises:
        ModelError: there is none, because the model embeds something else, in its own way, or (in its file) shares it
            with its head.
    """
    name = type(model).__name__
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        found = None
    if type(found) not in (nn.Embedding, StoredEmbedding) or found.max_norm is not None:
        raise refused(f"{name} embeds its inputs in a way of its own", setting)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if setting == FILE and f"{_path(model, found)}.weight" in {*tied, *tied.values()}:
        raise refused(f"the head of this {name} is tied to its embeddings, so every step reads all of them")
    return found  # type: ignore[no-any-return]


def without_table(cls: Any) -> Any:
    """A subclass of a model's class, made to be thrown away after loading, that never has its token embeddings."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        without(token_embedding(self), StoredEmbedding)

    names = {"__init__": __init__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names)


def without(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make an embedding or a linear layer one of another ``kind`` that has no weight yet."""
    module.__class__ = kind
    del module.weight
    module.register_buffer("weight", torch.zeros(0), persistent=False)  # some models ask it for its device
    vars(module)["_is_hf_initialized"] = True  # or transformers would fill it, too


def give_table(model: Any, source: str, dtype: torch.dtype) -> None:
    """Let the token embeddings of a ``model`` that was loaded without them be those in the files of ``source``.

    Raises:
        ModelError: see :func:`find_table`.
    """
    module = token_embedding(model)
    assert isinstance(module, StoredEmbedding)
    module.use(find_table(model, source, dtype))


def find_table(model: Any, source: str, dtype: torch.dtype) -> StoredTable:
    """Where the files of ``source``, a folder or an id of the Hub, have the token embeddings of ``model``.

    Raises:
        ModelError: they do not have them, or not as they are to be here.
    """
    module = token_embedding(model)
    table = find([f"{_path(model, module)}.weight"], (module.num_embeddings, module.embedding_dim), source)
    if table.dtype != dtype:
        stored, wanted = (str(kind).removeprefix("torch.") for kind in (table.dtype, dtype))
        raise refused(f"{table.file} has the embeddings in {stored}, and model.dtype is {wanted}")
    return table


def find(names: Sequence[str], shape: tuple[int, int], source: str, setting: tuple[str, str] = FILE) -> StoredTable:
    """Where the files of ``source`` have a table that a model knows by one of these ``names``, the first that is there.

    Raises:
        ModelError: they do not have it, or more than one, or in another ``shape``.
    """
    every = dict(tables_of(source))
    for name in names:
        best = max((_alike(key, name) for key in every), default=0)
        tables = [
            table for key, table in every.items() if _alike(key, name) == best >= 2
        ]  # such as embed_tokens.weight
        if len(tables) == 1 and tables[0].shape != shape:
            raise refused(
                f"{tables[0].file} has {name} with {tables[0].shape} numbers, and this model {shape}", setting
            )
        if len(tables) == 1:
            return tables[0]
    raise refused(f"{len(tables)} tensors in the safetensors files of {source} may be {names[0]}", setting)


def check_table(model: Any, source: str, dtype: torch.dtype) -> None:
    """Say why the token embeddings of ``model`` cannot stay in the files of ``source``, as far as these are here.

    Raises:
        ModelError: :func:`token_embedding` or :func:`find_table` refuses, or there never is a file.
    """
    token_embedding(model)
    if source.startswith("arch:"):
        raise refused(f"{source} has no file")
    if files_of(source):
        find_table(model, source, dtype)


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


def tables_of(source: str) -> Iterator[tuple[str, StoredTable]]:
    """All tables in the files of ``source``, by name."""
    for file in files_of(source):
        with file.open("rb") as stream:
            header, facts = read_header(stream), _facts(os.fstat(stream.fileno()))
        for name, entry in header.items():
            if len(entry.shape) == 2 and entry.dtype in DTYPES:
                rows, width = entry.shape
                yield name, StoredTable(file, entry.start, (rows, width), DTYPES[entry.dtype], facts)


def _facts(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def refused(why: str, setting: tuple[str, str] = FILE) -> ModelError:
    """That a model cannot have a setting."""
    return ModelError(f"{setting[0]} is not possible: {why}; use {setting[1]}")
