"""Where methods cut: one cut for all where the method has one, and resolving it twice changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexp.config import RunConfig
from flexp.errors import ConfigError
from flexp.methods.base import Cuts, base_depth, method_of
from tests.tiny import CLIENTS, config

OWN = {"north": (1, 3), "south": (2, 4), "west": (3, 4)}


def method_cuts(run: RunConfig, cuts: Cuts) -> Cuts:
    return method_of(run).cuts(run, cuts, 4)


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("flexp-sfl", {}, list(OWN.values())),
        ("splitft", {}, list(OWN.values())),
        ("fedavg", {}, list(OWN.values())),
        ("split-fedavg", {}, [(1, 4)] * 3),
        ("splitfed-v1", {}, [(1, 4)] * 3),
        ("splitfed-v2", {"splitfed": {"cut": 3}}, [(3, 4)] * 3),
        ("splitlora", {"splitlora": {"cut": 2}, "splitfed": {"cut": 3}}, [(2, 4)] * 3),
    ],
)
def test_cuts_by_method(home: Path, name: str, own: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    run = config(home, method={"name": name, **own})
    found = method_cuts(run, OWN)
    assert found == dict(zip(CLIENTS, expected, strict=True))
    assert method_cuts(run, found) == found


def test_a_cut_of_the_methods_own_is_checked(home: Path) -> None:
    with pytest.raises(ConfigError, match="with a cut of 0 the clients would send their embeddings"):
        method_cuts(config(home, method={"name": "splitfed-v1", "splitfed": {"cut": 0}}), OWN)
    with pytest.raises(ConfigError, match="method splitlora: cut"):
        method_cuts(config(home, method={"name": "splitlora", "splitlora": {"cut": 4}}), OWN)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [({}, 2), ({"recut": {"on": True}}, 1), ({"model": {"base_depth": 1}, "recut": {"on": True}}, 1)],
)
def test_the_server_begins_at_the_smallest_cut_there_may_be(home: Path, tables: dict[str, Any], expected: int) -> None:
    assert base_depth(config(home, **tables), {"north": (3, 4), "south": (2, 4)}) == expected
