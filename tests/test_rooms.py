"""One room, one job, and imports run downwards: docs/design.md's list of rooms is the order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from benchmarks.house import circles_of, imports_between_files

ROOT = Path(__file__).parents[1]


def rooms() -> dict[str, int]:
    """Room → its line in the list; rooms of one line may not import each other either way without notice."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8").partition("## The rooms")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return {
        name: number for number, line in enumerate(lines) for name in re.findall(r"(?<![\w/])([a-z]+)/(?=\s)", line)
    }


def imports() -> set[tuple[str, str]]:
    """(room, room that it imports), also inside functions."""
    source = ROOT / "src/flexp"
    found = set()
    for file in source.rglob("*.py"):
        room = file.relative_to(source).parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexp"):
                names = [a.name for a in node.names] if node.module == "flexp" else [str(node.module).split(".")[1]]
                found |= {(room, name) for name in names if (source / name).is_dir() and name != room}
    return found


def test_the_list_has_every_room() -> None:
    there = {path.parent.name for path in (ROOT / "src/flexp").glob("*/__init__.py")}
    assert rooms().keys() == there


def test_imports_run_downwards() -> None:
    order = rooms()
    upwards = {(room, other) for room, other in imports() if room in order and order[other] < order[room]}
    assert upwards == set()


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circles_of(imports_between_files()) == []
