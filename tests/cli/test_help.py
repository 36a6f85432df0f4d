"""What ``flexp … --help`` and the reference of the commands say."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flexp.cli
from flexp.cli.main import commands

sys.path.insert(0, str(Path(__file__).parents[2] / "docs/_hooks"))
reference = importlib.import_module("reference")
COMMANDS = list(reference.commands())


def test_no_text_loses_its_brackets() -> None:
    """The terminal's markup swallows ``[serve]`` and ``[data]``; ``[S, E)`` it leaves alone."""
    told = [(path, command.help or "") for path, command in COMMANDS]
    told += [(path, getattr(parameter, "help", "") or "") for path, command in COMMANDS for parameter in command.params]
    assert len(told) > 250
    assert [(path, text) for path, text in told if re.search(r"\[[a-z@#/][^\[]*\]", text)] == []


def test_the_reference_names_choices_and_both_forms_of_a_switch() -> None:
    page = reference.cli_reference()
    assert "`--tuning full\\|lora`" in page
    assert "`--link in-process\\|grpc`" in page
    assert "`--probe / --no-probe`" in page


def test_a_command_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greet.py").write_text('def greet() -> None:\n    print("hello")\n\n\nCOMMANDS = {"greet": greet}\n')
    monkeypatch.setattr(flexp.cli, "__path__", [*flexp.cli.__path__, str(tmp_path)])
    found = commands()
    assert {"run", "server", "state", "greet"} <= found.keys()
    found["greet"]()


def test_help_imports_nothing_that_is_slow() -> None:
    program = (
        "import contextlib, sys; sys.argv = ['flexp', '--help']; from flexp.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "assert not {'rich', 'pydantic', 'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert "Usage: flexp" in told or "Usage: -c" in told
