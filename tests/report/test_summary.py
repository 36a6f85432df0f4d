from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexp.report.metrics import Record, read, write_records
from flexp.report.summary import aggregate, best_round, build_summary, scores_by_round

from . import synthetic


def evaluation(round: int, client: str, personal: float | None, everybody: float | None) -> Record:
    return {
        "kind": "eval",
        "round": round,
        "client": client,
        "personal": {"accuracy": personal, "loss": 1.0, "n": 10},
        "global": {"accuracy": everybody, "loss": 1.0, "n": 20},
    }


DIARY = [
    evaluation(0, "a", 0.50, 0.40),
    evaluation(0, "b", 0.60, 0.50),
    {"kind": "step", "round": 1, "client": "a", "step": 1, "loss": 1.0},
    evaluation(1, "a", 0.80, 0.60),
    evaluation(1, "b", 0.90, 0.70),
    evaluation(2, "a", 0.70, 0.65),
    evaluation(2, "b", 0.90, 0.75),
    evaluation(3, "a", 0.99, 0.99),  # b was not evaluated any more: killed
]


def build(diary: list[Record], **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "name": "x",
        "method": "flexp-sfl",
        "seed": 0,
        "finished": True,
        "metric": "accuracy",
        "higher_is_better": True,
        "model": {"blocks": 4},
        "clients": [{"name": "a", "cut": [1, 3]}, {"name": "b", "cut": [2, 4]}],
        "records": diary,
        "server": {},
        "totals": {},
        "machine": {},
        "versions": {},
    }
    return build_summary(**{**arguments, **changes})


def test_the_best_round_is_picked_on_validation_data_where_there_is_any() -> None:
    scores = {1: (0.5, 0.7), 2: (0.9, 0.8), 3: (0.8, 0.6)}  # (validation, test)
    diary = [
        {**evaluation(round, client, test, 0.1), "validation": {"accuracy": validation, "loss": 1.0, "n": 3}}
        for round, (validation, test) in {0: (1.0, 1.0), **scores, 4: (0.2, 0.95)}.items()
        for client in ("a", "b")
    ]
    made = build(diary)
    assert made["scores"]["picked_on"] == "validation"
    assert made["scores"]["best"]["round"] == 2
    assert made["scores"]["best"]["validation_mean"] == pytest.approx(0.9)
    assert made["scores"]["best"]["personal_mean"] == pytest.approx(0.8)
    assert made["clients"][0]["last"] == {"personal": 0.95, "global": 0.1, "validation": 0.2}
    del diary[1]["validation"]  # a client without: what all can be compared on is test data
    assert build(diary)["scores"]["picked_on"] == "test"
    assert build(diary)["scores"]["best"]["round"] == 4


def test_means_worst_before_last_and_best() -> None:
    scores = build(DIARY)["scores"]
    assert scores["before"] == pytest.approx(
        {"personal_mean": 0.55, "personal_worst": 0.5, "global_mean": 0.45, "global_worst": 0.4}
    )
    assert scores["last"] == pytest.approx(
        {"personal_mean": 0.8, "personal_worst": 0.7, "global_mean": 0.7, "global_worst": 0.65}
    )
    assert scores["best"] == pytest.approx(
        {"round": 1, "personal_mean": 0.85, "personal_worst": 0.8, "global_mean": 0.65, "global_worst": 0.6}
    )


def test_every_client_has_its_scores_of_the_same_rounds() -> None:
    first, second = build(DIARY)["clients"]
    assert first == {
        "name": "a",
        "cut": [1, 3],
        "before": {"personal": 0.5, "global": 0.4},
        "last": {"personal": 0.7, "global": 0.65},
        "best": {"round": 1, "personal": 0.8, "global": 0.6},
    }
    assert second["best"]["round"] == 1


def test_a_round_that_not_all_clients_finished_does_not_count() -> None:
    assert list(scores_by_round(DIARY, ["a", "b"], "accuracy")) == [0, 1, 2]
    assert build(DIARY)["rounds"] == 2
    assert build(DIARY, rounds=3)["rounds"] == 3


