from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.config import ClientsConfig
from flexp.data.partition import Facts, partition, partition_test
from flexp.errors import ConfigError, DataError
from flexp.rng import generator


def clients(by: str, **settings: Any) -> ClientsConfig:
    return ClientsConfig.model_validate({"by": by, **settings})


def facts(count: int, labels: int = 4, groups: int = 3) -> Facts:
    return Facts(
        count,
        [f"l{k % labels}" for k in range(count)],
        [f"g{k // labels % groups}" for k in range(count)],
        [(k * 7) % 50 for k in range(count)],
    )


@settings(max_examples=40, deadline=None)
@given(
    by=st.sampled_from(["iid", "dirichlet", "size", "length", "column", "pathological", "skew"]),
    rows=st.integers(60, 120),
    count=st.integers(2, 5),
    seed=st.integers(0, 5),
)
def test_a_partition_gives_every_row_one_owner_at_most(by: str, rows: int, count: int, seed: int) -> None:
    config = clients(by, count=count, alpha=5.0)
    made = partition(facts(rows), config, seed)
    owned = [row for own in made.clients.values() for row in own]
    assert len(owned) == len(set(owned))
    assert set(owned) <= set(range(rows))
    assert all(own == sorted(own) and own for own in made.clients.values())
    if by not in ("pathological", "skew"):
        assert len(owned) == rows
    elif len(owned) < rows:
        assert made.notes
    assert made == partition(facts(rows), config, seed)


def test_iid_clients_are_alike_and_follow_the_seed() -> None:
    made = partition(facts(400), clients("iid", count=4), 0)
    assert list(made.clients) == ["client-1", "client-2", "client-3", "client-4"]
    assert [len(own) for own in made.clients.values()] == [100] * 4
    assert made.clients != partition(facts(400), clients("iid", count=4), 1).clients
    library = IidPartitioner(4)
    library.dataset = Dataset.from_dict({"row": generator(0, "partition", "iid").permutation(403)})
    parts = [sorted(library.load_partition(part)["row"]) for part in range(4)]
    assert list(partition(facts(403), clients("iid", count=4), 0).clients.values()) == parts


def test_by_size_grows_linearly() -> None:
    made = partition(facts(100), clients("size", count=4), 0)
    assert [len(own) for own in made.clients.values()] == [10, 20, 30, 40]


def test_by_length_deals_out_short_to_long() -> None:
    known = facts(100)
    assert known.lengths is not None
    made = partition(known, clients("length", count=4), 0)
    bounds = [(min(known.lengths[r] for r in own), max(known.lengths[r] for r in own)) for own in made.clients.values()]
    assert all(a[1] <= b[0] for a, b in pairwise(bounds))


def test_pathological_clients_have_few_labels() -> None:
    known = facts(200)
    assert known.labels is not None
    made = partition(known, clients("pathological", count=4, classes=2), 0)
    assert all(len({known.labels[row] for row in own}) == 2 for own in made.clients.values())


def test_small_alpha_is_more_skewed() -> None:
    known = facts(2000)
    assert known.labels is not None

    def largest_share(alpha: float) -> float:
        made = partition(known, clients("dirichlet", count=4, alpha=alpha), 0)
        shares = [max(Counter(known.labels[r] for r in own).values()) / len(own) for own in made.clients.values()]
        return sum(shares) / len(shares)

    assert largest_share(0.1) > 0.6 > 0.35 > largest_share(100.0)


def test_skew_makes_opposite_pairs() -> None:
    labels = ["no"] * 70 + ["yes"] * 40 + ["no"] * 20 + ["yes"] * 60
    known = Facts(190, labels, ["film"] * 110 + ["news"] * 80)
    made = partition(known, clients("skew", skew=0.75), 0)
    assert {name: Counter(labels[row] for row in own) for name, own in made.clients.items()} == {
        "film-a": {"no": 30, "yes": 10},
        "film-b": {"no": 10, "yes": 30},
        "news-a": {"no": 15, "yes": 5},
        "news-b": {"no": 5, "yes": 15},
    }
    assert made.notes == [
        "film: 80 of 110 rows are used, so that both of its clients are skewed alike",
        "news: 40 of 80 rows are used, so that both of its clients are skewed alike",
    ]


def test_skew_of_many_classes_halves_the_sorted_list() -> None:
    labels = [f"{k % 6}" for k in range(120)]
    made = partition(Facts(120, labels, ["x"] * 120), clients("skew", skew=0.9), 0)
    low = [sum(labels[row] in "012" for row in own) for own in made.clients.values()]
    assert low == [54, 6]
    assert Counter(labels[row] for row in made.clients["x-a"]) == {k: 18 if k in "012" else 2 for k in "012345"}


