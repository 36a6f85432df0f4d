"""Fuzzing of the decoder, the joining handshake and the server behind them: many bad frames, and no effect.

Two engines. ``coverage``: atheris, which drives libFuzzer by the branches that an input reaches (``pip install
atheris``; half of the changes are libFuzzer's own, half know what a frame is). ``blind``: the latter alone. Inputs are
tried in a process of its own (``python -m benchmarks.fuzz '{"frames": 1000, …}'``): atheris must instrument
``flexp.links`` and ``flexp.server`` before anything imports them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from benchmarks.tools.command import Result
from flexp.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from benchmarks.tools.fuzz_target import Target

WARM = 0.25
"""The share of frames after which memory should not grow any more."""
ENGINES = ("coverage", "blind")
MARKS = 20
"""How often memory is looked at."""
INSTRUMENTED = ["flexp.links", "flexp.server"]


def measure(
    frames: Annotated[int, typer.Option(min=100, help="How many inputs.")] = 1_000_000,
    engine: Annotated[
        str | None,
        typer.Option(help="coverage (needs pip install atheris) or blind. Default: the first that is there."),
    ] = None,
    seed: Annotated[int, typer.Option(min=1, help="Of the changes.")] = 1,
) -> Result:
    """Bad frames and bad handshakes for a tiny server: no crash, no growth of memory, no effect on the weights."""
    there = importlib.util.find_spec("atheris") is not None
    engine = engine or ("coverage" if there else "blind")
    if engine not in ENGINES or (engine == "coverage" and not there):
        raise ConfigError(f"--engine {engine}: expected coverage (which needs pip install atheris) or blind")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        asked = json.dumps({"frames": frames, "seed": seed, "engine": engine, "out": str(out)})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.fuzz", asked], capture_output=True, text=True, check=False
        )
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"finished": False}
    if done.returncode or not result["finished"]:
        tail = "; ".join(done.stderr.strip().splitlines()[-3:])
        raise TrainingError(f"fuzzing died with code {done.returncode} ({tail or 'it said nothing'})")
    marks = [size for count, size in result["memory"] if count >= WARM * frames]
    branches = re.findall(r"cov: (\d+)", done.stderr)
    facts = result | {
        "engine": engine, "seed": seed, "growth": marks[-1] - marks[0],
        "branches": int(branches[-1]) if branches else None,
    }  # fmt: skip
    counts, bad = facts["counts"], not facts["weights_unchanged"]
    rows = [
        ("engine", engine + (f", {branches[-1]} branches" if branches else "")),
        ("inputs", f"{facts['frames']} in {facts['seconds']:.0f} s ({facts['cpu_seconds']:.0f} s of CPU)"),
        ("refused as frames", str(counts.get("refused", 0))),
        ("denied with a reason", str(counts.get("denied", 0))),
        ("answered", str(counts.get("answered", 0))),
        ("handshakes", str(counts.get("handshake", 0))),
        ("growth of memory after a quarter", f"{facts['growth'] / 1e6:+.1f} MB"),
        ("weights", "CHANGED" if bad else "unchanged"),
        ("findings", str(counts.get("findings", 0))),
    ]
    findings = [f"{what}: {data}" for what, data in facts["findings"].items()]
    failed = "\n".join(findings + ["the weights have changed"] * bad) or None
    return Result(facts, rows, failed=failed)


class Watch:
    """Counts inputs, looks at memory now and then, and says what came of it after the last one."""

    def __init__(self, target: Target, frames: int, out: Path) -> None:
        self._target, self._frames, self._out = target, frames, out
        self._digest, self._began = target.digest, time.perf_counter()
        self.done = 0
        self._memory: list[tuple[int, int]] = []

    def feed(self, data: bytes) -> None:
        """One input; after the last, the result is written."""
        self._target.feed(data)
        self.done += 1
        if self.done % max(1, self._frames // MARKS) == 0:
            self._memory.append((self.done, resident()))
            self._write(self.done >= self._frames)

    def _write(self, finished: bool) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        self._out.write_text(
            json.dumps({
                "finished": finished,
                "frames": self.done,
                "counts": dict(self._target.counts),
                "findings": {what: data.hex() for what, data in self._target.findings.items()},
                "memory": self._memory,
                "weights_unchanged": self._target.digest == self._digest,
                "updates": self._target.server.shared.version,
                "seconds": time.perf_counter() - self._began,
                "cpu_seconds": used.ru_utime + used.ru_stime,
            }),
            encoding="utf-8",
        )  # fmt: skip


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(psutil.Process().memory_info().rss)


def blind(watch: Watch, target: Target, frames: int, seed: int) -> None:
    """Spoil honest inputs, without looking at what comes of it."""
    from benchmarks.tools.fuzz_inputs import mutated

    draw = random.Random(seed)
    for data in target.seeds:
        watch.feed(data)
    while watch.done < frames:
        watch.feed(mutated(draw.choice(target.seeds), draw, target.seeds))


def guided(atheris: Any, watch: Watch, target: Target, frames: int, seed: int) -> None:
    """Let libFuzzer choose what to spoil, and half of the ways to do it. Does not return."""
    from benchmarks.tools.fuzz_inputs import MOST, mutated

    def mutate(data: bytes, most: int, number: int) -> bytes:
        draw = random.Random(number)
        if data and draw.random() < 0.5:
            return mutated(data, draw, target.seeds)[:most]
        return bytes(atheris.Mutate(data, most))

    def test(data: bytes) -> None:
        watch.feed(data)
        if watch.done >= frames:
            sys.stdout.flush()
            os._exit(0)  # libFuzzer would take this for a crash, were it told otherwise

    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(target.seeds):
            (Path(folder) / f"{number:03}").write_bytes(data)
        options = [
            "flexp",
            f"-seed={seed or 1}",
            f"-max_len={MOST}",
            "-rss_limit_mb=0",
            "-timeout=600",
            "-len_control=0",
        ]
        atheris.Setup([*options, folder], test, custom_mutator=mutate)
        atheris.Fuzz()


def work(text: str) -> None:
    """Fuzz as ``text`` says, in JSON: ``frames``, ``seed``, ``engine`` and ``out``, the file for the result."""
    asked = json.loads(text)
    atheris: Any = importlib.import_module("atheris") if asked["engine"] == "coverage" else None
    instrumenting: Callable[..., Any] = contextlib.nullcontext if atheris is None else atheris.instrument_imports
    with instrumenting(*([] if atheris is None else [INSTRUMENTED])):
        from benchmarks.tools.fuzz_target import target as make

    import torch

    torch.set_num_threads(1)
    with make() as target:
        watch = Watch(target, asked["frames"], Path(asked["out"]))
        if atheris is None:
            blind(watch, target, asked["frames"], asked["seed"])
        else:
            guided(atheris, watch, target, asked["frames"], asked["seed"])


if __name__ == "__main__":
    work(sys.argv[1])
