"""What a server that conducts a run and its clients tell each other between steps: plain values, as JSON.

A client says that it is ready, the server says what to do next. Whose turn it is, when everybody saves and where
somebody who was away goes on is the server's to decide; the tensors of a step travel as ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from flexp.errors import LinkError

What = Literal["step", "evaluate", "save", "restore", "stop"]


@dataclass(frozen=True)
class Ready:
    """A client waits for its next order.

    Attributes:
        steps: that it has done in all.
        done: the place in the schedule that its last order named, and which is done; ``None``: it has just come.
        run: the run that its snapshots belong to; empty: it has none.
        snapshots: that it holds, by their numbers.
        saved: the steps that its newest snapshot has.
        facts: for the operator: losses, scores, seconds, bytes.
        planned: steps that the whole run has for it, by which its learning rate falls; 0: it does not fall.
    """

    steps: int
    done: int | None = None
    run: str = ""
    snapshots: tuple[int, ...] = ()
    saved: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    planned: int = 0


@dataclass(frozen=True)
class Order:
    """What a client does next.

    Attributes:
        what: ``step``: ``count`` steps. ``evaluate``: score the personal model after round ``number``. ``save``:
            keep a snapshot with that number. ``restore``: go back to that snapshot. ``stop``: the run is over.
        run: the run's name, the same after a restart of the server.
        place: in the schedule; the client's next :class:`Ready` says that it is done.
        save: with any order, first keep a snapshot with this number.
    """

    what: What
    run: str
    place: int = 0
    number: int = 0
    count: int = 1
    save: int | None = None


_READY = TypeAdapter(Ready)
_ORDER = TypeAdapter(Order)


def to_text(message: Ready | Order) -> str:
    """As JSON; numbers that are not finite become null."""
    return to_json(message, inf_nan_mode="null").decode()


def read_ready(text: str) -> Ready:
    """What :func:`to_text` made of a :class:`Ready`.

    Raises:
        LinkError: it is something else.
    """
    message: Ready = _read(_READY, text, "ready")
    return message


def read_order(text: str) -> Order:
    """What :func:`to_text` made of an :class:`Order`.

    Raises:
        LinkError: it is something else.
    """
    message: Order = _read(_ORDER, text, "order")
    return message


def _read(kind: TypeAdapter[Any], text: str, what: str) -> Any:
    try:
        said = from_json(text)
        if isinstance(said, dict) and isinstance(said.get("facts"), dict):
            said["facts"] = {name: value for name, value in said["facts"].items() if value is not None}
        return kind.validate_python(said)
    except (ValidationError, ValueError) as error:
        raise LinkError(f"a {what} message cannot be read ({str(error).splitlines()[0]})") from error
