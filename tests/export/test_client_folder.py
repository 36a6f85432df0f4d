"""What ``flexp client`` leaves is used like a run: scored, written with, exported, backed up and put back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexp.config import DeploymentConfig
from flexp.errors import ConfigError, LinkError, StorageError
from flexp.export.answers import predict, score
from flexp.export.backup import back_up, read, restore
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.export.saved import is_run, run_config
from flexp.export.trained import OWN
from flexp.links.grpc import connect, serve
from flexp.report.metrics import read as read_log
from flexp.run import runner
from flexp.run.server import load, make_server
from flexp.run.store import Store
from flexp.serving.writer import open_writer
from tests import tiny
from tests.data.tools import jsonl
from tests.harness import equal
from tests.run.tools import Client, Server, newest, parties, plain, without_meters
from tests.serving.test_opened import answer

from .remote_tools import Remote, remote
from .tools import train

NAMES = list(tiny.CLIENTS)
FIXED = DeploymentConfig(schedule="deterministic", clients=NAMES, save_every=1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def reach_of(server: Server) -> Callable[[str], Any]:
    return lambda name: connect(f"grpc://{server.address}", name, codec="off")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_fleets_models_are_the_simulations(tmp_path: Path) -> None:
    """After the run the server stays, and gives every client what makes its model the simulation's, bit for bit."""
    tiny.bert_folder(tmp_path / "model")
    config = tiny.config(tmp_path, train={"rounds": 1})
    runner.run(config, tmp_path / "sim")
    out = tmp_path / "fleet"
    server = Server(config, FIXED, out / "server", allow_export=True)
    clients = [Client(config, FIXED, name, plain(server), out / "clients" / name) for name in NAMES]
    for client in clients:
        client.join()
    until(lambda: any("the run is over; staying" in line for line in server.lines))
    for name in NAMES:
        facts = export(open_trained(out / "clients" / name, connect=reach_of(server)), tmp_path / name)
        alike = export(open_trained(tmp_path / "sim", name), tmp_path / f"sim-{name}")
        assert equal(tensors(tmp_path / name), tensors(tmp_path / f"sim-{name}"))
        for key in ("client", "cut", "kind", "labels", "round", "metric", "train_examples", "test_examples", "data"):
            assert facts[key] == alike[key]
        assert facts["scores"]["after"]["personal"] == alike["scores"]["after"]["personal"]
        assert "| private examples |" in (tmp_path / name / "README.md").read_text(encoding="utf-8")
        usable = open_trained(out / "clients" / name, connect=reach_of(server))
        told = [record["personal"] for record in read_log(tmp_path / "sim/metrics.jsonl") if record["kind"] == "eval"
                and record["client"] == name and record["round"] == 1]  # fmt: skip
        assert score(usable)[OWN] == told[0]
        usable.close()
    updates, snapshots = server.server.shared.version, server.conductor.numbers
    stray = Client(config, FIXED, NAMES[0], plain(server), tmp_path / "empty")
    with pytest.raises(LinkError, match="comes with nothing"):
        stray.join()
    assert (server.server.shared.version, server.conductor.numbers) == (updates, snapshots)
    server.end()
    with pytest.raises(StorageError, match="one client's part of a run on several machines"):
        run_config(out / "clients/north")

    again = Server(config, FIXED, out / "server", allow_export=True)  # clients need not all come before it gives
    assert any("back to snapshot" in line for line in again.lines)
    export(open_trained(out / "clients/north", connect=reach_of(again)), tmp_path / "again")
    assert equal(tensors(tmp_path / "again"), tensors(tmp_path / "north"))
    again.end()


