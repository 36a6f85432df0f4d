"""The split baselines on a tiny BERT: each against the case that it reduces to, bit for bit; averages, bytes, refusals.

Clipping is off where split and whole training are compared, since it is per party.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.errors import ConfigError, TrainingError
from flexp.kinds import KINDS
from flexp.methods import split_fedavg
from flexp.methods.ranks import average, fit
from flexp.methods.two_sided import SplitHarness
from tests.tiny import CLIENTS, bert_folder

from .tools import ADAPTERS, ONE, equal, make, trained

OPEN: dict[str, Any] = {"personal": {"clip": None}, "shared": {"clip": None}}
SGD: dict[str, Any] = {side: {"name": "sgd", "lr": 0.1, "clip": None} for side in ("personal", "shared")}
NEW: dict[str, Any] = {"personal": {"clip": None, "new_lr": 1e-2}, "shared": {"clip": None}}
L_SHAPED = ["splitfed-v1", "splitfed-v2", "splitlora"]
U_SHAPED = ["split-fedavg", "splitft"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model without dropout: a link's two sides draw it from streams of their own."""
    folder = tmp_path_factory.mktemp("split-methods")
    bert_folder(folder / "model")
    return folder


def everything(method: Any, client: str = "north") -> dict[str, Tensor]:
    """All trained weights that a client's personal model runs on."""
    if isinstance(method, split_fedavg.SplitFedAvg):
        return method.clients[client].model.personal_state() | dict(method.server.shared.updater.parameters)
    method._hold(method.clients[client])
    weights: dict[str, Tensor] = method.harness.take()
    return weights


def case(name: str, tuning: str) -> Any:
    return pytest.param(name, tuning, id=f"{name}-{tuning}")


@pytest.mark.parametrize(
    ("name", "tuning"),
    [
        case(name, tuning)
        for name in L_SHAPED + U_SHAPED
        for tuning in ("full", "lora")
        if tuning == "lora" or name not in ADAPTERS
    ],
)
def test_one_client_and_one_round_are_local_training(home: Path, plain: Path, name: str, tuning: str) -> None:
    folder = plain if name in U_SHAPED else home
    settings: dict[str, Any] = {
        "rounds": 1,
        "data": ONE,
        "model": {"tuning": tuning},
        "train": {"steps_per_round": 5, "micro_batch": 3, **OPEN},
    }
    method = trained(folder, name, own={"cut_rank": 8} if name == "splitft" else {}, **settings)
    local = trained(folder, "local", **settings)
    assert equal(everything(method), local.clients["north"].model.personal_state())
    assert [step.loss for step in method.seen] == [step.loss for step in local.seen]
    if name == "splitfed-v1":  # the others are local training's, too
        central = trained(folder, "centralized", **settings)
        assert equal(everything(method), central.model.personal_state())


@pytest.mark.parametrize("name", ["splitfed-v1", "splitfed-v2", "split-fedavg"])
def test_one_client_without_optimiser_state_is_local_training_for_ever(plain: Path, name: str) -> None:
    """Three rounds of plain SGD, which has nothing that begins anew with a round."""
    settings: dict[str, Any] = {"rounds": 3, "data": ONE, "train": SGD}
    local = trained(plain, "local", **settings).clients["north"].model.personal_state()
    assert equal(everything(trained(plain, name, **settings)), local)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_splitfed_v1_is_fedavg(home: Path, tuning: str) -> None:
    settings: dict[str, Any] = {"model": {"tuning": tuning}, "train": OPEN}
    plain = trained(home, "fedavg", **settings)
    method = trained(home, "splitfed-v1", own={"cut": 1 if tuning == "full" else 3}, **settings)
    assert equal(method.server.weights, plain.server.weights)
    assert equal(everything(method, "west"), plain.server.weights)


@pytest.mark.parametrize(
    ("name", "tuning"),
    [(name, "lora" if name in ADAPTERS else "full") for name in L_SHAPED + U_SHAPED],
)
def test_one_client_whose_head_has_a_rate_of_its_own_is_local_training(
    home: Path, plain: Path, name: str, tuning: str
) -> None:
    """Whichever side has the head, and set for the personal side alone; several rounds, of plain SGD."""
    folder = plain if name in U_SHAPED else home
    train = {side: dict(table) for side, table in SGD.items()}
    train["personal"]["new_lr"] = 1.0
    settings: dict[str, Any] = {"rounds": 3, "data": ONE, "train": train, "model": {"tuning": tuning}}
    method = trained(folder, name, own={"cut_rank": 8} if name == "splitft" else {}, **settings)
    weights = everything(method)
    local = trained(folder, "local", **settings).clients["north"].model.personal_state()
    assert equal(weights, local)
    del train["personal"]["new_lr"]
    slow = trained(folder, "local", **settings).clients["north"].model.personal_state()
    del settings["rounds"]
    start = make(folder, "local", **settings).clients["north"].model.personal_state()
    moved = [(one["classifier.weight"] - start["classifier.weight"]).norm().item() for one in (weights, slow)]
    assert moved[0] > 3 * moved[1]


