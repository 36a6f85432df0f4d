"""The benchmark's protocol on FlexP's methods: turns of an epoch, known special cases, scores, going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import pfl as bench
from benchmarks.pfl import NAMES, PUBLISHED, make_method, measure, score, settings
from benchmarks.tools.pictures import divide, federation, read_pictures, small_cnn
from flexp.errors import ConfigError, StorageError
from flexp.methods import METHODS, World

from .tools import picture_folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return picture_folder(tmp_path / "pictures", 90, 30)


def world(home: Path, name: str, clients: int = 4, **own: Any) -> World:
    pictures = read_pictures(str(home))
    config = settings(name, 2, 0)
    if own:
        table = METHODS[name].own(config).model_copy(update=own)
        config = config.model_copy(update={"method": config.method.model_copy(update={name: table})})
    return World(config, federation(pictures, divide(pictures.labels, clients, "dirichlet")), small_cnn(0), {})


def trained(made: World, rounds: int = 1) -> Any:
    method: Any = make_method(made)
    for number in range(1, rounds + 1):
        method.train_round(number, lambda step: None)
    return method


@pytest.mark.parametrize(
    ("name", "times"), [("local", 1), ("fedavg", 1), ("fedper", 1), ("fedrep", 2), ("ditto", 2), ("pfedme", 5)]
)
def test_a_turn_is_an_epoch_of_the_clients_own_data(home: Path, name: str, times: int) -> None:
    made = world(home, name)
    method = trained(made)
    assert isinstance(method, METHODS[name])  # the package's own class, not a second one
    for client in made.federation.clients:
        steps = -(-len(client.train) // 10)
        assert method.account(client.name).gradient_evaluations == times * steps
    assert len({len(client.train) for client in made.federation.clients}) > 1


def test_with_one_client_fedavg_is_local_training(home: Path) -> None:
    average, alone = trained(world(home, "fedavg", 1), 2), trained(world(home, "local", 1), 2)
    local = alone.clients["client-00"].model.personal_state()
    assert all(torch.equal(value, local[name]) for name, value in average.server.weights.items())


def test_ditto_without_its_pull_is_local_training(home: Path) -> None:
    ditto, alone = trained(world(home, "ditto", lam=0.0)), trained(world(home, "local"))
    for name, client in ditto.clients.items():
        local = alone.clients[name].model.personal_state()
        assert all(torch.equal(value, local[key]) for key, value in client.kept["personal"].items())


def test_the_head_is_the_last_layer(home: Path) -> None:
    for name in ("fedper", "fedrep"):
        method: Any = make_method(world(home, name))
        assert sorted(method.harness.parameters.keys() - method.shared) == ["classifier.bias", "classifier.weight"]


def test_pfedme_runs_with_the_benchmarks_settings() -> None:
    config = settings("pfedme", 1, 0)
    own, sgd = METHODS["pfedme"].own(config), config.train.personal
    assert (own.lam, own.inner_steps, own.eta, own.beta) == (15.0, 5, 0.005, 1.0)
    assert (sgd.name, sgd.lr, sgd.weight_decay, sgd.momentum, sgd.clip) == ("sgd", 0.01, 0.001, 0.0, None)
    assert settings("fedavg", 1, 0).train.personal.lr == 0.005
    assert config.method.budget == "paper"


def test_scores_weight_clients_by_their_test_pictures(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(home, "fedavg")
    sizes = {len(client.test) for client in made.federation.clients}
    assert len(sizes) > 1
    right = iter([1.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(
        bench, "evaluate", lambda forward, task, test, *a, **k: {"accuracy": next(right), "n": float(len(test))}
    )
    found = score(make_method(made), made)
    tests = [len(client.test) for client in made.federation.clients]
    assert found["accuracy"] == pytest.approx(100 * tests[0] / sum(tests))
    assert found["mean_accuracy"] == 25.0


def test_every_method_learns_and_small_data_has_no_published_figure(home: Path) -> None:
    result = measure(str(home), ["local", "pfedme"], rounds=2, clients=3)
    for row in result["rows"]:
        assert row["published"] is None
        assert row["difference"] is None
        assert [number for number, _ in row["curve"]] == [1, 2]
        assert row["best"] == max(value for _, value in row["curve"])
        assert row["last"] == row["curve"][-1][1] > 25.0  # ten classes, of which a client has few
    assert set(PUBLISHED["dirichlet"]) == set(PUBLISHED["pathological"]) > set(NAMES) - {"local"}


def test_it_goes_on_where_it_stopped(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = measure(str(home), ["ditto"], rounds=2, clients=3)["rows"][0]
    out = tmp_path / "out"
    measure(str(home), ["ditto"], rounds=1, clients=3, out=out)
    capsys.readouterr()
    row = measure(str(home), ["ditto"], rounds=2, clients=3, out=out)["rows"][0]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("ditto round 2: ")
    assert row["curve"] == once["curve"]
    lines = [json.loads(line) for line in (out / "ditto.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.get("round") for line in lines] == [None, 1, 2]
    assert lines[0]["clients"] == 3
    with pytest.raises(StorageError, match="another experiment"):
        measure(str(home), ["ditto"], rounds=2, clients=4, out=out)


def test_a_killed_run_leaves_half_a_line_and_goes_on(home: Path, tmp_path: Path) -> None:
    measure(str(home), ["fedavg"], rounds=1, clients=3, out=tmp_path)
    with (tmp_path / "fedavg.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"method": "fedavg", "rou')
    row = measure(str(home), ["fedavg"], rounds=2, clients=3, out=tmp_path)["rows"][0]
    assert [number for number, _ in row["curve"]] == [1, 2]


def test_an_unknown_method_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="expected one of local, fedavg"):
        measure("nowhere", ["flexp-sfl"])
