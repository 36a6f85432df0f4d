"""Reading a run's configuration: from TOML, with overrides, and with errors that name key, value and mend."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexp.config.run import RunConfig
from flexp.errors import ConfigError
from flexp.files import read_json


def load(path: Path, overrides: Iterable[str] = (), seed: int | None = None) -> RunConfig:
    """Read a ``CONFIG.toml``, apply ``key=value`` overrides such as ``train.rounds=3``, and validate it.

    Files and folders that it names beside itself are found from anywhere, and from then on by their absolute paths;
    those of overrides, as all that is typed in a shell, from the working directory. Tables of :data:`OTHERS` are left
    to the commands that they are for.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, of the wrong type or impossible.
    """
    content = overridden(path, overrides)
    if seed is not None:
        content["seed"] = seed
    return _of_run(content, str(path))


def parsed(text: str, path: Path) -> RunConfig:
    """The configuration that ``text`` would give as the TOML file ``path``, which need not be there.

    Raises:
        ConfigError: see :func:`load`.
    """
    content = tomllib.loads(text)
    _locate(content, [path.parent, Path()])
    return _of_run(content, str(path))


def _of_run(content: Mapping[str, Any], where: str) -> RunConfig:
    return validate({table: keys for table, keys in content.items() if table not in OTHERS}, where)


def overridden(path: Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a file (``None``: nothing) and overrides say, with absolute paths, not validated; see :func:`load`.

    Raises:
        ConfigError: the file cannot be read, or an override is none.
    """
    content = {} if path is None else read(path)
    if path is not None:
        _locate(content, [path.parent, Path()])
    for text in overrides:
        override(content, text)
    _locate(content, [Path()])
    return content


def read(path: Path) -> dict[str, Any]:
    """The content of a TOML file, or of a JSON file such as a run's ``config.json``, not validated.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path.suffix == ".json" and path.is_file():
        content: dict[str, Any] = read_json(path)
        return content
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error


OTHERS: frozenset[str] = frozenset({"compare", "deployment"})
"""Tables of a ``CONFIG.toml`` that are not a run's: :mod:`flexp.comparison.config` and
:mod:`flexp.config.deployment` read them."""

PLACES = (
    "model.id",
    "data.source",
    "data.test_source",
    "data.clients.plan",
    "data.clients.profile",
    "data.clients.each.profile",
    "privacy.public",
)
"""Keys that may name a file or a folder."""

MOVED = {
    "data.clients.cuts": "cut",
    "data.clients.profiles": "profile",
    "data.clients.micro_batches": "micro_batch",
    "data.clients.checkpointing": "checkpointing",
    "data.clients.codecs": "codec",
    "devices.assign": "device",
    "method.hetlora.ranks": "rank",
}
"""Lists of former versions, one value a client, and what a client's own key is called now."""


def _tables(content: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The tables at a path, of which there are several where a part of it is an array of tables."""
    for table in content if isinstance(content, list) else [content]:
        if isinstance(table, dict):
            if names:
                yield from _tables(table.get(names[0]), names[1:])
            else:
                yield table


def _locate(content: dict[str, Any], folders: Sequence[Path]) -> None:
    """Make the paths of :data:`PLACES` absolute, where there is such a file or folder; leave other names alone."""
    for place in PLACES:
        *names, key = place.split(".")
        for table in _tables(content, names):
            if key in table:
                table[key] = _located(table[key], folders)


def _located(value: Any, folders: Sequence[Path]) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    for name, split in ((value, ""), value.rpartition("#")[::2]):
        found = [folder / Path(name).expanduser() for folder in folders if name]
        place = next((place for place in found if place.exists()), None)
        if place is not None:
            whole = place.parent.resolve() / place.name  # a link's own name stays: it may have the suffix
            return f"{whole}{'#' if split else ''}{split}"
    return value


def validate(content: Mapping[str, Any], where: str) -> RunConfig:
    """Check a configuration that came from ``where``.

    Raises:
        ConfigError: see :func:`load`.
    """
    for old, key in MOVED.items():
        *names, last = old.split(".")
        found = [table[last] for table in _tables(content, names) if last in table]
        if any(last != key or isinstance(value, list) for value in found):
            raise ConfigError(
                f"{where}: the list {old} is gone: write data.clients.{key} for all clients, or {key} in "
                "[[data.clients.each]], one record a client in their order, repeated for more"
            )
    for table in content.keys() - RunConfig.holds().keys():
        near = difflib.get_close_matches(table, [*RunConfig.holds(), *OTHERS], n=1)
        if OTHERS.intersection(near):
            raise ConfigError(f"{where}: unknown key {table}; did you mean {near[0]!r}?")
    return RunConfig.checked(content, where)


def override(content: dict[str, Any], setting: str) -> None:
    """Put the value of one ``key=value`` into ``content``, in place.

    Raises:
        ConfigError: it has another form, or a part of the key is no table.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting}: expected key=value, for instance --set train.rounds=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    table = content
    *tables, leaf = key.strip().split(".")
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting}: {name} is a value, not a table of keys")
    table[leaf] = value
