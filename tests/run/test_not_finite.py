"""A run whose models do not answer with finite numbers: no score anywhere, and it says so."""

from __future__ import annotations

import html
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from flexp.client.trainer import Trainer
from flexp.config import DeploymentConfig
from flexp.report.metrics import read
from flexp.report.progress import Progress
from flexp.run import runner
from flexp.run.diary import Diary
from tests.tiny import CLIENTS, config

from .tools import Client, Server, plain

DIVERGES = {
    "method": {"name": "local"},
    "train": {"rounds": 1, "steps_per_round": 1, "personal": {"lr": 1e20}},
    "output": {"html": True},
}


def test_a_run_that_diverges_has_no_score_and_says_so(home: Path) -> None:
    told = io.StringIO()

    def progress(*of: Any, **more: Any) -> Progress:
        return Progress(*of, **more, console=Console(file=told))

    summary = runner.run(config(home, **DIVERGES), home / "out", progress=progress)
    line = (
        "clients north, south, west, after round 1: their models answer with numbers that are not finite, so there are "
        "no scores on their own test data and everybody's; lower train.personal.lr"
    )
    assert f"warning: {line}" in told.getvalue()
    assert "own test data" not in told.getvalue().split("round 1  ")[1].splitlines()[0]
    assert summary["warnings"][-1].startswith(line)
    assert line in html.unescape((home / "out/report.html").read_text(encoding="utf-8"))
    assert summary["not_finite"] == [*CLIENTS]
    assert summary["scores"]["before"]["personal_mean"] > 0
    assert set(summary["scores"]["last"].values()) == {None}
    assert summary["scores"]["best"]["round"] == 0
    last = [record for record in read(home / "out/metrics.jsonl") if record["kind"] == "eval"][-1]["personal"]
    assert last == {
        **dict.fromkeys(("loss", "accuracy", "macro_f1", "auc")),
        "majority": 5 / 9,
        "n": 9,
        "not_finite": 9,
    }


def test_a_deployed_client_goes_the_same_way(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    personal, begin = Trainer.personal, Diary.__init__

    def noting(self: Diary, *of: Any) -> None:
        begin(self, *of)
        self.note = notes.append

    def broken(self: Trainer, batch: Any) -> Any:
        return SimpleNamespace(logits=personal(self, batch).logits * (torch.nan if self.steps else 1.0))

    monkeypatch.setattr(Diary, "__init__", noting)
    monkeypatch.setattr(Trainer, "personal", broken)
    own = config(home, train={"rounds": 1, "steps_per_round": 1}, evaluation={"measure_memory": False})
    free = DeploymentConfig(schedule="free", clients=["north"])
    server = Server(own, free, home / "server")
    client = Client(own, free, "north", plain(server), home / "north")
    client.join()
    server.end()
    assert client.over
    assert [line for line in notes if "round 1" in line] == [
        "north: round 1, accuracy has no value on its own test data",
        "warning: client north, after round 1: its model answers with numbers that are not finite for 9 of 9 examples, "
        "so there are no scores on its own test data; lower train.personal.lr or train.shared.lr, set their clip, or "
        "use model.dtype = 'float32'",
    ]
    before, after = (record["personal"] for record in read(home / "north/metrics.jsonl") if record["kind"] == "eval")
    assert before["accuracy"] is not None
    assert (after["accuracy"], after["loss"], after["not_finite"]) == (None, None, 9)
