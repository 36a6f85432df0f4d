"""The accuracy curve: the prior says that it is one, and pilots give back the curve that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexp.cost.choice import Choice
from flexp.errors import ConfigError, StorageError
from flexp.planner.accuracy import AccuracyCurve, Pilot, fit, personal_share, prior, read_pilots


def test_the_prior_says_so_and_grows_with_the_share() -> None:
    curve = prior()
    assert curve.source == "prior"
    assert "a prior, not a measurement" in curve.note
    found = [curve.at((start, 6), 6) for start in range(1, 6)]
    assert [point.loss for point in found] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert all(point.low == 0.0 and point.high == pytest.approx(2 * point.loss) for point in found)
    assert curve.at((2, 5), 6).loss == pytest.approx(0.03)  # the tail's block counts like the head's


def test_codec_and_rank_cost_something() -> None:
    curve = prior()
    plain = curve.loss(Choice((1, 6), 8), 6)
    assert curve.loss(Choice((1, 6), 8, codec="bf16"), 6) == plain
    assert curve.loss(Choice((1, 6), 8, codec="int4"), 6) == pytest.approx(plain + 0.004)
    deep = Choice((5, 6), 8)  # a head that is the server's but for its first block is no deeper than that
    assert curve.loss(deep, 6, followed=1) == plain < curve.loss(deep, 6)
    ranks = [curve.loss(Choice((1, 6), 8, rank=rank), 6) - plain for rank in (4, 8, 16, 64)]
    assert ranks == pytest.approx([0.01, 0.005, 0.0, 0.0])


def made(shares: list[float], truth: list[float], clients: int, noise: float, seed: int = 0) -> list[Pilot]:
    """Every client at every share, on a level of its own."""
    random = np.random.default_rng(seed)
    levels = random.uniform(0.6, 0.95, clients)
    return [
        Pilot(f"{index}", share, float(levels[index] - loss + noise * random.standard_normal()))
        for index in range(clients)
        for share, loss in zip(shares, truth, strict=True)
    ]


@pytest.mark.parametrize("truth", [[0.0, 0.02, 0.02, 0.05], [0.05, 0.03, 0.0, 0.0]])
def test_exact_pilots_give_the_curve_back_in_either_direction(truth: list[float]) -> None:
    shares = [0.2, 0.4, 0.6, 0.8]
    curve = fit(made(shares, truth, 5, 0.0))
    assert curve.source == "pilots"
    assert [point.loss for point in curve.points] == pytest.approx(truth, abs=1e-9)
    assert [point.count for point in curve.points] == [5] * 4
    assert curve.at((5, 10), 10).loss == pytest.approx((truth[1] + truth[2]) / 2)  # a share of 0.5
    assert curve.at((9, 10), 10).loss == pytest.approx(truth[3])  # level beyond the last


def test_noisy_pilots_are_monotone_and_their_interval_covers_the_truth() -> None:
    shares, truth = [0.2, 0.4, 0.6, 0.8], [0.0, 0.01, 0.03, 0.06]
    inside = 0
    for seed in range(10):
        curve = fit(made(shares, truth, 12, 0.01, seed), resamples=200)
        losses = [point.loss for point in curve.points]
        assert losses == sorted(losses)
        inside += sum(
            point.low - 1e-9 <= loss <= point.high + 1e-9 for point, loss in zip(curve.points, truth, strict=True)
        )
    assert inside >= 34  # of 40: a 95 % interval from twelve clients, with room for chance


def test_clients_at_one_cut_each_are_told_apart_from_paired_ones() -> None:
    single = [Pilot("a", 0.2, 0.9), Pilot("b", 0.2, 0.8), Pilot("c", 0.8, 0.7)]
    assert "at one cut each: differences between clients are in it" in fit(single).note
    assert fit(single).at((4, 5), 5).loss == pytest.approx(0.15)
    both = [*single, Pilot("a", 0.8, 0.88)]  # only a is compared with itself
    assert fit(both).at((4, 5), 5).loss == pytest.approx(0.02)
    with pytest.raises(ConfigError, match="only one personal share"):
        fit([Pilot("a", 0.2, 0.9)])


def test_a_curve_survives_its_file(tmp_path: Path) -> None:
    curve = fit(made([0.2, 0.8], [0.0, 0.03], 4, 0.01), "asset:x", "accuracy")
    curve.write(tmp_path / "curve.json")
    assert AccuracyCurve.read(tmp_path / "curve.json") == curve
    (tmp_path / "other.json").write_text('{"version": 1}', encoding="utf-8")
    with pytest.raises(ConfigError, match="is no accuracy curve"):
        AccuracyCurve.read(tmp_path / "other.json")


def run_folder(place: Path, cuts: list[list[int]], scores: list[float], **changes: Any) -> Path:
    place.mkdir()
    summary = {
        "finished": True,
        "method": "flexp-sfl",
        "seed": 0,
        "metric": "accuracy",
        "higher_is_better": True,
        "model": {"id": "asset:x", "blocks": 4},
        "clients": [
            {"name": f"c{index}", "cut": cut, "last": {"personal": score, "global": 0.5}}
            for index, (cut, score) in enumerate(zip(cuts, scores, strict=True))
        ],
    } | changes
    (place / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return place


def test_pilots_are_read_from_finished_runs(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one", [[1, 4], [2, 3]], [0.9, 0.7])
    two = run_folder(tmp_path / "two", [[3, 4], [1, 4]], [0.8, 0.75])
    pilots, model, score = read_pilots([one, two])
    assert (model, score) == ("asset:x", "accuracy")
    assert pilots[1] == Pilot("c1, seed 0", personal_share((2, 3), 4), 0.7)
    curve = fit(pilots, model, score)
    assert [point.share for point in curve.points] == [0.25, 0.75]
    assert [point.loss for point in curve.points] == pytest.approx([0.0, 0.075])  # 0.1 and 0.05 less, each with itself
    small = run_folder(tmp_path / "small", [[1, 4], [3, 4]], [0.8, 0.5], dropped=[{"name": "c1"}])
    assert [pilot.level for pilot in read_pilots([small])[0]] == ["c0, seed 0"]  # who was left out has learned nothing
    for name, changes in {
        "unfinished": {"finished": False},
        "whole": {"method": "fedavg"},
        "other": {"model": {"id": "asset:y", "blocks": 4}},
    }.items():
        with pytest.raises(ConfigError):
            read_pilots([one, run_folder(tmp_path / name, [[1, 4]], [0.9], **changes)])
    with pytest.raises(StorageError):
        read_pilots([tmp_path / "nothing"])
    perplexity = run_folder(tmp_path / "lm", [[1, 4]], [20.0], metric="perplexity", higher_is_better=False)
    assert read_pilots([perplexity])[0][0].score == pytest.approx(-np.log(20.0))
