"""A comparison from its configuration to ``comparison.json``; and that it does nothing twice."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from flexp.client.trainer import Trainer
from flexp.comparison import compare as comparing
from flexp.comparison.cells import Cell, final_cell, is_done, tuning_cell
from flexp.comparison.compare import compare, regather
from flexp.comparison.config import make
from flexp.comparison.report.results import results
from flexp.config import RunConfig
from flexp.errors import BadValuesError, ConfigError, DataError, StorageError, TrainingError
from flexp.models.zoo import save_tiny
from flexp.report.metrics import read
from flexp.run import runner
from flexp.run.costs import MemoryProbes
from flexp.run.settle import build_world
from tests.tiny import CLIENTS

from .tools import comparison

THREE = {"methods": ["flexp-sfl", "fedavg", "local"], "seeds": 2, "trials": 2}


def test_equal_clients_batches_and_test_rows_for_all_methods(home: Path, ended: list[Cell]) -> None:
    """The same private examples in the same batches; over seeds other private examples and the same test rows."""
    wanted = comparison(home, THREE | {"tune": False})
    worlds = {(e.name, s): build_world(final_cell(wanted, e, {}, s).config) for e in wanted.entries for s in (0, 1)}

    def texts(name: str, seed: int, part: str) -> list[Any]:
        clients = worlds[name, seed].federation.clients
        return [[example["input_ids"] for example in getattr(client, part)] for client in clients]

    for seed in (0, 1):
        assert len({json.dumps(texts(e.name, seed, "train")) for e in wanted.entries}) == 1
    assert texts("local", 0, "train") != texts("local", 1, "train")
    assert texts("local", 0, "test") == texts("local", 1, "test")
    assert [len(examples) for examples in texts("local", 0, "train")] == [12] * 3
    tuning = build_world(tuning_cell(wanted, wanted.entries[0], 0, {}, 0).config).federation.clients
    for client, everything in zip(tuning, texts("local", 0, "train"), strict=True):
        parts = [example["input_ids"] for example in (*client.train, *client.validation)]
        assert (len(client.train), len(client.validation)) == (9, 3)
        assert sorted(parts) == sorted(everything)

    seen: dict[str, list[Any]] = {}
    step = Trainer.step

    def recorded(self: Trainer) -> Any:
        done = step(self)
        seen.setdefault(name, []).append((done.client, done.number, done.items))
        return done

    taken: dict[str, dict[str, list[Any]]] = {}
    collate = type(worlds["local", 0].federation.task).collate

    def watched(self: Any, examples: Any) -> Any:
        taken[name].setdefault("batches", []).append(sorted(example["input_ids"] for example in examples))
        return collate(self, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", recorded)
        patch.setattr(type(worlds["local", 0].federation.task), "collate", watched)
        for entry in wanted.entries:
            name = entry.name
            taken[name] = {}
            from flexp.methods import METHODS

            method = METHODS[entry.method](worlds[name, 0])
            method.train_round(1, lambda step: None)
            method.close()
    batches = [sorted(map(json.dumps, found["batches"])) for found in taken.values()]
    assert len(batches[0]) == 2 * len(CLIENTS)
    assert batches[0] == batches[1] == batches[2]


def test_tuning_picks_on_validation_and_finals_follow(home: Path, ended: list[Cell]) -> None:
    two = THREE | {"methods": ["flexp-sfl", "local"]}
    outcome = compare(comparison(home, two, train={"rounds": 2}), home / "out", 1)
    assert (outcome.done, outcome.kept, outcome.failures) == (2 * 2 + 2 * 2, 0, [])
    content = json.loads((home / "out/comparison.json").read_text(encoding="utf-8"))
    assert content == outcome.comparison
    assert (content["schema"], content["seeds"], content["reference"]) == (1, [0, 1], "flexp-sfl")
    assert RunConfig.model_validate(content["config"]).train.rounds == 2
    assert content["tuning"] == {
        "seeds": [0],
        "trials_per_method": 2,
        "measure": "mean validation score at the last round",
    }
    for method in content["methods"]:
        cells = [cell for cell in ended if cell.entry == method["name"]]
        tuned, finals = cells[:2], cells[2:]
        assert [cell.purpose for cell in cells] == ["tune"] * 2 + ["final"] * 2
        # By hand: means over clients in the last round, from the diaries.
        scored = []
        for cell in sorted(tuned, key=lambda cell: cell.trial):
            last = [r for r in read(home / "out" / cell.folder / "metrics.jsonl") if r["kind"] == "eval"][-3:]
            assert [record["round"] for record in last] == [2] * 3
            mean = {key: sum(r["validation"][key] for r in last) / 3 for key in ("accuracy", "loss")}
            scored.append((-mean["accuracy"], mean["loss"], cell.trial))
        assert [trial["validation"] for trial in method["trials"]] == pytest.approx([-score for score, _, _ in scored])
        assert method["settings"] == method["trials"][min(scored)[2]]["settings"]
        assert [cell.settings for cell in finals] == [method["settings"]] * 2
        assert [cell.config.data.validation_fraction for cell in finals] == [0.0] * 2
        assert [run["seed"] for run in method["runs"]] == [0, 1]


def test_runs_hold_what_the_cells_do(home: Path, ended: list[Cell]) -> None:
    changes = {"evaluation": {"every": 2, "measure_memory": True}}
    wanted = {"methods": ["fedavg"], "seeds": 2, "tune": False}
    content = compare(comparison(home, wanted, **changes), home / "out", 1).comparison
    for method in content["methods"]:
        assert method["trials"] == []
        for run in method["runs"]:
            folder = home / "out" / run["folder"]
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            assert not (folder / "checkpoints").exists()
            assert [at["round"] for at in run["rounds"]] == [2, 3]
            last = run["rounds"][-1]
            for client in summary["clients"]:
                for side in ("personal", "global"):
                    assert run["before"][side][client["name"]] == client["before"][side]
                    assert last[side][client["name"]] == client["last"][side]
                    assert last[f"{side}_loss"][client["name"]] > 0
            assert last["bytes_up"] == pytest.approx(summary["totals"]["bytes_up"] / 3)
            seconds = [client["client_seconds"] for client in summary["clients"]]
            assert last["client_seconds"] == pytest.approx(sum(seconds) / 3)
            assert (last["virtual_seconds"], run["dropped"], run["picked_on"]) == (None, [], "test")
            assert [client["name"] for client in run["clients"]] == sorted(CLIENTS)
            assert all(client["train_examples"] == 12 for client in run["clients"])
            # Measured with the first seed, told for all.
            assert all(client["peak_memory_bytes"] > 1_000_000 for client in run["clients"])
    measured = [cell for cell in ended if (home / "out" / cell.folder / "memory.json").exists()]
    assert sorted((cell.entry, cell.seed) for cell in measured) == [("fedavg", 0)]


def test_clients_whose_device_is_too_small_and_the_virtual_clock(
    home: Path, ended: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is dropped is named, what is spent is a mean over the others, and every round ends on the virtual clock."""
    needs = {"fedavg": 5000, "flexp-sfl": 500}
    monkeypatch.setattr(MemoryProbes, "measure", lambda self, say: None)
    monkeypatch.setattr(MemoryProbes, "peak", lambda self, client: needs[self.world.config.method.name])
    devices = {"assign": ["small", "phone"], "classes": {"small": {"base": "phone", "memory_bytes": 1000}}}
    compared = {"methods": list(needs), "seeds": 1, "tune": False}
    settings = comparison(home, compared, devices=devices, train={"rounds": 2})
    content = compare(settings, home / "out", 1).comparison
    small = {"fedavg": [sorted(CLIENTS)[0], sorted(CLIENTS)[2]], "flexp-sfl": []}
    for method in content["methods"]:
        (run,) = method["runs"]
        summary = json.loads((home / "out" / run["folder"] / "summary.json").read_text(encoding="utf-8"))
        assert run["dropped"] == small[method["name"]]
        assert [at["virtual_seconds"] for at in run["rounds"]] == summary["virtual"]["rounds"]
        assert 0 < run["rounds"][0]["virtual_seconds"] < run["rounds"][-1]["virtual_seconds"]
        taking_part = [client for client in run["clients"] if client["name"] not in run["dropped"]]
        for key in ("bytes_up", "bytes_down", "client_seconds"):
            mean = sum(client[key] for client in taking_part) / len(taking_part)
            assert run["rounds"][-1][key] == pytest.approx(mean)
        assert [client["device"] for client in run["clients"]] == ["small", "phone", "small"]
        assert all(client["client_flops"] > 0 for client in taking_part)


