"""A server for a long time, with clients that come, work, leave, vanish and come again.

Each time they stay for 1–40 steps with some cut, and a third of them just vanish. The server's resident memory should
be over the last quarter of the time what it was over the second.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import psutil
import torch
import typer

from benchmarks.tools.command import Result, say
from benchmarks.tools.tiny_run import tiny_run
from flexp.client.pretrained import SplitModelForSequenceClassification
from flexp.errors import FlexpError, LinkError
from flexp.links.grpc import connect
from flexp.models.zoo import tiny_batch

ADDRESS = re.compile(r"serving blocks \[.*\) at (\S+)")
CUTS = ((1, 4), (2, 4), (3, 4))


def measure(
    minutes: Annotated[float, typer.Option(min=0.05, help="How long.")] = 30.0,
    clients: Annotated[int, typer.Option(min=1, help="That come and go.")] = 6,
    seed: Annotated[int, typer.Option(help="Of what they do.")] = 0,
) -> Result:
    """A server for a long time, with clients that come, leave and vanish; does its memory stay flat?"""
    torch.set_num_threads(1)
    counts = {"sessions": 0, "steps": 0, "vanished": 0, "refused": 0}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        model = tiny_run(folder, rounds=1, steps_per_round=1).model.id
        process = stack.enter_context(_server(model, folder / "server.log"))
        address = _address(process, folder / "server.log")
        stop, lock = threading.Event(), threading.Lock()
        threads = [
            threading.Thread(target=_come_and_go, args=(model, address, name, seed, stop, counts, lock))
            for name in range(clients)
        ]
        for thread in threads:
            thread.start()
        memory = _watch(process, minutes, counts)
        stop.set()
        for thread in threads:
            thread.join()
    quarter = max(1, len(memory) // 4)
    second, last = (float(np.mean(part)) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    growth = last / second - 1.0
    facts = {
        "minutes": minutes, **counts, "memory_bytes": memory, "second_quarter_bytes": second,
        "last_quarter_bytes": last, "growth": growth,
    }  # fmt: skip
    rows = [
        ("sessions", str(counts["sessions"])),
        ("steps", str(counts["steps"])),
        ("vanished in the middle of a step", str(counts["vanished"])),
        ("server's memory in the second quarter", f"{second / 1e6:.1f} MB"),
        ("in the last", f"{last / 1e6:.1f} MB: {100 * growth:+.1f} %"),
    ]
    return Result(facts, rows)


@contextmanager
def _server(model: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = ["server", "--model", model, "--kind", "sequence-classification", "--set", "threads=1"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "flexp.cli.main", *command, "--end", "4", "--listen", "127.0.0.1:0", "--every", "5"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


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


def _watch(process: subprocess.Popen[bytes], minutes: float, counts: dict[str, int]) -> list[int]:
    server, end = psutil.Process(process.pid), time.monotonic() + 60 * minutes
    memory: list[int] = []
    while time.monotonic() < end:
        time.sleep(min(5.0, 60 * minutes / 20))
        if process.poll() is not None:
            raise FlexpError("the server ended during the soak")
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
