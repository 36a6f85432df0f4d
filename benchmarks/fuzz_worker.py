"""The process that fuzzes: ``python -m benchmarks.fuzz_worker '{"frames": 1000, …}'``; see :mod:`benchmarks.fuzz`.

With the coverage engine atheris (libFuzzer) picks inputs by the branches of ``flexp.links`` and ``flexp.server`` that
they reach, so it must instrument these before anything imports them; that is why this is a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.fuzz_target import Target

MARKS = 20
"""How often memory is looked at."""
INSTRUMENTED = ["flexp.links", "flexp.server"]


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
    import psutil

    return int(psutil.Process().memory_info().rss)


def blind(watch: Watch, target: Target, frames: int, seed: int) -> None:
    """Spoil honest inputs, without looking at what comes of it."""
    from benchmarks.fuzz_frames import mutated

    draw = random.Random(seed)
    for data in target.seeds:
        watch.feed(data)
    while watch.done < frames:
        watch.feed(mutated(draw.choice(target.seeds), draw, target.seeds))


def guided(atheris: Any, watch: Watch, target: Target, frames: int, seed: int) -> None:
    """Let libFuzzer choose what to spoil, and half of the ways to do it. Does not return."""
    from benchmarks.fuzz_frames import MOST, mutated

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


def main(text: str) -> None:
    """Fuzz as ``text`` says, in JSON: ``frames``, ``seed``, ``engine`` and ``out``, the file for the result."""
    asked = json.loads(text)
    atheris: Any = importlib.import_module("atheris") if asked["engine"] == "coverage" else None
    instrumenting: Callable[..., Any] = contextlib.nullcontext if atheris is None else atheris.instrument_imports
    with instrumenting(*([] if atheris is None else [INSTRUMENTED])):
        from benchmarks.fuzz_target import target as make

    import torch

    torch.set_num_threads(1)
    with make() as target:
        watch = Watch(target, asked["frames"], Path(asked["out"]))
        if atheris is None:
            blind(watch, target, asked["frames"], asked["seed"])
        else:
            guided(atheris, watch, target, asked["frames"], asked["seed"])


if __name__ == "__main__":
    main(sys.argv[1])
