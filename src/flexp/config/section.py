"""What a table of the schema is, and what is said of one that is wrong: which key, which value, what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticKnownError

from flexp.errors import ConfigError
from flexp.registry import Registry

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
Bytes = Annotated[int, Field(gt=0, lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what torch takes


class Section(BaseModel):
    """A table of the file: immutable, and closed to keys that it does not name and to values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @classmethod
    def holds(cls) -> dict[str, Any]:
        """Every key of the table, with the type of what it holds."""
        return {name: field.annotation for name, field in cls.model_fields.items()}

    @classmethod
    def checked(cls, content: Any, where: str, table: str = "") -> Self:
        """This table from ``content``, which came from ``where`` and is called ``table`` there.

        Raises:
            ConfigError: a key is unknown, of the wrong type or impossible; the message names it.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problems = error.errors()
            # Where a word or something else would do, and something else is wrong, the latter is what is reported.
            words = [item["type"] == "literal_error" and not isinstance(item["input"], str) for item in problems]
            first = problems[words.index(False) if False in words else 0]
            raise ConfigError(f"{where}: {_explain(cls, first, f'{table}.' if table else '')}") from error


def _two(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{value!r} is not allowed: expected two numbers, [a, b]")
    return tuple(value)


PAIR = BeforeValidator(_two)
"""What makes a tuple of an array of two."""


def named(registry: Registry, *others: str) -> AfterValidator:
    """What makes a ``str`` the name of a component, or one of the ``others``, which are no components."""

    def check(name: str) -> str:
        if name not in others and name not in registry:
            *most, last = map(repr, (*others, *registry))
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(most)} or {last}"})
        return name

    return AfterValidator(check)


def all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The full names of all keys of a table; ``NAME`` stands for a name that is the user's own."""
    for name, annotation in section.holds().items():
        inner, by_name = _inside(annotation)
        if inner is not None:
            yield from all_keys(inner, f"{prefix}{name}.NAME." if by_name else f"{prefix}{name}.")
        else:
            yield prefix + name


def _explain(root: type[Section], problem: Mapping[str, Any], prefix: str) -> str:
    fields = [part for part in problem["loc"] if isinstance(part, str)]
    key = prefix + ".".join(_visible(root, fields))
    if problem["type"] == "extra_forbidden":
        known = sorted(_table(root, fields[:-1]).holds())
        near = difflib.get_close_matches(fields[-1], known, n=1, cutoff=0.5)
        elsewhere = [path for path in all_keys(root) if path.rpartition(".")[2] == fields[-1]]
        if not near and elsewhere:
            return f"unknown key {key}; did you mean {prefix}{elsewhere[0]}?"
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {key}; {hint}known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"the key {key} is missing"
    if problem["type"] == "value_error":
        key = key.removesuffix(".")
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}"
    value, key = problem["input"], key.removesuffix(".")
    message = problem["msg"].removeprefix("Input should be ")
    if problem["type"] == "too_short":
        message = f"{problem['ctx']['min_length']} or more entries"
    if problem["type"] == "model_type":
        message = "a table"
    near_value = ""
    if problem["type"] == "literal_error" and isinstance(value, str):
        allowed = re.findall("'([^']*)'", problem["ctx"]["expected"])
        close = difflib.get_close_matches(value, allowed, n=1, cutoff=0.4)
        near_value = f"; did you mean {close[0]!r}?" if close else ""
    return f"{key} = {value!r} is not allowed: expected {message}{near_value}"


def _visible(root: type[Section], fields: Iterable[str]) -> Iterator[str]:
    """Without the names that pydantic gives to the branches of a union."""
    section: type[Section] | None = root
    named = False
    for name in fields:
        if named:  # of a table whose keys are the user's own names
            named = False
            yield name
        elif section is not None:
            yield name
            section, named = _inside(section.holds().get(name))


def _table(root: type[Section], fields: Iterable[str]) -> type[Section]:
    section = root
    names = iter(fields)
    for name in names:
        found, named = _inside(section.holds()[name])
        assert found is not None
        section = found
        if named:
            next(names, None)
    return section


def _inside(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a key holds, if it is one (or none); and whether it is a table of such sections by name."""
    for branch in (annotation, *get_args(annotation)):
        if isinstance(branch, type) and issubclass(branch, Section):
            return branch, get_origin(annotation) is dict
    return None, False
