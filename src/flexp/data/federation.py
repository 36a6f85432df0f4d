"""From the configuration to every client's encoded examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexp.config import DataConfig
from flexp.data.columns import as_text, check_known, check_present, classes_of, settled, written_gaps
from flexp.data.grouping import check_apart, check_whole
from flexp.data.partition import Facts, Partition, partition, partition_test, partitioner
from flexp.data.sources import Rows, read_rows, split_for_tests
from flexp.data.split import Split, split_client
from flexp.data.tasks import limit_of, make_task, task_of
from flexp.data.types import ClientData, Example, Federation, Task
from flexp.data.warnings import alike, cut_note, warnings_of
from flexp.errors import DataError


def load_federation(
    config: DataConfig,
    processor: Any,
    seed: int,
    max_positions: int | None,
    head: Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> Federation:
    """Read, check, divide and encode the data of all clients.

    Equal arguments give equal examples. The test examples do not depend on ``train_examples``.

    Args:
        config: the run's ``data`` section; its own seed goes before ``seed``.
        processor: the model's tokenizer, or its image processor.
        max_positions: the longest input of the model in tokens, if it has one.
        head: the classes of the classifier that the pretrained model brings, if it brings one.
        labels: the model's classes, where they are settled; the data may have fewer, but no others.

    Raises:
        ConfigError: settings that do not fit together.
        DataError: the data does not hold what the settings say; the message names the place.
        AssetError: a named asset cannot be had.
    """
    seed = seed if config.seed is None else config.seed
    limit = limit_of(config, max_positions)
    source = _Source(config, config.source, config.split)
    made = partition(source.facts, config.clients, seed)
    notes = [*source.rows.notes, *source.doubts, *made.notes]
    tests: Partition | None = None
    test_source = source
    if config.test_source is not None:
        test_source = _Source(config, config.test_source, split_for_tests(config.test_source))
        tests = partition_test(made, source.facts, test_source.facts, config.clients, seed)
        notes += [*test_source.rows.notes, *test_source.doubts, *tests.notes]
    if source.facts.groups is not None:
        check_whole(made.clients, source.facts.groups)
        if tests is not None and test_source.facts.groups is not None:
            check_whole(tests.clients, test_source.facts.groups)
            check_apart(made.clients, source.facts.groups, tests.clients, test_source.facts.groups)
    splits = {name: _split(name, config, source, rows, test_source, tests, seed) for name, rows in made.clients.items()}
    parts = [(source, made), *([] if tests is None else [(test_source, tests)])]
    names, remarks = _classes(config, parts, head, labels)
    notes += remarks
    task = make_task(config, processor, limit, names)
    clients = []
    for name, split in splits.items():
        if config.train_examples is not None and len(split.train) + len(split.validation) < config.train_examples:
            had = len(split.train) + len(split.validation)
            notes.append(f"{name}: has {had} examples to train on instead of the {config.train_examples} asked for")
        client = ClientData(
            name,
            source.encode(task, split.train),
            source.encode(task, split.validation),
            test_source.encode(task, split.test),
        )
        _check(client, config)
        notes += cut_note(client.name, [*client.train, *client.validation, *client.test], limit.tokens)
        clients.append(client)
    if limit.of_model and config.block_length is None and not task_of(config).images:
        notes.append(
            f"data.max_length = {config.max_length} is more than the model's {limit.tokens} positions, which are used"
        )
    groups = {name for each in (source, test_source) for name in each.facts.groups or ()}
    return Federation(clients, task, notes, [*warnings_of(clients, task), *alike("groups", sorted(groups))])


class _Source:
    """Rows that were checked against the task, and what partitioners need to know of them."""

    def __init__(self, config: DataConfig, source: str, split: str | None) -> None:
        self.how = partitioner(config.clients)
        self.config = config
        self.rows: Rows = read_rows(source, split, config.config, by_file=self.how.owners == "file")
        self.task = task_of(config)
        self.needed = self.task.needed_columns(config)
        for name, key in self.needed.items():
            self.rows.require(name, key)
        if self.how.owners == "column":
            self.rows.require(config.clients.column, "data.clients.column")
        for column, key in ((config.group, "data.group"), (config.clients.over, "data.clients.over")):
            if column is not None:
                self.rows.require(column, key)
        self.doubts: list[str] = []
        for name in {**self.needed, **({config.clients.column: ""} if self.how.owners == "column" else {})}:
            values = self.rows.values(name)
            if name in self.needed and name not in self.task.gaps(config):
                check_present(values, name, self.rows.place)
            self.doubts += written_gaps(values, name, self.rows.name)
        self.labels = self._labels() if self.task.labelled else None
        self.strata = None if self.labels is None else self.task.strata(self.labels)
        kinds = None if config.clients.over is None else self._texts(config.clients.over)
        self.facts = Facts(len(self.rows), self.strata, self._owners(), self._lengths(), self._groups(), kinds)

    def encode(self, task: Task, indices: Sequence[int]) -> list[Example]:
        """The examples of the given rows."""
        rows = self.rows.take(indices, list(self.needed))
        for row, index in zip(rows, indices, strict=True):
            if self.labels is not None:
                row[self.config.label] = self.labels[index]
            image = row.get(self.config.image)
            folder = self.rows.part(index).folder
            if self.task.images and isinstance(image, str) and folder is not None:
                row[self.config.image] = str(folder / Path(image))
        return task.encode(rows)

    def _labels(self) -> list[Any]:
        name = self.config.label
        return self.task.read_labels(self.rows.values(name), self.rows.class_names(name), self.config, self.rows.place)

    def _owners(self) -> list[str] | None:
        if self.how.owners == "file":
            return [str(self.rows.part(index).group) for index in range(len(self.rows))]
        if self.how.owners is None:
            return None
        return self._texts(self.config.clients.column)

    def _groups(self) -> list[str] | None:
        return None if self.config.group is None else self._texts(self.config.group)

    def _texts(self, name: str) -> list[str]:
        values = self.rows.values(name)
        check_present(values, name, self.rows.place)
        names = self.rows.class_names(name)
        return [
            as_text(v if names is None else names[v], name, self.rows.place(i)).strip() for i, v in enumerate(values)
        ]

    def _lengths(self) -> list[int] | None:
        columns = self.task.text_columns(self.config)
        if not self.how.lengths or not columns:
            return None
        texts = [self.rows.values(name) for name in columns]
        return [sum(len(str(values[index])) for values in texts) for index in range(len(self.rows))]


def _split(
    name: str,
    config: DataConfig,
    source: _Source,
    rows: list[int],
    test_source: _Source,
    tests: Partition | None,
    seed: int,
) -> Split:
    test_rows = None if tests is None else tests.clients[name]
    return split_client(
        name,
        rows,
        None if source.strata is None else [source.strata[row] for row in rows],
        test_fraction=config.test_fraction,
        validation_fraction=config.validation_fraction,
        train_examples=config.train_examples,
        test_examples=config.test_examples,
        seed=seed,
        private_seed=config.private_seed,
        test_rows=test_rows,
        test_labels=None
        if test_rows is None or test_source.strata is None
        else [test_source.strata[r] for r in test_rows],
        groups=None if source.facts.groups is None else [source.facts.groups[row] for row in rows],
    )


def _classes(
    config: DataConfig, parts: Sequence[tuple[_Source, Partition]], head: Sequence[str], labels: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """A classifier's classes over all clients' training and test data, and remarks on them; else none."""
    if not task_of(config).classes:
        return [], []
    found: set[str] = set()
    for source, made in parts:
        assert source.labels is not None
        own = {row: source.task.names_in(source.labels[row]) for rows in made.clients.values() for row in rows}
        found.update(*own.values())
        if labels is not None:
            check_known(own, labels, source.rows.place)
    if labels is not None:
        return list(labels), []
    first = parts[0][0].rows
    in_data = classes_of(found, first.class_names(config.label), head, first.name, config.label)
    return settled(in_data, head)


def _check(client: ClientData, config: DataConfig) -> None:
    if not client.train or (config.test_fraction > 0 and not client.test):
        raise DataError(
            f"client {client.name!r} is empty: its texts give {len(client.train)} blocks to train and "
            f"{len(client.test)} to test of data.block_length = {config.block_length}; give it more text"
        )
