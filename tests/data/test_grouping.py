from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexp.config import ClientsConfig, DataConfig
from flexp.data import load_federation
from flexp.data.grouping import deal, shares
from flexp.data.partition import Facts, partition, partition_test
from flexp.data.split import split_client
from flexp.errors import DataError

from .tools import jsonl, tokenizer

TOK = tokenizer()


def grouped(rows: int, groups: int, seed: int, labels: int = 4) -> Facts:
    """Rows with random labels, lengths and groups; every group lies in one of the owners x and y."""
    draw = random.Random(seed)
    names = [f"d{draw.randrange(groups)}" for _ in range(rows)]
    return Facts(
        rows,
        [f"l{draw.randrange(labels)}" for _ in range(rows)],
        ["x" if int(name[1:]) % 2 else "y" for name in names],
        [draw.randrange(50) for _ in range(rows)],
        names,
    )


def assert_apart(parts: Iterable[Iterable[int]], groups: Any) -> None:
    owner: dict[str, int] = {}
    rows = [(number, row) for number, part in enumerate(parts) for row in part]
    assert len({row for _, row in rows}) == len(rows)
    for number, row in rows:
        assert owner.setdefault(groups[row], number) == number


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    fractions=st.sampled_from([(0.3, 0.7), (0.2, 0.3, 0.5), (0.01, 0.99)]),
    seed=st.integers(0, 9),
)
def test_whole_groups_are_dealt_and_no_part_is_empty_without_need(
    sizes: list[int], fractions: tuple[float, ...], seed: int
) -> None:
    groups = [f"d{number}" for number, size in enumerate(sizes) for _ in range(size)]
    labels = [row % 2 for row in range(len(groups))]
    rows = range(len(groups))
    parts = deal(rows, groups, labels, shares(labels, fractions), np.random.default_rng(seed))
    assert sorted(row for part in parts for row in part) == list(rows)
    assert_apart(parts, groups)
    assert all(parts) or len(sizes) < len(fractions)
    assert parts == deal(rows, groups, labels, shares(labels, fractions), np.random.default_rng(seed))


@given(labels=st.lists(st.integers(0, 2), min_size=2, max_size=90), seed=st.integers(0, 9))
def test_groups_of_one_row_meet_the_wanted_counts(labels: list[int], seed: int) -> None:
    names = [str(row) for row in range(len(labels))]
    wanted = shares(labels, (0.3, 0.7))
    parts = deal(range(len(labels)), names, labels, wanted, np.random.default_rng(seed))
    for part, want in zip(parts, wanted, strict=True):
        counts = Counter(labels[row] for row in part)
        assert all(abs(counts[label] - number) <= 1.5 for label, number in want.items())


@settings(max_examples=50, deadline=None)
@given(
    by=st.sampled_from(["iid", "dirichlet", "size", "length", "column", "pathological", "skew"]),
    rows=st.integers(80, 160),
    groups=st.integers(12, 40),
    count=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_no_group_has_two_clients_or_two_sides(by: str, rows: int, groups: int, count: int, seed: int) -> None:
    config = ClientsConfig.model_validate({"by": by, "count": count, "alpha": 5.0})
    known, tests = grouped(rows, groups, seed), grouped(rows // 2, groups, seed + 1)
    assert known.labels is not None
    assert known.groups is not None
    try:
        made = partition(known, config, seed)
        tested = partition_test(made, known, tests, config, seed)
    except DataError:
        assume(False)
    assert_apart(made.clients.values(), known.groups)
    assert_apart(tested.clients.values(), tests.groups)
    assert made == partition(known, config, seed)
    assert all(made.clients.values())
    sides: list[list[int]] = []
    for name, own in made.clients.items():
        given_by = {"labels": [known.labels[r] for r in own], "groups": [known.groups[r] for r in own]}
        split = {"test_fraction": 0.3, "validation_fraction": 0.2, "test_examples": 5, "seed": seed}
        try:
            all_of_them = split_client(name, own, **given_by, **split, train_examples=None)  # type: ignore[arg-type]
            few = split_client(name, own, **given_by, **split, train_examples=8)  # type: ignore[arg-type]
        except DataError:  # fewer than three groups
            continue
        sides += [all_of_them.train, all_of_them.validation, all_of_them.test]
        assert few.test == all_of_them.test
        assert set(few.train + few.validation) <= set(all_of_them.train + all_of_them.validation)
        assert len(few.train + few.validation) == min(8, len(all_of_them.train + all_of_them.validation))
        assert_apart([few.train, few.validation, few.test], known.groups)
    assert_apart(sides, known.groups)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), skew=st.sampled_from([0.5, 0.75, 0.9, 1.0]))
