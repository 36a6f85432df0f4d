"""Sums over a link: equal with and without masks; with them a server that knows every feature reads no label."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from flexp.client.adding import KEYS, LateError, OverLink, agree
from flexp.client.closed_form import Discriminant, Statistics
from flexp.config import MeetConfig
from flexp.errors import ConfigError, LinkError, LinkLostError
from flexp.links.asking import SumReply, SumRequest
from flexp.links.base import Meter
from flexp.links.sums import Sums
from flexp.masking import Group, Identity, from_ring
from flexp.server.sums import SumTable
from tests.harness import seeded

NAMES = ("a", "b", "c")
EXAMPLES, WIDTH, CLASSES = 40, 32, 4


class Wire:
    """A link to a table of sums; keeps what the server sees."""

    def __init__(self, client: str, table: SumTable, seen: list[tuple[str, SumRequest]]) -> None:
        self.client, self.meter, self._table, self._seen = client, Meter(), table, seen

    def call(self, request: Any) -> Future[Any]:
        self._seen.append((self.client, request))
        return self._table.give(self.client, request)


def wires() -> tuple[dict[str, Any], list[tuple[str, SumRequest]]]:
    table = SumTable()
    table.open(NAMES)
    seen: list[tuple[str, SumRequest]] = []
    return {name: Wire(name, table, seen) for name in NAMES}, seen


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels of each client."""
    made = {}
    for number, name in enumerate(NAMES):
        labels = torch.randint(0, CLASSES, (EXAMPLES,), generator=seeded(number))
        centres = 2 * torch.randn(CLASSES, WIDTH, generator=seeded(9))
        made[name] = (torch.randn(EXAMPLES, WIDTH, generator=seeded(20 + number)) + centres[labels]).double(), labels
    return made


def met(masked: bool) -> tuple[dict[str, Sums], list[tuple[str, SumRequest]]]:
    links, seen = wires()
    group = Group.from_secret(b"what the owners share", "run") if masked else None
    waiting = {
        name: OverLink(links[name], group, "run").give(0, Statistics.of(x, y, CLASSES).tensors())
        for name, (x, y) in data().items()
    }
    return {name: total() for name, total in waiting.items()}, seen


def recovered(sums_CH: np.ndarray[Any, Any], features_NH: Tensor, labels_N: Tensor) -> float:
    """The labels that non-negative least squares tells from class sums, whose rows are sums of known features."""
    told = np.stack([nnls(features_NH.numpy().T, row, maxiter=20_000)[0] for row in sums_CH])
    return float((torch.from_numpy(told.argmax(0)) == labels_N).double().mean())


def class_sums(ring: Tensor) -> np.ndarray[Any, Any]:
    """Where class sums lie in what is given: after the counts."""
    numbers = from_ring(ring.numpy().view(np.uint64))
    return numbers[CLASSES : CLASSES * (1 + WIDTH)].reshape(CLASSES, WIDTH)


def test_heads_are_equal_bit_for_bit_with_masks_and_without() -> None:
    plain, masked = met(masked=False)[0], met(masked=True)[0]
    for name in NAMES:
        for key, value in plain[name].items():
            assert torch.equal(value, masked[name][key]), key
        heads = [Discriminant(Statistics.from_tensors(each[name])).head(0.5, 1.0) for each in (plain, masked)]
        assert torch.equal(heads[0].weight, heads[1].weight)
    x, y = (torch.cat(each) for each in zip(*data().values(), strict=True))
    whole = Statistics.of(x, y, CLASSES).sums
    torch.testing.assert_close(plain["a"]["sums"].double(), whole, atol=1e-5, rtol=1e-6)


def test_a_server_that_knows_all_features_reads_labels_out_of_plain_sums_only() -> None:
    of, majority = data(), 0.0
    for masked in (False, True):
        _, seen = met(masked)
        shares = []
        for client, request in seen:
            assert request.values_N is not None
            shares.append(recovered(class_sums(request.values_N), *of[client]))
            majority = max(majority, float(of[client][1].bincount().max()) / EXAMPLES)
        if masked:  # what is left is chance: three standard deviations of as many guesses
            assert max(shares) <= majority + 3 * (0.25 / EXAMPLES) ** 0.5
        else:
            assert min(shares) == 1.0
    x, y = (torch.cat(each) for each in zip(*of.values(), strict=True))
    totals = []
    for masked in (False, True):
        rings = [request.values_N for _, request in met(masked)[1] if request.values_N is not None]
        totals.append(recovered(class_sums(torch.stack(rings).sum(0)), x, y))
    assert totals[0] > 0.8  # adding up alone does not hide them
    assert totals[1] <= majority + 3 * (0.25 / len(y)) ** 0.5


