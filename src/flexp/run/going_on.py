"""Whether a run may go on from what was saved: with the same data only, and for as long as its learning rate allows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexp.client.meeting import Meets
from flexp.config import RunConfig
from flexp.data.identity import Identity, check_same, identity, of_client
from flexp.data.types import Federation
from flexp.errors import ConfigError
from flexp.run.store import CHECKPOINTS, Store

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
            f"{train.rounds} rounds: start a new one"
        )