def test_perplexity_is_better_when_lower() -> None:
    rounds = {
        0: {"a": {"personal": 5.0, "global": 9.0}, "b": {"personal": 5.0, "global": 9.0}},
        1: {"a": {"personal": 20.0, "global": 9.0}, "b": {"personal": 30.0, "global": 9.0}},
        2: {"a": {"personal": 10.0, "global": 9.0}, "b": {"personal": 30.0, "global": 9.0}},
    }
    assert aggregate(rounds[2], False)["personal_worst"] == 30.0
    assert best_round(rounds, False) == 2  # not round 0, which is no result of training
    assert best_round({0: rounds[0]}, False) == 0


def test_ties_go_to_the_earlier_round() -> None:
    diary = [evaluation(round, "a", 0.8, 0.5) for round in (0, 1, 2)]
    assert build(diary, clients=[{"name": "a"}])["scores"]["best"]["round"] == 1


def test_a_score_that_is_missing_makes_the_mean_missing() -> None:
    diary = [*DIARY[:5], evaluation(2, "a", None, 0.6), evaluation(2, "b", 0.9, 0.7)]
    last = build(diary)["scores"]["last"]
    assert last["personal_mean"] is None
    assert last["personal_worst"] is None
    assert last["global_mean"] == pytest.approx(0.65)


def test_a_run_without_any_evaluation_has_no_scores() -> None:
    made = build([])
    assert made["rounds"] == 0
    assert made["scores"]["last"]["personal_mean"] is None
    assert made["scores"]["best"]["round"] is None
    assert made["clients"][0]["last"] == {"personal": None, "global": None}


def test_the_summary_is_json_and_the_inputs_are_untouched() -> None:
    facts = synthetic.client_facts()
    copy = json.loads(json.dumps(facts))
    made = build(synthetic.records(), clients=facts)
    assert facts == copy
    assert json.loads(json.dumps(made)) == made


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.booleans(),
)
def test_the_mean_is_never_worse_than_the_worst(values: list[float], higher: bool) -> None:
    scores = aggregate({str(n): {"personal": value, "global": value} for n, value in enumerate(values)}, higher)
    mean, worst = scores["personal_mean"], scores["personal_worst"]
    assert mean is not None
    assert worst is not None
    assert mean >= worst - 1e-12 if higher else mean <= worst + 1e-12


def test_a_model_whose_loss_is_no_number_has_no_score_in_older_diaries_either(tmp_path: Path) -> None:
    """They hold an accuracy beside a loss that is missing: the arg max of NaN is a class."""
    old = [evaluation(1, "a", 0.8, 0.6), evaluation(1, "b", 0.9, 0.7)]
    old[1]["personal"] |= {"loss": None, "majority": 0.5, "f1_by_class": {"no": 1.0}}
    old[1]["global"] |= {"loss": None, "impossible": 1}  # a loss of infinity, beside which the others stand
    write_records(tmp_path / "metrics.jsonl", [*DIARY[:2], *old])
    records = read(tmp_path / "metrics.jsonl")
    assert records[-1]["personal"] == {"accuracy": None, "loss": None, "n": 10, "majority": 0.5}
    summary = build(records)
    assert [client["last"]["personal"] for client in summary["clients"]] == [0.8, None]
    last = summary["scores"]["last"]
    assert (last["personal_mean"], last["personal_worst"]) == (None, None)
    assert last["global_mean"] == pytest.approx(0.65)
    assert summary["not_finite"] == ["b"]
    (line,) = summary["warnings"]
    assert line.startswith("client b, after round 1: its model answers with numbers that are not finite, so there are")


def test_a_client_whose_examples_define_no_score_is_in_no_mean() -> None:
    diary = [evaluation(1, "a", 0.8, 0.6), evaluation(1, "b", None, 0.7)]
    assert build(diary)["scores"]["last"]["personal_mean"] is None
    diary[1]["personal"] |= {"undefined": ["accuracy"]}
    summary = build(diary)
    assert (summary["scores"]["last"]["personal_mean"], summary["scores"]["last"]["personal_worst"]) == (0.8, 0.8)
    assert summary["clients"][1]["last"] == {"personal": None, "global": 0.7, "undefined": ["personal"]}
    assert (summary["not_finite"], summary["warnings"]) == ([], [])
