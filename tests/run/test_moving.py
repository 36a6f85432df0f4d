"""A client whose device changes while it trains over a network: it moves its cut, and nothing is lost or done twice."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tools.tiny_run import tiny_run
from flexp.client.trainer import Trainer
from flexp.config import DeploymentConfig, RecutConfig, RunConfig
from flexp.errors import LinkError, StorageError, TrainingError
from flexp.limits import out_of_memory
from flexp.models.stage import Stage
from flexp.planner.policy import Situation
from flexp.report.metrics import read
from flexp.run import recutting
from flexp.run.recutting import Mover, in_words
from flexp.run.store import Store

from .tools import Client, Server, plain

NAME = "west"
DEPLOYMENT = DeploymentConfig(schedule="free", clients=[NAME], save_every=4, keep=50)
BIG = 1 << 40


def config(folder: Path, **recut: Any) -> RunConfig:
    base = tiny_run(folder, rounds=2, steps_per_round=12, dropout=0.1)
    clients = base.data.clients.model_copy(update={"names": [NAME], "cut": (3, 4), "each": []})
    rules = RecutConfig(on=True, **{"every": 1, "patience": 1, "pause": 4, **recut})
    model = base.model.model_copy(update={"base_depth": 1})
    data = base.data.model_copy(update={"clients": clients})
    return base.model_copy(update={"data": data, "recut": rules, "model": model})


@pytest.fixture
def situations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Situation]]:
    """From which step on the device is in which situation."""
    told: list[tuple[int, Situation]] = [(0, Situation(BIG))]
    monkeypatch.setattr("flexp.cost.memory.OVERHEAD", 0)  # so that a tiny model's tensors count

    def scripted(self: Mover) -> Situation:
        return next(now for step, now in reversed(told) if step <= self.trainer.steps)

    monkeypatch.setattr(Mover, "_situation", scripted)
    return told


def moves(state: Path) -> list[dict[str, Any]]:
    return [record for record in read(state / "metrics.jsonl") if record["kind"] == "move"]


def kept(cut: list[int]) -> int:
    """Blocks of the client's own, of four."""
    return cut[0] + 4 - cut[1]


