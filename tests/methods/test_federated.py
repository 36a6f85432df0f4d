"""The baselines on a tiny BERT with dropout and AdamW: each against the case that it reduces to, bit for bit; the
budget, the bytes, and resuming."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexp.client.model import SplitModel
from flexp.client.personal import WholeModel
from flexp.client.trainer import Step
from flexp.errors import ConfigError
from flexp.methods.harness import Worker
from flexp.methods.two_sided import SplitHarness
from flexp.run.store import Store
from tests.tiny import CLIENTS

from .tools import ADAPTERS, ONE, equal, make, trained

TUNING = pytest.mark.parametrize("tuning", ["full", "lora"])
FEDERATED = [
    *("fedavg", "fedavg-ft", "fedbabu", "fedprox", "pfedme", "ditto", "fedper", "fedrep", "per-fedavg", "apfl"),
    "fedsa-lora",
]
SPLIT = ["splitfed-v1", "splitfed-v2", "splitlora", "split-fedavg", "splitft"]
BASELINES = ["centralized", "pretrained", *FEDERATED, "hetlora", *SPLIT]
SCHEDULED = {"personal": {"schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1}}


def of(method: Any, client: str) -> dict[str, Tensor]:
    """The personal weights of a client."""
    weights: dict[str, Tensor] = method.personal_weights(method.clients[client])
    return weights


def local(home: Path, client: str = "north", **settings: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = trained(home, "local", **settings).clients[client].model.personal_state()
    return weights


@TUNING
def test_fedavg_with_one_client_and_one_round_is_local_training(home: Path, tuning: str) -> None:
    settings: dict[str, Any] = {
        "rounds": 1,
        "data": ONE,
        "model": {"tuning": tuning},
        "train": {"steps_per_round": 5, "micro_batch": 3, **SCHEDULED},
    }
    method = trained(home, "fedavg", **settings)
    assert equal(method.server.weights, local(home, **settings))
    assert [step.loss for step in method.seen] == [step.loss for step in trained(home, "local", **settings).seen]


def test_centralized_with_one_client_is_local_training(home: Path) -> None:
    method = trained(home, "centralized", data=ONE, train=SCHEDULED)
    assert equal(method.model.personal_state(), local(home, data=ONE, train=SCHEDULED))


def test_fedprox_without_its_term_is_fedavg(home: Path) -> None:
    plain = trained(home, "fedavg", train=SCHEDULED)
    assert equal(trained(home, "fedprox", own={"mu": 0.0}, train=SCHEDULED).server.weights, plain.server.weights)
    other = trained(home, "fedprox", own={"mu": 1.0}, train=SCHEDULED)
    assert not equal(other.server.weights, plain.server.weights)


def test_ditto_without_its_term_is_local_training_beside_fedavg(home: Path) -> None:
    method = trained(home, "ditto", own={"lam": 0.0, "personal_steps": 3}, train={"steps_per_round": 5, **SCHEDULED})
    alone = trained(home, "local", train={"steps_per_round": 3, **SCHEDULED})
    for client in CLIENTS:
        assert equal(of(method, client), alone.clients[client].model.personal_state())
    plain = trained(home, "fedavg", train={"steps_per_round": 2, **SCHEDULED})
    assert equal(method.server.weights, plain.server.weights)


@TUNING
def test_fedper_with_everything_shared_is_fedavg(home: Path, tuning: str) -> None:
    model = {"tuning": tuning}
    method = trained(home, "fedper", own={"classifier": False}, model=model)
    assert equal(method.server.weights, trained(home, "fedavg", model=model).server.weights)
    assert method.account("north").personal_parameters == 0


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_the_last_layers_are_personal(home: Path, name: str) -> None:
    method = trained(home, name, own={"last_blocks": 1})
    personal = of(method, "north").keys() - method.server.weights.keys()
    assert personal == {key for key in method.harness.parameters if ".layer.3." in key or key.startswith("classifier.")}
    north, south = of(method, "north"), of(method, "south")
    assert all(torch.equal(north[key], south[key]) == (key not in personal) for key in north)


@pytest.mark.parametrize("variant", ["first-order", "hessian-free"])
def test_per_fedavg_without_an_inner_step_is_fedavg(home: Path, variant: str) -> None:
    method = trained(home, "per-fedavg", own={"alpha": 0.0, "variant": variant}, train=SCHEDULED)
    plain = trained(home, "fedavg", train=SCHEDULED)
    assert equal(method.server.weights, plain.server.weights)
    assert equal(of(method, "north"), plain.server.weights)


def test_the_hessian_free_difference_is_of_weights_alone(home: Path) -> None:
    """The two gradients of the difference see one batch and one dropout: their losses differ by about 2δ‖g‖²."""
    own = {"variant": "hessian-free", "delta": 1e-3}
    method = trained(home, "per-fedavg", own=own, data=ONE, train={"steps_per_round": 8}, rounds=1, budget="paper")
    losses = [step.loss for step in method.seen]
    norms = [step.norm for step in method.seen]
    assert len(losses) == 8 * 4
    for start in range(0, len(losses), 4):
        _, _, above, below = losses[start : start + 4]
        assert 0 < abs(above - below) < 2 * 2e-3 * norms[start + 1] * max(norms[start + 2 : start + 4])


def test_apfl_at_its_ends(home: Path) -> None:
    """α = 0 is FedAvg, α = 1 local training, with half of the steps each; the average is FedAvg's in any case."""
    half, double = {"steps_per_round": 2, **SCHEDULED}, {"steps_per_round": 4, **SCHEDULED}
    plain, alone = trained(home, "fedavg", train=half), trained(home, "local", train=half)
    for alpha in (0.0, 0.5, 1.0):
        method = trained(home, "apfl", own={"alpha": alpha, "alpha_lr": 0.0}, train=double)
        assert equal(method.server.weights, plain.server.weights)
        assert equal(of(method, "south"), plain.server.weights) == (alpha == 0.0)
        assert equal(of(method, "south"), alone.clients["south"].model.personal_state()) == (alpha == 1.0)


