"""Who owns which row, and who is tested on which: what all partitioners (:mod:`flexp.data.partitioners`) share.

Where rows are grouped, whole groups are dealt out towards what would hold without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flexp.config import ClientsConfig
from flexp.data.columns import nearest
from flexp.data.grouping import deal
from flexp.errors import ConfigError, DataError
from flexp.registry import PARTITIONERS
from flexp.rng import generator


@dataclass(frozen=True)
class Partition:
    """Every client's row numbers, by name in the clients' order; no row has two owners."""

    clients: dict[str, list[int]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """What partitioners look at, one entry per row; None where it does not exist."""

    count: int
    labels: Sequence[str] | None = None
    owners: Sequence[str] | None = None  # of the column or the file
    lengths: Sequence[int] | None = None
    groups: Sequence[str] | None = None  # rows of a group go to one client
    kinds: Sequence[str] | None = None  # what dirichlet and pathological divide by, if not the labels


def partition(facts: Facts, config: ClientsConfig, seed: int) -> Partition:
    """Divide rows 0 ... ``facts.count`` - 1 among clients.

    Groups stay whole, except where clients are natural and a group has rows of two: the data says so itself.

    Raises:
        ConfigError: the settings do not fit together, or the task has not what the partitioner needs.
        DataError: the data cannot be divided that way.
    """
    how = partitioner(config)
    if config.over is not None and not how.kinds and not how.natural:
        raise ConfigError(
            f'data.clients.over is for by = "dirichlet" or "pathological", not for "{config.by}"; remove it'
        )
    if how.by_label and facts.labels is None and facts.kinds is None:
        raise ConfigError(
            f'data.clients.by = "{config.by}" divides by labels, but the task has none; name a column with '
            "data.clients.over, or use column, iid, size or length"
        )
    if how.owners is not None:
        return _select(how.divide(facts, config, seed), config)
    if config.names is not None:
        raise ConfigError(
            f'data.clients.names is for by = "column", "file" or "skew", not for "{config.by}"; remove it'
        )
    return how.divide(facts, config, seed)


def partition_test(train: Partition, facts: Facts, test: Facts, config: ClientsConfig, seed: int) -> Partition:
    """Divide the rows of a separate test source among the clients of ``train``, so that each is tested on its own kind.

    Natural clients, ``length`` and ``skew`` apply the same rule again; for the others every label's test rows are
    dealt out in proportion to the clients' training rows of that label (or of that value of ``over``).
    """
    if partitioner(config).again:
        again = partition(test, config.model_copy(update={"names": None}), seed)
        strangers = [name for name in again.clients if name not in train.clients]
        notes = [f"test rows of {', '.join(strangers)} are not used: no such client"] if strangers else []
        return Partition({name: again.clients.get(name, []) for name in train.clients}, again.notes + notes)
    labels: Sequence[Hashable] = facts.kinds or facts.labels or [0] * facts.count
    test_labels: Sequence[Hashable] = test.kinds or test.labels or [0] * test.count
    clients: dict[str, list[int]] = {name: [] for name in train.clients}
    left_out = 0
    for label in sorted(set(test_labels), key=str):
        shares = [sum(labels[row] == label for row in rows) for rows in train.clients.values()]
        order = [row for row in range(test.count) if test_labels[row] == label]
        order = [order[i] for i in generator(seed, "partition-test", str(label)).permutation(len(order))]
        if sum(shares) == 0:
            left_out += len(order)
            continue
        bounds = [round(len(order) * sum(shares[: k + 1]) / sum(shares)) for k in range(len(shares))]
        for name, start, stop in zip(clients, [0, *bounds], bounds, strict=False):
            clients[name] += order[start:stop]
    if test.groups is not None:
        clients = dict(zip(clients, regrouped(list(clients.values()), test, config, seed), strict=True))
    notes = [f"{left_out} test rows are not used: no client has their labels"] if left_out else []
    return Partition({name: sorted(rows) for name, rows in clients.items()}, notes)


class Partitioner:
    """A way to divide rows among clients; another package may add one (:mod:`flexp.registry`).

    Attributes:
        owners: where the rows' owners are read: in the column ``data.clients.column``, or the file that a row is in.
        natural: the clients are those owners, whatever their rows.
        by_label: it needs labels, or, with ``kinds``, another column in their place (``data.clients.over``).
        lengths: it needs the length of every row's text.
        again: it divides a separate test source by the same rule; else test rows follow the training rows' labels.
        exclusive: rows whose label is none of the client's are left out where whole groups are dealt.
    """

    name: ClassVar[str]
    owners: ClassVar[Literal["column", "file"] | None] = None
    natural: ClassVar[bool] = False
    by_label: ClassVar[bool] = False
    kinds: ClassVar[bool] = False
    lengths: ClassVar[bool] = False
    again: ClassVar[bool] = False
    exclusive: ClassVar[bool] = False

    def divide(self, facts: Facts, config: ClientsConfig, seed: int) -> Partition:
        """See :func:`partition`."""
        raise NotImplementedError

    def least(self, config: ClientsConfig) -> int:
        """The smallest admissible client."""
        return 1


def partitioner(config: ClientsConfig) -> Partitioner:
    """The partitioner that ``config`` names.

    Raises:
        ConfigError: there is none of that name, or it cannot be imported.
    """
    how: Partitioner = PARTITIONERS[config.by]()
    return how


def _select(made: Partition, config: ClientsConfig) -> Partition:
    if config.names is None:
        return made
    if len(set(config.names)) < len(config.names):
        raise ConfigError("data.clients.names names a client twice; remove one")
    for name in config.names:
        if name not in made.clients:
            listed = ", ".join(list(made.clients)[:12]) + (" ..." if len(made.clients) > 12 else "")
            where = f"column {config.column!r}" if partitioner(config).owners == "column" else "the folder"
            raise DataError(
                f"client {name!r} of data.clients.names is empty: {where} has 0 rows of it; "
                f"there are {listed}{nearest(name, made.clients)}"
            )
    return Partition({name: made.clients[name] for name in config.names}, made.notes)


def regrouped(owned: list[list[int]], facts: Facts, config: ClientsConfig, seed: int) -> list[list[int]]:
    """The rows of ``owned`` divided anew: whole groups, and nearly as many rows of every label for every client.

    ``length`` aims at the very rows instead; ``pathological`` leaves out rows whose label is none of the client's.
    """
    assert facts.groups is not None
    kinds: Sequence[Hashable] = facts.kinds or facts.labels or [0] * facts.count
    how = partitioner(config)
    if how.lengths:
        owner = {row: client for client, rows in enumerate(owned) for row in rows}
        kinds = [owner.get(row) for row in range(facts.count)]
    wanted = [dict(Counter(kinds[row] for row in rows)) for rows in owned]
    rng = generator(seed, "partition-groups", config.by)
    made = deal([row for rows in owned for row in rows], facts.groups, kinds, wanted, rng)
    if how.exclusive:
        made = [[row for row in rows if kinds[row] in part] for rows, part in zip(made, wanted, strict=True)]
    least = how.least(config)
    if any(len(rows) < min(least, len(before)) for rows, before in zip(made, owned, strict=True)):
        raise DataError(
            f'data.clients.by = "{config.by}" cannot divide whole groups (data.group) among {len(owned)} clients; '
            "lower data.clients.count"
        )
    return made
