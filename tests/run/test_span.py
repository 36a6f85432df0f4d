"""Question answering from a run to predictions, which are those of the exported folder in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from flexp.config.loading import validate
from flexp.export.answers import predict, score
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.models.zoo import save_tiny
from flexp.run import runner
from tests.data.test_span import COLUMNS
from tests.data.tools import jsonl, tokenizer
from tests.tiny import content


def test_from_a_run_to_predictions(tmp_path: Path) -> None:
    model = save_tiny("bert", tmp_path / "model", task="question-answering")
    tokenizer(bert=True).save_pretrained(model)
    rows = [
        {"question": f"what is w{k} ?", "context": " ".join(f"w{(7 * k + j) % 40}" for j in range(8 + k % 9)),
         "answers": f"w{(7 * k + 2) % 40} w{(7 * k + 3) % 40}", "client": ("north", "south")[k % 2]}
        for k in range(16)
    ]  # fmt: skip
    wanted = content(tmp_path, data={"clients": {"cut": [1, 3]}}, train={"rounds": 1, "steps_per_round": 2})
    wanted["data"] |= {"task": "question-answering", **COLUMNS, "max_length": 20}
    wanted["data"]["source"] = str(jsonl(tmp_path / "rows.jsonl", rows))
    summary = runner.run(validate(wanted, "test"), tmp_path / "run")
    assert (summary["metric"], summary["higher_is_better"]) == ("f1", True)
    opened = open_trained(tmp_path / "run", "north")
    assert summary["clients"][0]["last"]["personal"] == next(iter(score(opened).values()))["f1"]
    unknown = jsonl(tmp_path / "asked.jsonl", [{k: row[k] for k in ("question", "context")} for row in rows])
    assert predict(opened, str(unknown), tmp_path / "found.jsonl") == 16
    found = [json.loads(line)["predicted"] for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    export(opened, tmp_path / "out")
    plain = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    losses, right = [], []
    for row, answer in zip(rows, found, strict=True):
        batch = words(row["question"], row["context"], return_offsets_mapping=True, return_tensors="pt")
        offsets = batch.pop("offset_mapping")[0]
        if len(offsets) > 20:
            continue  # of windows, tests/data/test_span.py tells
        start = row["context"].index(row["answers"])
        ends = [k for k, which in enumerate(batch.sequence_ids(0)) if which == 1 and int(offsets[k][1]) > start][:2]
        with torch.no_grad():
            output = plain(**batch, start_positions=torch.tensor(ends[:1]), end_positions=torch.tensor(ends[1:]))
        losses.append(float(output.loss))
        right.append({**row, "f1": by_hand(answer.split(), row["answers"].split())})
        inside = [k for k, which in enumerate(batch.sequence_ids(0)) if which == 1]
        pairs = [(i, j) for i in inside for j in inside if i <= j]
        i, j = max(pairs, key=lambda pair: float(output.start_logits[0, pair[0]] + output.end_logits[0, pair[1]]))
        assert row["context"][offsets[i][0] : offsets[j][1]] == answer
    short = str(jsonl(tmp_path / "short.jsonl", [{k: v for k, v in row.items() if k != "f1"} for row in right]))
    (scores,) = score(open_trained(tmp_path / "out"), short, batch_size=1).values()  # padding is in a loss's softmax
    assert len(losses) > 8
    assert scores["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert scores["f1"] == pytest.approx(sum(row["f1"] for row in right) / len(right), rel=1e-9)


def by_hand(given: list[str], right: list[str]) -> float:
    """SQuAD's F1: the harmonic mean of the shares of words in common."""
    same = sum(min(given.count(word), right.count(word)) for word in set(given))
    return 0.0 if not same else 2 / (len(given) / same + len(right) / same)
