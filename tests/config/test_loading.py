"""Bad configurations get one line that names key, value, what is allowed and the nearest name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexp.config import RunConfig, all_keys
from flexp.config.loading import load
from flexp.errors import ConfigError
from flexp.registry import METHODS

MINIMAL = '[model]\nid = "m"\n[data]\nsource = "d"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_and_seed(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    run = load(path, ["train.rounds=7", "model.dtype=bfloat16", "data.clients.cut=[2, 5]"], seed=3)
    assert load(path, ["data.clients.cut=[2]"]).data.clients.cut == (2, None)
    assert (run.train.rounds, run.model.dtype, run.data.clients.cut, run.seed) == (7, "bfloat16", (2, 5), 3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.runds=3", r"unknown key train.runds; did you mean 'rounds'\?"),
        ("deploymnet.rounds=3", r"unknown key deploymnet; did you mean 'deployment'\?"),
        ("rounds=3", r"unknown key rounds; did you mean train.rounds\?"),
        ("train.rounds=0", r"train.rounds = 0 is not allowed: expected greater than 0"),
        ("train.rounds=many", r"train.rounds = 'many' is not allowed: expected a valid integer"),
        ("method.align.kind=kll", r"method.align.kind = 'kll' is not allowed: .*'kl'.*did you mean 'kl'\?"),
        ("method.name=fedavgg", r"method.name = 'fedavgg' is not allowed: .*'fedavg'.*did you mean 'fedavg'\?"),
        ("method.fedprox.nu=1", r"unknown key method.fedprox.nu; did you mean 'mu'\?"),
        ("method.fedprx.mu=1", r"unknown key method.fedprx; did you mean 'fedprox'\?"),
        ("method.fedprox.mu=-1", r"method.fedprox.mu = -1 is not allowed: expected greater than or equal to 0"),
        ("mu=1", r"unknown key mu; did you mean method.fedprox.mu\?"),
        ("train.micro_batch=99", r"train.micro_batch = 99 is larger than train.batch_size = 8"),
        ("data.test_fraction=1.5", r"data.test_fraction = 1.5 is not allowed: expected less than or equal to 1"),
        ("train.personal.lr=-1", r"train.personal.lr = -1 is not allowed: expected greater than 0"),
        ("data.clients.cut=[-1, 2]", r"data.clients.cut = -1 is not allowed"),
        ("train", r"expected key=value"),
        ("data.clients.cut=1", r"data.clients.cut: 1 is no cut: expected \[s, e\] or \[s\]"),
        ("data.clients.each=[{cut=[1, 4, 5]}]", r"data.clients.each.cut: \[1, 4, 5\] is no cut"),
        (
            "data.clients.each=[{cuts=[1, 4]}]",
            r"unknown key data.clients.each.cuts; did you mean 'cut'\? known here: ch",
        ),
        (
            "data.clients.cuts=[[1, 4]]",
            r"the list data.clients.cuts is gone: write data.clients.cut for all clients, or cut in ",
        ),
        (
            "devices.assign=['phone']",
            r"the list devices.assign is gone: write data.clients.device for all clients, or device in",
        ),
        ("devices.server=laptop", r"\[devices\] is there, but no client has a device class: set data.clients.device"),
        ("train.personal.betas=[1.5, 0.9]", r"train.personal.betas = 1.5 is not allowed: expected less than 1"),
        ("train.personal.lr=inf", r"train.personal.lr = inf is not allowed: expected a finite number"),
        ("method.align.weight=inf", r"method.align.weight = inf is not allowed: expected a finite number"),
        ("train.steps_per_round=true", r"train.steps_per_round = True is not allowed: expected a valid integer"),
        ("train.rounds='5'", r"train.rounds = '5' is not allowed: expected a valid integer"),
        ("train.shared.lr='1e-4'", r"train.shared.lr = '1e-4' is not allowed: expected a valid number"),
        ("output.html=1", r"output.html = 1 is not allowed: expected a valid boolean"),
        ("train.class_weights={yes='2'}", r"train.class_weights.*= '2' is not allowed: expected a valid number"),
        ("name=5", r"name = 5 is not allowed: expected a valid string"),
        ("seed=99999999999999999999", r"seed = 9{20} is not allowed: expected less than 9223372036854775808"),
        ("train.rounds=99999999999", r"train.rounds = 9{11} is not allowed: expected less than or equal to 1000000000"),
        ("train.shared.betas=[0.9]", r"train.shared.betas: \[0.9\] is not allowed: expected two numbers, \[a, b\]"),
        ("train=5", r"train = 5 is not allowed: expected a table"),
        ("threads=100000", r"threads = 100000 is not allowed: expected less than or equal to 1024"),
    ],
)
def test_one_line(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(written(tmp_path, MINIMAL), [setting])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("memory_bytes=0", r"devices.classes.phone.memory_bytes = 0 is not allowed: expected greater than 0"),
        ("memry=1", r"unknown key devices.classes.phone.memry; did you mean 'memory_bytes'\?"),
    ],
)
def test_one_line_for_names_of_ones_own(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, MINIMAL + '[data.clients]\ndevice = "phone"\n'), [f"devices.classes.phone.{setting}"])


def test_embeddings_are_not_trained_beside_adapters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.train_embeddings = true needs model.tuning = 'full'"):
        load(written(tmp_path, MINIMAL), ["model.tuning=lora", "model.train_embeddings=true"])


def test_paths_are_those_beside_the_file_and_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("beside", "here"):
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "rows.csv").touch()
    (tmp_path / "here/only").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = written(tmp_path / "beside", '[model]\nid = "only"\n[data]\nsource = "data#dev"\ntest_source = "rows.csv"\n')
    beside, here = tmp_path / "beside", tmp_path / "here"
    run = load(Path("../beside") / path.name)
    assert run.data.source == f"{beside / 'data'}#dev"
    assert run.data.test_source == str(beside / "rows.csv")
    assert run.model.id == str(here / "only")
    typed = load(path, ["data.source=rows.csv", "model.id=asset:data", "data.test_source=some/set"])
    assert (typed.data.source, typed.model.id) == (str(here / "rows.csv"), "asset:data")
    assert typed.data.test_source == "some/set"


def test_a_missing_key_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the key model is missing"):
        load(written(tmp_path, '[data]\nsource = "d"\n'))
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(written(tmp_path, "rounds = = 3"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.toml")


def test_shipped_configurations_are_valid() -> None:
    root = Path(__file__).parents[2]
    shipped = [*(root / "experiments").glob("*.toml"), root / "src/flexp/run/demo.toml"]
    assert len(shipped) >= 3
    for path in shipped:
        load(path)


def test_all_keys_are_named_in_full() -> None:
    keys = list(all_keys(RunConfig))
    assert "train.personal.lr" in keys
    assert "model.lora.rank" in keys
    assert len(keys) == len(set(keys))


def test_every_key_is_documented_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs/configuration.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert sorted(rows) == sorted(all_keys(RunConfig))
    defaults = load_defaults()
    for key, line in rows.items():
        value = defaults
        for part in key.split("."):
            value = (value[0] if isinstance(value, list) else value)[part]
        required = ("model.id", "data.source", "devices.changes.before_round", "devices.changes.to")
        shown = "**required**" if key in required else json.dumps(value).strip('"')
        assert value is None or shown in line.replace('"', ""), line


def load_defaults() -> Any:
    """With tables that hold nothing in other runs; a device class is of no consequence."""
    clients = {"each": [{"device": "phone"}]}
    devices = {"classes": {"NAME": {}}, "changes": [{"before_round": 2, "to": "phone"}]}
    content = {"model": {"id": "m"}, "data": {"source": "d", "clients": clients}, "devices": devices}
    made = RunConfig.model_validate(content).resolved()
    made["data"]["clients"]["each"][0]["device"] = None
    for method in METHODS.values():  # of which a run has its own method's only
        if method.Config is not None:
            made["method"][method.table] = method.Config().model_dump(mode="json")
    return made