def test_clients_agree_on_a_key_that_the_server_does_not_see(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    links, seen = wires()
    told: list[str] = []

    def one(name: str) -> Group:
        (tmp_path / name).mkdir(exist_ok=True)
        group = agree(links[name], MeetConfig(), "run", tmp_path / name, told.append)
        assert group is not None
        return group

    with ThreadPoolExecutor(3) as pool:
        groups = list(pool.map(one, NAMES))
    assert len({group.mark for group in groups}) == 1
    assert one("b").mark == groups[0].mark  # after a restart, from the key in its folder
    assert len({line.split("keys: ")[1] for line in told}) == 1
    assert (tmp_path / "a" / "meet.key").stat().st_mode & 0o077 == 0
    said = "".join(request.note for _, request in seen)
    assert groups[0]._key.hex() not in said
    pinned = MeetConfig(group=told[0].split("keys: ")[1].split(". ")[0])
    assert agree(links["a"], pinned, "run", tmp_path / "a") is not None


@pytest.mark.parametrize("masked", [True, False])
def test_the_lost_are_left_out_and_the_late_have_the_sum_with_their_own(masked: bool) -> None:
    links, _ = wires()
    table = links["a"]._table
    table.open(NAMES, 0.2)
    group = Group.from_secret(b"what the owners share", "run") if masked else None
    adders = {name: OverLink(links[name], group, "run") for name in NAMES}
    waiting = {name: adders[name].give(0, {"x": torch.full((2,), value)}) for name, value in (("a", 1.0), ("b", 2.0))}
    assert [total()["x"].tolist() for total in waiting.values()] == [[3.0, 3.0]] * 2
    assert adders["c"].give(0, {"x": torch.full((2,), 4.0)})()["x"].tolist() == [7.0, 7.0]
    table.open(NAMES, 60.0)  # long enough to see who is waited for
    table._late = {"c"}
    waiting = {name: adders[name].give(1, {"x": torch.ones(2)}) for name in ("a", "b")}
    assert waiting["a"]()["x"].tolist() == [2.0, 2.0]
    waiting = {name: adders[name].give(2, {"x": torch.ones(2)}) for name in ("c", "a", "b")}  # it is back
    assert waiting["a"]()["x"].tolist() == [3.0, 3.0]


def test_who_asks_again_while_it_waits_has_the_sum_once() -> None:
    table = SumTable()
    table.open(["a", "b"])
    given = SumRequest(0, torch.ones(2, dtype=torch.int64))
    earlier, later = table.give("a", given), table.give("a", given)
    with pytest.raises(LinkLostError, match="asked again since"):
        earlier.result(0)
    assert not later.done()
    assert table.give("b", given).result(0).values_N.tolist() == later.result(0).values_N.tolist() == [2, 2]


def test_who_comes_after_the_key_is_told(tmp_path: Path) -> None:
    links, _ = wires()
    table = links["a"]._table
    table.open(NAMES, 0.05)
    (tmp_path / "a").mkdir()
    assert agree(links["a"], MeetConfig(), "run", tmp_path / "a") is not None
    with pytest.raises(LateError, match="without it"):
        agree(links["c"], MeetConfig(), "run", tmp_path)


def test_a_key_of_the_servers_own_changes_the_fingerprint(tmp_path: Path) -> None:
    """Who is in the middle cannot keep the fingerprint that owners have compared."""

    class Lying(Wire):
        def call(self, request: Any) -> Future[Any]:
            future: Future[Any] = Future()
            keys = {"a": request.note, "b": Identity().public.hex()}
            future.set_result(SumReply(None, keys if request.number == KEYS else {}))
            return future

    link: Any = Lying("a", SumTable(), [])
    with pytest.raises(ConfigError, match="may have put keys of its own"):
        agree(link, MeetConfig(group="12345 " * 8), "run", tmp_path)


@pytest.mark.parametrize("other", [None, Group.from_secret(b"another secret, as long", "run")])
def test_another_key_is_noticed(other: Group | None) -> None:
    links, _ = wires()
    groups = {"a": Group.from_secret(b"what the owners share", "run"), "b": other}
    groups["c"] = groups["a"]
    waiting = {name: OverLink(links[name], groups[name], "run").give(0, {"x": torch.ones(2)}) for name in NAMES}
    with pytest.raises(LinkError, match="b hides its sums with another key"):
        waiting["a"]()


def test_no_key_is_needed_where_nothing_is_masked(tmp_path: Path) -> None:
    links, seen = wires()
    assert agree(links["a"], MeetConfig(masked=False), "run", tmp_path) is None
    assert seen == []


def test_a_secret_file(tmp_path: Path) -> None:
    links, _ = wires()
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match=r"method\.meet\.secret = .* cannot be read"):
        agree(links["a"], MeetConfig(secret=str(file)), "run", tmp_path)
    file.write_text("0123456789abcdef0123456789abcdef\n", encoding="utf-8")
    marks = set()
    for name, run in (("a", "run"), ("b", "run"), ("a", "other run")):
        group = agree(links[name], MeetConfig(secret=str(file)), run, tmp_path)
        assert group is not None
        marks.add(group.mark)
    assert len(marks) == 2