def test_nothing_is_done_twice_and_a_change_is_another_cell(home: Path, ended: list[Cell]) -> None:
    local, short = {"methods": ["local"], "seeds": 1, "trials": 2}, {"rounds": 1, "steps_per_round": 1}
    wanted = comparison(home, local, train=short)
    first = compare(wanted, home / "out", 1)
    before = {path: path.stat().st_mtime_ns for path in (home / "out/cells").rglob("*")}
    ended.clear()
    again = compare(wanted, home / "out", 1)
    assert (again.done, again.kept, ended) == (0, 3, [])
    assert again.comparison == first.comparison
    assert {path: path.stat().st_mtime_ns for path in (home / "out/cells").rglob("*")} == before

    renamed = comparison(home, local, name="other", threads=2, output={"html": True}, train=short)
    assert compare(renamed, home / "out", 1).done == 0
    more = compare(comparison(home, local | {"seeds": 2}, train=short), home / "out", 1)
    assert sorted((cell.entry, cell.seed) for cell in ended) == [("local", 1)]
    assert [len(method["runs"]) for method in more.comparison["methods"]] == [2]
    ended.clear()
    changed = compare(comparison(home, local | {"tune": False}, train={**short, "batch_size": 3}), home / "out", 1)
    assert (changed.done, changed.kept, len(ended)) == (1, 0, 1)
    assert all(path.exists() for path in before)


