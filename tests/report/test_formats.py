from __future__ import annotations

import pytest

from flexp.report import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1234, "1.23 kB"),
        (45_600_000, "45.6 MB"),
        (999_600_000, "1.00 GB"),
        (123_456_789_012, "123 GB"),
        (None, "–"),
    ],
)
def test_sizes(value: float | None, text: str) -> None:
    assert formats.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.42, "0.42 s"),
        (1.0, "1.0 s"),
        (38.2, "38 s"),
        (59.7, "1 min 00 s"),
        (725, "12 min 05 s"),
        (12000, "3 h 20 min"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert formats.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(96, "96"), (120.5, "120.5"), (12300, "12,300"), (22_713_986, "22.7 M"), (1.5e9, "1.50 G")]
)
def test_counts(value: float, text: str) -> None:
    assert formats.count(value) == text


def test_what_is_huge_stays_within_its_column() -> None:
    """A perplexity is exp of a loss: of a model that is far off it has hundreds of digits."""
    assert formats.number(999_999_999.0) == "999,999,999"
    assert formats.score(1.2367e89, "perplexity") == "1.24e+89"
    assert formats.pair(15.7, 1.2367e89, "perplexity") == "15.7 → 1.24e+89"
    assert formats.change(1.2367e89, 15.7, "perplexity") == "−1.24e+89"
    assert formats.interval(1e300, 3e299, "perplexity") == "1.00e+300 ± 3.00e+299"
    assert formats.difference(-1e300, 3e299, "perplexity", "n = 2") == "−1.00e+300 ± 3.00e+299 (n = 2)"
    assert formats.interval(12_431.0, 2e9, "perplexity") == "12,431 ± 2.00e+09"


def test_scores_and_changes() -> None:
    assert formats.score(0.8391, "accuracy") == "83.9 %"
    assert formats.score(24.21, "perplexity") == "24.2"
    assert formats.score(None, "accuracy") == "–"
    assert formats.pair(0.632, 0.8391, "accuracy") == "63.2 → 83.9 %"
    assert formats.pair(None, 0.5, "accuracy") == "50.0 %"
    assert formats.pair(912.4, 15.74, "perplexity") == "912 → 15.7"
    assert formats.change(0.80, 0.841, "accuracy") == "+4.1"
    assert formats.change(0.8, 0.7, "accuracy") == "−10.0"
    assert formats.change(0.8, 0.80001, "accuracy") == "±0"
    assert formats.change(912.0, 15.7, "perplexity") == "−896"
    assert formats.change(None, 15.7, "perplexity") == "–"
    assert formats.cut([1, 6]) == "(1, 6)"


@pytest.mark.parametrize(
    ("mean", "half", "metric", "note", "text"),
    [
        (0.8391, 0.0123, "accuracy", "", "83.9 ± 1.2 %"),
        (0.8391, None, "accuracy", "n = 1", "83.9 % (n = 1)"),
        (24.21, 0.31, "perplexity", "", "24.2 ± 0.3"),
        (24.21, 0.031, "perplexity", "", "24.21 ± 0.03"),  # never ± 0.0
        (0.354, 0.0004, "loss", "", "0.3540 ± 0.0004"),
        (0.354, 0.02, "loss", "", "0.354 ± 0.020"),
        (12431.0, 210.0, "perplexity", "n = 2", "12,431 ± 210 (n = 2)"),
        (None, None, "accuracy", "n = 1", "–"),
    ],
)
def test_intervals(mean: float | None, half: float | None, metric: str, note: str, text: str) -> None:
    assert formats.interval(mean, half, metric, note) == text


@pytest.mark.parametrize(
    ("mean", "half", "metric", "text"),
    [
        (0.0412, 0.0103, "accuracy", "+4.1 ± 1.0"),
        (-0.0412, None, "accuracy", "−4.1"),
        (0.0001, 0.01, "accuracy", "0.0 ± 1.0"),
        (-3.456, 0.21, "perplexity", "−3.46 ± 0.21"),
        (0.576, 0.072, "perplexity", "+0.58 ± 0.07"),
        (None, None, "accuracy", "–"),
    ],
)
def test_differences(mean: float | None, half: float | None, metric: str, text: str) -> None:
    assert formats.difference(mean, half, metric) == text