def test_skew_needs_both_halves() -> None:
    with pytest.raises(DataError, match="'x' has 3 rows of the labels a and 0 of the others"):
        partition(Facts(4, ["a", "a", "a", "b"], ["x", "x", "x", "y"]), clients("skew"), 0)


def test_natural_clients_are_sorted_or_chosen() -> None:
    known = Facts(4, None, ["10", "9", "10", "2"])
    assert partition(known, clients("column"), 0).clients == {"2": [3], "9": [1], "10": [0, 2]}
    assert list(partition(known, clients("column", names=["10", "2"]), 0).clients) == ["10", "2"]


def test_errors_say_what_is_wrong_and_how_to_mend_it() -> None:
    known = facts(40)
    with pytest.raises(
        DataError, match=r"client 'g5' .* is empty: column 'client' has 0 rows of it; there are g0, g1, g2; did"
    ):
        partition(known, clients("column", names=["g5"]), 0)
    with pytest.raises(ConfigError, match=r'"iid" needs data.clients.count'):
        partition(known, clients("iid"), 0)
    with pytest.raises(ConfigError, match="divides by labels, but the task has none"):
        partition(Facts(40), clients("dirichlet", count=2), 0)
    with pytest.raises(ConfigError, match=r"names is for by = .column."):
        partition(known, clients("iid", count=2, names=["a", "b"]), 0)
    with pytest.raises(DataError, match="40 rows cannot be divided among 41 clients"):
        partition(known, clients("iid", count=41), 0)
    with pytest.raises(DataError, match=r"cannot divide 40 rows among 3 clients .*lower count or classes"):
        partition(known, clients("pathological", count=3, classes=9), 0)
    with pytest.raises(DataError, match=r"cannot divide 40 rows among 5 clients .*raise data.clients.alpha"):
        partition(known, clients("dirichlet", count=5, alpha=0.01, min_examples=8), 0)


def test_a_separate_test_source_follows_the_clients_labels() -> None:
    labels = ["a"] * 40 + ["b"] * 40
    config = clients("pathological", count=2, classes=1)
    made = partition(Facts(80, labels), config, 0)
    tests = partition_test(made, Facts(80, labels), Facts(30, ["a", "b", "c"] * 10), config, 0)
    assert {name: {["a", "b", "c"][row % 3] for row in rows} for name, rows in tests.clients.items()} == {
        name: {labels[own[0]]} for name, own in made.clients.items()
    }
    assert tests.notes == ["10 test rows are not used: no client has their labels"]


def test_a_separate_test_source_of_natural_clients() -> None:
    config = clients("column")
    made = partition(Facts(2, None, ["x", "y"]), config, 0)
    tests = partition_test(made, Facts(2, None, ["x", "y"]), Facts(3, None, ["y", "z", "x"]), config, 0)
    assert tests.clients == {"x": [2], "y": [0]}
    assert tests.notes == ["test rows of z are not used: no such client"]


def test_dirichlet_over_a_column_mixes_its_values_and_not_the_labels() -> None:
    rows = 1200
    domains = [f"domain-{row % 4}" for row in range(rows)]
    labels = [f"label-{row % 3}" for row in range(rows)]
    facts = Facts(rows, labels, kinds=domains)
    config = ClientsConfig(by="dirichlet", over="domain", count=4, alpha=0.05, min_examples=150)  # a third is a third
    made = partition(facts, config, 0)
    shares = [max(Counter(domains[row] for row in owned).values()) / len(owned) for owned in made.clients.values()]
    spread = [max(Counter(labels[row] for row in owned).values()) / len(owned) for owned in made.clients.values()]
    assert sum(shares) / 4 > 0.7  # nearly one domain each
    assert max(spread) < 0.45  # while labels stay near a third
    test = Facts(400, [f"label-{row % 3}" for row in range(400)], kinds=[f"domain-{row % 4}" for row in range(400)])
    given = partition_test(made, facts, test, config, 0)
    for name, owned in given.clients.items():
        seen = {domains[row] for row in made.clients[name]}
        assert {f"domain-{row % 4}" for row in owned} <= seen


def test_over_is_refused_where_nothing_divides_by_it() -> None:
    with pytest.raises(ConfigError, match="over is for"):
        partition(Facts(10, ["a"] * 10, kinds=["x"] * 10), ClientsConfig(by="iid", over="domain", count=2), 0)
