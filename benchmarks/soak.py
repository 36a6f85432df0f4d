"""``python -m benchmarks soak``: a server for long, with clients that come, work, leave, vanish and come again."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.tiny_run import tiny_run
from flexp.client.model import SplitModelForSequenceClassification
from flexp.errors import FlexpError, LinkError
from flexp.links.grpc import connect
from flexp.models.zoo import tiny_batch

ADDRESS = re.compile(r"serving blocks \[.*\) at (\S+)")
CUTS = ((1, 4), (2, 4), (3, 4))


def soak(
    folder: Path, *, minutes: float, clients: int = 6, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Let ``clients`` come and go for so long, each time for 1–40 steps with some cut; a third of them just vanish.

    Returns:
        The server's resident memory over time (bytes), its means over the second and the last quarter, and counts.

    Raises:
        FlexpError: the server ended.
    """
    config = tiny_run(folder, rounds=1, steps_per_round=1)
    torch.set_num_threads(1)
    log = (folder / "server.log").open("wb")
    command = ["server", "--model", config.model.id, "--kind", "sequence-classification", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flexp.cli.main", *command, "--end", "4", "--listen", "127.0.0.1:0", "--every", "5"],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        address = _address(process, folder / "server.log")
        counts = {"sessions": 0, "steps": 0, "vanished": 0, "refused": 0}
        stop, lock = threading.Event(), threading.Lock()
        threads = [
            threading.Thread(target=_come_and_go, args=(config.model.id, address, name, seed, stop, counts, lock))
            for name in range(clients)
        ]
        for thread in threads:
            thread.start()
        memory = _watch(process, minutes, counts, say)
        stop.set()
        for thread in threads:
            thread.join()
    finally:
        process.terminate()
        process.wait()
        log.close()
    quarter = max(1, len(memory) // 4)
    second, last = (float(np.mean(part)) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    return {
        "bench": "soak",
        "minutes": minutes,
        **counts,
        "memory_bytes": memory,
        "second_quarter_bytes": second,
        "last_quarter_bytes": last,
        "growth": last / second - 1.0,
    }


def _come_and_go(
    model_id: str,
    address: str,
    name: int,
    seed: int,
    stop: threading.Event,
    counts: dict[str, int],
    lock: threading.Lock,
) -> None:
    draw = random.Random(1000 * seed + name)
    while not stop.is_set():
        steps, vanishes = draw.randint(1, 40), draw.random() < 1 / 3
        done = refused = 0
        try:
            link = connect(f"grpc://{address}", f"client-{name}")
            model = SplitModelForSequenceClassification.from_pretrained(model_id, cut=draw.choice(CUTS), link=link)
            model.train()
            for number in range(steps):
                batch = tiny_batch(model.model, batch=4, length=draw.randint(4, 16), seed=number)
                loss = model(**batch).loss
                if vanishes and number == steps - 1:
                    break  # in the middle of a step
                loss.backward()
                done += 1
                time.sleep(0.02)
            link._stream.cancel() if vanishes else link.close()
        except LinkError:
            refused = 1  # the server has not yet noticed that this one vanished
        with lock:
            counts["sessions"] += 1
            counts["steps"] += done
            counts["vanished"] += int(vanishes)
            counts["refused"] += refused
        stop.wait(draw.uniform(0.1, 1.5))


def _watch(
    process: subprocess.Popen[bytes], minutes: float, counts: dict[str, int], say: Callable[[str], None]
) -> list[int]:
    server, end = psutil.Process(process.pid), time.monotonic() + 60 * minutes
    memory: list[int] = []
    while time.monotonic() < end:
        time.sleep(min(5.0, 60 * minutes / 20))
        if process.poll() is not None:
            raise FlexpError("the server ended during the soak; see server.log")
        memory.append(server.memory_info().rss)
        if len(memory) % 24 == 0:
            say(f"{counts['sessions']} sessions, {counts['steps']} steps, {memory[-1] / 1e6:.1f} MB")
    return memory


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    while True:
        found = ADDRESS.search(log.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found[1]
        if process.poll() is not None:
            raise FlexpError(f"the server could not be started: {log.read_text(errors='replace')[-500:]}")
        time.sleep(0.1)
