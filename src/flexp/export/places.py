"""Exporting whatever a folder holds: a run's client, or a client of its own whose middle is on a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexp.errors import ConfigError
from flexp.export import folder as local
from flexp.export.client_folder import middle, open_client
from flexp.export.remote import export_remote
from flexp.export.saved import LAST, open_run
from flexp.links.base import Link
from flexp.run.folder import is_client


def export(
    place: Path,
    client: str | None,
    out: Path,
    form: local.Form = "whole",
    dtype: str | None = None,
    which: str = LAST,
    connect: Callable[[str], Link] | None = None,
) -> dict[str, Any]:
    """Write a personal model into the new folder ``out`` and give its facts.

    Args:
        place: a run, or what ``flexp client`` left.
        connect: of the latter: gives a link of the client that is named to a running server.

    Raises:
        FlexpError: see :func:`flexp.export.folder.export` and :func:`flexp.export.remote.export_remote`.
    """
    if is_client(place):
        return export_remote(open_client(place, client), middle(place, connect), out, form, dtype, which)
    if connect is not None and place.is_dir():
        raise ConfigError(f"{place} has the server's blocks itself: leave out --server")
    return local.export(open_run(place, which), client, out, form, dtype)
