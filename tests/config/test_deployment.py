"""The table of a deployment: read beside a run's, overridden the same way, refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexp.config.deployment import load
from flexp.config.loading import load as load_run
from flexp.errors import ConfigError
from flexp.run.server import read_config

TEXT = '[model]\nid = "arch:llama"\n[train]\nrounds = 7\n[deployment]\nkeep = 5\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "server.toml"
    place.write_text(TEXT, encoding="utf-8")
    return place


def test_keys_of_both_are_set_the_same_way(path: Path) -> None:
    settings = ["deployment.save_every=3", "data.source=none", "train.rounds=2"]
    made, run = load(path, settings), load_run(path, settings)
    assert (made.keep, made.save_every, run.train.rounds) == (5, 3, 2)


def test_a_server_needs_no_data_and_no_file(path: Path) -> None:
    run, made = read_config(path, ["train.shared.lr=0.5", "deployment.end=3"])
    assert (run.train.shared.lr, run.train.rounds, made.end, made.keep) == (0.5, 7, 3, 5)
    run, made = read_config(None, ['model.id="arch:gpt2"', "server.tuning=frozen"])
    assert (run.model.id, run.server.tuning, made.keep) == ("arch:gpt2", "frozen", 3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("deployment.kep=3", r"unknown key deployment.kep; did you mean 'keep'\?"),
        ("deployment.schedule=fre", r"deployment.schedule = 'fre' is not allowed: .*did you mean 'free'\?"),
        ("deployment.schedule=deterministic", r'schedule = "deterministic" needs deployment.clients'),
        ("deployment=[1]", r"deployment = \[1\] is not allowed: expected a table"),
        ("deployment.clients=[]", r"deployment.clients: \[\] is not allowed: expected the names of clients, each once"),
        ("deployment.clients=['north', 'north']", "deployment.clients: 'north' is not allowed: expected the names"),
        ("deployment.clients=['']", "deployment.clients: '' is not allowed: expected the names"),
        ("deployment.clients=['a', 'operator']", "'operator' is not allowed: .* and not operator or chain"),
        ("deployment.clients=['chain']", "'chain' is not allowed: "),
        ("deployment.blocks=[1]", r"deployment.blocks: \[1\] is not allowed: expected two numbers"),
        ("model.tunning=lora", r"unknown key model.tunning; did you mean 'tuning'\?"),
    ],
)
def test_one_line(path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read_config(path, [setting])
    assert "\n" not in str(error.value)
