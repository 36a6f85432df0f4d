"""Another package adds components: it is installed, and FlexP's commands know what it brings."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexp import registry
from flexp.cli.main import app
from flexp.comparison import compare as comparing
from flexp.errors import ConfigError
from flexp.methods import METHODS
from tests import warm
from tests.cli.test_commands import toml
from tests.comparison.tools import Inline
from tests.tiny import bert_folder

HERE, SOURCE = Path(__file__).parent, Path(registry.__file__).parent
KINDS = (registry.METHODS, registry.ALIGNMENTS, registry.CODECS)


def install(folder: Path, target: Path) -> None:
    """What an installer leaves of the package in ``folder``: its module, and its metadata beside it."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = project["name"].replace("-", "_")
    place = target / f"{name}-{project['version']}.dist-info"
    place.mkdir(parents=True)
    shutil.copy(folder / f"{name}.py", target)
    about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (place / "METADATA").write_text(about, encoding="utf-8")
    groups = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (place / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")


def forget() -> None:
    """Let the registries look again."""
    for kind in KINDS:
        vars(kind).pop("_found", None)


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that Python looks in."""
    target = tmp_path / "packages"
    target.mkdir()
    monkeypatch.syspath_prepend(target)
    forget()
    yield target
    sys.modules.pop("flexp_example", None)
    forget()


@pytest.fixture
def installed(target: Path) -> Path:
    install(HERE, target)
    forget()
    return target


def flexp(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_flexp_methods_lists_what_is_there_and_whose_it_is(installed: Path) -> None:
    rows = {line.split()[0]: line for line in flexp("methods").splitlines() if line.strip()}
    assert set(METHODS) <= rows.keys()
    for words in ("yes", "no", "weights", "flexp-example 0.1", "FedAvg whose average moves only part of the way."):
        assert words in rows["half-average"]


def test_a_run_of_its_method_and_one_with_its_alignment_and_codec(installed: Path, tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    path = toml(tmp_path, train={"rounds": 1})
    flexp("run", path, "--out", tmp_path / "half", "--set", "method.name=half-average")
    own = ("--set", "method.align.kind=l1", "--set", "link.codec.activation=sign")
    flexp("run", path, "--out", tmp_path / "split", *own)
    for name, method in (("half", "half-average"), ("split", "flexp-sfl")):
        summary = json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))
        assert (summary["method"], summary["finished"]) == (method, True)
    settings = json.loads((tmp_path / "half/config.json").read_text(encoding="utf-8"))["method"]
    assert settings["half_average"] == {"share": 0.5}


def test_its_settings_are_checked_and_are_what_it_runs_with(installed: Path, tmp_path: Path) -> None:
    from flexp.config.loading import load

    path = toml(tmp_path)
    run = load(path, ["method.name=half-average", "method.half_average.share=0.25"])
    assert METHODS["half-average"].own(run).share == 0.25
    with pytest.raises(ConfigError, match=r"unknown key method.half_average.shar; did you mean 'share'\?"):
        load(path, ["method.half_average.shar=0.25"])
    with pytest.raises(ConfigError, match=r"method.half_average.share = 2 is not allowed: expected less"):
        load(path, ["method.half_average.share=2"])


def test_a_comparison_tunes_it_like_any_other(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "Pool", Inline)
    bert_folder(tmp_path / "model")
    path = toml(tmp_path, train={"rounds": 1, "steps_per_round": 1})
    options = ("--seeds", 1, "--trials", 2, "--jobs", 1, "--out", tmp_path / "out")
    flexp("compare", path, "--methods", "fedavg,half-average", *options)
    content = json.loads((tmp_path / "out/comparison.json").read_text(encoding="utf-8"))
    found = {method["name"]: method for method in content["methods"]}
    tried = [trial["settings"]["method.half_average.share"] for trial in found["half-average"]["trials"]]
    assert tried == [0.5, 1.0]
    assert len(found["half-average"]["runs"]) == 1


BROKEN = '[project]\nname = "flexp-broken"\nversion = "2"\n[project.entry-points."flexp.methods"]\n{} = "{}"\n'


def broken(folder: Path, target: Path, name: str, value: str, module: str = "") -> None:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(BROKEN.format(name, value), encoding="utf-8")
    (folder / "flexp_broken.py").write_text(module, encoding="utf-8")
    install(folder, target)
    forget()


def test_a_package_that_cannot_be_imported_is_told_in_one_line(target: Path, tmp_path: Path) -> None:
    broken(tmp_path / "source", target, "odd", "flexp_broken:Odd", "import nowhere_at_all")
    with pytest.raises(ConfigError) as error:
        METHODS["odd"]
    assert str(error.value) == (
        "the method 'odd' of flexp-broken 2 cannot be imported from flexp_broken:Odd (ModuleNotFoundError: No module "
        "named 'nowhere_at_all'); mend or uninstall that package"
    )
    shown = flexp("methods")
    assert "nowhere_at_all" in shown
    assert "flexp-sfl" in shown


def test_two_of_a_name_are_refused_and_others_still_work(target: Path, tmp_path: Path) -> None:
    broken(tmp_path / "source", target, "fedavg", "flexp_broken:FedAvg")
    with pytest.raises(ConfigError) as error:
        METHODS["fedavg"]
    both = "flexp.methods.fedavg:FedAvg (flexp) and flexp_broken:FedAvg (flexp-broken 2)"
    assert str(error.value) == f"two methods are called 'fedavg': {both}; uninstall or rename one"
    assert METHODS["fedprox"].name == "fedprox"


ONE_FILE = '''
from flexp.methods.local import Local


class Lonely(Local):
    """Local training by another name."""

    name = "lonely"
'''


def test_a_method_of_our_own_is_one_file(tmp_path: Path) -> None:
    """A copy of the package with one more file trains by the method that is in it."""
    bert_folder(tmp_path / "model")
    path = toml(tmp_path, train={"rounds": 1, "steps_per_round": 1})
    shutil.copytree(SOURCE, tmp_path / "src/flexp", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src/flexp/methods/lonely.py").write_text(ONE_FILE, encoding="utf-8")
    command = ["-m", "flexp.cli.main", "run", str(path), "--out", "out", "--set", "method.name=lonely"]
    environment = {"PYTHONPATH": str(tmp_path / "src"), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = warm.run(command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))["method"] == "lonely"
