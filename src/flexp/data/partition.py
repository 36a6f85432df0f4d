"""Who owns which row: natural clients, and partitioners that make heterogeneous clients of any data.

IID, Dirichlet (Yurochkin et al., 2019, arXiv 1905.12022), pathological (Li et al., 2021, arXiv 2102.02079) and
by size are those of ``flwr-datasets``; ``length`` deals out texts sorted by length; ``skew`` makes pairs of clients
with opposite label proportions. Where rows are grouped, whole groups are dealt out towards what would hold without.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from flexp.config import ClientsConfig
from flexp.data.columns import nearest, sort_labels
from flexp.data.grouping import deal
from flexp.data.ordering import generator
from flexp.data.split import stratified_order
from flexp.errors import ConfigError, DataError
from flexp.registry import PARTITIONERS


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
        clients = dict(zip(clients, _regrouped(list(clients.values()), test, config, seed), strict=True))
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


class Column(Partitioner):
    """A column names each row's client."""

    name = "column"
    owners: ClassVar[Literal["column", "file"] | None] = "column"
    natural = True
    again = True

    def divide(self, facts: Facts, config: ClientsConfig, seed: int) -> Partition:
        return Partition(_owned(facts))


class File(Column):
    """Every file is a client."""

    name = "file"
    owners = "file"


class Skew(Partitioner):
    """Two equally large clients for each value of a column, with opposite label proportions."""

    name = "skew"
    owners = "column"
    by_label = True
    again = True

    def divide(self, facts: Facts, config: ClientsConfig, seed: int) -> Partition:
        return _skewed(facts, config.skew, seed)


class Counted(Partitioner):
    """``data.clients.count`` clients of no name of their own, divided by a partitioner of flwr-datasets.

    Attributes:
        mend: what helps where the data cannot be divided that way.
    """

    mend: ClassVar[str] = "lower data.clients.count"

    def make(self, flwr: Any, config: ClientsConfig, draw: int) -> Any:
        """A partitioner of ``flwr_datasets.partitioner``, for columns ``row`` and ``kind``; ``draw`` is its seed."""
        raise NotImplementedError

    def divide(self, facts: Facts, config: ClientsConfig, seed: int) -> Partition:
        count = config.count
        if count is None:
            raise ConfigError(f'data.clients.by = "{self.name}" needs data.clients.count, the number of clients')
        if count > facts.count:
            raise DataError(f"{facts.count} rows cannot be divided among {count} clients; lower data.clients.count")
        width = len(str(count))
        names = [f"client-{number:0{width}d}" for number in range(1, count + 1)]
        owned = _partitioned(self, facts, config, count, seed)
        if facts.groups is not None:
            owned = _regrouped(owned, facts, config, seed)
        unused = facts.count - sum(map(len, owned))
        notes = [f"{unused} of {facts.count} rows are not used: their labels fell to no client"] if unused else []
        return Partition(dict(zip(names, owned, strict=True)), notes)


class Iid(Counted):
    """Rows at random, equally many each."""

    name = "iid"

    def make(self, flwr: Any, config: ClientsConfig, draw: int) -> Any:
        return flwr.IidPartitioner(config.count)


class Length(Iid):
    """Texts sorted by their length."""

    name = "length"
    lengths = True
    again = True


class Size(Counted):
    """Client k has k times as many rows as the first."""

    name = "size"

    def make(self, flwr: Any, config: ClientsConfig, draw: int) -> Any:
        return flwr.LinearPartitioner(config.count)


class Dirichlet(Counted):
    """Shares of every label drawn from a Dirichlet distribution (Yurochkin et al., 2019, arXiv 1905.12022)."""

    name = "dirichlet"
    by_label = True
    kinds = True
    mend = "raise data.clients.alpha, or lower min_examples or count"

    def least(self, config: ClientsConfig) -> int:
        return config.min_examples

    def make(self, flwr: Any, config: ClientsConfig, draw: int) -> Any:
        return flwr.DirichletPartitioner(
            config.count, "kind", config.alpha, min_partition_size=config.min_examples, seed=draw
        )


class Pathological(Counted):
    """So many labels for every client (Li et al., 2021, arXiv 2102.02079)."""

    name = "pathological"
    by_label = True
    kinds = True
    exclusive = True
    mend = "lower count or classes"

    def make(self, flwr: Any, config: ClientsConfig, draw: int) -> Any:
        return flwr.PathologicalPartitioner(
            config.count, "kind", config.classes, class_assignment_mode="first-deterministic", seed=draw
        )


def _owned(facts: Facts) -> dict[str, list[int]]:
    assert facts.owners is not None
    clients: dict[str, list[int]] = {name: [] for name in sort_labels(facts.owners)}
    for row, group in enumerate(facts.owners):
        clients[group].append(row)
    return clients


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


