"""Flower's SuperLink and three SuperNodes with a private file each, over TLS, nodes known by their keys: a run that is
stopped, and a second one that goes on. ``make flower-demo``, or ``python examples/flower/demo.py DIR``."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexp.assets import resolve
from flexp.carried import certify

NODES = {"movies": "2:6", "amazon": "1:6", "nyt": "3:6"}
BIN = Path(sys.executable).parent
CONFIG = """\
name = "flower-demo"
threads = 1

[model]
id = "asset:minilm-l6"
base_depth = 1

[data]
max_length = 32

[train]
rounds = 3
steps_per_round = 8
batch_size = 8

[evaluation]
measure_memory = false

[deployment]
clients = ["movies", "amazon", "nyt"]
save_every = 4
"""
"""Nothing is said of the data: each node has its own."""


class Flower:
    """A SuperLink and SuperNodes on this machine, in the folder ``work``; leaving the block ends all of them.

    Args:
        nodes: the ``--node-config`` of each; an integer: of so many that Flower simulates.
    """

    def __init__(self, work: Path, nodes: list[str] | int) -> None:
        self.work, self.nodes, self.started = work, nodes, list[subprocess.Popen[bytes]]()
        # Flower starts its own commands by name; nothing is fetched, and nothing told to anybody.
        own = {"FLWR_HOME": str(work / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        one = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        one["PYTHONDONTWRITEBYTECODE"] = ""  # else each of some twenty processes compiles all that it imports
        self.env = {**os.environ, **own, **one, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def __enter__(self) -> Flower:
        work, port = self.work, free_port()
        work.joinpath("flwr").mkdir(parents=True)
        certify("127.0.0.1", work)
        cert = work / "cert.pem"
        said = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        work.joinpath("flwr/config.toml").write_text(f'{said}root-certificates = "{cert}"\n', encoding="utf-8")
        tls = ["--ssl-certfile", cert, "--ssl-keyfile", work / "key.pem", "--ssl-ca-certfile", cert]
        kind = "--simulation" if isinstance(self.nodes, int) else "--enable-supernode-auth"
        offline = "--disable-runtime-dependency-installation"
        self._start("superlink", "flower-superlink", *tls, kind, offline, "--port", port)
        wait_for(lambda: reached(port), 120)
        for number, node in enumerate([] if isinstance(self.nodes, int) else self.nodes):
            key = work / f"node-{number}"
            write_keys(key)
            self.flwr("supernode", "register", f"{key}.pub", "here")
            self._start(f"node-{number}", "flower-supernode", "--superlink", f"127.0.0.1:{port}",
                        "--root-certificates", cert, "--auth-supernode-private-key", key, "--node-config", node,
                        "--port", free_port())  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        every = [child for made in self.started for child in psutil.Process(made.pid).children(recursive=True)]
        for made in reversed(self.started):
            made.send_signal(signal.SIGTERM)
        for made in self.started:
            with suppress(subprocess.TimeoutExpired):
                made.wait(20)
        for left in [*every, *(psutil.Process(made.pid) for made in self.started if made.poll() is None)]:
            with suppress(psutil.NoSuchProcess):
                left.kill()

    def flwr(self, *arguments: object) -> str:
        """``flwr`` with these arguments; gives what it said."""
        command = [str(BIN / "flwr"), *map(str, arguments)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=180)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def run(self, app: Path, state: Path) -> str:
        """Start a run; gives its number."""
        how = ["-c", f'state="{state}"']
        if isinstance(self.nodes, int):  # all at once, however few cores there are
            how += ["--federation-config", f"num-supernodes={self.nodes} init-args-num-cpus={self.nodes} "
                    "client-resources-num-cpus=1"]  # fmt: skip
        said = self.flwr("run", app, "here", "--format", "json", *how)
        return str(json.loads(said[said.index("{") :])["run-id"])

    def apps(self) -> list[str]:
        """The ServerApps, ClientApps and simulations that are alive."""
        found = []
        for made in self.started:
            for child in psutil.Process(made.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    found += re.findall(r"flwr-(?:serverapp|clientapp|simulation)", " ".join(child.cmdline()))[:1]
        return found

    def _start(self, name: str, *command: object) -> None:
        with self.work.joinpath(f"{name}.log").open("wb") as log:
            self.started.append(
                subprocess.Popen([str(BIN / str(command[0])), *map(str, command[1:])], cwd=self.work, env=self.env,
                                 stdout=log, stderr=log, start_new_session=True)
            )  # fmt: skip


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def reached(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def wait_for(there: Callable[[], bool], seconds: float) -> float:
    """Wait until it is so; gives the seconds that took."""
    began = time.monotonic()
    while not there():
        if time.monotonic() - began > seconds:
            raise SystemExit(f"nothing after {seconds:g} s; see the logs")
        time.sleep(0.25)
    return time.monotonic() - began


def write_keys(path: Path) -> None:
    key, form = ec.generate_private_key(ec.SECP384R1()), serialization.Encoding
    no = serialization.NoEncryption()
    path.write_bytes(key.private_bytes(form.PEM, serialization.PrivateFormat.OpenSSH, no))
    public = key.public_key().public_bytes(form.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)


def private_files(work: Path) -> list[str]:
    """A file for each node, of another kind of text; gives the nodes' configurations."""
    rows = [json.loads(line) for line in Path(resolve("asset:sentiment")).read_text(encoding="utf-8").splitlines()]
    said = []
    for name, cut in NODES.items():
        own = [row for row in rows if row["client"] == name][:240]
        file = work / f"{name}.jsonl"
        file.write_text("".join(json.dumps({key: row[key] for key in ("text", "label")}) + "\n" for row in own))
        said.append(f'name="{name}" data="{file}" cut="{cut}" state="{work / "clients"}"')
    return said


def steps(work: Path) -> int:
    """That all clients have done."""
    files = work.glob("clients/*/metrics.jsonl")
    return sum(json.loads(line)["kind"] == "step" for file in files for line in file.open() if line.endswith("\n"))


def main(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    work.joinpath("config.toml").write_text(CONFIG, encoding="utf-8")
    app, began = work / "app", time.monotonic()
    flexp = [str(BIN / "flexp"), "flower", "new", str(app), "--config", str(work / "config.toml")]
    subprocess.run(flexp, check=True, stdout=subprocess.DEVNULL)

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {line}", flush=True)

    with Flower(work, private_files(work)) as flower:
        tell("a SuperLink and three SuperNodes are up (TLS, nodes known by their keys)")
        first, asked = flower.run(app, work / "server"), time.monotonic()
        wait_for(lambda: steps(work) >= 1, 240)
        tell(f"run 1: the first step after {time.monotonic() - asked:.0f} s")
        wait_for(lambda: steps(work) >= 24, 240)
        flower.flwr("stop", first, "here")
        tell(f"run 1: stopped; none of its processes is left after {wait_for(lambda: not flower.apps(), 60):.0f} s")
        done = steps(work)
        second = flower.run(app, work / "server")
        wait_for(lambda: bool(flower.apps()), 60)
        wait_for(lambda: not flower.apps(), 400)
        tell(f"run 2: went on after {done} steps, and is over after {steps(work)}")
        said = flower.flwr("log", second, "here", "--show")
    print("\n".join(line for line in said.splitlines() if re.match(rf"flexp: ({'|'.join(NODES)}) ", line)))
    tell("everything that was started has ended")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/flower-demo").resolve())