def test_a_stopped_cell_goes_on_and_ends_alike(home: Path, ended: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = comparison(home, {"methods": ["fedavg"], "seeds": 1, "tune": False})
    whole = compare(wanted, home / "whole", 1).comparison
    evaluate = runner._Run._evaluate

    def interrupted(self: Any, number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt
        evaluate(self, number)

    monkeypatch.setattr(runner._Run, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(wanted, home / "out", 1)
    monkeypatch.setattr(runner._Run, "_evaluate", evaluate)
    (cell,) = {cell.folder: cell for cell in ended}.values()
    assert not is_done(cell, home / "out")
    assert regather(home / "out")["methods"][0]["runs"] == []
    rounds: list[int] = []
    train = runner._Run._round
    monkeypatch.setattr(runner._Run, "_round", lambda self, number: (rounds.append(number), train(self, number))[1])
    done = compare(wanted, home / "out", 1)
    assert rounds == [3]
    for here, there in zip(
        done.comparison["methods"][0]["runs"][0]["rounds"], whole["methods"][0]["runs"][0]["rounds"], strict=True
    ):
        assert {**here, "client_seconds": 0} == {**there, "client_seconds": 0}


def test_a_failing_cell_is_told_and_the_others_go_on(
    home: Path, ended: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divergence ends a trial, which then cannot be chosen; in a final run it is a run that is missing."""
    train = runner._Run._round

    def diverging(self: Any, number: int) -> None:
        name, seed = self.config.method.name, self.config.seed
        tuning = self.config.data.validation_fraction > 0
        if name == "local" and (self.config.train.personal.lr > 1e-4 if tuning else seed == 1):
            raise TrainingError("the loss is not a number")
        train(self, number)

    monkeypatch.setattr(runner._Run, "_round", diverging)
    compared = {"methods": ["local", "fedavg"], "seeds": 2, "trials": 2}
    wanted = comparison(home, compared, train={"rounds": 1, "steps_per_round": 1})
    outcome = compare(wanted, home / "out", 1)
    assert outcome.failures == ["local, seed 1: the loss is not a number"]
    local = outcome.comparison["methods"][0]
    assert [trial["validation"] is None for trial in local["trials"]] == [False, True]
    assert local["settings"]["train.personal.lr"] == 1e-4
    assert [run["seed"] for run in local["runs"]] == [0]
    assert [len(method["runs"]) for method in outcome.comparison["methods"]] == [1, 2]
    ended.clear()
    monkeypatch.setattr(runner._Run, "_round", train)
    mended = compare(wanted, home / "out", 1)
    assert [(cell.entry, cell.purpose, cell.seed) for cell in ended] == [("local", "final", 1)]
    assert mended.failures == []


def test_a_method_whose_models_answer_with_nan_is_never_ranked(home: Path, ended: list[Cell]) -> None:
    """It has no score, neither anew nor in an older version's folder, whose diaries hold one beside a missing loss."""
    compared = {"methods": ["local", "pretrained"], "seeds": 1, "tune": False}
    settings = {"rounds": 1, "steps_per_round": 1, "personal": {"lr": 1e20}}
    outcome = compare(comparison(home, compared, train=settings), home / "out", 1)
    line = "local, seed 0: diverged: clients north, south, west: their models answer with numbers that are not finite"
    (failure,) = outcome.failures
    assert failure.startswith(line)
    assert outcome.comparison["warnings"] == [
        line for line in outcome.comparison["warnings"] if "test examples" in line
    ]  # of the data alone
    found, other = results(outcome.comparison)
    assert (found.personal, found.worst, found.everybody, found.loss, other.difference) == (None,) * 5
    assert found.best_rounds == (0, 0)
    assert other.personal is not None

    run = outcome.comparison["methods"][0]["runs"][0]
    diary = home / "out" / run["folder"] / "metrics.jsonl"
    records = [json.loads(text) for text in diary.read_text(encoding="utf-8").splitlines()]
    for record in records:
        if record["kind"] == "eval" and record["round"] == 1:
            for side in ("personal", "global"):
                del record[side]["not_finite"]
                record[side] |= {"accuracy": 0.9, "macro_f1": 0.3}
    diary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert regather(home / "out") == outcome.comparison


@pytest.mark.parametrize("error", [TrainingError, BadValuesError, OSError])
def test_what_a_trial_that_did_not_end_leaves_to_a_report(
    home: Path, ended: list[Cell], monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Diverged here or refused by the server's guard, it is a result; killed, it is not, and the finals stay."""
    train = runner._Run._round

    def failing(self: Any, number: int) -> None:
        if self.config.train.personal.lr > 1e-4:
            raise error("so it ends")
        train(self, number)

    monkeypatch.setattr(runner._Run, "_round", failing)
    compared = {"methods": ["fedavg"], "seeds": 1, "trials": 2}
    outcome = compare(comparison(home, compared, train={"rounds": 1, "steps_per_round": 1}), home / "out", 1)
    assert bool(outcome.failures) == (error is OSError)
    assert regather(home / "out") == outcome.comparison
    assert len(outcome.comparison["methods"][0]["runs"]) == 1


def test_a_run_is_no_comparison(tmp_path: Path) -> None:
    """Though a run with planned cuts has a ``plan.json`` as well."""
    (tmp_path / "plan.json").write_text('{"version": 3, "clients": []}')
    with pytest.raises(StorageError, match=r"has no plan\.json of a comparison"):
        regather(tmp_path)


def test_places_that_are_taken(home: Path, ended: list[Cell]) -> None:
    wanted = comparison(home, {"methods": ["pretrained"], "seeds": 1})
    runner.run(wanted.base, home / "run")
    with pytest.raises(ConfigError, match="holds a run"):
        compare(wanted, home / "run", 1)
    outcome = compare(wanted, home / "out", 1)
    folder = outcome.comparison["methods"][0]["runs"][0]["folder"]
    assert re.fullmatch(r"cells/pretrained/final-seed-0-[0-9a-f]{10}", folder)
    # Another version's defaults under the same name: the cell is not what is asked for, and is done anew.
    path = home / "out" / folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["evaluation"]["batch_size"] = 7
    path.write_text(json.dumps(stored), encoding="utf-8")
    os.utime(path)
    assert compare(wanted, home / "out", 1).done == 1


def test_data_that_change_meanwhile_make_no_cell(
    home: Path, ended: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = comparison(home, {"methods": ["pretrained"], "seeds": 1, "tune": False}, train={"rounds": 1})
    run, rows = runner.run, home / "rows.jsonl"
    before = rows.read_text(encoding="utf-8")

    def changing(*args: Any, **settings: Any) -> Any:
        rows.write_text(before + before.splitlines()[0] + "\n", encoding="utf-8")
        return run(*args, **settings)

    monkeypatch.setattr(runner, "run", changing)
    outcome = compare(wanted, home / "out", 1)
    assert "data or model were changed meanwhile; put them back" in outcome.failures[0]
    assert len([*home.glob("out/cells/pretrained/*-changed-1/summary.json")]) == 1  # nothing that was trained is lost
    monkeypatch.setattr(runner, "run", run)
    rows.write_text(before, encoding="utf-8")
    beside = comparison(home, {"methods": ["pretrained"], "seeds": 1, "tune": False}, data={"source": str(home)})
    assert {path.parent for path, _, _ in comparing._files(beside.base, home / "out")} >= {home, home / "model"}
    assert not any("out" in path.parts for path, _, _ in comparing._files(beside.base, home / "out"))
    outcome = compare(wanted, home / "out", 1)
    assert (outcome.failures, outcome.done, outcome.kept) == ([], 1, 0)


def test_cells_of_other_data_or_weights_do_not_stand_beside_each_other(home: Path, ended: list[Cell]) -> None:
    """A row that is appended, a label that is mended far from what the first seed draws, a model that is saved anew."""
    wanted = comparison(home, {"methods": ["pretrained"], "seeds": 1, "tune": False}, train={"rounds": 1})
    out, rows, weights = home / "out", home / "rows.jsonl", home / "model/model.safetensors"
    compare(wanted, out, 1)
    before, model = rows.read_text(encoding="utf-8"), weights.read_bytes()
    more = wanted.config.model_copy(update={"seeds": 2})

    def refused(pattern: str) -> None:
        with pytest.raises(DataError, match=pattern):
            compare(make(wanted.base, more), out, 1)

    rows.write_text(before + before.splitlines()[0].replace("w0", "w39") + "\n", encoding="utf-8")
    refused(r"not those of the cells that are there: north has 22 train examples, it had 21.*choose another --out")
    lines = before.splitlines()
    rows.write_text("\n".join([*lines[:-1], lines[-1].replace("dog", "cat")]) + "\n", encoding="utf-8")
    refused("west has other .* examples")
    rows.write_text(before, encoding="utf-8")
    save_tiny("bert", home / "model", seed=3)
    refused("the weights of .*model are not those")
    weights.write_bytes(model)
    assert compare(make(wanted.base, more), out, 1).kept == 1
