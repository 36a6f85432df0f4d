"""FlexP-SFL and Flower's own FedAvg in turn, both in Flower's simulation, on the same clients, batches and budget:

    python examples/flower/against.py CONFIG.toml DIR [--pairs 2]

Seconds are from ``flwr run`` until nothing of the run is left; a process's processor time and peak memory are the
kernel's, read four times a second. Needs ``pip install "flexp[flower]" "flwr[simulation]"``."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from demo import BIN, Flower, wait_for

from flexp.config.deployment import load
from flexp.run.store import SNAPSHOTS, Store

ROLES = {"client": r"ray::ClientAppActor|flwr-clientapp", "server": r"flwr-simulation|flwr-serverapp"}


class Watch(threading.Thread):
    """Adds up what the processes of a Flower take: processor seconds by role, peak memory by process."""

    def __init__(self, flower: Flower) -> None:
        super().__init__(daemon=True)
        self.flower, self.ended = flower, threading.Event()
        self.seconds, self.peak, self.role = dict[int, float](), dict[int, int](), defaultdict[int, str](str)

    def run(self) -> None:
        while not self.ended.wait(0.25):
            for made in self.flower.started:
                for child in psutil.Process(made.pid).children(recursive=True):
                    with suppress(psutil.Error, OSError, AttributeError):
                        self._look(child)

    def _look(self, child: psutil.Process) -> None:
        line = " ".join(child.cmdline())
        for role, pattern in ROLES.items():
            if re.search(pattern, line):
                self.role[child.pid] = role
        self.seconds[child.pid] = sum(child.cpu_times()[:2])
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
        self.peak[child.pid] = 1024 * int(found[1]) if found else 0

    def told(self) -> dict[str, Any]:
        clients = sorted(self.peak[pid] for pid, role in self.role.items() if role == "client")
        spent = {
            role: sum(s for pid, s in self.seconds.items() if self.role[pid] == role) for role in ("client", "server")
        }
        return {
            "client_seconds": spent["client"],
            "server_seconds": spent["server"],
            "other_seconds": sum(self.seconds.values()) - sum(spent.values()),
            "client_processes": len(clients),
            "client_peak": [clients[0], clients[len(clients) // 2], clients[-1]],
        }


def flexp_result(state: Path) -> dict[str, Any]:
    """Accuracies and bytes out of what FlexP's clients left."""
    scores, crossed = defaultdict[int, list[float]](list), 0
    for client in state.glob("clients/*"):
        for record in map(json.loads, client.joinpath("metrics.jsonl").open(encoding="utf-8")):
            if record["kind"] == "eval":
                scores[record["round"]].append(record["personal"]["accuracy"])
        saved = Store(client / SNAPSHOTS)
        ((_, tensors),) = saved.load(max(saved.numbers())).items()
        crossed += sum(int(value) for name, value in tensors.items() if "/bytes_" in name)
    return {"accuracy": {n: sum(found) / len(found) for n, found in sorted(scores.items())}, "bytes": crossed}


def one(config: Path, work: Path, method: str, nodes: int) -> dict[str, Any]:
    """A run of one of both; gives what it took and reached."""
    app = work / "app"
    work.mkdir(parents=True)
    flexp = [str(BIN / "flexp"), "flower", "new", str(app), "--config", str(config)]
    subprocess.run(flexp, check=True, stdout=subprocess.DEVNULL)
    if method == "fedavg":
        shutil.copy(Path(__file__).with_name("fedavg.py"), app / "flexp_app" / "apps.py")
    with Flower(work, nodes) as flower:
        watch = Watch(flower)
        watch.start()
        began = time.monotonic()
        run = flower.run(app, work / "server")
        wait_for(lambda: bool(flower.apps()), 60)
        wait_for(lambda: not flower.apps(), 1800)
        seconds = time.monotonic() - began
        watch.ended.set()
        watch.join()
        work.joinpath("said.log").write_text(flower.flwr("log", run, "here", "--show"), encoding="utf-8")
    said = work / "server/fedavg.json"
    found = json.loads(said.read_text()) if method == "fedavg" else flexp_result(work / "server")
    return {"method": method, "seconds": seconds, **watch.told(), **found}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("config", type=Path)
    options.add_argument("work", type=Path)
    options.add_argument("--pairs", type=int, default=1)
    options.add_argument("--methods", default="flexp-sfl,fedavg")
    asked = options.parse_args()
    nodes = len(load(asked.config, ()).clients or ())
    for pair in range(asked.pairs):
        for method in asked.methods.split(","):
            work = (asked.work / f"{method}-{pair}").resolve()
            shutil.rmtree(work, ignore_errors=True)
            print(json.dumps(one(asked.config.resolve(), work, method, nodes)), flush=True)


if __name__ == "__main__":
    main()
