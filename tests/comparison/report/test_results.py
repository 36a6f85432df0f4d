from __future__ import annotations

import math

import pytest

from flexp.comparison.report.results import Dropped, checked, chosen, results, settings_text, standings
from flexp.errors import StorageError

from . import synthetic

BY_HAND: dict[str, list[list[float | None]]] = {
    "mine": [[0.8, 0.9], [0.7, 0.8], [0.9, 0.9]],  # means 0.85, 0.75, 0.90
    "other": [[0.8, 0.8], [0.6, 0.8], [0.8, 0.9]],  # means 0.80, 0.70, 0.85
}


def test_numbers_equal_those_computed_by_hand() -> None:
    mine, other = results(synthetic.tiny(BY_HAND))
    assert mine.personal is not None
    assert mine.personal.mean == pytest.approx(2.5 / 3)
    # squared distances to 0.8333: 0.000278 + 0.006944 + 0.004444 = 0.011667, over 2; t(0.975, 2) = 4.302653
    assert mine.personal.half == pytest.approx(4.3026527 * math.sqrt(0.0116667 / 2 / 3), rel=1e-5)
    assert mine.worst is not None
    assert mine.worst.mean == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    assert mine.everybody is not None
    assert mine.everybody.mean == pytest.approx(2.5 / 6)
    assert mine.loss is not None
    assert (mine.loss.mean, mine.loss.half) == (0.5, 0.0)
    assert mine.difference is None
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(0.05)
    assert other.difference.half == pytest.approx(0.0, abs=1e-9)
    assert other.difference.excludes_zero
    assert (mine.bytes_up, mine.bytes_down, mine.client_seconds) == (100.0, 50.0, 2.0)


def test_lower_is_better_turns_the_sign_and_the_worst() -> None:
    mine, other = results(synthetic.tiny({"mine": [[20.0, 30.0]], "other": [[30.0, 50.0]]}, False, "perplexity"))
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(15.0)
    assert mine.worst is not None
    assert mine.worst.mean == 30.0


def test_the_reference_comes_first() -> None:
    made = synthetic.comparison()
    made["reference"] = "ditto"
    names = [result.name for result in results(made)]
    assert names == ["ditto", *(name for name in synthetic.METHODS if name != "ditto")]


def test_a_client_without_a_score_leaves_no_mean() -> None:
    mine, other = results(synthetic.tiny({"mine": [[0.8, 0.9]], "other": [[0.8, None]]}))
    assert mine.personal is not None
    assert other.personal is other.worst is other.difference is None


def test_dropped_clients_do_not_dilute_costs_and_say_what_they_need() -> None:
    made = synthetic.comparison(devices=True)
    result = next(result for result in results(made) if result.name == "fedavg")
    assert str(result.dropped) == "4 of 8 clients dropped: need 316 MB"
    assert result.bytes_up == 6 * 91_000_000  # the four that take part
    assert str(results(made)[0].dropped) == ""


@pytest.mark.parametrize(
    ("dropped", "text"),
    [
        (Dropped(0, 0, 8, None), ""),
        (Dropped(1, 1, 1, None), "1 of 1 client dropped"),
        (Dropped(2, 4, 8, 1.5e9), "2–4 of 8 clients dropped: need 1.50 GB"),
        (Dropped(4, 4, 8, 4e8, 3e8), "4 of 8 clients dropped: need 400 MB, have 300 MB"),
        (Dropped(8, 8, 8, 4e8, 3e8), "all 8 clients dropped: need 400 MB, have 300 MB"),
    ],
)
def test_how_dropped_clients_are_told(dropped: Dropped, text: str) -> None:
    assert str(dropped) == text


def test_when_all_are_dropped_costs_are_unknown_and_the_need_is_told() -> None:
    made = synthetic.comparison(devices=True)
    for run in made["methods"][2]["runs"]:
        run["dropped"] = list(synthetic.NAMES)
    result = results(made)[2]
    assert result.memory is None
    assert str(result.dropped) == "all 8 clients dropped: need 316 MB"


def test_peak_memory_is_the_highest_of_any_client() -> None:
    assert results(synthetic.comparison())[0].memory == 92_000_000 + 2 * 21_000_000


def test_equal_bytes_by_hand() -> None:
    made = synthetic.tiny({"mine": [[0.8], [0.7]], "other": [[0.9], [0.9]]})
    for run in made["methods"][1]["runs"]:
        run["rounds"][0]["bytes_up"] = 101  # a byte too many: before training, 0.1, counts
    mine, other = standings(made, "bytes")
    assert other.score is not None
    assert other.score.mean == pytest.approx(0.1)
    assert other.rounds == (0, 0)
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(0.65)
    assert mine.difference is None
    assert standings(made, "time")[1].rounds == (1, 1)


def test_a_reference_that_sends_nothing_gives_no_budget() -> None:
    made = synthetic.tiny({"mine": [[0.8]], "other": [[0.9]]})
    made["methods"][0]["runs"][0]["rounds"][0].update(bytes_up=0, bytes_down=0)
    assert standings(made, "bytes") == []


def test_the_trial_that_was_chosen() -> None:
    method = {"settings": {"train.personal.lr": 2e-4, "train.rounds": 6}}
    assert chosen(method, {"settings": {"train.personal.lr": 2e-4}})
    assert not chosen(method, {"settings": {"train.personal.lr": 1e-4}})
    assert not chosen(method, {"settings": {"method.mu": 0.1}})


def test_settings_as_text() -> None:
    assert settings_text({"a.lr": 2e-4, "b": True, "c": "sum", "d": 3}) == "a.lr = 0.0002, b = true, c = sum, d = 3"
    assert settings_text({}) == "defaults"


def test_another_schema_is_refused_in_one_line() -> None:
    with pytest.raises(StorageError, match="has schema 2, expected 1; use the version"):
        checked({"schema": 2})