def test_a_lost_device_goes_on_from_its_backup(tmp_path: Path) -> None:
    """Backup → all snapshots lost → restore → the run goes on, and ends as if nothing had happened."""
    tiny.bert_folder(tmp_path / "model", dropout=True)
    train_table = {"rounds": 2, "steps_per_round": 5, "batch_size": 4, "order": "random"}
    config = tiny.config(tmp_path, train=train_table)
    runner.run(config, tmp_path / "sim")
    out = tmp_path / "fleet"
    server = Server(config, FIXED, out / "server")
    clients = {name: Client(config, FIXED, name, plain(server), out / "clients" / name) for name in NAMES}
    until(lambda: server.server.shared.version >= 8)
    clients["south"].stop.set()
    clients["south"].join()
    south = out / "clients/south"
    before = newest(south / "snapshots")
    facts = back_up(south, None, tmp_path / "south.safetensors", "some words")
    assert (facts["client"], facts["cut"], facts["snapshot"]["run"]) == (
        "south",
        [2, 4],
        server.conductor.run,
    )
    shutil.rmtree(south / "snapshots")
    with pytest.raises(StorageError, match="has no whole checkpoint"):
        back_up(south, None, tmp_path / "x")
    found = restore(tmp_path / "south.safetensors", south, passphrase="some words")
    assert found["into"] == facts["snapshot"]["number"]
    assert equal(newest(south / "snapshots"), before)
    clients["south"] = Client(config, FIXED, "south", plain(server), south)
    for client in clients.values():
        client.join()
        assert client.over
    server.end()
    there, here = tiny.checkpoint(tmp_path / "sim"), parties(out, NAMES)
    for party, state in there.items():
        assert equal(without_meters(state), without_meters(here[party])), party


def test_a_backup_knows_which_averages_a_client_has(tmp_path: Path) -> None:
    """All stop after an average, one client goes on from its backup, to the simulation's weights."""
    tiny.bert_folder(tmp_path / "model")
    config = tiny.config(
        tmp_path, method={"name": "fedavg"}, train={"rounds": 8, "steps_per_round": 2, "batch_size": 4}
    )
    runner.run(config, tmp_path / "sim")
    out = tmp_path / "fleet/clients"
    for last in (False, True):
        server = Server(config, FIXED, tmp_path / "fleet/server")
        clients = [Client(config, FIXED, name, plain(server), out / name) for name in NAMES]
        if not last:
            # all have saved since: at step 3 or later, and the first average is after step 2
            until(lambda: [one.ready.saved > 2 for one in server.conductor.members.values()] == [True] * len(NAMES))  # noqa: B023
            for client in clients:
                client.stop.set()
        for client in clients:
            client.join()
            assert client.over is last
        server.end()
        if not last:
            own = Store(out / "north/snapshots")
            for number in set(own.numbers()) - set(Store(tmp_path / "fleet/server").numbers()):
                own.quarantine(number)  # one of its own, from where it was stopped: the others have none of it
            facts = back_up(out / "north", None, tmp_path / "north.safetensors")
            assert facts["snapshot"]["met"] >= 1
            for lost in (out / "north/snapshots").glob("checkpoint-*"):
                shutil.rmtree(lost)  # and not the key that the clients have agreed on
            restore(tmp_path / "north.safetensors", out / "north")
    wanted = tiny.checkpoint(tmp_path / "sim")["server"]
    for name in NAMES:
        for key, value in newest(out / name / "snapshots").items():
            if key.startswith("personal/"):
                assert torch.equal(value, wanted[key.replace("personal/", "global/")]), key


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with remote(tmp_path_factory.mktemp("client"), "bert", cut=(2, 3)) as made:
        yield made


def newest_number(folder: Path) -> int:
    return Store(folder / "snapshots").numbers()[-1]


def test_an_older_backup_is_what_it_goes_on_from(here: Remote, tmp_path: Path) -> None:
    folder = shutil.copytree(here.state, tmp_path / "client")
    back_up(folder, "north", tmp_path / "four.safetensors")
    shutil.copytree(folder / "snapshots/checkpoint-00000004", folder / "snapshots/checkpoint-00000009")
    assert read(tmp_path / "four.safetensors").facts["snapshot"]["number"] == 4
    assert newest_number(folder) == 9
    restore(tmp_path / "four.safetensors", folder)
    assert newest_number(folder) == 4
    assert (folder / "snapshots/checkpoint-00000009.quarantined/checkpoint.json").is_file()


