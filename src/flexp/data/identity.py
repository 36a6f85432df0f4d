"""Which examples a client trains on and which it is tested with, in a few bytes: so that whoever goes on with a run
notices that its data are others now, before anything that was trained on becomes a test example."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from flexp.data.types import ClientData, Example
from flexp.errors import DataError

Identity = dict[str, Any]
"""JSON: the classes, and of every client and each of its sets the number of examples and a SHA-256 over them."""

SETS = ("train", "validation", "test")
_MOST = 4  # differences that a message names


def identity(clients: Iterable[ClientData], labels: Sequence[str] | None) -> Identity:
    """What :func:`check_same` compares.

    Args:
        labels: the classes, in their order.
    """
    return {
        "labels": None if labels is None else list(labels),
        "clients": {
            client.name: {name: [len(examples), _digest(examples)] for name, examples in _sets(client)}
            for client in clients
        },
    }


def of_client(found: Identity | None, client: str) -> Identity | None:
    """The part of it that is one client's; ``None``: there is none."""
    if found is None or client not in found["clients"]:
        return None
    return {**found, "clients": {client: found["clients"][client]}}


def check_same(then: Identity | None, now: Identity, where: object, mend: str, what: str = "run") -> None:
    """Refuse data that are not those of ``then``; ``None``: nobody knows what they were.

    Args:
        where: what was saved with them.
        mend: what to do about it.
        what: it was.

    Raises:
        DataError: see above; it names what is different.
    """
    found = [] if then is None else differences(then, now)
    if found:
        more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise DataError(f"{where}: the data are not those of the {what}: {'; '.join(found[:_MOST])}{more}; {mend}")


def differences(then: Identity, now: Identity) -> list[str]:
    """What is different now, in words."""
    found = []
    if then["labels"] != now["labels"]:
        found.append(f"the labels are {_listed(now['labels'])}, they were {_listed(then['labels'])}")
    before, after = then["clients"], now["clients"]
    found += [f"client {name} is new" for name in after if name not in before]
    found += [f"client {name} is gone" for name in before if name not in after]
    for name in (name for name in after if name in before):
        for key in SETS:
            (was, digest), (count, other) = before[name][key], after[name][key]
            if was != count:
                found.append(f"{name} has {count} {key} examples, it had {was}")
            elif digest != other:
                found.append(f"{name} has other {key} examples (or in another order), {count} as before")
    return found


def _sets(client: ClientData) -> Iterable[tuple[str, list[Example]]]:
    return zip(SETS, (client.train, client.validation, client.test), strict=True)


def _digest(examples: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, default=_plain).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _plain(value: Any) -> Any:
    """A tensor (or an array) as its type, shape and the SHA-256 of its bytes."""
    tensor = torch.as_tensor(value).contiguous()
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()]


def _listed(labels: Sequence[str] | None) -> str:
    return "none" if labels is None else ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