def test_splitfed_v1_with_a_rate_of_the_head_is_fedavg(home: Path) -> None:
    """The server's own rate for new weights counts first, then the clients'."""
    expected = trained(home, "fedavg", train=NEW).server.weights
    assert equal(trained(home, "splitfed-v1", train=NEW).server.weights, expected)
    assert not equal(trained(home, "fedavg", train=OPEN).server.weights, expected)
    own = {"personal": {**NEW["personal"], "new_lr": 1.0}, "shared": {**NEW["shared"], "new_lr": 1e-2}}
    assert equal(trained(home, "splitfed-v1", train=own).server.weights, expected)


def test_splitfed_v1_and_v2_with_one_client(home: Path) -> None:
    """One round of AdamW; with several the one's server begins anew and the other's does not."""
    settings: dict[str, Any] = {"data": ONE, "train": OPEN}
    first, second = (trained(home, name, rounds=1, **settings) for name in ("splitfed-v1", "splitfed-v2"))
    assert equal(everything(first), everything(second))
    first, second = (trained(home, name, rounds=2, **settings) for name in ("splitfed-v1", "splitfed-v2"))
    assert not equal(everything(first), everything(second))


def test_splitlora_with_one_client_and_no_average_is_local_training(home: Path) -> None:
    """Averaging after the last round only: both optimisers last until then."""
    settings: dict[str, Any] = {"data": ONE, "rounds": 3, "train": OPEN, "model": {"tuning": "lora"}}
    method = trained(home, "splitlora", own={"average_every": 3}, **settings)
    assert equal(everything(method), trained(home, "local", **settings).clients["north"].model.personal_state())


def test_the_two_sides(home: Path) -> None:
    method = make(home, "splitfed-v2", own={"cut": 2}, model={"train_embeddings": True})
    bench: SplitHarness = method.harness
    assert bench.client_side | bench.server_side == bench.parameters.keys()
    assert bench.client_side == {
        name for name in bench.parameters if "embeddings." in name or ".layer.0." in name or ".layer.1." in name
    }
    assert make(home, "splitfed-v1").cut == 1  # the smallest of 1, 2 and 3


def test_split_fedavg_is_flexp_sfl_and_an_average(plain: Path) -> None:
    """One round on the common cut without alignment; then head and tail are the mean by examples, the middle is not."""
    common = {"clients": {"each": [{"cut": [1, 4]}]}}
    split = make(plain, "flexp-sfl", data=common, train={"rounds": 1}, align={"kind": "off"})
    split.train_round(1, lambda step: None)
    method = make(plain, "split-fedavg", train={"rounds": 1})
    method.examples = {"north": 1, "south": 2, "west": 5}
    method.train_round(1, lambda step: None)
    assert equal(method.server.shared.updater.parameters, split.server.shared.updater.parameters)
    parts = {name: split.clients[name].model.personal_state() for name in CLIENTS}
    for name, value in parts["north"].items():
        mean = (value.double() + 2 * parts["south"][name].double() + 5 * parts["west"][name].double()) / 8
        for client in CLIENTS:
            own = method.clients[client].model.personal_state()[name]
            torch.testing.assert_close(own, mean.float(), rtol=1e-6, atol=1e-9)
    assert not equal(parts["north"], method.clients["north"].model.personal_state())