def test_skew_keeps_its_shares_and_counts_exactly(seed: int, skew: float) -> None:
    known = grouped(400, 90, seed, labels=2)
    assert known.labels is not None
    assert known.groups is not None
    made = partition(known, ClientsConfig(by="skew", skew=skew), seed)
    for owner in "xy":
        pair = [made.clients[f"{owner}-{side}"] for side in "ab"]
        many = round(skew * len(pair[0]))
        assert [sum(known.labels[row] == "l0" for row in own) for own in pair] == [many, len(pair[0]) - many]
        assert len(pair[0]) == len(pair[1])
    for name, own in made.clients.items():
        split = split_client(
            name, own, [known.labels[r] for r in own], groups=[known.groups[r] for r in own],
            test_fraction=0.4, validation_fraction=0.0, train_examples=16, test_examples=8, seed=seed,
        )  # fmt: skip
        assert (len(split.train), len(split.test)) == (16, 8)
        share = sum(known.labels[row] == "l0" for row in own) / len(own)
        assert abs(sum(known.labels[row] == "l0" for row in split.train) - 16 * share) <= 1
        assert abs(sum(known.labels[row] == "l0" for row in split.test) - 8 * share) <= 1


def test_pathological_clients_keep_few_labels() -> None:
    known = grouped(300, 60, 0)
    assert known.labels is not None
    made = partition(known, ClientsConfig(by="pathological", count=4, classes=2), 0)
    assert all(len({known.labels[row] for row in own}) <= 2 for own in made.clients.values())
    unused = 300 - sum(map(len, made.clients.values()))
    assert made.notes == [f"{unused} of 300 rows are not used: their labels fell to no client"]


def test_groups_that_cannot_be_divided_are_told() -> None:
    one = Facts(8, ["a", "b"] * 4, ["x"] * 8, None, ["d"] * 8)
    with pytest.raises(DataError, match=r"data.group column ties the rows of 'x' together"):
        partition(one, ClientsConfig(by="skew", skew=0.75), 0)
    with pytest.raises(DataError, match=r"cannot divide whole groups \(data.group\) among 2 clients; lower data.cli"):
        partition(one, ClientsConfig(by="iid", count=2), 0)


def test_without_groups_nothing_has_changed() -> None:
    """Digests of what 0.1.0 made before there were groups: a resumed or repeated run must see the same rows."""
    known = grouped(200, 40, 7)
    plain = Facts(known.count, known.labels, known.owners, known.lengths)
    assert plain.labels is not None
    made = partition(plain, ClientsConfig(by="skew", skew=0.75), 3)
    parts: list[list[int]] = list(made.clients.values())
    for name, own in made.clients.items():
        split = split_client(
            name, own, [plain.labels[r] for r in own], test_fraction=0.3, validation_fraction=0.2,
            train_examples=20, test_examples=9, seed=3,
        )  # fmt: skip
        parts += [split.train, split.validation, split.test]
    assert hashlib.sha256(repr(parts).encode()).hexdigest()[:16] == "017ea78c2510ccff"


def documents(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "text": f"the w{k % 40} dog w{k // 40} runs",
            "label": "ny"[k % 3 == 0],
            "client": ("north", "south")[k // 5 % 2],
            "doc": start + k // 5,
        }
        for k in range(count)
    ]


@pytest.mark.parametrize("by", ["column", "skew", "iid"])
def test_documents_stay_on_one_side_in_a_federation(tmp_path: Path, by: str) -> None:
    rows = documents(300)
    where = {tuple(TOK(str(row["text"]))["input_ids"]): row["doc"] for row in rows}
    config = DataConfig.model_validate(
        {
            "source": str(jsonl(tmp_path / "x.jsonl", rows)),
            "group": "doc",
            "validation_fraction": 0.2,
            "clients": {"by": by, "count": 3},
        }
    )
    made = load_federation(config, TOK, 0, None)
    parts = [part for c in made.clients for part in (c.train, c.validation, c.test)]
    seen = [{where[tuple(example["input_ids"])] for example in part} for part in parts]
    assert all(seen)
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert made.clients == load_federation(config, TOK, 0, None).clients


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"group": "docs"}, r"x.jsonl: there is no column 'docs' \(data.group\); .* did you mean 'doc'\?"),
        ({"doc": None}, {}, r"x.jsonl, line 1: the column 'doc' is empty; fill it in or remove the row"),
        ({"doc": 1}, {}, r"data.group '1' has rows of two clients, 'north' and 'south': give each client's groups"),
        ({}, {"test_source": "y.jsonl"}, r"data.group '50' and 9 more is in data.source and in data.test_source: rem"),
    ],
)
def test_bad_groups_get_one_clear_line(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    rows = documents(300)
    rows[0] |= change
    jsonl(tmp_path / "y.jsonl", documents(100, start=50))
    if "test_source" in settings:
        settings = {"test_source": str(tmp_path / "y.jsonl")}
    config = DataConfig.model_validate(
        {"source": str(jsonl(tmp_path / "x.jsonl", rows)), "group": "doc", "test_fraction": 0.3, **settings}
    )
    with pytest.raises(DataError, match=message) as raised:
        load_federation(config, TOK, 0, None)
    assert "\n" not in str(raised.value)
