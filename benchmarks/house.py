"""How large the code is, and how far one has to walk through it.

Counted are lines and files of every room, circles of imports between files, imports that run up docs/design.md's list
of rooms, and the files that are *entered*, by call events: by one training step inside a process, by one exchange over
gRPC (the same step, on both sides), and by ``flexp run`` from a CSV file to the first optimiser step. What sets a step
up is not counted with it; what modules do when they are first imported is not counted anywhere.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import flexp
from benchmarks.tools.command import Result
from benchmarks.tools.tiny_run import tiny_run
from flexp.config import AlignConfig, RunConfig
from flexp.links.base import Link
from flexp.links.opening import loopback
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.optim import Updater
from flexp.report.progress import Progress
from flexp.run import runner
from flexp.run.settle import build_world

SOURCE = Path(flexp.__file__).parent
IMPORTED = ("<module>",)


def measure(repeats: Annotated[int, typer.Option(min=1, help="Of each start of a process.")] = 3) -> Result:
    """Lines and files of every room, circles of imports, and the files that a step, an exchange and a run enter."""
    files = _files()
    rooms: dict[str, list[int]] = {}
    for name, text in files.items():
        room = rooms.setdefault(_room(name), [0, 0])
        room[0] += len(text.splitlines())
        room[1] += 1
    arrows = imports_between_files()
    circles, upward = circles_of(arrows), _upward(arrows)
    with TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        config = tiny_run(Path(folder), rounds=1, steps_per_round=1, dropout=0.0)
        config = config.model_copy(update={"method": type(config.method)(align=AlignConfig(kind="kl"))})
        walks = {"step": walk_of_step(config), "exchange": _exchange(config), "run": _run(config, Path(folder))}
    times = {
        "help_seconds": _started("-m", "flexp.cli.main", "--help", repeats=repeats),
        "import_seconds": _started("-c", "import flexp", repeats=repeats),
        "python_seconds": _started("-c", "pass", repeats=repeats),
    }
    lines = sum(own[0] for own in rooms.values())
    facts = {
        "lines": lines, "files": len(files), "rooms": rooms, "circles": circles, "upward": upward,
        "entered": {what: walk.files for what, walk in walks.items()},
        "moves": {what: walk.moves for what, walk in walks.items()}, **times,
    }  # fmt: skip
    rows = [(f"{room}/", f"{own[0]:,} lines, {own[1]} files") for room, own in sorted(rooms.items())]
    rows += [
        ("all", f"{lines:,} lines, {len(files)} files"),
        ("circles of imports", "; ".join(" ".join(circle) for circle in circles) or "none"),
        ("imports that run up", "; ".join(" → ".join(pair) for pair in upward) or "none"),
        *(
            (f"{what}: files entered, moves between them", f"{len(walk.files)}, {walk.moves}")
            for what, walk in walks.items()
        ),
        *((what.replace("_", " "), f"{seconds:.2f}") for what, seconds in times.items()),
    ]
    notes = [f"{what}: {' '.join(walk.files)}" for what, walk in walks.items()]
    return Result(facts, rows, notes=notes)


class Walk:
    """Which files of the package are entered, and how often a call is to another file than the one before it.

    Looked at are this thread and those that start while the walk is prepared, each with moves of its own.
    """

    def __init__(self) -> None:
        self.entered: Counter[str] = Counter()
        self.moves = 0
        self._last: dict[int, str] = {}
        self.on = False

    @property
    def files(self) -> list[str]:
        """The files, by name."""
        return sorted(self.entered)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Watch this thread and those that start inside the ``with`` block, whenever ``on`` is set."""
        threading.setprofile(self._seen)
        sys.setprofile(self._seen)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _seen(self, frame: FrameType, event: str, _: Any) -> None:
        if not self.on or event != "call" or frame.f_code.co_name in IMPORTED:
            return
        if "__module__" in frame.f_code.co_names[:2]:
            return  # the body of a class
        name = frame.f_code.co_filename
        if not name.startswith(str(SOURCE)):
            return
        self.entered[_name(Path(name))] += 1
        thread = threading.get_ident()
        self.moves += self._last.get(thread, name) != name
        self._last[thread] = name