def test_splitft_averages_what_several_hold(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """North has block 0 at rank 4, next to its cut; south block 0 at 8 and block 1 at 4; nobody has a tail."""
    seen: list[Any] = []

    def noted(parts: Any, examples: Any) -> Any:
        seen.append({client: {name: value.clone() for name, value in part.items()} for client, part in parts.items()})
        return average(parts, examples)

    monkeypatch.setattr(split_fedavg, "average", noted)
    data = {"clients": {"names": ["north", "south"], "each": [{"cut": [1, 4]}, {"cut": [2, 4]}]}}
    method = make(plain, "splitft", data=data, train={"rounds": 1})
    method.examples = {"north": 1, "south": 3}
    method.train_round(1, lambda step: None)
    north, south = seen[0]["north"], seen[0]["south"]
    after = {client: method.clients[client].model.personal_state() for client in ("north", "south")}
    checked = 0
    for name, value in south.items():
        if ".layer.1." in name:
            rank = value.shape[0] if "lora_A" in name else value.shape[1]
            assert rank == 4
            assert name not in north
            assert torch.equal(after["south"][name], value)
        elif "lora_A" in name:
            assert (len(north[name]), len(value)) == (4, 8)
            torch.testing.assert_close(after["south"][name][4:], 0.75 * value[4:])
            torch.testing.assert_close(after["south"][name][:4], 0.25 * north[name] + 0.75 * value[:4])
            assert torch.equal(after["north"][name], after["south"][name][:4])
            checked += 1
        elif "lora_B" in name:
            assert torch.equal(after["north"][name], after["south"][name][:, :4])
            assert torch.equal(fit(after["north"][name], value.shape)[:, :4], after["south"][name][:, :4])
            checked += 1
        else:
            torch.testing.assert_close(after["north"][name], 0.25 * north[name] + 0.75 * value)
    assert checked == 2 * 6


def test_splitft_starts_from_the_first_rows_of_the_full_adapter(plain: Path) -> None:
    data = {"clients": {"names": ["north"], "each": [{"cut": [2, 3]}]}}
    low = make(plain, "splitft", data=data).clients["north"].model
    full = make(plain, "splitft", data=data, own={"cut_rank": 8}).clients["north"].model
    ranks = {}
    for name, value in low.personal_state().items():
        if "lora_A" in name:
            assert torch.equal(value, full.personal_state()[name][: len(value)])
            ranks[low.stage.block_of(name)] = len(value)
    assert ranks == {0: 8, 1: 4, 3: 4}
    layers = [module for module in low.stage.model.modules() if hasattr(module, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {16.0 / 8}


@pytest.mark.parametrize("name", L_SHAPED)
def test_bytes_of_an_l_shape(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations, masks (a byte an entry) and labels up, gradients down, and the client's side both ways."""
    shapes: list[tuple[int, int, int]] = []
    call = SplitHarness.__call__

    def noted(self: SplitHarness, **batch: Any) -> Any:
        if self.stage.model.training:
            shapes.append((*batch["input_ids"].shape, KINDS["sequence-classification"].items(batch)))
        return call(self, **batch)

    monkeypatch.setattr(SplitHarness, "__call__", noted)
    method = trained(home, name, data=ONE)
    side = 4 * sum(method.harness.parameters[key].numel() for key in method.harness.client_side)
    hidden = sum(4 * 32 * examples * length for examples, length, _ in shapes)
    masks = sum(examples * length for examples, length, _ in shapes)
    labels = sum(8 * items for *_, items in shapes)
    traffic = method.account("north").training
    assert len(shapes) == 2 * 2
    assert traffic.bytes_up == hidden + masks + labels + 2 * side
    assert traffic.bytes_down == hidden + 2 * side
    assert traffic.exchanges == len(shapes) + 2
    before = method.account("north").evaluation.bytes_down
    batch = method.world.federation.task.collate(method.world.federation.clients[0].test[:2])
    batch.pop("labels")
    for _ in range(2):
        method.personal("north")(batch)
    scored = method.account("north").evaluation
    assert scored.bytes_down - before == side + 2 * (2 * 2 * 4)  # the average once, and logits
    assert scored.bytes_up == 2 * batch["input_ids"].numel() * (4 * 32 + 1)
    assert method.account("north").training == traffic


def test_splitlora_sends_adapters_when_they_are_averaged(home: Path) -> None:
    plain = trained(home, "splitlora", rounds=4, data=ONE).account("north").training
    method = trained(home, "splitlora", own={"average_every": 2}, rounds=4, data=ONE)
    side = 4 * sum(method.harness.parameters[key].numel() for key in method.harness.client_side)
    rare = method.account("north").training
    assert (plain.bytes_up - rare.bytes_up, plain.bytes_down - rare.bytes_down) == (2 * side, 2 * side)


@pytest.mark.parametrize("name", U_SHAPED)
def test_bytes_of_a_u_shape(plain: Path, name: str) -> None:
    """What the link carries without averages, and every round head and tail both ways; no label."""
    settings: dict[str, Any] = {"data": ONE, "own": {"cut_rank": 8} if name == "splitft" else {}}
    method = trained(plain, name, model={"tuning": "lora"}, **settings)
    local = 4 * sum(value.numel() for value in method.clients["north"].model.personal_state().values())
    account = method.account("north").training
    task, data = method.world.federation.task, method.world.federation.clients[0]
    crossed = 0
    for step in range(4):
        batch = task.collate([data.train[index] for index in method.clients["north"]._order.indices(step)])
        crossed += batch["input_ids"].numel()
    assert account.bytes_up == 2 * 4 * 32 * crossed + crossed + 2 * local
    assert account.bytes_down == 2 * 4 * 32 * crossed + 2 * local
    method.personal("north")(batch)
    fetched = method.account("north").evaluation.bytes_down
    method.personal("north")(batch)
    assert fetched - local == method.account("north").evaluation.bytes_down - fetched


def test_a_failed_step_leaves_no_gradient_on_either_side(home: Path) -> None:
    method = make(home, "splitfed-v2", data=ONE, train={"micro_batch": 2})
    worker, calls = method.clients["north"].workers["model"], []
    check = worker._check

    def failing(loss: Tensor) -> None:
        calls.append(1)
        check(loss if len(calls) != 2 else loss * float("nan"))

    worker._check = failing
    with pytest.raises(TrainingError, match="the loss is nan"):
        method.train_round(1, lambda step: None)
    assert len(calls) == 2
    assert all(parameter.grad is None for parameter in method.harness.parameters.values())
    assert method.updates == method.lasting.steps == 0


def test_a_head_tied_to_trained_embeddings_is_refused(home: Path) -> None:
    method = make(home, "splitfed-v1", model={"train_embeddings": True})
    bench, model = method.harness, method.harness.stage.model
    model.get_output_embeddings = model.get_input_embeddings
    with pytest.raises(ConfigError, match=r"train_embeddings = true: this model's head is tied"):
        SplitHarness(bench.stage, 1)