def test_apfl_holds_no_more_on_a_rounds_first_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of one shape that live while a gradient is computed: as many when α moves as when it does not."""
    shape, counts = (64, 32), list[int]()
    step = Worker.step

    def counted(self: Worker, **options: Any) -> Any:
        gc.collect()
        counts.append(sum(type(item) in (Tensor, nn.Parameter) and item.shape == shape for item in gc.get_objects()))
        return step(self, **options)

    monkeypatch.setattr(Worker, "step", counted)
    sgd = {"name": "sgd", "lr": 0.1}
    gc.freeze()  # only what comes from here on is looked through
    trained(home, "apfl", rounds=1, data=ONE, train={"steps_per_round": 8, "personal": sgd})
    assert len(counts) == 8
    assert len(set(counts[0::2])) == len(set(counts[1::2])) == 1


def test_apfl_adapts_its_mixture(home: Path) -> None:
    method = trained(home, "apfl", own={"alpha_lr": 10.0}, train={"steps_per_round": 4})
    alphas = {float(client.kept["mixture"]["alpha"]) for client in method.clients.values()}
    assert len(alphas) > 1
    assert all(0.0 <= alpha <= 1.0 for alpha in alphas)


@pytest.mark.parametrize("name", ["fedavg-ft", "fedbabu"])
def test_finetuning_alone_is_local_training(home: Path, name: str) -> None:
    """With as many fine-tuning steps as the run has, nothing is left to average."""
    method = trained(home, name, rounds=1)
    assert equal(of(method, "west"), local(home, "west", rounds=1))
    assert equal(method.server.weights, make(home, name).server.weights)


def test_a_head_that_stands_still(home: Path) -> None:
    """Until clients fine-tune: the body's average is that of FedAvg whose head learns at a rate of zero."""
    method = trained(home, "fedbabu", own={"finetune_steps": 2}, train={"steps_per_round": 3}, rounds=2)
    start, north, south = make(home, "fedbabu"), method.clients["north"], of(method, "south")
    head = {"classifier.weight", "classifier.bias"}
    assert head == north.kept["personal"].keys() == method.harness.parameters.keys() - method.server.weights.keys()
    assert equal(north.kept["personal"], start.clients["west"].kept["personal"])
    assert not equal({name: south[name] for name in head}, north.kept["personal"])
    assert method.account("north").personal_parameters == sum(value.numel() for value in south.values())