def test_it_goes_nowhere_else(here: Remote, tmp_path: Path) -> None:
    folder = shutil.copytree(here.state, tmp_path / "client")
    back_up(folder, None, tmp_path / "north.safetensors")
    facts = json.loads((folder / "client.json").read_text(encoding="utf-8"))
    (folder / "client.json").write_text(json.dumps({**facts, "cut": [1, 3]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"another cut .*\[2, 3\], not \[1, 3\]"):
        restore(tmp_path / "north.safetensors", folder)
    with pytest.raises(ConfigError, match="is of the client 'north', not of 'south'"):
        restore(tmp_path / "north.safetensors", folder, "south")
    (folder / "client.json").write_text(json.dumps({**facts, "schema": 0}), encoding="utf-8")
    with pytest.raises(StorageError, match="start flexp client there again"):
        back_up(folder, None, tmp_path / "x")
    run = train(tmp_path, "bert", data={"clients": {"each": [{"cut": [2, 3]}]}, "source": here.config.data.source},
                model={"id": here.config.model.id})  # fmt: skip
    back_up(run, "north", tmp_path / "run.safetensors")
    with pytest.raises(ConfigError, match="the file is from a run of flexp run"):
        restore(tmp_path / "run.safetensors", here.state)
    assert here.opened.checkpoint.number == 4


def test_scores_and_predictions_are_the_exported_models(here: Remote, tmp_path: Path) -> None:
    assert not is_run(here.state)
    export(here.opened, tmp_path / "out")
    source = str(
        jsonl(tmp_path / "rows.jsonl", [{"text": f"the w{k} dog", "label": ("no", "yes")[k % 2]} for k in range(9)])
    )
    usable, exported = here.opened, open_trained(tmp_path / "out")
    assert score(usable, source) == score(exported, source)
    assert score(usable).keys() == {OWN}
    for number, model in enumerate((usable, exported)):
        assert predict(model, source, tmp_path / f"{number}.csv") == 9
    assert (tmp_path / "0.csv").read_text(encoding="utf-8") == (tmp_path / "1.csv").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="--pretrained needs the run"):
        score(usable, pretrained=True)
    usable.close()
    with pytest.raises(ConfigError, match="say where with --server"):
        score(open_trained(here.state), source)
    with pytest.raises(ConfigError, match="leave out --server"):
        open_trained(tmp_path / "out", connect=here.reach)
    with pytest.raises(ConfigError, match="leave out --run"):
        open_trained(here.state, run=tmp_path, connect=here.reach)
    with pytest.raises(ConfigError, match="writes no text: its task is classification"):
        open_writer(here.state, connect=here.reach)


def test_it_writes_what_the_exported_model_writes(tmp_path: Path) -> None:
    with remote(tmp_path, "llama") as here:
        export(here.opened, tmp_path / "out")
        writer = open_writer(here.state, connect=here.reach)
        assert "its middle on a server" in writer.about
        assert answer(writer) == answer(open_writer(tmp_path / "out"))
        with pytest.raises(ConfigError, match="say where with --server"):
            open_writer(here.state)


def test_a_runs_folder_with_its_middle_on_a_server(tmp_path: Path) -> None:
    """Of the run the client's own part alone is read; scores and exported weights are the run's."""
    place = train(tmp_path, "bert")
    config = run_config(place)
    server = make_server(config, 1, None, "sequence-classification", ["north"])
    load(server, Store(place / "checkpoints"))
    server.allow_export = True
    (place / "checkpoints/checkpoint-00000001/002-client-south.safetensors").rename(tmp_path / "south")
    with serve(server) as serving:
        url = f"grpc://{serving.address}"
        model = open_trained(place, "north", connect=lambda name: connect(url, name, codec="off"))
        found = score(model)[OWN]
        model.close()  # a client has one link at a time
        export(model, tmp_path / "out")
    (tmp_path / "south").rename(place / "checkpoints/checkpoint-00000001/002-client-south.safetensors")
    whole = open_trained(place, "north")
    assert found == score(whole)[OWN]
    facts = export(whole, tmp_path / "whole")
    assert equal(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    assert (facts["cut"], facts["round"]) == ([1, 3], 1)
