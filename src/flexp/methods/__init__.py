"""The methods: one class each, found by name (:mod:`flexp.registry`), behind :class:`flexp.methods.base.Method`."""

from flexp.methods.base import Account, Method, World
from flexp.registry import METHODS

__all__ = ["METHODS", "Account", "Method", "World"]
