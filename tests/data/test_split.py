from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.data.split import split_client, stratified_order
from flexp.errors import DataError


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=80), seed=st.integers(0, 99))
def test_every_prefix_has_the_proportions_of_the_whole(labels: list[int], seed: int) -> None:
    order = stratified_order(labels, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(labels)))
    whole = Counter(labels)
    for length in range(1, len(labels) + 1):
        part = Counter(labels[index] for index in order[:length])
        for label, count in whole.items():
            assert abs(part[label] - count * length / len(labels)) <= len(whole)


@settings(max_examples=60)
@given(
    count=st.integers(4, 60),
    test=st.floats(0.1, 0.8),
    validation=st.sampled_from([0.0, 0.2, 0.5]),
    few=st.none() | st.integers(2, 30),
    seed=st.integers(0, 9),
)
def test_splits_are_disjoint_and_test_rows_stay(
    count: int, test: float, validation: float, few: int | None, seed: int
) -> None:
    rows = [100 + 3 * k for k in range(count)]
    labels = [k % 3 for k in range(count)]

    def split(train_examples: int | None, validation_fraction: float):  # type: ignore[no-untyped-def]
        return split_client(
            "x", rows, labels, test_fraction=test, validation_fraction=validation_fraction,
            train_examples=train_examples, test_examples=None, seed=seed,
        )  # fmt: skip

    try:
        made = split(few, validation)
    except DataError:
        assert validation > 0  # one training row cannot be divided
        return
    everything = made.train + made.validation + made.test
    assert len(set(everything)) == len(everything)
    assert set(everything) <= set(rows)
    if few is None:
        assert set(everything) == set(rows)
    else:
        assert len(made.train) + len(made.validation) == min(few, count - len(made.test))
    assert made.test == split(None, 0.0).test


def test_few_shot_subsets_keep_the_clients_labels_and_are_nested() -> None:
    labels = ["a"] * 75 + ["b"] * 25

    def train(few: int) -> list[int]:
        return split_client(
            "x", range(100), labels, test_fraction=0.2, validation_fraction=0.0,
            train_examples=few, test_examples=None, seed=0,
        ).train  # fmt: skip

    assert Counter(labels[row] for row in train(16)) == {"a": 12, "b": 4}
    assert Counter(labels[row] for row in train(32)) == {"a": 24, "b": 8}
    assert set(train(16)) < set(train(32))


def test_at_most_test_examples_and_never_back_into_training() -> None:
    made = split_client(
        "x", range(100), [0, 1] * 50, test_fraction=0.5, validation_fraction=0.0,
        train_examples=None, test_examples=10, seed=0,
    )  # fmt: skip
    assert (len(made.train), len(made.test)) == (50, 10)
    assert sum(row % 2 for row in made.test) == 5


def test_a_client_with_nothing_to_test_is_named_with_its_counts() -> None:
    with pytest.raises(DataError, match="client 'clinic-a' has 1 examples: 1 to train, 0 to validate, 0 to test"):
        split_client(
            "clinic-a", [7], [0], test_fraction=0.3, validation_fraction=0.0,
            train_examples=None, test_examples=None, seed=0,
        )  # fmt: skip


def test_clients_are_split_independently() -> None:
    def test_rows(name: str, seed: int) -> list[int]:
        return split_client(
            name, range(60), None, test_fraction=0.5, validation_fraction=0.0,
            train_examples=None, test_examples=None, seed=seed,
        ).test  # fmt: skip

    assert test_rows("a", 0) == test_rows("a", 0)
    assert test_rows("a", 0) != test_rows("b", 0)
    assert test_rows("a", 0) != test_rows("a", 1)


def test_private_seed_changes_what_is_trained_on_and_nothing_else() -> None:
    rows, labels = list(range(200)), [index % 3 for index in range(200)]
    settings: dict = {"test_fraction": 0.3, "validation_fraction": 0.25, "train_examples": 24, "test_examples": None}
    splits = [split_client("a", rows, labels, seed=5, private_seed=own, **settings) for own in (None, 5, 6, 7)]
    assert splits[0] == splits[1]
    assert splits[1].test == splits[2].test == splits[3].test
    assert splits[1].train != splits[2].train != splits[3].train
    assert not {*splits[2].train, *splits[2].validation, *splits[3].train} & set(splits[1].test)
