"""Natural clients, and partitioners that make heterogeneous clients of any data: one class each, found by its name.

Dirichlet (Yurochkin et al., 2019, arXiv 1905.12022), pathological (Li et al., 2021, arXiv 2102.02079) and by size are
those of ``flwr-datasets``; ``length`` deals out texts sorted by length; ``skew`` makes pairs of clients with opposite
label proportions.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from flexp.config import ClientsConfig
from flexp.data.columns import sort_labels
from flexp.data.grouping import deal
from flexp.data.partition import Facts, Partition, Partitioner, regrouped
from flexp.data.split import stratified_order
from flexp.errors import ConfigError, DataError
from flexp.rng import generator


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

    def parts(self, order: list[int], facts: Facts, config: ClientsConfig, seed: int) -> list[list[int]]:
        """The rows of each client, out of all in this order."""
        return _partitioned(self, order, facts, config, seed)

    def divide(self, facts: Facts, config: ClientsConfig, seed: int) -> Partition:
        count = config.count
        if count is None:
            raise ConfigError(f'data.clients.by = "{self.name}" needs data.clients.count, the number of clients')
        if count > facts.count:
            raise DataError(f"{facts.count} rows cannot be divided among {count} clients; lower data.clients.count")
        width = len(str(count))
        names = [f"client-{number:0{width}d}" for number in range(1, count + 1)]
        owned = self.parts(_order(self, facts, seed), facts, config, seed)
        if facts.groups is not None:
            owned = regrouped(owned, facts, config, seed)
        unused = facts.count - sum(map(len, owned))
        notes = [f"{unused} of {facts.count} rows are not used: their labels fell to no client"] if unused else []
        return Partition(dict(zip(names, owned, strict=True)), notes)


class Iid(Counted):
    """Rows at random, equally many each."""

    name = "iid"

    def parts(self, order: list[int], facts: Facts, config: ClientsConfig, seed: int) -> list[list[int]]:
        # As IidPartitioner; its package imports seaborn and scipy.stats, three seconds of processor at every start.
        return [sorted(map(int, part)) for part in np.array_split(order, config.count or 1)]


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


def _order(how: Counted, facts: Facts, seed: int) -> list[int]:
    """All rows at random, or by their length."""
    order = [int(row) for row in generator(seed, "partition", how.name).permutation(facts.count)]
    if how.lengths:
        lengths = facts.lengths
        if lengths is None:
            raise ConfigError(
                f'data.clients.by = "{how.name}" needs texts, but the task has none; use another partitioner'
            )
        order.sort(key=lambda row: lengths[row])  # stable: equal lengths stay in random order
    return order


def _partitioned(how: Counted, order: list[int], facts: Facts, config: ClientsConfig, seed: int) -> list[list[int]]:
    """Row numbers per client by a partitioner of flwr-datasets, which sees row numbers and label numbers only."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    import datasets
    from flwr_datasets import partitioner as flwr

    count = config.count or 1
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
