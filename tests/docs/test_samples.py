"""Whatever the documentation shows can be typed: commands and their options, keys, Python."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexp.config import RunConfig, all_keys
from flexp.config.loading import load, read

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
CONFIGURATIONS = sorted((ROOT / "experiments").glob("*.toml"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
sys.path.insert(0, str(ROOT / "docs/_hooks"))
reference = importlib.import_module("reference")

COMMANDS = dict(reference.commands())


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def typed() -> Iterator[tuple[str, str]]:
    """Every line of the pages and of the shipped configurations' heads that calls flexp: the place, and the line."""
    for page in [*PAGES, *CONFIGURATIONS]:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            bare = re.sub(r"^(    |\s*#\s+|\$ )(\w+=\S+ )?", "", line)
            if re.match(r"(flexp|python -m benchmarks) [a-z][\w-]*( |$)", bare):
                yield f"{page.relative_to(ROOT)}:{number}", bare.rstrip("\\")


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    for length in (4, 3, 2):
        if tuple(words[:length]) in COMMANDS:
            return COMMANDS[tuple(words[:length])], words[length:]
    raise AssertionError(f"there is no command {' '.join(words[:4])}")


def test_there_is_much_to_check() -> None:
    assert len(list(typed())) > 60
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 10
    assert len(COMMANDS) > 15


@pytest.mark.parametrize(("place", "line"), list(typed()))
def test_commands_can_be_typed(place: str, line: str) -> None:
    check(place, re.sub(r"\s{3,}\S.*$", "", line) if ".toml:" in place else line)  # a remark follows


@pytest.mark.parametrize(
    "line",
    [
        "flexp run mine.toml --rounds 3",
        "flexp state burn x",
        "flexp join runs/mine --out x",
        "python -m benchmarks link --hidden many",
        "flexp runn mine.toml",
    ],
)
def test_what_cannot_be_typed_is_found(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|there is no command|missing|not a valid"):
        check("here", line)


def check(place: str, line: str) -> None:
    command, arguments = command_of(shlex.split(line, comments=True))
    if "..." in line or "…" in line or "CONFIG.toml" in line:
        names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in arguments if re.match(r"--\w", word)} <= names, place
        return
    command.make_context("flexp", arguments)  # parses and converts, and runs nothing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_named_in_the_text_are_there(page: Path) -> None:
    groups = {path[1] for path in COMMANDS if path[0] == "flexp" and len(path) > 2}
    for inside in re.findall(r"`((?:flexp|python -m benchmarks) [a-z][^`]*)`", page.read_text(encoding="utf-8")):
        words = inside.split()
        if words[1] in groups and (len(words) == 2 or not words[2].isidentifier()):
            continue  # a group is named, as in `flexp state`
        command, arguments = command_of([word for word in words if re.match(r"[\w-]+$", word)])
        names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {w.strip("[]…") for w in words if re.match(r"\[?--\w", w)} <= names, inside
        del arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles_and_what_it_imports_is_there(page: Path) -> None:
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        compile(tree, str(page), "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                if node.module and node.module.partition(".")[0] in ("lm_eval", "peft"):
                    continue  # an extra, or slow
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), (page, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "flexp":
                assert hasattr(importlib.import_module("flexp"), node.attr), (page, node.attr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_of_toml_samples_are_known(page: Path) -> None:
    known = set(all_keys(RunConfig))
    tables = {".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 1)}
    for code in blocks(page, "toml"):
        for key in _leaves(tomllib.loads(code)):
            general = re.sub(r"^devices\.classes\.[^.]+", "devices.classes.NAME", key)
            assert general in known | tables or key.startswith("compare."), (page, key)


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("page", ["first-model", "chat"])
def test_the_tutorials_data_and_configuration_fit(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the tables is run; what trains on them is loaded, and its columns are there."""
    monkeypatch.chdir(tmp_path)
    text = ROOT / f"docs/tutorial/{page}.md"
    makers = [code for code in blocks(text, "python") if 'open("' in code]
    assert makers
    for code in makers:
        exec(compile(code, str(text), "exec"), {})
    (settings,) = blocks(text, "toml")
    (tmp_path / "mine.toml").write_text(settings, encoding="utf-8")
    config = load(tmp_path / "mine.toml")
    head = (tmp_path / str(config.data.source)).read_text(encoding="utf-8").splitlines()[0].split(",")
    wanted = {"classification": [config.data.text, config.data.label], "instruction": ["prompt", "answer"]}
    assert {*wanted[config.data.task], config.data.clients.column} <= set(head)
    assert read(tmp_path / "mine.toml")["name"] == config.name
