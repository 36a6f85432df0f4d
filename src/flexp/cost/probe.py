"""The peak memory of a client, measured in a process of its own and never guessed.

The process (:mod:`flexp.cost.echo`) loads what a client of one cut owns, trains it for a few steps on random inputs of
the size of its largest batch, with a link that answers at once, and reads the highest resident memory that the kernel
saw: above what Python and its libraries take before any model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from flexp.errors import FlexpError
from flexp.files import read_json, storage_error, write_json

VERSION = 5
"""Of what a probe does; measurements of another one are made anew."""

RATES = ("lr", "new_lr", "schedule", "warmup_steps")
"""What an optimiser is told that changes no byte of it."""


@dataclass(frozen=True)
class Probe:
    """What to measure. ``cut`` = ``None`` is a client that holds the whole model.

    ``examples`` and ``length`` are those of the largest exchange (images: ``length`` is not used), ``tuning`` and the
    like as in the run. ``align`` is the run's alignment (``None``: off) and ``base_depth`` its s_min (``None``: s):
    with alignment a client also keeps what it sends from there, and holds the weights that it pulls. Without a ``tail``
    the client has nothing behind s: the server computes the loss, too. ``extra_weights`` are further copies of what it
    trains, ``extra_optimizers`` further states of the optimiser, that it holds all the while
    (:class:`flexp.methods.base.Holds`). ``ranks`` are those of the adapters in some blocks, (block, rank), where they
    are not ``model_config``'s. ``frozen`` of its first blocks are not trained. ``rows`` and ``cache`` are the run's
    ``link.rows`` and ``link.cache``, ``pools`` and ``gradients`` its ``privacy.pool`` and ``.gradients``.
    """

    model: str
    kind: str
    cut: tuple[int, int] | None
    examples: int
    length: int
    labels: list[str] | None
    model_config: dict[str, Any]
    optimizer: dict[str, Any]
    steps: int = 3
    align: dict[str, Any] | None = None
    base_depth: int | None = None
    tail: bool = True
    extra_weights: int = 0
    extra_optimizers: int = 0
    ranks: tuple[tuple[int, int], ...] = ()
    frozen: int = 0
    rows: str = "loss"
    cache: str = "off"
    pools: bool = False
    gradients: bool = True


@dataclass(frozen=True)
class Measured:
    """In bytes above the interpreter's own: ``loaded`` at the highest while loading and reading every weight once,
    ``peak`` at the highest in all."""

    loaded: int
    peak: int


def measure(probe: Probe, timeout: float = 600.0) -> Measured:
    """Run ``probe`` in a process of its own.

    Raises:
        FlexpError: the process failed; the message holds its last line.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    # One arena, and large blocks given back at once: otherwise the allocator's habits are measured as well.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flexp.cost.echo", json.dumps(asdict(probe))],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FlexpError(f"measuring the client's memory took more than {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise FlexpError(f"measuring the client's memory failed: {lines[-1]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure_once(probe: Probe, cache: Path | None, timeout: float = 600.0) -> Measured:
    """:func:`measure`, or what ``cache``, a folder that many runs may share at once, has of an equal probe.

    Equal are probes of the same settings, as far as they matter to memory, model files and versions. Whoever comes
    while another process measures the same waits for its result.

    Raises:
        FlexpError: see :func:`measure`.
        StorageError: the folder cannot be written.
    """
    probe = plain(probe)
    if cache is None:
        return measure(probe, timeout)
    path = cache / f"{_key(probe)}.json"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(cache, error) from error
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return Measured(**read_json(path)["measured"])
        measured = measure(probe, timeout)
        write_json(path, {"measured": asdict(measured), "probe": asdict(probe)})
        return measured


def plain(probe: Probe) -> Probe:
    """``probe`` without the settings that do not change memory, such as learning rates: a grid's trials are one."""
    optimizer = {key: value for key, value in probe.optimizer.items() if key not in RATES}
    model = {key: value for key, value in probe.model_config.items() if key not in ("base_depth", "expose_embeddings")}
    align = None
    if probe.align is not None and probe.cut is not None and _base(probe) < probe.cut[0]:
        kind, teach = probe.align["kind"], probe.align.get("teach")
        sends = kind not in ("off", "weights") and probe.align.get("weight") != 0
        if sends or teach or kind == "weights":
            align = {key: value for key, value in probe.align.items() if key in ("kind", "at", "teach", "follow")}
    return replace(
        probe,
        optimizer=optimizer,
        model_config=model,
        align=align,
        base_depth=None if align is None else probe.base_depth,
    )


def _base(probe: Probe) -> int:
    assert probe.cut is not None
    return probe.cut[0] if probe.base_depth is None else probe.base_depth


def _key(probe: Probe) -> str:
    folder = Path(probe.model)
    files = sorted((item.name, item.stat().st_size) for item in folder.iterdir()) if folder.is_dir() else []
    known = [metadata.version(name) for name in ("torch", "transformers")]
    return hashlib.sha256(json.dumps([VERSION, asdict(probe), files, known], sort_keys=True).encode()).hexdigest()[:32]
