"""What all clients share is scored once, and the scores are those of scoring it for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexp.methods import METHODS
from flexp.report.metrics import read
from flexp.run import runner
from tests.methods.tools import ADAPTERS
from tests.tiny import CLIENTS, config

ONE_MODEL = ("fedavg", "fedprox", "centralized", "pretrained")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_scores_are_the_same(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = "lora" if name in ADAPTERS else "full"
    run = config(home, model={"tuning": tuning}, method={"name": name}, train={"rounds": 1, "steps_per_round": 2})
    calls = 0
    evaluate = runner.evaluate

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return evaluate(*arguments, **options)

    expected: list[dict[str, Any]] = []
    once = runner._Run._evaluate

    def each(self: Any, number: int) -> None:
        """And as it would be without: every client's model on everything."""
        once(self, number)
        task, size = self.world.federation.task, self.config.evaluation.batch_size
        for client in self.world.federation.clients:
            forward = self.method.personal(client.name)
            found = {
                side: evaluate(forward, task, examples, size)
                for side, examples in (("personal", client.test), ("global", self.everybody))
            }
            expected.append({"round": number, "client": client.name, **found})

    monkeypatch.setattr(runner, "evaluate", counted)
    monkeypatch.setattr(runner._Run, "_evaluate", each)
    runner.run(run, home / "out")
    everybody = 1 + (1 if name in ONE_MODEL else len(CLIENTS))  # before training, after round 1
    assert calls == 2 * len(CLIENTS) + everybody
    told = [record for record in read(home / "out/metrics.jsonl") if record["kind"] == "eval"]
    assert [{key: record[key] for key in ("round", "client", "personal", "global")} for record in told] == expected
