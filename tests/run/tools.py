"""A server and clients in threads of one process, over gRPC on this machine."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from benchmarks.chaos import METERS
from flexp.config import DeploymentConfig, RunConfig
from flexp.links.base import Link
from flexp.links.grpc import connect
from flexp.run import runner
from flexp.run.client import run_client
from flexp.run.server import make_conductor, make_server, run_server
from flexp.run.settle import settle, settle_client
from flexp.run.store import Store


def copying(monkeypatch: pytest.MonkeyPatch, out: Path, left: Path, number: int = 2) -> None:
    """Let a run in ``out`` leave in ``left`` what a kill after the steps of round ``number`` leaves, which has no
    checkpoint yet: whoever resumes that has no need of a second run that is stopped."""
    evaluate = runner._Run._evaluate

    def copied(self: Any, round_: int) -> None:
        if round_ == number and self.out == out:
            shutil.copytree(out, left)
        evaluate(self, round_)

    monkeypatch.setattr(runner._Run, "_evaluate", copied)


class Server:
    """``run_server`` of a conducted run in a thread."""

    def __init__(
        self,
        config: RunConfig,
        deployment: DeploymentConfig,
        state: Path | None,
        listen: str = "127.0.0.1:0",
        **more: Any,
    ) -> None:
        more["dismiss"] = deployment.on_stop == "leave"
        self.lines: list[str] = []
        self.stop, self._listening = threading.Event(), threading.Event()
        cuts = settle(config).cuts
        start, end = min(cut[0] for cut in cuts.values()), max(cut[1] for cut in cuts.values())
        start = config.model.base_depth or start
        server = make_server(config, start, end, "sequence-classification", deployment.clients)
        self.server = server
        self.conductor = make_conductor(server, config, deployment, state, self._say)
        self.thread = threading.Thread(
            target=lambda: run_server(server, listen, say=self._say, stop=self.stop, conductor=self.conductor, **more),
            daemon=True,  # a test that failed does not end it
        )
        self.thread.start()
        assert self._listening.wait(30), self.lines
        self.address = next(line.split(" at ")[1] for line in self.lines if line.startswith("serving"))

    def _say(self, line: str) -> None:
        self.lines.append(line)
        if line.startswith("serving"):
            self._listening.set()

    def end(self) -> None:
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


class Client:
    """``run_client`` in a thread."""

    def __init__(
        self,
        config: RunConfig,
        deployment: DeploymentConfig,
        name: str,
        reach: Callable[[str], Link],
        state: Path,
        cut: tuple[int, int | None] | None = None,
    ) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.over: bool | None = None

        def work() -> None:
            try:
                console = Console(quiet=True)
                self.over = run_client(
                    settle_client(config, name, cut),
                    deployment,
                    lambda: reach(name),
                    state,
                    codec=config.link.codec,
                    console=console,
                    stop=self.stop,
                )
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def join(self, seconds: float = 90.0) -> None:
        self.thread.join(seconds)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error


def plain(server: Server) -> Callable[[str], Link]:
    return lambda name: connect(f"grpc://{server.address}", name)


def fleet(
    config: RunConfig,
    deployment: DeploymentConfig,
    out: Path,
    reach: Callable[[Server], Callable[[str], Link]] = plain,
    **options: Any,
) -> Server:
    """All of a run, from the start to the end."""
    server = Server(config, deployment, out / "server", **options)
    clients = [
        Client(config, deployment, name, reach(server), out / "clients" / name) for name in deployment.clients or ()
    ]
    for client in clients:
        client.join()
    server.end()
    return server


def newest(folder: Path) -> Mapping[str, Tensor]:
    """The content of a party's newest snapshot."""
    store = Store(folder)
    (tensors,) = store.load(max(store.numbers())).values()
    return tensors


def parties(out: Path, names: list[str], clients: Path | None = None) -> dict[str, Mapping[str, Tensor]]:
    """What every party of a fleet ended with, named as a simulation's checkpoint names them."""
    folder = clients or out / "clients"
    every = {f"client-{name}": newest(folder / name / "snapshots") for name in names}
    return {"server": newest(out / "server"), **every}


def without_meters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what differs from run to run, and what a simulation scores besides."""
    return {name: value for name, value in state.items() if not name.startswith(METERS)}
