"""What a folder says of itself besides its configuration: whose it is, and what using it needs besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexp.data.types import ClientData, Federation
from flexp.errors import StorageError
from flexp.files import read_json, write_json

FILE = "client.json"
SCHEMA = 1
JOINED = "join.json"
"""In the folder of a client that joined a run later: its name, and the labels of the earlier run."""
JOINED_SCHEMA = 1


def is_client(folder: Path) -> bool:
    """Whether ``folder`` is what ``flexp client`` leaves."""
    return (folder / FILE).is_file()


def is_joined(folder: Path) -> bool:
    """Whether ``folder`` is a run of one client that joined another run (``flexp join``)."""
    return (folder / JOINED).is_file()


def write_facts(folder: Path, client: ClientData, federation: Federation, cut: tuple[int, int]) -> None:
    """Write :data:`FILE`: whose folder it is, the cut, the task's labels, and how many examples there are."""
    task = federation.task
    facts = {
        "schema": SCHEMA,
        "client": client.name,
        "cut": list(cut),
        "kind": task.model_kind,
        "labels": task.label_names,
        "metric": task.metric,
        "train_examples": len(client.train),
        "test_examples": len(client.test),
    }
    write_json(folder / FILE, facts)


def read_facts(folder: Path) -> dict[str, Any]:
    """What :func:`write_facts` wrote.

    Raises:
        StorageError: it is not there, damaged, or of another version.
    """
    facts = read_json(folder / FILE)
    needed = ("client", "cut", "kind", "labels", "metric", "train_examples", "test_examples")
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA or any(key not in facts for key in needed):
        raise StorageError(
            f"{folder / FILE} is not what this FlexP writes; start flexp client there again, it mends it"
        )
    return facts
