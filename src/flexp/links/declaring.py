"""How a message is declared: its answer, and what the annotations of its fields say about tensors and numbers.

A field that holds tensors is ``Annotated[Tensor, …]`` (one, perhaps ``| None``), ``Annotated[tuple[Tensor, ...], …]``
(any number) or ``Annotated[dict[str, Tensor], …]`` (by name) with a :class:`Tensors`; every other field is a number, a
text or a configuration, which pydantic reads and bounds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from itertools import count, takewhile
from typing import (
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import to_json
from torch import Tensor

from flexp.errors import LinkError

Reply = TypeVar("Reply")
Declared = TypeVar("Declared")
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Tensors:
    """What a field's tensors may be.

    Attributes:
        shapes: one of these, a letter a dimension: B and T are those of the message's first tensor (of the request's,
            in an answer), H is the model's width, 1 is 1; b and t are those of its mask: B and T, unless B is 1 and T
            are the tokens under the mask (:mod:`flexp.links.packing`). None: tensors of any shape; floating-point ones,
            if ``dtype`` says nothing.
        dtype: their type; ``None``: the model's.
        codec: the key of ``link.codec`` that says in what form they cross; ``None``: they cross as they are.
        flags: zeros and ones of any type, which cross as one byte each.
    """

    shapes: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    codec: str | None = None
    flags: bool = False


MASK = Tensors(("bt",), flags=True)
POSITIONS = Tensors(("bt", "1t"), torch.int64)
ROWS = Tensors(("b",), torch.int64)
FLAGS = Tensors(("b",), flags=True)
WEIGHTS = Tensors(codec="weights")
INTEGERS = Tensors(dtype=torch.int64)


def hidden(codec: str | None = None) -> Tensors:
    """Activations or their gradients, (B, T, H)."""
    return Tensors(("BTH",), codec=codec)


class Request(Generic[Reply]):
    """What a client sends. The server answers it with a ``Reply``, or refuses it.

    Attributes:
        reply: the type of its answer.
        trains: whether the tensors of request and reply count as training's or evaluation's; ``None``: it has none.
        urgent: whether it leaves before requests that are not and have not begun to leave.
        waits: whether its answer may take as long as other clients do. It may be asked again meanwhile: the server then
            refuses the earlier one, and answers the later one.
    """

    reply: ClassVar[type[Any]]
    trains: ClassVar[bool | None] = None
    urgent: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        (cls.reply,) = get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]


MESSAGES: dict[str, type[Any]] = {}
"""All messages, by the names that they have in frames."""


@dataclass_transform(frozen_default=True)
def message(cls: type[Declared]) -> type[Declared]:
    """A frozen dataclass that crosses links."""
    made = dataclass(frozen=True)(cls)
    MESSAGES[made.__name__] = made
    return made


@dataclass(frozen=True)
class Entry:
    """A field with tensors; in a frame those of one field are ``FIELD``, or ``FIELD.0``, ``FIELD.1``, …, or
    ``FIELD.NAME``."""

    field: str
    tensors: Tensors
    holds: Literal["one", "many", "named"]
    needed: bool

    def split(self, value: Any) -> Iterator[tuple[str, Tensor]]:
        """The value of a message's field as the tensors of a frame."""
        if self.holds == "named":
            yield from ((f"{self.field}.{name}", each) for name, each in value.items())
        elif self.holds == "many":
            yield from ((f"{self.field}.{number}", each) for number, each in enumerate(value))
        elif value is not None:
            yield self.field, value

    def names(self, names: Collection[str]) -> list[str]:
        """Those of a frame's tensors that are this field's, without scales."""
        if self.holds == "named":
            return [name for name in names if name.startswith(f"{self.field}.")]
        if self.holds == "many":
            return list(takewhile(names.__contains__, (f"{self.field}.{number}" for number in count())))
        return [self.field] if self.field in names else []

    def join(self, given: Mapping[str, Tensor]) -> Any:
        """The value of the field, of its tensors by their names in the frame."""
        if self.holds == "named":
            return {name.removeprefix(f"{self.field}."): value for name, value in given.items()}
        return tuple(given.values()) if self.holds == "many" else next(iter(given.values()), None)


@dataclass(frozen=True)
class Declaration:
    """What a type of message has declared: ``entries`` with tensors, and ``scalars``."""

    name: str
    entries: tuple[Entry, ...]
    scalars: dict[str, TypeAdapter[Any]]

    def texts(self, said: Any) -> dict[str, str]:
        """The scalars of a message, as JSON each; numbers that are not finite are NaN, Infinity and -Infinity."""
        return {name: to_json(getattr(said, name), inf_nan_mode="constants").decode() for name in self.scalars}

    def values(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """What :meth:`texts` made texts of.

        Raises:
            LinkError: one is missing or unknown, or is not within its bounds.
        """
        odd = sorted(texts.keys() ^ self.scalars.keys())
        if odd:
            raise LinkError(f"{self.name} cannot be read: {odd[0]} is missing or unknown")
        try:
            return {name: form.validate_json(texts[name], strict=True) for name, form in self.scalars.items()}
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or error.title
            raise LinkError(f"{self.name} cannot be read: {where}: {first['msg']}") from error


def tensors(said: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a message, with the name of its field (and, of weights, its own)."""
    for entry in declared(type(said)).entries:
        for name, value in entry.split(getattr(said, entry.field)):
            yield entry.field if entry.holds == "many" else name, value


def size(said: Any) -> int:
    """The bytes of a message's tensors, as they cross without a codec (:meth:`flexp.links.coding.Coding.size`)."""
    return sum(
        value.numel() * (1 if entry.tensors.flags else value.element_size())  # flags cross as one byte each
        for entry in declared(type(said)).entries
        for _, value in entry.split(getattr(said, entry.field))
    )


def declared(kind: type[Any]) -> Declaration:
    """The declaration of a type of message."""
    if kind not in _declared:
        _declared[kind] = _read(kind)
    return _declared[kind]


_declared: dict[type[Any], Declaration] = {}


def _read(kind: type[Any]) -> Declaration:
    hints = get_type_hints(kind, include_extras=True)
    entries, scalars = [], {}
    for item in fields(kind):
        hint = hints[item.name]
        tensors = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Tensors)), None)
        if tensors is None:
            scalars[item.name] = TypeAdapter(hint)
            continue
        holds: Any = {tuple: "many", dict: "named"}.get(get_origin(get_args(hint)[0]), "one")
        optional = item.default is not MISSING or item.default_factory is not MISSING
        entries.append(Entry(item.name, tensors, holds, not optional))
    return Declaration(kind.__name__, tuple(entries), scalars)
