"""Reading a run's configuration: from TOML, with overrides, and with errors that name key, value and mend."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

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
    content = {table: keys for table, keys in read(path).items() if table not in OTHERS}
    _locate(content, [path.parent, Path()])
    for text in overrides:
        override(content, text)
    _locate(content, [Path()])
    if seed is not None:
        content["seed"] = seed
    return validate(content, str(path))


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
    ("model", "id"),
    ("data", "source"),
    ("data", "test_source"),
    ("data.clients", "plan"),
    ("data.clients", "profiles"),
)
"""Keys that may name a file or a folder, or a list of them."""


def _locate(content: dict[str, Any], folders: Sequence[Path]) -> None:
    """Make the paths of :data:`PLACES` absolute, where there is such a file or folder; leave other names alone."""
    for table, key in PLACES:
        keys: Any = content
        for name in table.split("."):
            keys = keys.get(name) if isinstance(keys, dict) else None
        value = keys.get(key) if isinstance(keys, dict) else None
        if not isinstance(keys, dict):
            continue
        if isinstance(value, list):
            keys[key] = [_located(item, folders) for item in value]
        elif value is not None:
            keys[key] = _located(value, folders)


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
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
        # Where a word or something else would do, and something else is wrong, what is wrong with that is to be told.
        words = [item["type"] == "literal_error" and not isinstance(item["input"], str) for item in problems]
        raise ConfigError(f"{where}: {_explain(problems[words.index(False) if False in words else 0])}") from error


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


def _explain(problem: Mapping[str, Any]) -> str:
    place = [part for part in problem["loc"] if isinstance(part, str | int)]
    fields = [part for part in place if isinstance(part, str)]
    key = ".".join(str(part) for part in _visible(fields))
    if problem["type"] == "extra_forbidden":
        known = sorted(_section(fields[:-1]).model_fields)
        near = difflib.get_close_matches(fields[-1], known, n=1, cutoff=0.5)
        elsewhere = [path for path in all_keys() if path.rpartition(".")[2] == fields[-1]]
        hint = near[0] if near else None
        if hint is None and elsewhere:
            return f"unknown key {key}; did you mean {elsewhere[0]}?"
        did = f"did you mean {hint!r}? " if hint else ""
        return f"unknown key {key}; {did}known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"the key {key} is missing"
    if problem["type"] == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}"
    value = problem["input"]
    message = problem["msg"].removeprefix("Input should be ")
    if problem["type"] == "too_short":
        message = f"{problem['ctx']['min_length']} or more entries"
    near_value = ""
    if problem["type"] == "literal_error" and isinstance(value, str):
        allowed = [str(item) for item in _allowed(fields)]
        close = difflib.get_close_matches(value, allowed, n=1, cutoff=0.4)
        near_value = f"; did you mean {close[0]!r}?" if close else ""
    return f"{key} = {value!r} is not allowed: expected {message}{near_value}"


def _visible(fields: list[str]) -> Iterator[str]:
    """Without the names that pydantic gives to the branches of a union."""
    section: type[BaseModel] | None = RunConfig
    named = False
    for name in fields:
        if named:  # of a table whose keys are the user's own names
            named = False
            yield name
        elif section is not None:
            yield name
            field = section.model_fields.get(name)
            section, named = (None, False) if field is None else _inside(field.annotation)


def _section(fields: Iterable[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    names = iter(fields)
    for name in names:
        found, named = _inside(section.model_fields[name].annotation)
        assert found is not None
        section = found
        if named:
            next(names, None)
    return section


def _inside(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a key holds, if it is one (or none); and whether it is a table of such sections by name."""
    for branch in (annotation, *get_args(annotation)):
        if isinstance(branch, type) and issubclass(branch, BaseModel):
            return branch, get_origin(annotation) is dict
    return None, False


def _allowed(fields: list[str]) -> list[Any]:
    visible = list(_visible(fields))
    annotation = _section(visible[:-1]).model_fields[visible[-1]].annotation
    return list(_literals(annotation))


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, UnionType):
        for branch in get_args(annotation):
            yield from _literals(branch)


def all_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """The full names of all keys of the schema; ``NAME`` stands for a name that is the user's own."""
    for name, field in section.model_fields.items():
        inner, named = _inside(field.annotation)
        if inner is not None:
            yield from all_keys(inner, f"{prefix}{name}.NAME." if named else f"{prefix}{name}.")
        else:
            yield prefix + name
