"""Several exchanges of a step under way: the same numbers as one by one, and nothing waits that need not."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.client import trainer as trainer_module
from flexp.client.exchange import Piece
from flexp.client.overlap import overlapped
from flexp.config import AlignConfig, ServerConfig
from flexp.errors import ConfigError, LinkError, TrainingError
from flexp.links.emulated import EmulatedLink, Network
from flexp.links.messages import BackwardRequest, ForwardRequest
from flexp.links.opening import loopback
from flexp.methods import METHODS
from flexp.run.settle import build_world
from tests.harness import RecordingLink, World, equal, gradients, shared_weights, world
from tests.tiny import bert_folder, config

ONE = {"clients": {"names": ["north"], "each": [{"cut": [2, 3]}]}}


def method_of(home: Path, in_flight: int, **settings: Any) -> Any:
    train = {"batch_size": 7, "micro_batch": 2, "in_flight": in_flight, **settings.pop("train", {})}
    return METHODS["flexp-sfl"](build_world(config(home, train=train, **settings)))


def trained(home: Path, in_flight: int, **settings: Any) -> tuple[dict[str, Tensor], list[tuple[Any, ...]], Any]:
    """All weights after a round of two steps, the steps as told, and what crossed."""
    method = method_of(home, in_flight, **settings)
    steps: list[tuple[Any, ...]] = []
    method.train_round(1, lambda step: steps.append((step.loss, step.align, step.items, step.norm)))
    weights = {f"shared/{name}": value for name, value in method.server.shared.updater.parameters.items()}
    for client, trainer in method.clients.items():
        weights |= {f"{client}/{name}": value for name, value in trainer.model.personal_state().items()}
    meters = [trainer.model.link.meter.training for trainer in method.clients.values()]
    return weights, steps, [(meter.bytes_up, meter.bytes_down, meter.exchanges) for meter in meters]


@pytest.mark.parametrize(
    ("tuning", "align", "server", "in_flight"),
    [
        ("full", {"kind": "off"}, {}, 2),
        ("full", {"kind": "mse", "at": "every-block", "every": 2}, {"update": "mean", "mean_over": 2}, 4),
        ("lora", {"kind": "kl", "teach": True}, {"memory": "recompute"}, 4),
        ("full", {"kind": "weights"}, {}, 2),
    ],
    ids=lambda value: str(value.get("kind", "")) if isinstance(value, dict) else value,
)
def test_weights_losses_and_bytes_are_those_of_one_by_one(
    tmp_path: Path, tuning: str, align: dict[str, Any], server: dict[str, Any], in_flight: int
) -> None:
    """Four exchanges a step, the last of which is smaller; three clients, one of which has nothing to train below z."""
    bert_folder(tmp_path / "model")
    settings = {"model": {"tuning": tuning, "base_depth": 1}, "method": {"align": align}, "server": server}
    expected, steps, crossed = trained(tmp_path, 1, **settings)
    weights, told, bytes_ = trained(tmp_path, in_flight, **settings)
    assert equal(weights, expected)
    assert told == steps
    assert bytes_ == crossed


def pieces(here: World, count: int) -> list[tuple[Piece, dict[str, Tensor]]]:
    batches = [here.batch(seed, padding="right", length=5 + seed) for seed in range(count)]
    total = sum(range(1, count + 1))
    return [
        (Piece(number, count, number / total, number / total, number), batch)
        for number, batch in enumerate(batches, start=1)
    ]


def run(here: World, link: Any, most: int, count: int = 6) -> tuple[dict[str, Tensor], list[float]]:
    model = here.client("a", (3, 4), AlignConfig(kind="kl"), link=link)
    losses = [done.loss for done in overlapped(model, pieces(here, count), most, lambda loss: None)]
    assert model.steps.done == here.server.shared.version == 1
    return gradients(model.stage.trainable()) | shared_weights(here.server), losses


def test_every_link_gives_the_same_gradients() -> None:
    results = []
    for kind in ("in-process", "emulated", "grpc"):
        here = world("llama")
        if kind == "grpc":
            with loopback(here.server, "a") as link:
                results.append(run(here, link, 3))
            continue
        near: Any = here.server.connect("a")
        link = EmulatedLink(near, Network(latency_s=0.005, jitter_s=0.004)) if kind == "emulated" else near
        results.append(run(here, link, 1 if kind == "in-process" else 4))
        link.close()
    assert all(equal(weights, results[0][0]) and losses == results[0][1] for weights, losses in results[1:])


class _Watching(RecordingLink):
    """Counts the exchanges whose backward has not been answered."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.order: list[str] = []
        self.open = self.most = 0

    def call(self, request: Any) -> Any:
        if isinstance(request, ForwardRequest):
            self.open += 1
            self.most = max(self.most, self.open)
            self.order.append(f"forward {request.exchange & 0xFFFF}")
        future = self.inner.call(request)
        if isinstance(request, BackwardRequest):
            self.order.append(f"backward {request.exchange & 0xFFFF}")
            future.add_done_callback(lambda _: setattr(self, "open", self.open - 1))
        return future


