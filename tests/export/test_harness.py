"""The harness's questions, answered as one computes them by hand and as the harness's own adapter answers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from flexp.cli.main import main
from flexp.errors import ConfigError
from flexp.export.folder import export
from flexp.export.harness import HarnessModel, run_harness
from flexp.export.opening import open_trained
from tests.data.tools import jsonl

from .tools import train

CHOICES = """
task: pick
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: "{rows}" }} }}
test_split: test
output_type: multiple_choice
doc_to_text: "the {{{{q}}}} dog"
doc_to_choice: ["runs", "sleeps now", "w7"]
doc_to_target: answer
metric_list: [{{ metric: acc }}]
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: "{rows}" }} }}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "the {{{{q}}}} dog runs fast now"
metric_list: [{{ metric: word_perplexity }}]
"""
WORDS = """
task: words
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: "{rows}" }} }}
test_split: test
output_type: generate_until
doc_to_text: "the {{{{q}}}} dog"
doc_to_target: "runs"
generation_kwargs: {{ until: ["."], max_gen_toks: 3 }}
metric_list: [{{ metric: exact_match }}]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    export(open_trained(train(folder, "gpt2", train={"steps_per_round": 8}), "north"), folder / "out")
    rows = jsonl(folder / "tasks.jsonl", [{"q": f"w{k}", "answer": k % 3} for k in range(12)])
    for name, text in (("pick", CHOICES), ("texts", TEXTS), ("words", WORDS)):
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / f"tasks/{name}.yaml").write_text(text.format(rows=rows), encoding="utf-8")
    return folder


def ask(*pairs: Any) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def by_hand(model: Any, context: list[int], continuation: list[int]) -> float:
    """One token after the other, each with all before it."""
    total = 0.0
    for k, token in enumerate(continuation):
        ids = torch.tensor([context + continuation[:k]])
        logits = model.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        total += float(torch.log_softmax(logits[0, -1].double(), -1)[token])
    return total


def test_log_probabilities_are_those_computed_by_hand(home: Path) -> None:
    model = open_trained(home / "run", "north")
    adapter = HarnessModel(model, batch_size=2)
    encode = adapter.tok_encode
    pairs = [("the w1", " dog runs"), ("the", " dog"), ("", "a cat sleeps"), ("the red dog ", "runs"), ("w3", " w4")]
    found = adapter.loglikelihood(ask(*pairs), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        before = encode(context) or [adapter.prefix_token_id]
        assert value == pytest.approx(by_hand(model, before, encode(continuation)), abs=1e-4)
    (rolled,) = adapter.loglikelihood_rolling(ask(("the w1 dog runs",)))
    assert rolled == pytest.approx(by_hand(model, [adapter.eot_token_id], encode("the w1 dog runs")), abs=1e-4)


def test_what_is_greedy_is_generated(home: Path) -> None:
    adapter = HarnessModel(open_trained(home / "run", "north"))
    (text,) = adapter.generate_until(ask(("the w1 dog", {"until": [], "max_gen_toks": 4})))
    assert 1 <= len(text.split()) <= 4
    assert adapter.loglikelihood(ask(("the w1 dog", " " + text)), disable_tqdm=True)[0][1]
    first, second = text.split()[:2]
    (stopped,) = adapter.generate_until(ask(("the w1 dog", {"until": second, "max_gen_toks": 4})))
    assert stopped.split() == [first]
    with pytest.raises(ConfigError, match="generates greedily"):
        adapter.generate_until(ask(("the", {"do_sample": True})))


def test_texts_longer_than_the_model_go_in_windows(home: Path) -> None:
    model = open_trained(home / "run", "north")
    adapter = HarnessModel(model)
    adapter.max_length = 4
    ids = adapter.tok_encode("the w1 dog runs fast slowly")
    windows = by_hand(model, [adapter.eot_token_id], ids[:4]) + by_hand(model, ids[1:4], ids[4:])
    (rolled,) = adapter.loglikelihood_rolling(ask(("the w1 dog runs fast slowly",)))
    assert rolled == pytest.approx(windows, abs=1e-4)
    (long,) = adapter.loglikelihood(ask(("the w1 dog runs fast", " slowly")), disable_tqdm=True)
    assert long[0] == pytest.approx(by_hand(model, ids[1:5], ids[5:]), abs=1e-4)


def test_tasks_with_local_data_score_as_under_the_harness_itself(home: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ["pick", "texts", "words"]
    split = run_harness(open_trained(home / "run", "north"), names, home / "tasks")
    exported = run_harness(open_trained(home / "out"), names, home / "tasks", batch_size=5)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(home / "out"), "dtype": "float32"},
        device="cpu",
        tasks=names,
        task_manager=TaskManager(include_path=str(home / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    for task, metric in (("pick", "acc,none"), ("texts", "word_perplexity,none"), ("words", "exact_match,none")):
        assert split[task][metric] == pytest.approx(theirs[task][metric], rel=1e-5)
        assert exported[task][metric] == pytest.approx(theirs[task][metric], rel=1e-5)


def test_the_command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["flexp", "evaluate", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        assert left.value.code == code, captured.err
        return captured.err if code else captured.out

    run, tasks = str(home / "run"), ["--harness", "pick", "--tasks-dir", str(home / "tasks")]
    shown = json.loads(call(run, "--client", "north", *tasks, "--pretrained", "--limit", "6", "--json"))
    assert set(shown["harness"]) == {"pretrained", "personal"}
    assert set(shown["harness"]["personal"]) == {"pick"}
    assert "acc,none" in call(str(home / "out"), *tasks)
    for wrong, message in (
        ([run, "--client", "north", "--harness", "none", *tasks[2:]], "there is no such task"),
        ([run, "--client", "north", *tasks[2:]], "go with --harness"),
        ([str(home / "out"), *tasks, "--pretrained"], "--pretrained needs the run"),
    ):
        assert message in call(*wrong, code=2).strip().splitlines()[-1]