def _skewed(facts: Facts, skew: float, seed: int) -> Partition:
    """Two equally large clients for each group: shares ``skew`` and 1 - ``skew`` of the halves of the label list."""
    assert facts.labels is not None
    names = sort_labels(facts.labels)
    first = set(names[: (len(names) + 1) // 2])
    clients: dict[str, list[int]] = {}
    notes = []
    for group, rows in _owned(facts).items():
        halves = [[r for r in rows if facts.labels[r] in first], [r for r in rows if facts.labels[r] not in first]]
        size = min(map(len, halves))
        many = round(skew * size)
        if size == 0:
            raise DataError(
                f'data.clients.by = "skew": {group!r} has {len(halves[0])} rows of the labels {_few(first)} and '
                f"{len(halves[1])} of the others; both kinds are needed: leave it out with another data.clients.column"
            )
        if facts.groups is not None:
            a, b = _skewed_groups(halves, facts, skew, group, seed)
            size = len(a)
        else:
            first_half, second_half = (
                _drawn(half, size, facts.labels, generator(seed, "skew", group, k)) for k, half in enumerate(halves)
            )
            a, b = first_half[:many] + second_half[: size - many], first_half[many:] + second_half[size - many :]
        clients[f"{group}-a"], clients[f"{group}-b"] = sorted(a), sorted(b)
        if 2 * size < len(rows):
            notes.append(
                f"{group}: {2 * size} of {len(rows)} rows are used, so that both of its clients are skewed alike"
            )
    return Partition(clients, notes)


def _skewed_groups(
    halves: list[list[int]], facts: Facts, skew: float, owner: str, seed: int
) -> tuple[list[int], list[int]]:
    """The two clients of ``owner``: each has groups of its own, and as many of their rows as give the exact shares."""
    labels, groups = facts.labels, facts.groups
    assert labels is not None
    assert groups is not None
    counts = [Counter(labels[row] for row in half) for half in halves]
    wanted: list[dict[Hashable, float]] = [
        {label: share * count for share, half in zip(pair, counts, strict=True) for label, count in half.items()}
        for pair in ((skew, 1 - skew), (1 - skew, skew))
    ]
    dealt = deal([*halves[0], *halves[1]], groups, labels, wanted, generator(seed, "skew-groups", owner))
    first = set(counts[0])
    owned = [[[r for r in part if (labels[r] in first) == low] for low in (True, False)] for part in dealt]
    size = min(map(len, dealt))
    while True:
        many = round(skew * size)
        sizes = [[many, size - many], [size - many, many]]
        if all(len(rows) >= n for part, ns in zip(owned, sizes, strict=True) for rows, n in zip(part, ns, strict=True)):
            break
        size -= 1
    if size == 0:
        raise DataError(
            f'data.clients.by = "skew": the data.group column ties the rows of {owner!r} together so that it cannot be '
            "divided; leave it out with data.clients.names, or lower data.clients.skew"
        )
    made = [
        [row for k, rows in enumerate(part) for row in _drawn(rows, ns[k], labels, generator(seed, "skew", name, k))]
        for name, part, ns in zip((f"{owner}-a", f"{owner}-b"), owned, sizes, strict=True)
    ]
    return made[0], made[1]


def _drawn(rows: list[int], count: int, labels: Sequence[str], rng: np.random.Generator) -> list[int]:
    order = stratified_order([labels[row] for row in rows], rng)
    return [rows[index] for index in order[:count]]


def _regrouped(owned: list[list[int]], facts: Facts, config: ClientsConfig, seed: int) -> list[list[int]]:
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


def _partitioned(how: Counted, facts: Facts, config: ClientsConfig, count: int, seed: int) -> list[list[int]]:
    """Row numbers per client by a partitioner of flwr-datasets, which sees row numbers and label numbers only."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    import datasets
    from flwr_datasets import partitioner as flwr

    order = [int(row) for row in generator(seed, "partition", config.by).permutation(facts.count)]
    if how.lengths:
        lengths = facts.lengths
        if lengths is None:
            raise ConfigError(
                f'data.clients.by = "{how.name}" needs texts, but the task has none; use another partitioner'
            )
        order.sort(key=lambda row: lengths[row])  # stable: equal lengths stay in random order
    columns: dict[str, Any] = {"row": order}
    kinds = facts.kinds if facts.kinds is not None else facts.labels
    if kinds is not None:
        number = {kind: index for index, kind in enumerate(sort_labels(kinds))}
        columns["kind"] = [number[kinds[row]] for row in order]
    dataset = datasets.Dataset.from_dict(columns)
    reason = ""
    for attempt in range(20):  # a draw may be impossible where the next one is not
        draw = int(generator(seed, "partition", config.by, attempt).integers(2**31))
        made = how.make(flwr, config, draw)
        made.dataset = dataset
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said in the notes, or in the error
                return [sorted(made.load_partition(k)["row"]) for k in range(count)]
        except ValueError as error:
            reason = re.sub(r"\s+", " ", str(error)).split(". ")[0].strip(". ")
            continue
    raise DataError(
        f'data.clients.by = "{how.name}" cannot divide {facts.count} rows among {count} clients ({reason}); {how.mend}'
    )


def _few(labels: set[str]) -> str:
    ordered = sort_labels(labels)
    return ", ".join(ordered[:4]) + (" ..." if len(ordered) > 4 else "")
