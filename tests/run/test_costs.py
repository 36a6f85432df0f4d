"""Counted operations against a count by hand, and the parts of a split step against the whole one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexp.client.personal import WholeModel
from flexp.client.trainer import split_model_of
from flexp.cost.choice import ExchangeCost
from flexp.cost.clock import SPLIT_ASYNC
from flexp.cost.counting import counting
from flexp.cost.echo import random_batch
from flexp.cost.model_cost import model_cost
from flexp.cost.probe import Probe
from flexp.links.base import Traffic
from flexp.methods.base import Account
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.methods.parties import own_stage
from flexp.models.anatomy import Part
from flexp.run.costs import Costs
from flexp.run.settle import build_world
from flexp.run.virtual import client_work
from tests.tiny import bert_folder, config, each

OFF = {"align": {"kind": "off"}}
SOME = [[1, 3], [2, None], [3, 4]]
CUTS = {"clients": each(cut=SOME)}


def costs(home: Path, name: str = "flexp-sfl", **changes: Any) -> Costs:
    """Of a run."""
    settings = {"data": CUTS, **changes}
    settings["method"] = {"name": name, **changes.get("method", OFF)}
    return Costs(build_world(config(home, **settings)))


def total(cost: ExchangeCost) -> float:
    return cost.client_step + cost.server_step


def test_a_block_is_counted_as_by_hand(home: Path) -> None:
    """A forward: four H × H projections, two of the MLP, and attention as two products of T × T × H."""
    stage = own_stage(build_world(config(home)), Part.whole(4))
    size = stage.model.config
    examples, length, width, inner = 2, 6, size.hidden_size, size.intermediate_size
    probe = Probe("", "sequence-classification", None, examples, length, None, {}, {})
    model = WholeModel(stage)
    with counting() as flops:
        model(**random_batch(probe, size))
        forward = flops()
    tokens = examples * length
    block = 2 * tokens * (4 * width**2 + 2 * width * inner) + 2 * 2 * tokens * length * width
    ends = 2 * examples * (width**2 + width * size.num_labels)  # the pooler and the classifier, on one token
    assert forward == 4 * block + ends


@pytest.mark.parametrize("rank", [None, 4])
def test_what_the_planner_counts_without_weights_is_what_runs(home: Path, rank: int | None) -> None:
    """Piece by piece on tensors without content, and in a step of client and server: the same operations."""
    model = {} if rank is None else {"tuning": "lora", "lora": {"rank": rank}}
    found = costs(home, model=model)
    for name, (start, stop) in found.world.cuts.items():
        examples, length, _ = found.shape(name)
        cost = model_cost(str(home / "model"), "sequence-classification", length=length).exactly(examples, rank)
        head = [cost.first, *cost.blocks[1:start]]
        middle, tail = cost.blocks[start:stop], [*cost.blocks[stop:], cost.head]
        real = found.of(name)
        assert real.before == sum(piece.forward_flops for piece in head)
        assert real.server_forward == sum(piece.forward_flops for piece in middle)
        assert real.between == sum(piece.forward_flops + piece.backward_flops for piece in tail)
        assert real.server_backward == sum(piece.backward_flops for piece in middle)
        assert real.after == sum(piece.backward_flops for piece in head)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", ["flexp-sfl", "splitfed-v1"], ids=["ends", "start"])
def test_the_parts_of_a_split_step_are_the_whole_step(home: Path, tuning: str, name: str) -> None:
    model = {"tuning": tuning}
    whole = costs(home, "fedavg", model=model)
    split = costs(home, name, model=model)
    for client in ("north", "south", "west"):
        one, other = whole.of(client), split.of(client)
        assert one.server_step == 0.0
        assert other.server_step > 0.0 < other.client_step
        assert total(other) == pytest.approx(total(one))
    assert other.weights < one.weights


def test_deeper_cuts_leave_more_to_the_client(home: Path) -> None:
    found = costs(home, data={"clients": {"each": [{"cut": [1, 4]}, {"cut": [2, 4]}, {"cut": [3, 4]}]}})
    one, two, three = (found.of(name) for name in ("north", "south", "west"))
    assert one.client_step < two.client_step < three.client_step
    assert one.server_step > two.server_step > three.server_step
    assert one.server_forward - two.server_forward == pytest.approx(two.server_forward - three.server_forward)
    assert one.server_forward == pytest.approx(3 * three.server_forward)


def test_messages_are_those_of_the_protocol(home: Path) -> None:
    found = costs(home)
    cost = found.of("north")
    examples, length, _ = found.shape("north")
    activation = examples * length * 32 * 4
    assert (cost.forward_up, cost.forward_down) == (activation + examples * length, activation)
    assert (cost.backward_up, cost.backward_down) == (activation, activation)
    assert costs(home, "splitfed-v1").of("north").forward_up == activation + examples * length + examples * 8


def test_alignment_is_the_servers_work_and_one_more_upload(home: Path) -> None:
    plain = costs(home).of("west")
    aligned = costs(home, method={"align": {"kind": "kl"}}).of("west")  # blocks 1 and 2 of s = 3 have a teacher
    assert aligned.client_step == plain.client_step
    assert aligned.server_forward == pytest.approx(3 * plain.server_forward)  # one block of its own, two as teacher
    assert aligned.server_backward == plain.server_backward
    pulled = costs(home, method={"align": {"kind": "weights"}}).of("west")
    assert pulled.server_step == plain.server_step
    assert 0 < pulled.pull_down < pulled.weights
    assert aligned.forward_up > plain.forward_up == pulled.forward_up


def test_micro_batches_are_more_exchanges_of_less(home: Path) -> None:
    one = costs(home).of("north")
    two = costs(home, train={"micro_batch": 2}).of("north")
    assert two.exchanges == 2 * one.exchanges == 2
    assert two.forward_up < one.forward_up


def test_a_frozen_body_costs_no_gradients_of_its_own(home: Path) -> None:
    found = costs(home, "fedrep")
    head = {name for name in own_stage(found.world, Part.whole(4)).trainable() if name.startswith("classifier")}
    assert head
    whole, only_head = found.of("north"), found.of("north", head)
    assert only_head.client_step < 0.4 * whole.client_step  # a forward, and next to nothing back


def test_equal_shapes_are_counted_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = costs(home, "fedavg")
    calls = 0
    count = Costs._count

    def counted(self: Costs, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return count(self, *arguments)

    monkeypatch.setattr(Costs, "_count", counted)
    shapes = {found.shape(data.name)[:2] for data in found.world.federation.clients}
    for data in found.world.federation.clients * 2:
        found.of(data.name)
    assert calls == len(shapes)


def test_a_recomputing_server_computes_its_forward_twice(home: Path) -> None:
    keep = costs(home).of("north")
    again = costs(home, server={"memory": "recompute"}).of("north")
    assert again.server_backward == pytest.approx(keep.server_backward + keep.server_forward)
    assert replace(again, server_backward=keep.server_backward) == keep


def test_adapters_cost_what_the_clients_rank_does(home: Path) -> None:
    """Ranks 2 and 16 in turn: each client costs what it does where all have its rank."""
    found = costs(home, "hetlora", model={"tuning": "lora"}, data={"clients": each(cut=SOME, rank=[2, 16])})
    for name, rank in (("north", 2), ("south", 16), ("west", 2)):
        alone = costs(home, "fedavg", model={"tuning": "lora", "lora": {"rank": rank}}).of(name)
        assert found.of(name) == alone


def test_lower_ranks_beside_the_cut_cost_less(home: Path) -> None:
    lora = {"tuning": "lora"}
    full = costs(home, "splitft", model=lora, method={"splitft": {"cut_rank": 8}}).of("north")
    half = costs(home, "splitft", model=lora, method={"splitft": {"cut_rank": 4}}).of("north")
    assert full == costs(home, "flexp-sfl", model=lora).of("north")
    # North has blocks 0 and 3, both next to its cut (1, 3): of all its adapters half, the classifier whole.
    stage = own_stage(found_world(home, lora), Part.client((1, 3), 4))
    adapters = sum(4 * value.numel() for name, value in stage.trainable().items() if "lora_" in name)
    assert full.weights - half.weights == adapters // 2
    assert half.client_step < full.client_step
    assert half.server_step == full.server_step


def found_world(home: Path, model: dict[str, Any]) -> Any:
    return build_world(config(home, model=model))


def test_kept_examples_cost_their_numbers(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    method = {**OFF, "personal": {"frozen_head_blocks": 1}}
    found = costs(tmp_path, data={"clients": {"cut": [1, 4]}}, link={"cache": "memory"}, method=method)
    cost, (examples, length, _) = found.of("north"), found.shape("north")
    numbers = 2 * examples * length + 8 * examples + examples  # mask, rows that are read, numbers, what is fresh
    assert (cost.later_up, cost.forward_up) == (numbers, examples * length * 32 * 4 + numbers)
    assert (cost.backward_down, cost.later_before, cost.epoch) == (0, 0, 3)
    assert cost.before > 0
    assert costs(tmp_path, link={"cache": "memory"}).of("north").later_up is None  # its head is trained
    traffic = Traffic(bytes_up=int(9 * cost.backward_up + 3 * cost.forward_up + 6 * numbers))
    steps = Account(0, traffic, Traffic(), 0.0, 0.0)
    work = client_work(cost, steps, [3, 3, 3], SPLIT_ASYNC)
    assert (work.forward_up, work.later_up, work.backward_up) == (cost.forward_up, numbers, cost.backward_up)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("pool", [True, False])
def test_what_a_defence_keeps_at_home_is_not_counted(home: Path, *, pool: bool, gradients: bool) -> None:
    """Of a pooled text one vector, whatever its length, and of what is not sent nothing: as it crosses."""
    privacy = {"pool": pool, "gradients": gradients}
    found = costs(home, model={"id": str(home / "model"), "pooling": "mean"}, privacy=privacy)
    name = found.world.participants[0].name
    examples, length, exchanges = found.shape(name)
    cost, vectors = found.of(name), examples * (1 if pool else length)
    hidden = found.world.source.anatomy.hidden
    assert cost.forward_up == vectors * (4 * hidden + 1)  # and the mask
    assert cost.backward_up == (vectors * 4 * hidden if gradients else 0)
    assert cost.combined == (not gradients)
    assert (cost.server_backward == 0) == (not gradients)
    trainer = FlexpSfl(found.world).clients[name]
    trainer.step()
    crossed = split_model_of(trainer).link.meter.training
    if pool:
        assert (crossed.bytes_up, crossed.bytes_down) == (
            exchanges * (cost.forward_up + cost.backward_up), exchanges * (cost.forward_down + cost.backward_down)
        )  # fmt: skip
    else:
        assert crossed.bytes_up < (2.1 if gradients else 1.1) * exchanges * examples * 16 * 4 * hidden
