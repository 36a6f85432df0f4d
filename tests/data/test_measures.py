"""Scores against scikit-learn, and those that it does not have by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from flexp.data import measures

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 4])
def test_one_class(classes: int) -> None:
    right = DRAW.integers(0, classes, 60)
    logits = np.round(DRAW.normal(size=(60, classes)), 1)  # with ties
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    given = chances.argmax(1)
    found = measures.class_scores(chances.tolist(), right.tolist())
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(right, given, average="macro"))
    area = chances[:, 1] if classes == 2 else chances
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(right, area, multi_class="ovr", average="macro"))
    table = measures.confusion(right.tolist(), given.tolist(), classes)
    assert table.tolist() == metrics.confusion_matrix(right, given).tolist()
    assert measures.f1_by_class(table) == pytest.approx(metrics.f1_score(right, given, average=None).tolist())


def test_classes_that_are_not_there() -> None:
    table = measures.confusion([0, 0, 1], [0, 1, 1], 3)
    assert measures.f1_by_class(table) == [pytest.approx(2 / 3), pytest.approx(2 / 3), None]
    assert measures.class_scores([[0.9, 0.1], [0.8, 0.2]], [0, 0])["auc"] is None


def test_several_classes() -> None:
    right, chances = DRAW.random((60, 3)) < 0.3, DRAW.random((60, 3))
    given = chances >= 0.5
    found = measures.several_scores(chances.tolist(), right.astype(float).tolist())
    for name in ("micro", "macro"):
        assert found[f"{name}_f1"] == pytest.approx(metrics.f1_score(right, given, average=name))
    assert found["exact_match"] == pytest.approx(metrics.accuracy_score(right, given))
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(right, chances, average="macro"))


def test_numbers() -> None:
    right, given = DRAW.normal(size=40), DRAW.normal(size=40)
    assert measures.number_scores(given.tolist(), right.tolist()) == {
        "rmse": pytest.approx(metrics.root_mean_squared_error(right, given)),
        "mae": pytest.approx(metrics.mean_absolute_error(right, given)),
        "r2": pytest.approx(metrics.r2_score(right, given)),
        "pearson": pytest.approx(stats.pearsonr(right, given).statistic),
    }
    assert measures.number_scores([1.0, 2.0], [1.0, 1.0])["r2"] is None


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-X I-X O B-Y", {("X", 1, 3), ("Y", 4, 5)}),
        ("B-X B-X I-Y I-Y", {("X", 0, 1), ("X", 1, 2), ("Y", 2, 4)}),
        ("I-X O I-X", {("X", 0, 1), ("X", 2, 3)}),
        ("S-X B-Y I-Y E-Y I-Y O", {("X", 0, 1), ("Y", 1, 4), ("Y", 4, 5)}),
        ("O O", set()),
        ("_ OTHER B-X o NONE", {("X", 2, 3)}),  # outside is written in many ways
        ("B I O B B", {("", 0, 2), ("", 3, 4), ("", 4, 5)}),
    ],
)
def test_entities(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert measures.entities(tags.split()) == expected


def test_entities_found_and_missed() -> None:
    right, given = [["B-X", "I-X", "O"], ["B-Y", "O"]], [["B-X", "I-X", "B-Y"], ["O", "O"]]
    assert measures.entity_scores(given, right) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}


@pytest.mark.parametrize(
    ("given", "right", "expected"),
    [
        ("O O", "O O", (None, None, None)),
        ("B-X O", "O O", (0.0, 0.0, 0.0)),  # as seqeval has both
        ("O O", "B-X O", (0.0, 0.0, 0.0)),
    ],
)
def test_where_there_is_no_entity(given: str, right: str, expected: tuple[float | None, ...]) -> None:
    found = measures.entity_scores([given.split()], [right.split()])
    assert found == dict(zip(("f1", "precision", "recall"), expected, strict=True))


def test_words_in_common() -> None:
    assert measures.words_in_common("The red dog!", "a red dog") == 1.0
    assert measures.words_in_common("red cat", "red dog") == 0.5
    assert measures.words_in_common("", "") == 1.0
    assert measures.words_in_common("", "dog") == 0.0
    assert not math.isnan(measures.words_in_common("the", "a"))
