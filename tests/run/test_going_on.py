"""What a run goes on with: the data that it was trained on, and for as many rounds as its learning rate allows."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexp.cli.main import app
from flexp.config import DeploymentConfig
from flexp.data.split import identity
from flexp.data.types import ClientData
from flexp.errors import ConfigError, DataError, FlexpError
from flexp.export.answers import score
from flexp.export.backup import back_up, restore
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.gaussian import kept_key, key_of
from flexp.run import runner
from flexp.run.client import KEY_FILE, _check_labels, _known, run_client
from flexp.run.server import make_conductor, make_server
from flexp.run.settle import settle_client
from flexp.run.store import SNAPSHOTS, Store, party_of
from tests.data.tools import jsonl
from tests.tiny import checkpoint, config, each

from .tools import Server, plain

Rows = list[dict[str, Any]]
EVERYTHING = {"train_examples": None}  # without it, a client's private examples are drawn anew


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def appended(rows: Rows) -> Rows:
    return rows + [{**row, "text": f"{row['text']} now"} for row in rows if row["client"] == "north"][:15]


def reworded(rows: Rows) -> Rows:
    return [{**row, "text": row["text"].replace("dog", "cat")} if row["client"] == "south" else row for row in rows]


def relabelled(rows: Rows) -> Rows:
    return [{**row, "label": {"no": "never"}.get(row["label"], row["label"])} for row in rows]


CHANGES: list[tuple[Callable[[Rows], Rows], str]] = [
    (appended, r"north has \d+ train examples, it had \d+; north has \d+ test examples, it had \d+"),
    (reworded, r"south has other train examples \(or in another order\), \d+ as before"),
    (relabelled, r"the labels are never, yes, they were no, yes"),
    (lambda rows: rows + [{**row, "client": "east"} for row in rows[:12]], r"client east is new"),
    (lambda rows: [row for row in rows if row["client"] != "west"], r"client west is gone"),
]


@pytest.fixture
def stopped(home: Path) -> Path:
    """A run of one round, of which two more are to come."""
    run = config(home, data=EVERYTHING)
    runner.run(run.model_copy(update={"train": run.train.model_copy(update={"rounds": 1})}), home / "run")
    return home / "run"


def test_other_data_are_named(home: Path, stopped: Path) -> None:
    rows, before = read(home / "rows.jsonl"), (stopped / "config.json").read_bytes()
    for change, said in CHANGES:
        jsonl(home / "rows.jsonl", change(rows))
        with pytest.raises(DataError, match=said) as caught:
            runner.resume(stopped, rounds=3)
        assert "\n" not in str(caught.value)
        assert "put the data back" in str(caught.value)
        assert (stopped / "config.json").read_bytes() == before


def test_a_finished_run_is_made_longer(home: Path, stopped: Path) -> None:
    """By the command, to the weights of a run that was to be so long, bit for bit."""
    runner.run(config(home, data=EVERYTHING), home / "whole")
    done = CliRunner().invoke(app, ["run", "--resume", str(stopped), "--set", "train.rounds=3"])
    assert done.exit_code == 0, done.output
    one, two = checkpoint(home / "whole"), checkpoint(stopped)
    assert one.keys() == two.keys()
    for party, tensors in one.items():
        assert all(torch.equal(value, two[party][name]) for name, value in tensors.items() if "seconds" not in name)
    assert json.loads((stopped / "summary.json").read_text(encoding="utf-8"))["rounds"] == 3
    assert json.loads((stopped / "config.json").read_text(encoding="utf-8"))["train"]["rounds"] == 3
    with pytest.raises(ConfigError, match=r"train.rounds = 2 is less than the 3 rounds that are done"):
        runner.resume(stopped, rounds=2)
    for setting in ("train.lr=1", "train.rounds=4 --set seed=3", "seed=1", "train=5"):
        asked = ["run", "--resume", str(stopped), "--set", *setting.split()]
        assert isinstance(CliRunner().invoke(app, asked).exception, ConfigError), setting


def test_a_rate_that_falls_is_not_made_longer(home: Path) -> None:
    run = config(home, train={"rounds": 1, "shared": {"schedule": "cosine"}})
    runner.run(run, home / "run")
    with pytest.raises(ConfigError, match=r"train.shared.schedule .* until round 1, so the run cannot have 2 rounds"):
        runner.resume(home / "run", rounds=2)


def test_clients_that_met_for_the_last_time_do_not_go_on(home: Path) -> None:
    runner.run(config(home, train={"rounds": 1}, method={"meet": {"on": True}}), home / "run")
    with pytest.raises(ConfigError, match=r"have met after round 1, the last .* cannot have 2 rounds"):
        runner.resume(home / "run", rounds=2)


def test_nothing_is_scored_on_what_it_was_trained_on(home: Path, stopped: Path) -> None:
    rows = read(home / "rows.jsonl")
    export(open_trained(stopped, "north"), home / "exported")
    jsonl(home / "rows.jsonl", appended(rows))
    for opened in (open_trained(stopped, "north"), open_trained(home / "exported", run=stopped)):
        with pytest.raises(DataError, match=r"north has \d+ train examples, it had .* score on a file with --data"):
            score(opened)
        assert score(opened, str(home / "rows.jsonl"))
    export(open_trained(stopped, "north"), home / "again")  # needs no data


def test_a_backup_does_not_go_where_its_examples_are_tests(home: Path, stopped: Path) -> None:
    back_up(stopped, "north", home / "north.safetensors")
    runner.run(config(home, data=EVERYTHING, seed=1, train={"rounds": 1}), home / "other")
    with pytest.raises(DataError, match="north has other train examples"):
        restore(home / "north.safetensors", home / "other")
    assert restore(home / "north.safetensors", stopped)["into"] == 1


def test_a_client_of_a_server_notices_too(home: Path) -> None:
    run, state = config(home, data=EVERYTHING), home / "state"
    setup = settle_client(run, "north", None)
    facts = {"client": "north", "cut": list(setup.cut), "steps": 1, "data": setup.identity}
    Store(state).save(1, {party_of("north"): {"steps": torch.tensor(1)}}, facts)
    assert _known(Store(state), setup, state, may_move=False) is not None
    jsonl(home / "rows.jsonl", reworded(read(home / "rows.jsonl")))
    assert _known(Store(state), settle_client(run, "north", None), state, may_move=False) is not None  # south's alone
    jsonl(home / "rows.jsonl", appended(read(home / "rows.jsonl")))
    with pytest.raises(DataError, match=r"north has \d+ train examples.* begin anew in another --state"):
        _known(Store(state), settle_client(run, "north", None), state, may_move=False)


def disturbed(folder: Path) -> None:
    """Another pretrained model of the same architecture."""
    weights = load_file(folder / "model.safetensors")
    noisy = {name: value + 0.1 if value.is_floating_point() else value for name, value in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})


LORA = {"tuning": "lora", "pooling": "mean"}
OTHERS: list[tuple[dict[str, Any], str, bool]] = [
    ({"model": {**LORA, "lora": {"alpha": 256.0}}}, "model.lora", True),
    ({"model": {**LORA, "pooling": "last"}}, "model.pooling", False),
    ({"model": LORA, "train": {"personal": {"name": "sgd"}}}, "train.personal.name", False),
    ({"model": LORA, "train": {"shared": {"name": "sgd"}}}, "train.shared.name", True),
    ({"model": LORA}, r"pretrained model \(its weights differ\)", True),
]


def test_a_client_and_a_server_go_on_with_the_model_that_they_were_trained_in(home: Path) -> None:
    once = {"rounds": 1, "steps_per_round": 1}
    of = partial(config, home, method={"align": {"kind": "off"}}, data={"clients": each(cut=[[1, 3]])})
    run, state = of(model=LORA, train=once), home / "state"
    asked = DeploymentConfig(schedule="free", clients=["north"], save_every=1)
    server, quiet = Server(run, asked, home / "server"), Console(quiet=True)
    setup = settle_client(run, "north", None)
    try:
        assert run_client(setup, asked, lambda: plain(server)("north"), state, codec=run.link.codec, console=quiet)
    finally:
        server.end()
    before = {path: path.read_bytes() for path in (state / SNAPSHOTS).rglob("*") if path.is_file()}
    for changes, what, shared in OTHERS:
        if "weights" in what:
            disturbed(home / "model")
        other = of(**{**changes, "train": {**once, **changes.get("train", {})}})
        says = f"{what} than this run now has .*; set it as it was, or begin anew"
        if "shared" not in what:
            link = Mock()
            with pytest.raises(ConfigError, match=says):
                run_client(settle_client(other, "north", None), asked, lambda link=link: link, state, console=quiet)  # type: ignore[misc]
            assert [name for name, _, _ in link.mock_calls] == ["close"]  # nothing was sent
        if shared:
            again = make_server(other, 1, 3, "sequence-classification", ["north"])
            with pytest.raises(ConfigError, match=says):
                make_conductor(again, other, asked, home / "server", lambda _: None)
    assert before == {path: path.read_bytes() for path in before}


def test_what_was_trained_is_used_in_the_model_that_it_was_trained_in(home: Path, stopped: Path) -> None:
    disturbed(home / "model")
    says = r"run: was saved with another pretrained model \(its weights differ\)"
    with pytest.raises(ConfigError, match=f"{says} than this run now has"):
        runner.resume(stopped, rounds=3)
    with pytest.raises(ConfigError, match=f"{says} than its model.id now has .*; put the model back as it was"):
        score(open_trained(stopped, "north"))


@pytest.mark.parametrize("place", ["taken", "taken/in", "mine"])
def test_a_state_that_cannot_be_written_is_refused_before_anything_is_joined(home: Path, place: str) -> None:
    (home / "taken").write_text("a file")
    (home / "mine").mkdir()
    (home / "mine/metrics.jsonl").write_text("somebody's")
    setup = settle_client(config(home), "north", None)
    with pytest.raises(FlexpError, match=r"is a file|cannot be written|holds metrics.jsonl, which is not of a client"):
        run_client(setup, DeploymentConfig(), lambda: pytest.fail("it has joined"), home / place)
    assert (home / "mine/metrics.jsonl").read_text() == "somebody's"


@pytest.mark.parametrize("held", ["run.json", "checkpoint-00000003/checkpoint.json", "sums/run/1.safetensors"])
def test_a_client_does_not_write_into_a_servers_state(home: Path, held: str) -> None:
    (home / "run" / held).parent.mkdir(parents=True)
    (home / "run" / held).write_text("a server's")
    setup, taken = settle_client(config(home), "north", None), held.partition("/")[0]
    with pytest.raises(ConfigError, match=f"run holds {taken}, which is not of a client; choose another --state"):
        run_client(setup, DeploymentConfig(), lambda: pytest.fail("it has joined"), home / "run")
    assert [path for path in (home / "run").rglob("*") if path.is_file()] == [home / "run" / held]


@pytest.mark.parametrize("how", [["--model", "any"], ["--config", "run.toml"], ["--model", "any", "--frozen"]])
@pytest.mark.parametrize("held", ["client.json", "snapshots/.lock"])
def test_a_server_does_not_write_into_a_clients_state(tmp_path: Path, how: list[str], held: str) -> None:
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).write_text("a client's")
    caught = CliRunner().invoke(app, ["server", *how, "--state", str(tmp_path)]).exception
    assert isinstance(caught, ConfigError)
    assert f"holds {held.partition('/')[0]}, which is not of a server; choose another --state" in str(caught)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / held]


def test_tensors_and_nested_values_count() -> None:
    def of(**example: Any) -> Any:
        return identity([ClientData("a", [example], [], [])], None)

    pixels = torch.arange(6.0).reshape(2, 3)
    base = of(pixel_values=pixels, labels=1, choices=[[1, 2], [3]])
    assert base == of(choices=[[1, 2], [3]], labels=1, pixel_values=pixels.clone())
    for other in (pixels + 1, pixels.reshape(3, 2), pixels.double(), pixels.to(torch.bfloat16)):
        assert base != of(pixel_values=other, labels=1, choices=[[1, 2], [3]])
    assert base != of(pixel_values=pixels, labels=1, choices=[[1], [2, 3]])


def test_a_client_that_falls_before_its_first_snapshot_answers_as_it_did(home: Path) -> None:
    """Its state has nothing but the key then; labels that are answered twice, at random each time, tell twice ε."""
    bound, cuts = {"label_epsilon": 1.0}, {"clients": each(cut=[[1, 3]])}
    run = config(home, privacy=bound, method={"align": {"kind": "off"}}, data=cuts,
                 train={"rounds": 1, "steps_per_round": 1})  # fmt: skip
    asked, state = DeploymentConfig(schedule="free", clients=["north"], save_every=1), home / "state"
    setup, quiet, keys = settle_client(run, "north", None), Console(quiet=True), []
    for _ in range(2):
        server = Server(run, asked, None)

        def reached(server: Server = server) -> Any:
            assert (state / KEY_FILE).stat().st_mode & 0o077 == 0  # before anything is sent
            return plain(server)("north")

        try:
            assert run_client(setup, asked, reached, state, codec=run.link.codec, console=quiet)
        finally:
            server.end()
        snapshots = Store(state / SNAPSHOTS)
        newest = snapshots.newest_whole()
        assert newest is not None
        keys.append(newest.load(party_of("north"))["label_key"])
        shutil.rmtree(state / SNAPSHOTS)
    assert torch.equal(keys[0], keys[1])
    assert key_of(keys[0]) == kept_key(state / KEY_FILE, "")


def test_a_client_that_goes_on_counts_the_steps_that_it_had_done(home: Path) -> None:
    run = config(home, train={"rounds": 2, "steps_per_round": 1})
    asked, state = DeploymentConfig(schedule="free", clients=["north"], save_every=1), home / "state"
    for expected in ("2 steps to do", "0 steps to do"):
        server, shown = Server(run, asked, home / "server"), Console(file=io.StringIO(), width=200)
        try:
            assert run_client(settle_client(run, "north", None), asked, partial(plain(server), "north"), state,
                              codec=run.link.codec, console=shown)  # fmt: skip
        finally:
            server.end()
        text = shown.file.getvalue()  # type: ignore[attr-defined]
        assert f"north: {expected}\n" in text
        assert "step 2/2 (100 %)" in text.splitlines()[-1]


def test_a_client_that_is_started_again_keeps_the_defence_of_its_labels(home: Path) -> None:
    """Which ``max_label_auc`` has chosen by its ``--cut``: after no gradients come no random answers."""
    bound = {"max_label_auc": 0.6}
    run = config(home, privacy=bound, method={"align": {"kind": "off"}}, data={"clients": each(cut=[[1, 4]])},
                 train={"rounds": 1, "steps_per_round": 1})  # fmt: skip
    asked, state = DeploymentConfig(schedule="free", clients=["north"], save_every=1), home / "state"
    server, quiet = Server(run, asked, None), Console(quiet=True)
    setup = settle_client(run, "north", (1, 3))
    assert (setup.config.privacy.gradients, setup.config.privacy.label_epsilon) == (False, None)
    try:
        assert run_client(setup, asked, lambda: plain(server)("north"), state, codec=run.link.codec, console=quiet)
    finally:
        server.end()
    says = r"begun with privacy.gradients = false, and now there is privacy.gradients = true .* give another --state"
    other = settle_client(run, "north", None)
    assert other.config.privacy.label_epsilon == pytest.approx(math.log(0.6 / 0.4))
    with pytest.raises(ConfigError, match=says):
        run_client(other, asked, lambda: pytest.fail("it has joined"), state, console=quiet)
    _check_labels(state, setup.config.privacy)
    weaker = setup.config.privacy.model_copy(update={"label_epsilon": 1.0})
    with pytest.raises(ConfigError, match=r"begun with no privacy.label_epsilon, and now there is .*epsilon = 1.0"):
        _check_labels(state, weaker)


def test_the_only_client_of_a_file_is_called_by_its_name(home: Path) -> None:
    """But its examples are those that it has had under the other one."""
    rows = [{"text": f"the w{n} dog", "label": "yes" if n % 2 else "no"} for n in range(9)]
    few = jsonl(home / "client-1.jsonl", rows)
    alone = {"source": str(few), "clients": {"by": "iid", "count": 1, "cut": [1, 3]}}
    said = "\n".join(settle_client(config(home, data=alone), "north", None).run.federation.remarks)
    assert "(north 3)" in said
    assert "client-1" not in said
    jsonl(few, [{"text": "the dog", "label": "yes"}])
    with pytest.raises(DataError, match="client 'north' has 1 examples"):
        settle_client(config(home, data=alone), "north", None)