def peak_of(mover_config: RunConfig, cut: tuple[int, int], micro: int) -> int:
    from flexp.cost.choice import Choice
    from flexp.planner.model import ModelCosts
    from flexp.run.planned import auto_fleet
    from flexp.run.settle import model_folder, settle_client

    fleet = auto_fleet(mover_config, settle_client(mover_config, NAME, (3, 4)).run.federation)
    costs = ModelCosts(model_folder(mover_config), fleet.task, fleet.choices, fleet.server)
    return costs.predict(fleet.devices[0].profile, Choice(cut, micro, 4 // micro)).memory_bytes


def test_it_sheds_when_memory_is_short_and_takes_back_what_it_gave_when_that_pays(
    tmp_path: Path, situations: list[tuple[int, Situation]]
) -> None:
    settings = config(tmp_path, gain=0.05)
    small = peak_of(settings, (1, 4), 1)
    situations += [
        (8, Situation(int(1.2 * small))),  # less than (3, 4) takes, whatever the exchange
        (15, Situation(BIG, server=1e6)),  # memory is back, and the server has become slow
    ]
    situations[0] = (0, Situation(BIG, server=1e6))  # deep pays from the beginning
    server = Server(settings, DEPLOYMENT, tmp_path / "server")
    client = Client(settings, DEPLOYMENT, NAME, plain(server), tmp_path / "client")
    client.join()
    server.end()
    found = moves(tmp_path / "client")
    shed, last = next(record for record in found if record["why"] == "memory"), found[-1]
    assert shed["step"] == 8
    assert kept(shed["cut"]) < kept(shed["before"])
    assert (last["why"], kept(last["cut"])) == ("gain", 3)
    assert last["step"] >= 15
    assert last["restored"]  # as it left them
    assert all(in_words(record).startswith(NAME) for record in found)
    steps = [record["step"] for record in read(tmp_path / "client" / "metrics.jsonl") if record["kind"] == "step"]
    assert steps == list(range(1, 25))
    assert server.server.clients[NAME].progress.newest == 24  # each once


def test_stopped_after_a_move_it_goes_on_with_the_cut_that_it_has(
    tmp_path: Path, situations: list[tuple[int, Situation]]
) -> None:
    settings = config(tmp_path, gain=1.0)  # for want of memory only
    situations.append((5, Situation(int(1.2 * peak_of(settings, (1, 4), 1)))))
    server = Server(settings, DEPLOYMENT, tmp_path / "server")
    client = Client(settings, DEPLOYMENT, NAME, plain(server), tmp_path / "client")
    snapshots = Store(tmp_path / "client" / "snapshots", 50)
    while not (tmp_path / "client" / "metrics.jsonl").exists() or not moves(tmp_path / "client"):
        assert client.thread.is_alive()
    client.stop.set()
    client.join()
    moved = moves(tmp_path / "client")[0]["cut"]
    newest = snapshots.newest_whole()
    assert newest is not None
    assert newest.facts["cut"] == moved != [3, 4]
    again = Client(settings, DEPLOYMENT, NAME, plain(server), tmp_path / "client")
    again.join()
    server.end()
    assert again.over
    steps = [record["step"] for record in read(tmp_path / "client" / "metrics.jsonl") if record["kind"] == "step"]
    assert steps == list(range(1, 25))
    assert len(moves(tmp_path / "client")) == 1  # it was not moved back to the configuration's cut and again


def test_a_move_that_the_server_refuses_is_told_once_and_training_goes_on(
    tmp_path: Path, situations: list[tuple[int, Situation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, gain=1.0)  # for want of memory only
    small = int(1.2 * peak_of(settings, (1, 4), 1))
    situations.append((5, Situation(small)))

    def refused(*_: Any) -> Any:
        raise LinkError("the server has other blocks now")

    monkeypatch.setattr(recutting, "recut", refused)
    server = Server(settings, DEPLOYMENT, tmp_path / "server")
    client = Client(settings, DEPLOYMENT, NAME, plain(server), tmp_path / "client")
    client.join()
    server.end()
    assert client.over
    told = [record for record in read(tmp_path / "client" / "metrics.jsonl") if record["kind"] == "refused move"]
    assert 1 <= len(told) <= 4  # the other cuts, each once
    assert len({tuple(record["cut"]) for record in told}) == len(told)
    assert all("other blocks" in record["why"] for record in told)
    assert all(record["cut"] == [3, 4] for record in moves(tmp_path / "client"))  # what is left is smaller exchanges


def allocate(_: Any = None) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "where",
    ["between exchanges", "client's block", "server's block", "server's block, backward", "server, of several blocks"],
)
def test_a_step_that_runs_out_of_memory_is_done_again_with_less(
    where: str, tmp_path: Path, situations: list[tuple[int, Situation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, several = config(tmp_path, gain=1.0), "several" in where
    if several:
        clients = settings.data.clients.model_copy(update={"cut": (1, 4)})
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"clients": clients})})
    assert situations
    held: list[weakref.ref[Any]] = []
    server = Server(settings, DEPLOYMENT, tmp_path / "server")
    shared, run, exchanges, told = server.server, Stage.run, Trainer._exchanges, list[str]()

    def limited(self: Trainer, pieces: Any) -> Any:
        done = exchanges(self, pieces)
        if len(pieces) > 1:  # in the middle of the step
            yield next(done)
        if self.steps == 6 and (self.micro_batch > 1 or self.model.cut[0] > 1):  # type: ignore[attr-defined]
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        yield from done

    def full(self: Stage, hidden_BTH: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        mine = self is shared.shared.stage
        many = args[2] - args[1] > 1 if several else len(hidden_BTH) > 1
        if shared.updates > 5 and many and hidden_BTH.requires_grad and mine == ("server" in where):
            held.append(weakref.ref(hidden_BTH))
            if "backward" not in where:
                allocate()
            hidden_BTH.register_hook(allocate)
        return run(self, hidden_BTH, *args, **options)

    def why(error: BaseException) -> str | None:
        told.append(str(out_of_memory(error)))
        return told[-1]

    monkeypatch.setattr("flexp.run.party.out_of_memory", why)
    if where == "between exchanges":
        monkeypatch.setattr(Trainer, "_exchanges", limited)
    else:
        monkeypatch.setattr(Stage, "run", full)
    client = Client(settings, DEPLOYMENT, NAME, plain(server), tmp_path / "client")
    client.join()
    server.end()
    found = moves(tmp_path / "client")
    assert {record["why"] for record in found} == {"memory"}
    assert several or found[-1]["micro_batch"] == 1
    sizes = [(record["micro_batch"], -kept(record["cut"])) for record in found]
    assert sizes[0][0] < 4  # first a smaller exchange
    if where == "between exchanges":
        assert kept(found[-1]["cut"]) < 3
    elif several:  # smaller exchanges are not enough: the client takes blocks off the server
        assert kept(found[-1]["cut"]) == 3
    else:  # which is enough
        assert [record["cut"] for record in found] == [[3, 4]] * len(found)
        gc.collect()
        assert held
        assert not any(value() is not None for value in held)  # nothing of what failed is kept
    said = "the server's memory ran out at a" if "server" in where else "memory ran out; give it more"
    assert len(told) >= len(found) > 0
    assert all(said in line and "\n" not in line for line in told)
    steps = [record["step"] for record in read(tmp_path / "client" / "metrics.jsonl") if record["kind"] == "step"]
    assert steps == list(range(1, 25))
    assert server.server.clients[NAME].progress.newest == 24


def test_memory_that_runs_out_with_nothing_left_to_give_up_ends_it_in_a_line(
    tmp_path: Path, situations: list[tuple[int, Situation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, gain=1.0)
    assert situations

    def never(self: Trainer, pieces: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(Trainer, "_exchanges", never)
    server = Server(settings, DEPLOYMENT, tmp_path / "server")
    client = Client(settings, DEPLOYMENT, NAME, plain(server), tmp_path / "client")
    with pytest.raises(TrainingError, match="step 1: memory ran out"):
        client.join()
    server.end()


def test_a_full_disk_while_memory_runs_out_ends_it_instead_of_trying_for_ever(
    tmp_path: Path, situations: list[tuple[int, Situation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, gain=1.0)
    assert situations
    asked: list[Any] = []

    def full(trainer: Trainer, cut: tuple[int, int], *_: Any) -> Any:
        asked.append(cut)
        raise StorageError("the disk is full")

    def never(self: Trainer, pieces: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(recutting, "recut", full)
    monkeypatch.setattr(Trainer, "_exchanges", never)
    server = Server(settings, DEPLOYMENT, tmp_path / "server")
    client = Client(settings, DEPLOYMENT, NAME, plain(server), tmp_path / "client")
    with pytest.raises(TrainingError, match="step 1: memory ran out"):
        client.join()
    server.end()
    assert asked
    assert len(asked) == len(set(asked))  # each cut once
