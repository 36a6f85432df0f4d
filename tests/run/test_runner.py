"""A run from its configuration to its folder; and every way to stop it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.config import RunConfig
from flexp.cost import probe
from flexp.errors import ConfigError, DataError, FlexpError, StorageError, TrainingError
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.models.zoo import tiny_model
from flexp.report.metrics import read
from flexp.run import runner, settle, store
from flexp.run.meetings import meeting
from flexp.run.settle import build_world
from tests.data.tools import jsonl, labelled, tokenizer
from tests.run.tools import copying
from tests.tiny import CLIENTS, bert_folder, checkpoint, config

VALIDATION_EXAMPLES = 3  # a quarter of 12

SETTINGS: list[dict[str, Any]] = [
    {},
    {"model": {"tuning": "lora"}, "train": {"shared": {"schedule": "cosine", "warmup_steps": 2}}},
    {"server": {"update": "mean", "mean_over": 4, "memory": "recompute"}, "train": {"micro_batch": 3}},
    {"method": {"align": {"kind": "weights", "every": 2}}, "train": {"turn": "round", "steps_per_round": 2}},
    {"method": {"name": "local"}},
    {"data": {"validation_fraction": 0.25, "train_examples": 16}},
]


def same(left: Path, right: Path) -> None:
    """Equal weights, optimiser states and generators, bit for bit; seconds differ, of course."""
    one, two = checkpoint(left), checkpoint(right)
    assert one.keys() == two.keys()
    for party, tensors in one.items():
        assert tensors.keys() == two[party].keys()
        for name, value in tensors.items():
            if "seconds" not in name:
                assert torch.equal(value, two[party][name]), (party, name)


@pytest.mark.parametrize("settings", SETTINGS, ids=["full", "lora", "mean", "weights", "local", "validation"])
def test_resumed_equals_undisturbed(home: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(home, **settings | {"train": {"steps_per_round": 1, **settings.get("train", {}), "rounds": 2}})
    copying(monkeypatch, home / "undisturbed", home / "stopped")
    whole = runner.run(run, home / "undisturbed")
    assert whole["finished"]

    if not settings:  # that somebody interrupts it leaves no more than a kill
        shutil.rmtree(home / "stopped")
        evaluate = runner._Run._evaluate

        def interrupted(self: Any, number: int) -> None:
            if number == 2:
                raise KeyboardInterrupt
            evaluate(self, number)

        monkeypatch.setattr(runner._Run, "_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(run, home / "stopped")
    monkeypatch.undo()
    resumed = runner.resume(home / "stopped")

    same(home / "undisturbed", home / "stopped")
    assert resumed["scores"] == whole["scores"]
    for key in ("bytes_up", "bytes_down"):
        assert resumed["totals"][key] == whole["totals"][key]
    steps = [(r["client"], r["step"], r["loss"]) for r in read(home / "stopped/metrics.jsonl") if r["kind"] == "step"]
    assert steps == [
        (r["client"], r["step"], r["loss"]) for r in read(home / "undisturbed/metrics.jsonl") if r["kind"] == "step"
    ]


def test_a_model_whose_blocks_give_tuples_resumes_alike(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run makes its first plan in training, where looking for tuples must not draw dropout twice."""
    model: Any = tiny_model("gpt_neo", dropout=0.2)
    model.save_pretrained(home / "neo")
    tokenizer().save_pretrained(home / "neo")
    run = config(home, model={"id": str(home / "neo")}, data={"task": "causal-lm"}, train={"rounds": 2})
    copying(monkeypatch, home / "whole", home / "out")
    runner.run(run, home / "whole")
    runner.resume(home / "out")
    same(home / "whole", home / "out")


