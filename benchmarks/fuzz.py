"""Fuzzing of the decoder, the joining handshake and the server behind them: many bad frames, and no effect.

Two engines. ``coverage``: atheris, which drives libFuzzer by the branches that an input reaches (``pip install
atheris``; half of the changes are libFuzzer's own, half know what a frame is). ``blind``: the latter alone.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flexp.errors import ConfigError, TrainingError
from flexp.machine import machine

WARM = 0.25
"""The share of frames after which memory should not grow any more."""
ENGINES = ("coverage", "blind")


def fuzz(frames: int = 1_000_000, *, engine: str | None = None, seed: int = 1) -> dict[str, Any]:
    """Feed that many inputs to a tiny server, in a process of its own.

    Args:
        engine: see above; ``None``: coverage, if atheris is there.

    Returns:
        ``counts`` of what became of the inputs, ``findings`` (what should never happen, with an input in hexadecimal),
        ``memory`` as (inputs, resident bytes), ``growth``: bytes between :data:`WARM` of the inputs and the end,
        ``weights_unchanged``, and with coverage ``branches``.

    Raises:
        ConfigError: there is no such engine.
        TrainingError: the process died.
    """
    there = importlib.util.find_spec("atheris") is not None
    engine = engine or ("coverage" if there else "blind")
    if engine not in ENGINES or (engine == "coverage" and not there):
        raise ConfigError(f"--engine {engine}: expected coverage (which needs pip install atheris) or blind")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        asked = json.dumps({"frames": frames, "seed": seed, "engine": engine, "out": str(out)})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.fuzz_worker", asked], capture_output=True, text=True, check=False
        )
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"finished": False}
    if done.returncode or not result["finished"]:
        tail = "; ".join(done.stderr.strip().splitlines()[-3:])
        raise TrainingError(f"fuzzing died with code {done.returncode} ({tail or 'it said nothing'})")
    marks = [(count, size) for count, size in result["memory"] if count >= WARM * frames]
    branches = re.findall(r"cov: (\d+)", done.stderr)
    return result | {
        "bench": "fuzz",
        "engine": engine,
        "seed": seed,
        "growth": marks[-1][1] - marks[0][1],
        "branches": int(branches[-1]) if branches else None,
        "machine": machine(),
    }
