"""What a folder says of itself besides its configuration: whose it is, what using it needs besides, and whether a run
may go on from it: with the same data only, and for as long as its learning rate allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexp.client.meeting import Meets
from flexp.config import RunConfig
from flexp.data.split import Identity, check_same, identity, of_client
from flexp.data.types import ClientData, Federation
from flexp.errors import ConfigError, StorageError
from flexp.files import check_free, read_json, write_json
from flexp.report.summary import UNKNOWN
from flexp.run.store import CHECKPOINTS, SNAPSHOTS, Store

FILE = "client.json"
SCHEMA = 1
JOINED = "join.json"
"""In the folder of a client that joined a run later: its name, and the labels of the earlier run."""
JOINED_SCHEMA = 1
AUDIT = "audit.json"
"""What an audit found, in the folder of a run or of a client."""


def is_client(folder: Path) -> bool:
    """Whether ``folder`` is what ``flexp client`` leaves."""
    return (folder / FILE).is_file()


def check_state(folder: Path, *, server: bool) -> None:
    """Refuse, before anything is written, to keep a server's state where a client's is, or the other way round.

    Raises:
        ConfigError: see above.
    """
    if server:
        if folder.is_file():
            return  # what an older version kept, which says so itself
        check_free(folder, (FILE, "config.json", "metrics.jsonl", SNAPSHOTS), "a server", "--state")
    elif not is_client(folder):
        checkpoints = sorted(found.name for found in folder.glob("checkpoint-*"))[:1]
        taken = ("config.json", "metrics.jsonl", "run.json", "sums", *checkpoints)
        check_free(folder, taken, "a client", "--state")


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


MEND = (
    "going on could test with what was trained on: put the data back as they were, or start a new run (flexp join lets "
    "a newcomer in)"
)


def data_of(federation: Federation) -> Identity:
    """Every client's split, as a checkpoint knows it."""
    return identity(federation.clients, federation.task.label_names)


def saved_facts(run: Path) -> dict[str, Any]:
    """What the last checkpoint of the run in ``run`` says of itself; nothing, where there is none.

    Raises:
        StorageError: its index is damaged.
    """
    store = Store(run / CHECKPOINTS)
    numbers = store.numbers()
    return {**store.open(numbers[-1]).facts, "number": numbers[-1]} if numbers else {}


def check_scored(run: Path, saved: Mapping[str, Any], federation: Federation, client: str | None = None) -> None:
    """Refuse to score models on a run's own test data where these are others than in training.

    Args:
        saved: the facts of the checkpoint that the models are from, or :func:`saved_facts`.
        client: whose data are looked at; ``None``: everybody's.

    Raises:
        DataError: see above.
    """
    then, now = saved.get("data"), data_of(federation)
    if client is not None:
        then, now = of_client(then, client), of_client(now, client) or now
    mend = "what was trained on could be tested on: put the data back as they were, or score on a file with --data"
    check_same(then, now, run, mend)


def check_length(config: RunConfig, saved: Mapping[str, Any], run: Path) -> None:
    """See that a run may have so many rounds, going by what :func:`saved_facts` found.

    Raises:
        ConfigError: it had more already; its learning rate falls to the end that was planned; or its clients have met
            for the last time.
    """
    train = config.train
    planned = saved.get("rounds", train.rounds)
    if train.rounds < saved.get("number", 0):
        raise ConfigError(
            f"{run}: train.rounds = {train.rounds} is less than the {saved['number']} rounds that are done; say more"
        )
    falling = [side for side in ("personal", "shared") if getattr(train, side).schedule != "constant"]
    if train.rounds != planned and falling:
        raise ConfigError(
            f"{run}: train.{falling[0]}.schedule lets the learning rate fall until round {planned}, so the run cannot "
            f"have {train.rounds} rounds: start a new one"
        )
    if train.rounds != planned == saved.get("number") and Meets.of(config).last:
        raise ConfigError(
            f"{run}: its clients have met after round {planned}, the last (method.meet), so the run cannot have "
            f"{train.rounds} rounds: start a new one (with method.meet.on = false it stays open)"
        )


def said(folder: Path) -> str | None:
    """What the server can read, as an audit in ``folder`` says; ``None``: there was none."""
    return str(read_json(folder / AUDIT)["line"]) if (folder / AUDIT).is_file() else None


def told(folder: Path) -> str:
    """The line of a client's summary."""
    return f"what the server can read: {said(folder) or f'{UNKNOWN} (privacy.audit = true)'}"
