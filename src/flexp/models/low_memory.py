"""Loading where reserves count (:mod:`flexp.limits`): a part of a checkpoint instead of a map of all of it.

A file that is mapped costs no memory until it is read, and processes on one machine share its pages; so that is what
happens as a rule. Under ``RLIMIT_DATA`` or ``RLIMIT_AS`` it counts with all of its bytes for as long as one weight is
in it. There each tensor is read for itself into memory of its own, by one thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import safetensors
from transformers import modeling_utils

from flexp.limits import reserves_count

ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"
"""By which transformers is told to load without threads, each of which would count with its stack."""


@contextlib.contextmanager
def low_memory_loading(*, quantised: bool = False) -> Iterator[None]:
    """While this lasts transformers maps no file, where that would count; for one thread at a time.

    Of weights that are ``quantised`` as they are read, the pages of a map would stay beside what was made of them.
    """
    if not quantised and not reserves_count():
        yield
        return
    original, before = modeling_utils.safe_open, os.environ.get(ONE_THREAD)
    modeling_utils.safe_open, os.environ[ONE_THREAD] = _without_a_map, "1"
    try:
        yield
    finally:
        modeling_utils.safe_open = original
        if before is None:
            del os.environ[ONE_THREAD]
        else:
            os.environ[ONE_THREAD] = before


class _File:
    """An open file whose slices, asked for all they are of, are read straight into their tensor.

    By itself a slice of a file that is read holds its bytes beside the tensor: a large table counted twice.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *failed: Any) -> None:
        self._file.__exit__(*failed)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._file, name)


class _Slice:
    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file.get_slice(self._name), name)

    def __getitem__(self, place: Any) -> Any:
        return self._file.get_tensor(self._name) if place is ... else self._file.get_slice(self._name)[place]


def _without_a_map(*arguments: Any, **options: Any) -> Any:
    try:
        return _File(safetensors.safe_open(*arguments, **{**options, "backend": "pread"}))
    except TypeError:  # before safetensors 0.8 there were only maps
        return safetensors.safe_open(*arguments, **options)
