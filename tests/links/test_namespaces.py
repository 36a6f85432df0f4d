"""One server and one client in network namespaces of their own, with a real, slow line of the kernel's in between.

It needs root and the programs ``ip`` and ``tc``, and skips itself elsewhere. Where the kernel can delay packets
(netem), there is a round trip of 50 ms as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import flexp
from flexp.config import OptimizerConfig
from flexp.models.zoo import save_tiny
from flexp.optim import Updater
from flexp.run.store import Store
from tests.harness import equal

MBIT, ROUND_TRIP, STEPS = 4, 0.05, 2
SERVER, CLIENT = "10.213.77.1", "10.213.77.2"
LISTEN = f"{SERVER}:7070"


def steps(model: Any) -> list[float]:
    """Two steps on equal batches, the same in this process and in the client's."""
    updater = Updater(model.stage.trainable(), OptimizerConfig(name="sgd", lr=1e-2))
    losses = []
    for seed in range(STEPS):
        ids = torch.randint(3, 64, (8, 128), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        updater.step()
        losses.append(loss.item())
    return losses


def client(folder: str) -> None:
    """What the client's process runs."""
    link = flexp.connect(f"grpc://{LISTEN}", "a", token="secret", insecure=True, codec="off")
    model = flexp.SplitModelForCausalLM.from_pretrained(folder, cut=(2, 4), link=link).train()
    losses = steps(model)
    print(json.dumps({"losses": losses, **vars(link.meter.training)}))
    link.close()


@contextmanager
def namespaces() -> Iterator[tuple[str, str, bool]]:
    """Two namespaces with a line of :data:`MBIT` Mbit/s each way between them, and whether it has a delay."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root and the programs ip and tc")
    names = [f"flexp-{side}-{os.getpid()}" for side in ("s", "c")]
    made: list[str] = []
    try:
        for name in names:
            if run("ip", "netns", "add", name).returncode:
                pytest.skip("this machine allows no network namespaces")
            made.append(name)
        wires = [f"fx{side}{os.getpid()}"[:15] for side in ("s", "c")]
        pair = ("ip", "-n", names[0], "link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        if run(*pair, "netns", names[1]).returncode:
            pytest.skip("this machine allows no virtual lines between namespaces")
        for name, wire, address in zip(names, wires, (SERVER, CLIENT), strict=True):
            must("ip", "-n", name, "addr", "add", f"{address}/24", "dev", wire)
            must("ip", "-n", name, "link", "set", wire, "up")
            rate = ("tc", "-n", name, "qdisc", "add", "dev", wire, "root", "handle", "1:", "tbf", "rate", f"{MBIT}mbit")
            if run(*rate, "burst", "16kb", "latency", "2s").returncode:
                pytest.skip("this kernel cannot limit the rate of a line")
        late = [
            run("tc", "-n", name, "qdisc", "add", "dev", wire, "parent", "1:1", "netem", "delay", "25ms")
            for name, wire in zip(names, wires, strict=True)
        ]
        yield names[0], names[1], not any(done.returncode for done in late)
    finally:
        for name in made:
            run("ip", "netns", "del", name)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def must(*command: str) -> None:
    done = run(*command)
    assert not done.returncode, done.stderr


def inside(namespace: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, sys.executable, *command]


@pytest.mark.slow
def test_a_slow_line_of_the_kernel_changes_no_bit(tmp_path: Path) -> None:
    with namespaces() as (near, far, delayed):
        folder = save_tiny("llama", tmp_path / "model")
        tokens = tmp_path / "tokens"
        tokens.write_text(hashlib.sha256(b"secret").hexdigest() + " a\n", encoding="utf-8")
        state = tmp_path / "state"
        options = ("--base-depth", "1", "--insecure", "--tokens", str(tokens), "--state", str(state))
        options += ("--set", "train.shared.lr=0.01")
        command = inside(near, "-m", "flexp.cli.main", "server", "--model", str(folder), "--listen", LISTEN, *options)
        server = subprocess.Popen([*command, "--set", "threads=1"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            assert any("serving blocks" in line for line in server.stdout)
            code = f"from tests.links.test_namespaces import client; client({str(folder)!r})"
            began = time.monotonic()
            done = subprocess.run(inside(far, "-c", code), capture_output=True, text=True, check=False, timeout=300)
            took = time.monotonic() - began
            assert not done.returncode, done.stderr
        finally:
            server.terminate()
            server.communicate(timeout=60)
        told = json.loads(done.stdout.splitlines()[-1])
        reference = flexp.Server.from_pretrained(folder, base_depth=1, optimizer=OptimizerConfig(lr=0.01))
        link = reference.connect("a")
        model = flexp.SplitModelForCausalLM.from_pretrained(folder, cut=(2, 4), link=link).train()
        assert told["losses"] == steps(model)
        saved = {
            name: value for name, value in Store(state).load(1)["server"].items() if name.startswith("shared/weights/")
        }
        assert saved
        assert equal(saved, {name: value for name, value in reference.state().items() if name in saved})
        meter = link.meter.training
        assert (told["bytes_up"], told["bytes_down"]) == (meter.bytes_up, meter.bytes_down)
        least = 8 * (meter.bytes_up + meter.bytes_down) / (MBIT * 1e6) + (2 * STEPS * ROUND_TRIP if delayed else 0)
        assert took > told["waited_seconds"] > 0.9 * least - 0.1  # the line's first bytes go faster than its rate