def test_fedsa_lora_with_one_client_and_one_round_is_local_training(home: Path) -> None:
    settings: dict[str, Any] = {"rounds": 1, "data": ONE, "model": {"tuning": "lora"}, "train": SCHEDULED}
    method = trained(home, "fedsa-lora", **settings)
    assert equal(of(method, "north"), local(home, **settings))
    assert all("lora_A" in name for name in method.server.weights)
    assert len(method.server.weights) == 6 * BLOCKS


def test_a_schedule_goes_on_across_rounds(home: Path) -> None:
    rates = {
        name: [step.lr for step in trained(home, name, data=ONE, train=SCHEDULED).seen] for name in ("local", "fedavg")
    }
    assert rates["local"] == rates["fedavg"]
    assert len(set(rates["local"])) > 3


def test_finetuning_goes_on_with_the_schedule_or_has_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = Worker.step

    def watched(self: Worker, **options: bool) -> Step:
        done = step(self, **options)
        rates.append(done.lr)
        return done

    monkeypatch.setattr(Worker, "step", watched)
    train = {"steps_per_round": 4, "personal": {"lr": 1.0, "schedule": "linear"}}
    whole, averaging = [(12 - n) / 12 for n in range(12)], [(8 - n) / 8 for n in range(8)]
    for own, expected in (
        ({}, whole),
        ({"finetune_lr": 0.5}, whole[:8] + [rate / 2 for rate in whole[8:]]),
        ({"finetune_schedule": "own"}, averaging + [(4 - n) / 4 for n in range(4)]),
        ({"finetune_schedule": "own", "finetune_lr": 0.5}, averaging + [(4 - n) / 8 for n in range(4)]),
    ):
        method = trained(
            home, "fedavg-ft", own=own, data=ONE, train=train, rounds=3
        )  # three rounds, the last four steps alone
        of(method, "north")
        assert rates == pytest.approx(expected)
        rates.clear()