def walk_of_step(config: RunConfig) -> Walk:
    """The second step of a client that is linked inside this process."""
    walk = Walk()
    trainer = next(iter(FlexpSfl(build_world(config)).clients.values()))
    trainer.step()
    with walk.prepared():
        walk.on = True
        trainer.step()
        walk.on = False
    return walk


def _exchange(config: RunConfig) -> Walk:
    """The same over gRPC, on both sides."""
    walk = Walk()
    with walk.prepared(), ExitStack() as stack:

        class OverGrpc(FlexpSfl):
            def connect(self, name: str) -> Link:
                return stack.enter_context(loopback(self.server, name))

        trainer = next(iter(OverGrpc(build_world(config)).clients.values()))
        trainer.step()
        walk.on = True
        trainer.step()
        walk.on = False
    return walk


class _FirstStepError(BaseException):
    """The walk is over; nobody is to take it for an update that failed."""


def _run(config: RunConfig, folder: Path) -> Walk:
    """From a table's rows to the first optimiser step, by what ``flexp run`` calls once it has read its settings."""
    walk, ended = Walk(), Updater.step

    def stop(self: Updater, norm: float | None = None) -> float:
        raise _FirstStepError

    quiet = {"progress": lambda *args, **more: Progress(*args, **more | {"console": Console(quiet=True)})}
    try:
        Updater.step = stop  # type: ignore[method-assign]
        for number, on in enumerate((False, True)):  # the first one imports
            with walk.prepared():
                walk.on = on
                try:
                    runner.run(config, folder / f"run-{number}", **quiet)  # type: ignore[arg-type]
                except _FirstStepError:
                    walk.on = False
    finally:
        Updater.step = ended  # type: ignore[method-assign]
    return walk


def _started(*arguments: str, repeats: int) -> float:
    """Median seconds of a Python process with these arguments."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def imports_between_files() -> dict[str, set[str]]:
    """Every file of the package, and those that it imports."""
    files = _files()
    return {name: set(_imports(name, text, files.keys())) for name, text in files.items()}


def _files() -> dict[str, str]:
    return {_name(path): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}


def _name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def _room(name: str) -> str:
    return name.partition("/")[0] if "/" in name else "(flexp)"


def _imports(name: str, text: str, files: Any) -> Iterator[str]:
    """The files of the package that one imports, inside functions too, but not for type checkers alone."""
    for node in _nodes(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "flexp":
            base = "/".join(str(node.module).split(".")[1:])
            for alias in node.names:
                inner = f"{base}/{alias.name}.py".lstrip("/")
                places = (inner, inner.removesuffix(".py") + "/__init__.py", f"{base}.py", f"{base}/__init__.py")
                yield from [place for place in places if place in files and place != name][:1]


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes(child)


def circles_of(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Sets of files that all reach each other."""
    reach = {name: _reached(name, arrows) for name in arrows}
    found = {tuple(sorted(o for o in reach[name] if name in reach[o])) for name in arrows if name in reach[name]}
    return [list(circle) for circle in sorted(found)]


def _reached(name: str, arrows: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(arrows[name])
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += arrows[one]
    return seen


def _upward(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Imports that run up docs/design.md's list of rooms, where the documentation is there."""
    design = SOURCE.parents[1] / "docs/design.md"
    if not design.is_file():
        return []
    text = design.read_text(encoding="utf-8").partition("## The rooms")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    order = {
        name: number for number, line in enumerate(lines) for name in re.findall(r"(?<![\w/])([a-z]+)/(?=\s)", line)
    }
    return [
        [name, other]
        for name in sorted(arrows)
        for other in sorted(arrows[name])
        if order.get(_room(other), 99) < order.get(_room(name), -1)
    ]
