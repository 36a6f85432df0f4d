"""The methods: one file each, behind the Protocol of :mod:`flexp.methods.base`."""

from __future__ import annotations

from collections.abc import Callable

from flexp.methods.base import Account, Method, World
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.methods.local import Local

METHODS: dict[str, Callable[[World], Method]] = {"flexp-sfl": FlexpSfl, "local": Local}

__all__ = ["METHODS", "Account", "FlexpSfl", "Local", "Method", "World"]