class _Holding(_Watching):
    """Answers no forward before the third, unless nobody sends it."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.held: list[tuple[Future[Any], Future[Any]]] = []
        self.patience = threading.Timer(10.0, self._release, ["nobody sent a third"])

    def call(self, request: Any) -> Any:
        if not isinstance(request, ForwardRequest):
            return super().call(request)
        answer: Future[Any] = Future()
        self.held.append((answer, super().call(request)))
        if len(self.held) == 1:
            self.patience.start()
        if len(self.held) >= 3:
            self._release("three are here")
        return answer

    def _release(self, why: str) -> None:
        self.patience.cancel()
        self.order.append(why)
        for answer, inner in self.held:
            if not answer.done():
                answer.set_result(inner.result())


def test_heads_go_ahead_of_answers_up_to_the_bound() -> None:
    here = world("llama")
    link = _Holding(here.server.connect("a"))
    run(here, link, 3, count=4)
    assert link.order[:4] == ["forward 1", "forward 2", "forward 3", "three are here"]
    assert link.most == 3
    sent = [number for number in link.order if number.startswith("backward")]
    assert sent == [f"backward {number}" for number in (1, 2, 3, 4)]  # so sums on the server have one order


def test_gradients_go_up_before_other_heads() -> None:
    """Where answers are there at once, each tail comes before the next head."""
    here = world("llama")
    link = _Watching(here.server.connect("a"))
    run(here, link, 4, count=3)
    assert link.order == [f"{what} {number}" for number in (1, 2, 3) for what in ("forward", "backward")]


def test_the_servers_bound_is_kept() -> None:
    here = world("llama", config=ServerConfig(max_in_flight=2))
    link = _Watching(EmulatedLink(here.server.connect("a"), Network(latency_s=0.02)))
    run(here, link, 5)
    assert link.most == 2
    link.close()


def test_more_than_the_servers_bound_is_refused_in_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.in_flight = 9 is more than server.max_in_flight = 8"):
        config(tmp_path, train={"in_flight": 9})


@pytest.mark.parametrize("failing", [1, 3])
def test_a_step_that_fails_has_no_effect_and_may_be_tried_again(tmp_path: Path, failing: int) -> None:
    bert_folder(tmp_path / "model")
    results = []
    for fails in (False, True):
        method = method_of(tmp_path, 3, data=ONE)
        trainer = method.clients["north"]
        if fails:
            check, calls = trainer._check, []

            def broken(loss: Tensor, check: Any = check, calls: list[int] = calls) -> None:
                calls.append(1)
                check(loss if len(calls) != failing else loss * float("nan"))

            trainer._check = broken
            with pytest.raises(TrainingError, match="the loss is nan"):
                trainer.step()
            assert method.server.shared.version == trainer.steps == trainer.model.steps.done == 0
            assert not method.server._sessions["north"].pending
        trainer.step()
        results.append({**trainer.model.personal_state(), **method.server.shared.updater.parameters})
    assert equal(results[0], results[1])


def test_a_refused_gradient_ends_the_step() -> None:
    here = world("llama")
    model = here.client("a", (2, 4))
    before = shared_weights(here.server)
    broken = pieces(here, 3)
    broken[1] = (Piece(2, 3, float("nan"), 0.4, 2.0), broken[1][1])
    with pytest.raises(LinkError, match="not finite"):
        list(overlapped(model, broken, 2, lambda loss: None))
    assert equal(shared_weights(here.server), before)
    assert not here.server._sessions["a"].pending
    assert model.steps.done == 0
    list(overlapped(model, pieces(here, 3), 2, lambda loss: None))
    assert here.server.shared.version == 1


def test_a_batch_is_divided_by_what_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert_folder(tmp_path / "model")
    seen: list[int] = []
    inner = trainer_module.overlapped

    def watched(model: Any, parts: Any, *others: Any) -> Any:
        seen.extend(len(batch["labels"]) for _, batch in parts)
        return inner(model, parts, *others)

    monkeypatch.setattr(trainer_module, "overlapped", watched)
    method = METHODS["flexp-sfl"](build_world(config(tmp_path, data=ONE, train={"batch_size": 7, "in_flight": 3})))
    method.clients["north"].step()
    assert seen == [3, 3, 1]


def test_ordinary_loops_are_as_they_were() -> None:
    """loss.backward() in one piece, right after a step in pieces, waits for the server as ever."""
    here = world("llama")
    model = here.client("a", (2, 4))
    list(overlapped(model, pieces(here, 2), 2, lambda loss: None))
    model.zero_grad()
    model(**here.batch()).loss.backward()
    assert here.server.shared.version == 2
    assert all(value.grad is not None for value in model.stage.trainable().values())
    assert torch.isfinite(torch.stack([value.norm() for value in gradients(model.stage.trainable()).values()])).all()
