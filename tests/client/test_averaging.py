"""Averages as sums over a link: what clients have is what a simulation has, and what the server has is noise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from flexp.client.adding import OverLink
from flexp.client.averaging import FINE, Mean, averaged
from flexp.errors import LinkError, StorageError, TrainingError
from flexp.links import asking
from flexp.links.asking import PIECES, SumReply, SumRequest
from flexp.masking import SHARES, Group, from_ring
from flexp.server.journal import Journal
from flexp.server.sums import SumTable
from tests.harness import seeded
from tests.methods.tools import equal

from .test_adding import NAMES, Wire

EXAMPLES = {"a": 1, "b": 96, "c": 1000}
ROUNDS = [("average", number) for number in (1, 2, 3)]
GROUP = Group.from_secret(b"what the owners share", "run")
Seen = list[tuple[str, SumRequest]]


def model(name: str) -> dict[str, Tensor]:
    """Of a client: small and large weights, and one in another precision."""
    made = seeded(ord(name))
    return {
        "weight": torch.randn(40, 30, generator=made) * 0.02,
        "norm": 50 + torch.randn(30, generator=made),
        "half": torch.randn(7, generator=made).bfloat16(),
        "zero": torch.zeros(3),
    }


def table(journal: Journal | None = None, keep: int = 2) -> SumTable:
    made = SumTable()
    made.open(NAMES, rounds=3, keep=keep, journal=journal)
    return made


def over(sums: SumTable, seen: Seen, name: str, masked: bool = True) -> OverLink:
    link: object = Wire(name, sums, seen)
    return OverLink(link, GROUP if masked else None, "run", shares=True)  # type: ignore[arg-type]


def met(sums: SumTable, seen: Seen, number: int = 1, masked: bool = True) -> dict[str, dict[str, Tensor]]:
    sums.asked = dict.fromkeys(NAMES, number)
    with ThreadPoolExecutor(len(NAMES)) as pool:
        each = {
            name: pool.submit(averaged, model(name), EXAMPLES[name], over(sums, seen, name, masked), number)
            for name in NAMES
        }
        return {name: one.result() for name, one in each.items()}


def simulated(*names: str) -> dict[str, Tensor]:
    mean = Mean()
    for name in names:
        mean.add(model(name), EXAMPLES[name] / sum(EXAMPLES[one] for one in names))
    return {name: value.to(model("a")[name].dtype) for name, value in mean.take().items()}


@pytest.mark.parametrize("masked", [True, False])
def test_all_have_the_simulations_average_bit_for_bit(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    monkeypatch.setattr(asking, "PIECE", 500)
    seen: Seen = []
    here = met(table(), seen, masked=masked)
    for name in NAMES:
        assert equal(here[name], simulated(*NAMES))
    total = sum(EXAMPLES.values())
    for key, value in here["a"].items():
        wanted = sum(model(name)[key].double() * EXAMPLES[name] / total for name in NAMES)
        assert torch.equal(value, torch.as_tensor(wanted).to(value.dtype)), key
    pieces = {request.number for _, request in seen}
    assert pieces == {PIECES + place for place in range(4)}  # how many examples, and 1,240 numbers, 500 at a time


def test_equals_average_to_equals_and_one_alone_keeps_its_own() -> None:
    for names in (("a",), ("a", "a", "a")):
        mean = Mean()
        for _ in names:
            mean.add(model("a"), 1 / len(names))
        assert all(torch.equal(value.to(model("a")[key].dtype), model("a")[key]) for key, value in mean.take().items())


@pytest.mark.parametrize("masked", [True, False])
def test_a_server_that_keeps_every_message_reads_weights_without_masks_alone(masked: bool) -> None:
    seen: Seen = []
    met(table(), seen, masked=masked)
    for client, request in seen:
        if request.number == PIECES or request.values_N is None:
            continue
        read = from_ring(request.values_N.numpy().view(np.uint64), SHARES)[1:]  # after the share
        true = torch.cat([value.double().flatten() for value in model(client).values()]).numpy()
        guess = abs(float(np.corrcoef(read, true)[0, 1]))
        if masked:
            assert kstest((read / 2.0**11 + 1) / 2, "uniform").pvalue > 1e-3
            assert guess < 4 / len(true) ** 0.5  # of chance, four standard deviations
        else:
            assert guess > 0.999999
    total = sum(
        request.values_N for _, request in seen if request.number == PIECES + 1 and request.values_N is not None
    )
    assert isinstance(total, Tensor)  # nor the average
    there = from_ring(total.numpy().view(np.uint64), SHARES)[1:1201].reshape(40, 30)
    assert np.allclose(there, simulated(*NAMES)["weight"], atol=1e-6) is not masked


def test_the_lost_are_left_out_and_the_late_have_what_the_others_have() -> None:
    sums, seen = table(), list[tuple[str, SumRequest]]()
    met(sums, seen)
    sums._late, sums.asked = {"c"}, dict.fromkeys(NAMES, 2)
    with ThreadPoolExecutor(2) as pool:
        both = {n: pool.submit(averaged, model(n), EXAMPLES[n], over(sums, seen, n), 2) for n in "ab"}
    late = averaged(model("c"), EXAMPLES["c"], over(sums, seen, "c"), 2)
    for given in (both["a"].result(), both["b"].result(), late):
        assert equal(given, simulated("a", "b"))


def test_who_goes_back_has_the_last_averages_again(tmp_path: Path) -> None:
    """Also from a server that fell after others had them."""
    lines: list[str] = []
    sums, seen = table(Journal(tmp_path, "run", lines.append)), list[tuple[str, SumRequest]]()
    for number in (1, 2, 3):
        met(sums, seen, number)
    fallen = table(Journal(tmp_path, "run", lines.append))
    for there in (sums, fallen):
        for number in (3, 2):
            there.asked["a"] = number
            there.past("b", ROUNDS[:3])
            again = averaged(model("b"), EXAMPLES["a"], over(there, seen, "a"), number)  # whatever it gives
            assert equal(again, simulated(*NAMES))
        assert {number // PIECES for number in there.done} == {2, 3}  # what is kept is bounded
        there.asked["a"] = 1
        with pytest.raises(
            LinkError, match=r"client a goes back to round 1, and averages are kept of the rounds from 2 on"
        ):
            averaged(model("a"), EXAMPLES["a"], over(there, seen, "a"), 1)
        with pytest.raises(LinkError, match=r"this run has 8, and averages of 3 rounds"):
            averaged(model("a"), EXAMPLES["a"], over(there, seen, "a"), 4)
    assert {int(file.stem) // PIECES for file in tmp_path.glob("run/*.safetensors")} == {2, 3}
    assert not lines
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").touch()
    other = table(Journal(tmp_path, "another", print))
    assert not other.done
    assert (other.first, fallen.first) == (1, 2)
    assert {folder.name for folder in tmp_path.iterdir()} == {"run", "own"}  # a start by mistake takes nothing away
    met(other, seen)
    assert {folder.name for folder in tmp_path.iterdir()} == {"another", "own"}


def test_of_the_rounds_that_are_there_the_last_without_a_gap_are_had(tmp_path: Path) -> None:
    sums, seen = table(Journal(tmp_path, "run", print), keep=3), list[tuple[str, SumRequest]]()
    for number in (1, 2, 3):
        met(sums, seen, number)
    for file in tmp_path.glob("run/*.safetensors"):
        if int(file.stem) // PIECES == 2:
            file.unlink()
    assert table(Journal(tmp_path, "run", print), keep=3).first == 3


def test_nobody_waits_in_vain_for_who_is_past_a_sum_that_is_lost() -> None:
    """Nor is its own model its average, without a word."""
    for first in (True, False):  # whether it is known before, or in the middle
        sums, number = table(), 2 * PIECES
        sums.asked["a"] = 2
        if first:
            sums.past("b", ROUNDS[:2])
            with pytest.raises(LinkError, match="client a has no average of round 2, which others went on from"):
                averaged(model("a"), EXAMPLES["a"], over(sums, [], "a"), 2)
            continue
        waits = sums.give("a", SumRequest(number, torch.ones(1, dtype=torch.int64)))
        sums.past("b", ROUNDS[:1])
        assert not waits.done()
        sums.past("b", ROUNDS[:2])
        with pytest.raises(LinkError, match="the server has lost it: give it a newer snapshot, or begin the run anew"):
            waits.result(1)


@pytest.mark.parametrize(
    ("number", "place", "what"),
    [
        (6, ("average", 1), "key of the group"),
        (7, ("meet", 0), "key of the group"),
        (2, ("meet", 0), "sums of a meeting"),
        (5, ("meet", 1), "sums of a meeting"),
    ],
)
def test_nor_for_a_key_or_a_meeting(number: int, place: tuple[str, int], what: str) -> None:
    sums = table()
    waits = sums.give("a", SumRequest(number, torch.ones(1, dtype=torch.int64)))
    sums.past("b", [])
    assert not waits.done()
    sums.past("b", [place])
    with pytest.raises(LinkError, match=f"client a has no {what}, which others went on from"):
        waits.result(1)
    with pytest.raises(LinkError, match=f"client a has no {what}, which others went on from"):
        sums.give("a", SumRequest(number, torch.ones(1, dtype=torch.int64)))


def test_who_met_nobody_says_nothing_of_a_meeting_that_goes_on() -> None:
    """It came when the others had agreed on their key, and has met by itself before they are through."""
    sums = SumTable()
    sums.open("ab")
    for name in "ab":
        sums.give(name, SumRequest(6, note="key"))
    sums.clients = ("a", "b", "c")
    sums._late = {"c"}
    waits = sums.give("a", SumRequest(0, torch.ones(1, dtype=torch.int64)))
    sums.past("c", [("meet", 0)])
    assert not waits.done()
    sums.give("b", SumRequest(0, torch.ones(1, dtype=torch.int64)))
    assert torch.equal(torch.as_tensor(waits.result(1).values_N), torch.tensor([2]))


def test_a_damaged_sum_is_named_and_a_full_disk_is_told(tmp_path: Path) -> None:
    lines: list[str] = []
    journal = Journal(tmp_path / "sums", "run", lines.append)
    reply = SumReply(torch.arange(-2, 5), {"a": "x", "b": "y"})
    assert journal.write(5, reply)
    assert journal.write(6, SumReply(None, {"a": "z"}))
    back = Journal(tmp_path / "sums", "run", print)
    assert back.numbers == [5, 6]
    assert torch.equal(torch.as_tensor(back.read(5).values_N), torch.arange(-2, 5))
    assert (back.read(5).notes, back.read(6)) == (reply.notes, SumReply(None, {"a": "z"}))
    file = tmp_path / "sums/run/5.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"5\.safetensors is not what was saved \(its SHA-256 differs\); delete it"):
        table(back)
    file.write_bytes(b"no")
    with pytest.raises(StorageError, match=r"5\.safetensors is no sum of clients"):
        table(back)
    (tmp_path / "file").touch()
    sums = table(Journal(tmp_path / "file", "run", lines.append))
    met(sums, [])
    assert "sum 65536 was not saved, so no client can have it again" in lines[0]
    sums.asked["a"] = 1
    assert equal(averaged(model("b"), 1, over(sums, [], "a"), 1), simulated(*NAMES))  # in memory it is


@pytest.mark.parametrize("value", [float("nan"), 2e3])
def test_weights_that_do_not_fit_are_refused(value: float) -> None:
    sums = SumTable()
    sums.open("a", rounds=1)
    sums.asked["a"] = 1
    with pytest.raises(TrainingError, match="finite weights below 1024"):
        averaged({"w": torch.tensor([value])}, 5, over(sums, [], "a"), 1)
    with pytest.raises(TrainingError, match="finite weights below 1024"):  # in a simulation, too: it would run over
        Mean().add({"w": torch.tensor([value])}, 0.1)


def test_who_comes_when_examples_are_counted_weighs_nothing_and_takes_the_average() -> None:
    """Not 500 times the only one who was there, which would run over in fixed point."""
    sums, seen = table(), list[tuple[str, SumRequest]]()
    sums._late, sums.asked = {"b", "c"}, dict.fromkeys(NAMES, 1)
    of = {name: {"w": torch.full((3,), 2.0 + ord(name))} for name in NAMES}
    alone = averaged(of["a"], 1, over(sums, seen, "a"), 1)
    assert all(torch.equal(averaged(of[name], 500, over(sums, seen, name), 1)["w"], of["a"]["w"]) for name in "bc")
    assert torch.equal(alone["w"], of["a"]["w"])


def test_who_is_late_for_a_piece_keeps_its_own_where_nobody_gave_a_share() -> None:
    """a has said in time how many examples it has; b, who has not, was alone in time for the weights."""
    sums, seen = table(), list[tuple[str, SumRequest]]()
    sums._late, sums.asked = {"b", "c"}, dict.fromkeys(NAMES, 1)
    of = {name: {"w": torch.full((3,), 2.0 + ord(name))} for name in NAMES}
    own = torch.tensor([5 * FINE], dtype=torch.float64)
    adder = over(sums, seen, "a")
    adder.give(PIECES, {"examples": own})()
    sums._late = {"a", "c"}
    for name in "ba":
        link = over(sums, seen, name)
        assert torch.equal(averaged(of[name], 5, link, 1)["w"], of[name]["w"])
        assert (link.everywhere, link.anywhere) == (set(), {"a", "b"})  # nobody is in both sums


def test_nobody_runs_ahead_or_holds_more_than_a_piece() -> None:
    sums = table()
    part, large = (SumRequest(0, torch.zeros(size, dtype=torch.int64)) for size in (2, asking.PIECE + 2))
    sums.asked = {"a": 1}
    for number, request, why in (
        (3 * PIECES, part, "was asked for another or none"),
        (PIECES + 1, part, "before the one before is there"),
        (PIECES, large, "has 131073 at most"),
    ):
        with pytest.raises(LinkError, match=why):
            sums.give("a", replace(request, number=number))


def test_a_sum_that_closes_when_newer_ones_are_there_is_answered() -> None:
    """After a restart of the server, whose averages were in memory: one client is at a later round than another."""
    sums = table()
    sums.asked = {"a": 3, "b": 1}
    ahead, behind = (
        sums.give(name, SumRequest(of * PIECES, torch.ones(1, dtype=torch.int64))) for name, of in sums.asked.items()
    )
    for of in (3, 1):
        sums._wait_no_more(of * PIECES, sums._given[of * PIECES])
    assert [len(future.result(1).notes) for future in (ahead, behind)] == [1, 1]


def test_clients_of_other_models_are_not_averaged() -> None:
    sums, links = table(), {}
    for name, alike in zip(NAMES, ("no, yes", "no, yes", "yes, no"), strict=True):
        links[name] = OverLink(Wire(name, sums, []), GROUP, "run", shares=True, alike=alike)  # type: ignore[arg-type]
    sums.asked = dict.fromkeys(NAMES, 1)
    with ThreadPoolExecutor(len(NAMES)) as pool:
        each = [pool.submit(averaged, model(name), 1, links[name], 1) for name in NAMES]
    for one in each:
        with pytest.raises(LinkError, match="trains another model than this client: names of classes"):
            one.result()


@pytest.mark.parametrize(
    ("sums", "why"),
    [([0.0], "all clients have 0 examples"), ([5.0, 0.0], "an average of 0"), ([5.0, 3.0], "an average of 3")],
)
def test_a_server_that_gives_no_average_is_refused(sums: list[float], why: str) -> None:
    """Nor is what it makes up taken where nobody is in a sum."""

    class Lying:
        late, answers = False, iter(sums)

        def give(self, _: int, values: dict[str, Tensor]) -> Any:
            told = next(self.answers)
            told *= FINE if "examples" in values else 1.0
            return lambda: {name: torch.full_like(value, told) for name, value in values.items()}

    with pytest.raises(LinkError, match=why):
        averaged({"w": torch.ones(2)}, 5, Lying(), 1)  # type: ignore[arg-type]
