"""What a server that conducts a run and its clients tell each other between steps: plain values, as JSON.

A client says that it is ready, the server says what to do next. Whose turn it is, when everybody saves and where
somebody who was away goes on is the server's to decide; the tensors of a step travel as ever.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from flexp.errors import LinkError
from flexp.links.messages import Order, Ready

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
