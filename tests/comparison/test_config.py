"""The ``[compare]`` table: what it means, what it refuses, and that a run does not mind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexp.comparison.config import CompareConfig, Needs, load
from flexp.config import loading as settings
from flexp.config.methods import HEADLINE
from flexp.errors import ConfigError

RUN = 'seed = 7\n[model]\nid = "m"\n[data]\nsource = "d"\n'
TABLE = """[compare]
methods = ["flexp-sfl", "fedavg", "plain"]
seeds = 3
trials = 4
[compare.grids.fedavg]
"train.personal.lr" = [1e-4, 2e-4, 3e-4, 4e-4]
[compare.variants.plain]
method = "flexp-sfl"
set = { "method.align.kind" = "off" }
grid = { "method.align.pull" = [0.1, 0.5] }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_run_is_the_same_with_and_without_the_table(tmp_path: Path) -> None:
    alone = settings.load(written(tmp_path, RUN))
    assert settings.load(written(tmp_path, RUN + TABLE)) == alone
    assert settings.load(written(tmp_path, RUN + "[compare]\nnonsense = 1\n")) == alone
    with pytest.raises(ConfigError, match="unknown key compares"):
        settings.load(written(tmp_path, RUN + "[compares]\n"))


def test_what_the_table_means(tmp_path: Path) -> None:
    wanted = load(written(tmp_path, RUN + TABLE), ["train.rounds=2", "compare.tune_seeds=2"], {"seeds": 4})
    assert wanted.base.train.rounds == 2
    assert (wanted.seeds, wanted.tune_seeds, wanted.config.trials) == ([7, 8, 9, 10], [7, 8], 4)
    assert [(entry.name, entry.method) for entry in wanted.entries] == [
        ("flexp-sfl", "flexp-sfl"),
        ("fedavg", "fedavg"),
        ("plain", "flexp-sfl"),
    ]
    assert wanted.entries[1].grid == {"train.personal.lr": [1e-4, 2e-4, 3e-4, 4e-4]}
    assert wanted.entries[2].fixed == {"method.align.kind": "off"}
    assert wanted.reference == "flexp-sfl"
    assert load(written(tmp_path, RUN + TABLE), [], {"methods": ["fedavg", "plain"]}).reference == "fedavg"
    named = written(tmp_path, RUN + TABLE.replace("[compare]", '[compare]\nreference = "flexp-sfl"', 1))
    assert load(named, [], {"methods": ["fedavg"]}).reference == "fedavg"
    with pytest.raises(ConfigError, match="is not compared"):
        load(named, ["compare.reference=flexp-sfl"], {"methods": ["fedavg"]})


def test_variants_may_have_other_cuts_and_steps(tmp_path: Path) -> None:
    table = """[compare]
methods = ["x"]
[compare.variants.x]
method = "flexp-sfl"
set = { "data.clients.each" = [{ cut = [1, 3] }], "data.clients.cut" = [2, 3], "train.steps_per_round" = 7 }
"""
    assert load(written(tmp_path, RUN + table)).entries[0].fixed["train.steps_per_round"] == 7


def test_nothing_said_compares_the_headline_methods(tmp_path: Path) -> None:
    wanted = load(written(tmp_path, RUN), [], {"seeds": [3, 5]})
    assert [entry.name for entry in wanted.entries] == list(HEADLINE)
    assert wanted.seeds == [3, 5]


def test_without_classes_there_is_no_closed_form_to_compare(tmp_path: Path) -> None:
    path = written(tmp_path, RUN)
    wanted = load(path, ["data.task=causal-lm"])
    assert [entry.name for entry in wanted.entries] == [name for name in HEADLINE if name != "closed-form"]
    assert [e.name for e in load(path, ["data.task=causal-lm"], {"methods": ["closed-form"]}).entries] == [
        "closed-form"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trails = 3", r"unknown key compare.trails; did you mean 'trials'\?"),
        ("trials = 0", r"compare.trials = 0 is not allowed: expected greater than 0"),
        ('methods = ["fedavgg"]', r"compare.methods: there is no 'fedavgg'; did you mean 'fedavg'\?"),
        ('methods = ["local", "local"]', r"compare.methods names 'local' twice"),
        ('methods = ["local"]\nreference = "fedavg"', r"compare.reference = 'fedavg' is not compared"),
        ("seeds = [1, 1]", r"compare.seeds: seeds must be different"),
        ("lrs = [-1.0]", r"compare.lrs = -1.0 is not allowed: expected greater than 0"),
        ("[compare.variants.x]\nmethd = 'local'", r"unknown key compare.variants.x.methd; did you mean 'method'\?"),
        ("[compare.variants.'a/b']\nmethod = 'local'", r"compare.variants.'a/b': a variant's name is"),
        ("[compare.grids.fedavgg]\na = [1]", r"compare.grids: there is no 'fedavgg'"),
        (
            "[compare.variants.local]\nset = { 'data.test_fraction' = 0.6 }",
            r"compare.variants.local: data.test_fraction is the same for all that are compared; say it for the whole",
        ),
        ("[compare.variants.local]\ngrid = { 'data.private_seed' = [1] }", r"data.private_seed is the same for all"),
        ("[compare.variants.local]\nset = { seed = 5 }", r"variants.local: seed is the same for all"),
        (
            "[compare.variants.local]\nset = { 'method.name' = 'fedavg' }",
            r"method.name is the same for all that are compared; say compare.variants.local.method",
        ),
        (
            "[compare.grids.local]\n'evaluation.global_examples' = [9]",
            r"compare.grids.local: evaluation.global_examples",
        ),
    ],
)
def test_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(written(tmp_path, f"{RUN}[compare]\n{text}\n"))
    assert "\n" not in str(error.value)


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/compare.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `compare.")]
    own = [name for name in CompareConfig.model_fields if name not in ("variants", "grids", "needs")]
    own += [f"needs.{name}" for name in Needs.model_fields]
    variant = [f"variants.NAME.{key}" for key in ("method", "set", "grid")]
    assert sorted(rows) == sorted(f"compare.{name}" for name in [*own, *variant, "grids.METHOD"])
