"""Every method gets the same number of trials, all different, all valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexp.comparison.config import CompareConfig, Comparison, make
from flexp.comparison.grid import PERSONAL, SHARED, apply, rates, trials, untried
from flexp.config import RunConfig
from flexp.errors import ConfigError
from flexp.methods import METHODS
from flexp.methods.base import RATIO

BASE = RunConfig.model_validate(
    {"model": {"id": "m"}, "data": {"source": "d"}, "train": {"steps_per_round": 12, "personal": {"lr": 1e-4}}}
)


def compared(**compare: Any) -> Comparison:
    return make(BASE, CompareConfig.model_validate({"methods": list(METHODS), **compare}))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_equal_numbers_of_trials(count: int) -> None:
    comparison = compared(trials=count)
    found = {entry.method: trials(comparison, entry) for entry in comparison.entries}
    assert {method: len(tried) for method, tried in found.items()} == {
        name: count if method.tuned else 0 for name, method in METHODS.items()
    }
    for method, tried in found.items():
        assert len({json.dumps(settings, sort_keys=True) for settings in tried}) == len(tried), method
        for settings in tried:
            assert apply(comparison.base, {"method.name": method, **settings}, method).method.name == method


def test_the_default_grids_by_hand() -> None:
    comparison = compared()
    tried = {entry.method: trials(comparison, entry) for entry in comparison.entries}
    assert [settings[PERSONAL] for settings in tried["fedavg"]] == [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4]
    assert [settings[SHARED] for settings in tried["fedavg"]] == [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4]
    assert [(settings[PERSONAL], settings["method.fedprox.mu"]) for settings in tried["fedprox"]] == [
        (rate, mu) for rate in (5e-5, 1e-4, 2e-4) for mu in (0.1, 0.01)
    ]
    assert [(settings[PERSONAL], settings[SHARED]) for settings in tried["flexp-sfl"]] == [
        (5e-5, 5e-5),
        (5e-5, 2e-4),
        (1e-4, 1e-4),
        (1e-4, 4e-4),
        (2e-4, 2e-4),
        (2e-4, 8e-4),
    ]
    assert {settings["method.fedavg_ft.finetune_steps"] for settings in tried["fedavg-ft"]} == {6, 12}
    assert {settings["method.fedrep.head_steps"] for settings in tried["fedrep"]} == {3, 6}


def test_what_a_method_tunes_is_a_setting_of_its_own_with_its_default_first() -> None:
    for name, method in METHODS.items():
        if method.axis is None:
            continue
        key, values = method.axis
        assert callable(values) or len(set(values)) == 2, name
        if key != RATIO:
            assert key.startswith(f"method.{method.table}.")
            apply(BASE, {key: values(BASE)[0] if callable(values) else values[0]}, name)


def test_fixed_settings_are_not_tuned_and_go_with_every_trial() -> None:
    variants = {
        "mild": {"method": "fedprox", "set": {"method.fedprox.mu": 0.5}},
        "slow": {"method": "fedprox", "set": {PERSONAL: 1e-5}},
        "still": {"method": "flexp-sfl", "set": {"shared/personal": 0.5}},
    }
    comparison = compared(methods=["mild", "slow", "still"], variants=variants)
    mild, slow, still = (trials(comparison, entry) for entry in comparison.entries)
    assert [settings["method.fedprox.mu"] for settings in mild] == [0.5] * 6
    assert len({settings[PERSONAL] for settings in mild}) == 6
    assert [(settings[PERSONAL], settings["method.fedprox.mu"]) for settings in slow] == [(1e-5, 0.1), (1e-5, 0.01)]
    assert [settings[SHARED] / settings[PERSONAL] for settings in still] == pytest.approx([0.5] * 6)
    assert untried(comparison, comparison.entries[2]) == {SHARED: 5e-5}


def test_a_grid_of_ones_own() -> None:
    grid = {"method.align.kind": ["kl", "weights"], "method.align.pull": [0.1, 0.3, 0.5]}
    comparison = compared(methods=["flexp-sfl"], grids={"flexp-sfl": grid})
    tried = trials(comparison, comparison.entries[0])
    assert [(settings["method.align.kind"], settings["method.align.pull"]) for settings in tried] == [
        (kind, pull) for kind in ("kl", "weights") for pull in (0.1, 0.3, 0.5)
    ]
    assert {settings[PERSONAL] for settings in tried} == {1e-4}
    for bad, message in (
        ({"method.align.pull": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]}, "has 7 combinations, more than"),
        ({PERSONAL: [1e-4, 2e-4]}, "names its learning rates and has 2 combinations"),
        ({"method.align.pull": []}, "has no value for method.align.pull"),
        ({PERSONAL: ["a", "b", "c", "d", "e", "f"]}, "train.personal.lr = 'a' is no number"),
    ):
        wrong = compared(methods=["flexp-sfl"], grids={"flexp-sfl": bad})
        with pytest.raises(ConfigError, match=message):
            trials(wrong, wrong.entries[0])


def test_learning_rates_of_ones_own() -> None:
    six = compared(lrs=[1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4])
    assert rates(six, 6) == [1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4]
    assert rates(six, 3) == [1e-5, 4e-5, 3.2e-4]
    assert rates(six, 1) == [8e-5]
    assert rates(compared(lrs=[1e-5, 1e-3]), 3) == [1e-5, 1e-4, 1e-3]
    with pytest.raises(ConfigError, match="one learning rate"):
        rates(compared(lrs=[1e-5]), 2)
    with pytest.raises(ConfigError, match=r"the default grid has 6: name them in compare\.lrs"):
        rates(compared(), 7)


def test_impossible_settings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"here: unknown key method.align.pul; did you mean 'pull'"):
        apply(BASE, {"method.align.pul": 0.1}, "here")
    with pytest.raises(ConfigError, match="seed is a value, not a table"):
        apply(BASE, {"seed.x": 0.1}, "here")


def test_a_variant_with_rounds_of_its_own_is_tuned_over_its_own_steps() -> None:
    variants = {"longer": {"method": "fedavg-ft", "set": {"train.steps_per_round": 40}}}
    found = compared(methods=["longer"], trials=4, variants=variants)
    assert found.base.train.steps_per_round != 40
    steps = {settings["method.fedavg_ft.finetune_steps"] for settings in trials(found, found.entries[0])}
    assert steps == {20, 40}