def test_the_folder_holds_what_the_docs_say(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(what: probe.Probe, timeout: float) -> probe.Measured:  # really: tests/comparison and tests/cost
        assert what.cut
        return probe.Measured(1, 1000 * what.cut[0])

    monkeypatch.setattr(probe, "measure", measured)
    output = {"tensorboard": True, "html": True}
    run = config(home, output=output, evaluation={"measure_memory": True}, train={"rounds": 2})
    summary = runner.run(run, home / "out")
    assert summary == json.loads((home / "out/summary.json").read_text(encoding="utf-8"))
    assert (home / "out/report.html").stat().st_size > 10_000
    assert list((home / "out/events").rglob("*tfevents*"))
    written = RunConfig.model_validate(json.loads((home / "out/config.json").read_text(encoding="utf-8")))
    assert written == meeting(run, on=False)  # what was left to the run: two classes begin as well without
    clients = {client["name"]: client for client in summary["clients"]}
    assert list(clients) == sorted(CLIENTS)
    assert [clients[name]["cut"] for name in sorted(CLIENTS)] == [[1, 4], [2, 4], [3, 4]]
    # Every client sends z up and gets h down in the forward, and the same again as gradients in the backward; with
    # aligned blocks z_base goes up as well. (B, T, H) = (4, T, 32) in fp32; masks are one byte an entry.
    records = read(home / "out/metrics.jsonl")
    assert clients["north"]["bytes_up"] < clients["south"]["bytes_up"]
    assert all(client["bytes_up"] > client["bytes_down"] for client in clients.values())
    assert {name: client["peak_memory_bytes"] for name, client in clients.items()} == {
        "north": 1000, "south": 2000, "west": 3000,
    }  # fmt: skip
    assert sum(record["kind"] == "eval" for record in records) == (1 + 2) * len(CLIENTS)
    assert sum(record["kind"] == "step" for record in records) == 2 * 2 * len(CLIENTS)
    assert summary["server"]["updates"] == 2 * 2 * len(CLIENTS)


def test_equal_seeds_give_equal_runs_and_other_seeds_others(home: Path) -> None:
    short = {"rounds": 1}
    one = runner.run(config(home, train=short), home / "a")
    two = runner.run(config(home, train=short), home / "b")
    other = runner.run(config(home, seed=1, train=short), home / "c")
    same(home / "a", home / "b")
    assert one["scores"] == two["scores"]
    assert any(
        not torch.equal(value, checkpoint(home / "c")["client-north"][name])
        for name, value in checkpoint(home / "a")["client-north"].items()
        if name.startswith("personal/")
    )
    assert other["seed"] == 1


def test_simulated_clients_share_what_is_frozen(home: Path) -> None:
    world = build_world(config(home, model={"tuning": "lora"}))
    method = FlexpSfl(world)
    frozen = {name: value.data_ptr() for name, value in world.source.model.named_parameters()}
    for trainer in method.clients.values():
        stage = trainer.model.stage  # type: ignore[attr-defined]
        own = {value.data_ptr() for value in stage.trainable().values()}
        rest = {value.data_ptr() for value in stage.model.parameters()} - own
        assert own.isdisjoint(frozen.values())
        assert rest <= set(frozen.values())


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of two rounds and its folder; tests that change it do so in copies."""
    place: Path = tmp_path_factory.mktemp("short")
    bert_folder(place / "model", dropout=True)
    run = config(place, train={"rounds": 2})
    runner.run(run, place / "out")
    return run, place / "out"


@pytest.fixture
def out(short: tuple[RunConfig, Path], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(short[1], tmp_path / "out"))


def test_a_run_is_not_written_over(short: tuple[RunConfig, Path]) -> None:
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume"):
        runner.run(*short)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(out: Path) -> None:
    file = out / "checkpoints/checkpoint-00000002/000-server.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(
        StorageError, match=r"000-server.safetensors is not what was saved.*delete .* checkpoint-00000002"
    ):
        runner.resume(out)


def test_an_empty_index_of_a_checkpoint_is_mended_alike(out: Path) -> None:
    (out / "checkpoints/checkpoint-00000002/checkpoint.json").write_text("")
    with pytest.raises(
        StorageError, match=r"checkpoint.json is not what was saved .*; delete the folder checkpoint-00000002"
    ):
        runner.resume(out)


NAMES = ("a/x", "../a", "[red]a[/]", "n" * 300, "a.x", "A.x")


def test_clients_may_be_called_what_no_file_can_be_called(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(home / "odd.jsonl", labelled(90, NAMES))
    output = {"tensorboard": True, "html": True}
    run = config(
        home, data={"source": str(home / "odd.jsonl")}, output=output, train={"rounds": 2, "steps_per_round": 1}
    )
    copying(monkeypatch, home / "whole", home / "out")
    runner.run(run, home / "whole")
    summary = runner.resume(home / "out")
    assert {client["name"] for client in summary["clients"]} == set(NAMES)
    assert set(checkpoint(home / "out")) == {"server", *(f"client-{name}" for name in NAMES)}
    same(home / "whole", home / "out")
    assert {path.name for path in home.iterdir()} == {"model", "rows.jsonl", "odd.jsonl", "whole", "out"}


def test_what_cannot_be_built_leaves_no_folder(home: Path) -> None:
    with pytest.raises(FlexpError, match="no linear layer of that name"):
        runner.run(config(home, model={"tuning": "lora", "lora": {"targets": "foo"}}), home / "out")
    assert not (home / "out").exists()


def test_the_best_round_on_validation_data_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, calls = runner.evaluate, 0
    rounds = [0.1, 0.2, 0.9, 0.3, 0.4]  # accuracy on validation data before training, after round 1, ...

    def scored(forward: Any, task: Any, examples: Any, size: int, extras: bool = True) -> Any:
        nonlocal calls
        scores = evaluate(forward, task, examples, size, extras=extras)
        if len(examples) == VALIDATION_EXAMPLES:
            scores["accuracy"] = rounds[calls // len(CLIENTS)]
            calls += 1
        return scores

    run = config(home, data={"validation_fraction": 0.25}, train={"rounds": 4}, output={"html": True})
    monkeypatch.setattr(runner, "evaluate", scored)
    summary = runner.run(run, home / "out")
    assert summary["scores"]["picked_on"] == "validation"
    assert summary["scores"]["best"]["round"] == 2
    kept = sorted(path.name for path in (home / "out/checkpoints").glob("checkpoint-*"))
    assert kept == [f"checkpoint-{number:08d}" for number in (2, 3, 4)]
    records = [record for record in read(home / "out/metrics.jsonl") if record["kind"] == "eval"]
    assert all(record["validation"]["n"] == VALIDATION_EXAMPLES for record in records)
    assert "The best round on validation data was round 2" in (home / "out/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("imitates", [False, True])
def test_bfloat16_is_warned_of_where_it_loses_steps_or_time(
    home: Path, monkeypatch: pytest.MonkeyPatch, imitates: bool
) -> None:
    def notes(**model: Any) -> str:
        return " ".join(build_world(config(home, model=model)).federation.notes)

    monkeypatch.setattr(settle, "imitates_bfloat16", lambda: imitates)
    assert "bfloat16 loses the steps that are small" in notes(dtype="bfloat16")
    assert "bfloat16" not in notes()
    slow = "no instructions for it"
    assert (slow in notes(dtype="bfloat16", tuning="lora")) is imitates
    assert ('model.autocast = "off" is faster here' in notes(autocast="bfloat16")) is imitates
    assert "loses" not in notes(dtype="bfloat16", tuning="lora") + notes(autocast="bfloat16")


def test_halves_of_checkpoints_go_when_a_run_is_resumed(out: Path) -> None:
    half = out / "checkpoints/.checkpoint-00000003.0123abcd.part"
    half.mkdir()
    (half / "000-server.safetensors").write_bytes(b"half")
    runner.resume(out)
    assert not half.exists()


def test_a_full_disk_while_saving_loses_nothing(
    short: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, undisturbed = short
    saves = 0
    save_file = store.save_file

    def full(tensors: Any, path: Path) -> None:
        nonlocal saves
        saves += 1
        if saves == 6:  # in the middle of the second checkpoint
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(StorageError, match="the disk is full; what was saved before is intact"):
        runner.run(run, tmp_path / "out")
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir()) == [store.LOCK, "checkpoint-00000001"]
    runner.resume(tmp_path / "out")
    same(tmp_path / "out", undisturbed)


def test_a_loss_that_is_no_number_stops_with_one_line(home: Path) -> None:
    run = config(home, train={"personal": {"name": "sgd", "lr": 1e30, "clip": None}})
    with pytest.raises((TrainingError, Exception), match=r"client \w+.*(the loss is|not finite).*lower train"):
        runner.run(run, home / "out")


def test_an_empty_client_is_named(home: Path) -> None:
    with pytest.raises(DataError, match="east"):
        runner.run(config(home, data={"clients": {"names": ["north", "east"]}}), home / "out")
    assert not (home / "out").exists()


def test_a_cut_outside_of_the_model_is_named(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"clients.cut of client north = \(2, 9\) does not fit a model of 4 blocks"):
        runner.run(config(home, data={"clients": {"each": [{"cut": [2, 9]}]}}), home / "out")


def test_sending_embeddings_must_be_asked_for(home: Path) -> None:
    data = {"clients": {"names": ["north"], "each": [{"cut": [0, 3]}]}}
    with pytest.raises(ConfigError, match=r"the server can read every token.*s >= 1"):
        runner.run(config(home, data=data), home / "out")
    with pytest.raises(ConfigError, match="the server can read every token"):
        runner.run(config(home, model={"base_depth": 0}), home / "out")
    allowed = config(home, data=data, model={"expose_embeddings": True}, train={"rounds": 1})
    assert runner.run(allowed, home / "out")["finished"]
