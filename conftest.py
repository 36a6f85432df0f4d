"""What all tests have in common: Python's garbage collection looks through what a test made, not through what stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Half a million objects of libraries and tests come until tests are collected, and all of them stay."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        gc.set_threshold(20_000)