@pytest.mark.parametrize("name", BASELINES)
def test_every_client_spends_the_budget_to_the_last_gradient(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of two gradient evaluations of four examples for each of three clients, whatever the method."""
    evaluated: list[int] = []
    calls: list[tuple[Any, str]] = [(WholeModel, "__call__"), (SplitHarness, "__call__"), (SplitModel, "forward")]
    for kind, name_of_call in calls:

        def counted(self: Any, call: Any = getattr(kind, name_of_call), **batch: Any) -> Any:
            if self.stage.model.training:
                evaluated.append(len(batch["labels"]))
            return call(self, **batch)

        monkeypatch.setattr(kind, name_of_call, counted)
    own = {"adapt_steps": 2} if name == "per-fedavg" else {}  # so that nothing remains
    method = trained(home, name, own=own, train={"steps_per_round": 2})
    task = method.world.federation.task if name != "pretrained" else None
    for client in CLIENTS:
        forward = method.personal(client)
        if task is not None:
            batch = task.collate(method.world.federation.clients[0].test[:2])
            batch.pop("labels")
            with torch.no_grad():  # as scoring does
                assert torch.equal(forward(batch).logits, forward(batch).logits)
    expected = 0 if name == "pretrained" else 4
    assert {method.account(client).gradient_evaluations for client in CLIENTS} == {expected}
    assert evaluated == [4] * (expected * len(CLIENTS))
    if name in (*FEDERATED, "hetlora", *SPLIT) and name not in ("fedavg-ft", "fedbabu", "per-fedavg"):
        assert Counter(step.client for step in method.seen) == dict.fromkeys(CLIENTS, 4)


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("fedavg-ft", {}, 12 + 4),
        ("pfedme", {"inner_steps": 3}, 12 * 3),
        ("ditto", {}, 12 + 12),
        ("fedrep", {}, 12 + 12),
        ("per-fedavg", {"variant": "hessian-free"}, 12 * 4 + 1),
        ("apfl", {}, 12 + 12),
    ],
)
def test_the_papers_budget_is_counted(home: Path, name: str, own: dict[str, Any], expected: int) -> None:
    method = trained(home, name, own=own, budget="paper", data=ONE, train={"steps_per_round": 4}, rounds=3)
    of(method, "north")
    assert method.account("north").gradient_evaluations == expected


def test_batches_are_those_of_local_training(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[list[int]]] = {}
    for name in ("local", "fedavg", "pfedme"):
        method = make(home, name, own={"inner_steps": 2} if name == "pfedme" else {}, data=ONE)
        worker = method.clients["north"] if name == "local" else method.clients["north"].workers["model"]
        order, seen[name] = worker._order, []
        indices = order.indices

        def noted(step: int, indices: Any = indices, found: Any = seen[name]) -> Any:
            found.append(indices(step))
            return found[-1]

        monkeypatch.setattr(order, "indices", noted)
        for number in (1, 2, 3):
            method.train_round(number, lambda step: None)
    assert seen["fedavg"] == seen["local"]
    assert seen["pfedme"] == [batch for batch in seen["local"][:3] for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "tuning", "new_lr"),
    [
        *((name, "lora" if name in ADAPTERS else "full", None) for name in BASELINES if name not in SPLIT),
        *((name, "lora", None) for name in ("fedavg", "fedper", "splitfed-v2", "split-fedavg")),
        *((name, "lora" if name in ADAPTERS else "full", 1e-2) for name in SPLIT),
    ],
)
def test_resumed_equals_undisturbed_and_scoring_disturbs_nothing(
    home: Path, tmp_path: Path, name: str, tuning: str, new_lr: float | None
) -> None:
    personal = SCHEDULED["personal"] | ({"new_lr": new_lr} if new_lr else {})
    settings: dict[str, Any] = {"train": {"steps_per_round": 2, "personal": personal}, "model": {"tuning": tuning}}
    whole = trained(home, name, **settings).state()
    settings["train"] = {**settings["train"], "rounds": 2}
    first, batch = make(home, name, **settings), None
    first.train_round(1, lambda step: None)
    if name != "pretrained":
        batch = first.world.federation.task.collate(first.world.federation.clients[0].test[:2])
        batch.pop("labels")
        scored = [first.personal(client)(batch).logits for client in CLIENTS]
    store = Store(tmp_path)
    store.save(1, first.state())
    second = make(home, name, **settings)
    second.load(store.load(1))
    if batch is not None:
        assert all(
            torch.equal(second.personal(client)(batch).logits, one) for client, one in zip(CLIENTS, scored, strict=True)
        )
    second.train_round(2, lambda step: None)
    resumed = second.state()
    apart = ("seconds", "meter/evaluation", "version", "adapted")  # what scoring leaves, and clocks
    assert whole.keys() == resumed.keys()
    for party, tensors in whole.items():
        kept = {key: value for key, value in tensors.items() if not any(word in key for word in apart)}
        assert kept
        assert equal(kept, {key: value for key, value in resumed[party].items() if key in kept})


HIDDEN, BLOCKS, LABELS, RANK = 32, 4, 2, 8


def test_bytes_are_the_tensors_sizes(home: Path) -> None:
    """Rounds × 4 bytes × what is shared, each way."""
    source = make(home, "pretrained").model.stage.model
    shapes = {name: value.shape for name, value in source.named_parameters()}
    full = sum(shape.numel() for name, shape in shapes.items() if ".embeddings." not in name)
    head = HIDDEN * LABELS + LABELS
    adapters = sum(RANK * sum(shape) for name, shape in shapes.items() if ".layer." in name and len(shape) == 2)
    assert sum(".layer." in name and len(shape) == 2 for name, shape in shapes.items()) == 6 * BLOCKS
    for name, tuning, numbers in (
        ("fedavg", "full", full),
        ("fedavg", "lora", adapters + head),
        ("fedper", "full", full - head),
        ("fedper", "lora", adapters),
        ("ditto", "full", full),
        ("apfl", "lora", adapters + head),
        ("fedsa-lora", "lora", 6 * BLOCKS * RANK * HIDDEN + BLOCKS * RANK * HIDDEN),  # one of six takes 2 H numbers
    ):
        method = trained(home, name, model={"tuning": tuning}, train={"steps_per_round": 2})
        account = method.account("north")
        assert (account.training.bytes_up, account.training.bytes_down) == (2 * 4 * numbers,) * 2
        assert account.training.exchanges == 2
        before = account.evaluation.bytes_down
        batch = method.world.federation.task.collate(method.world.federation.clients[0].test[:2])
        batch.pop("labels")
        for client in ("north", "south", "north"):
            method.personal(client)(batch)
        fetched = 0 if name == "ditto" else 4 * numbers  # once, however often it is asked
        assert method.account("north").evaluation.bytes_down - before == fetched
        assert method.account("north").training == account.training


def test_clients_share_one_set_of_modules(home: Path) -> None:
    method = make(home, "ditto")
    assert {id(worker.model) for client in method.clients.values() for worker in client.workers.values()} == {
        id(method.harness)
    }
    frozen = {value.data_ptr() for value in method.world.source.model.parameters()}
    own = {value.data_ptr() for value in method.harness.parameters.values()}
    rest = {value.data_ptr() for value in method.harness.stage.model.parameters()} - own
    assert rest <= frozen
    assert own.isdisjoint(frozen)


def test_no_optimiser_outlives_its_turn(home: Path) -> None:
    method = trained(home, "apfl")
    for client in method.clients.values():
        assert all(not worker.updater.parameters for worker in client.workers.values())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ditto", {"own": {"personal_steps": 2}}, r"ditto.personal_steps.*steps_per_round = 2"),
        ("fedrep", {"train": {"steps_per_round": 1}}, r"fedrep.head_steps.*leave no step"),
        ("fedrep", {"own": {"classifier": False}}, "nothing is personal"),
        ("fedper", {"own": {"last_blocks": 9}, "model": {"tuning": "lora"}}, r"last_blocks = 9 of 4 blocks"),
        ("fedavg-ft", {"own": {"finetune_steps": 99}}, r"finetune_steps = 99 is more than the run's 6 steps"),
        ("per-fedavg", {"own": {"adapt_steps": 9}}, r"adapt_steps = 9 is more than the run's 6"),
        ("fedprox", {"own": {"mu": -1.0}}, r"method.fedprox.mu"),
        ("apfl", {"own": {"alpha": 1.5}}, r"method.apfl.alpha"),
        ("pfedme", {"own": {"lambda": 1.5}}, r"lambda"),
        ("splitlora", {"model": {"tuning": "full"}}, r"splitlora .* needs model.tuning = 'lora'"),
        ("splitft", {"model": {"tuning": "full"}}, r"splitft .* needs model.tuning = 'lora'"),
        ("fedsa-lora", {"model": {"tuning": "full"}}, r"fedsa-lora .* needs model.tuning = 'lora'"),
        ("hetlora", {"model": {"tuning": "full"}}, r"hetlora .* needs model.tuning = 'lora'"),
        ("splitft", {"own": {"cut_rank": 9}}, r"cut_rank = 9 is larger than model.lora.rank = 8"),
        ("splitfed-v1", {"own": {"cut": 4}}, r"splitfed-v1: cut = \(4, 4\) does not fit a model of 4 blocks"),
        ("splitfed-v2", {"own": {"cut": 0}}, r"splitfed-v2: with a cut of 0 .*expose_embeddings"),
        ("hetlora", {"own": {"ranks": [2]}}, r"the list method.hetlora.ranks is gone: write data.clients.rank for all"),
    ],
)
def test_impossible_settings_are_named(home: Path, name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(home, name, **settings)
