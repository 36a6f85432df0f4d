"""A server and its clients as processes on this machine, from the configuration of a run: to try, and for tests."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from flexp.config import DeploymentConfig, RunConfig
from flexp.errors import ConfigError, FlexpError
from flexp.files import check_free, folder_name, read_json, write_json
from flexp.methods.base import deployed
from flexp.report.metrics import Follower
from flexp.report.metrics import read as read_log
from flexp.run.conduct import is_over, newest_facts
from flexp.run.meetings import check_masks, meeting
from flexp.run.processes import begin
from flexp.run.settle import Settled
from flexp.run.store import Store
from flexp.signals import interrupted_by_term

Say = Callable[[str], None]
ADDRESS = re.compile(r"serving blocks \[.*\) at (\S+)")
STOPPING = re.compile(r"^flexp server: stopping$", re.MULTILINE)
LEFT = 3
"""What a client is to end with that leaves before the run is over: whoever sent it a signal did not end the run."""


@dataclass
class Process:
    """One party of the run as a process: what it is started with, how often it had to be started, and where in its log
    the last start begins."""

    name: str
    arguments: list[str]
    log: Path
    process: BaseProcess | None = None
    starts: int = 0
    ended: bool = False
    said: int = 0

    def start(self, threads: int) -> None:
        """Start it, or start it again. The fleet itself passes signals on."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.said = self.log.stat().st_size if self.log.exists() else 0
        self.process = begin(command, self.arguments, log=self.log, threads=threads, alone=True)
        self.starts += 1

    @property
    def code(self) -> int | None:
        """What its process ended with; ``None`` while it runs, or if it was never started."""
        return None if self.process is None else self.process.exitcode

    @property
    def words(self) -> str:
        """What it has said since it was started last."""
        return self.log.read_bytes()[self.said :].decode(errors="replace")

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


class Fleet:
    """Starts everybody, watches, starts again who fell, and collects what they did.

    Args:
        restarts: how often one party may fall before the fleet gives up.
        deployment: keys of ``[deployment]``; without a ``schedule`` it is deterministic, and everybody takes part.

    Raises:
        ConfigError: ``out`` holds something else, the table names other clients than the data have, or clients meet and
            what masks their sums is not installed.
    """

    def __init__(
        self,
        run: Settled,
        out: Path,
        *,
        restarts: int = 3,
        threads: int = 1,
        say: Say = print,
        **deployment: Any,
    ) -> None:
        check_masks(run.config)
        self.config, self.out, self.say = run.config, out, say
        _, self.cuts = run.deployed()
        self.restarts, self.threads = restarts, threads
        self._file = out / "fleet.json"
        if not self._file.exists():
            check_free(out, ("config.json", "server", "clients"), "a fleet")
        self._write_config(deployment)
        self._stays = bool(deployment.get("allow_export"))  # the server, until it is told to go
        self.server = Process("server", [], out / "server" / "log.txt")
        self.clients = {name: Process(name, [], self.folder(name) / "log.txt") for name in self.cuts}
        self._diaries = {name: Follower(self.folder(name) / "metrics.jsonl") for name in self.cuts}
        self._steps: dict[str, set[int]] = {name: set() for name in self.cuts}  # some are done again
        self.address = ""
        self.way = ""  # how clients reach the server, if not at its address

    def folder(self, client: str) -> Path:
        """What a client has for itself."""
        return self.out / "clients" / folder_name(client)

    @property
    def blocks(self) -> list[str]:
        """What the server is told of its blocks."""
        depth = self.config.model.base_depth
        if not deployed(self.config).middle:
            return []
        if self.config.recut.on:  # then cuts may become as shallow as any
            return [] if depth is None else ["--base-depth", str(depth)]
        start = min(cut[0] for cut in self.cuts.values()) if depth is None else depth
        return ["--base-depth", str(start), "--end", str(max(cut[1] for cut in self.cuts.values()))]

    def start_server(self, listen: str = "127.0.0.1:0") -> None:
        """Start the server and wait until it listens; it keeps its port when it is started again.

        Raises:
            FlexpError: it ended instead.
        """
        self.server.arguments = [
            "server", "--config", str(self._file), "--state", str(self.out / "server"), *self.blocks,
            "--listen", self.address or listen, "--every", "5",
        ]  # fmt: skip
        self.server.start(self.threads)
        while True:
            found = ADDRESS.search(self.server.words)
            if found:
                self.address = found[1]
                return
            if self.server.code is not None:
                raise FlexpError(f"the server could not be started: {self.server.last_words()}")
            time.sleep(0.05)

    def start_client(self, name: str) -> None:
        """Start one client, or start it again."""
        party = self.clients[name]
        party.arguments = [
            "client", "--config", str(self._file), "--server", self.way or self.address, "--name", name,
            "--state", str(self.folder(name)), "--left-code", str(LEFT),
        ]  # fmt: skip
        party.start(self.threads)

    def start(self) -> None:
        """Everybody."""
        self.start_server()
        for name in self.clients:
            self.start_client(name)

    def watch(self) -> bool:
        """See who has ended and start again who fell, or left before the run was over; gives whether all is over.

        Raises:
            FlexpError: somebody did so too often.
        """
        for party in (self.server, *self.clients.values()):
            if party.ended or party.code is None:
                continue
            if party.code == 0:
                party.ended = True
                continue
            left = party.code == LEFT and party is not self.server
            if left and STOPPING.search(self.server.words):  # which has told it to leave
                continue
            if party.starts > self.restarts:
                how = "before the run was over" if left else "with an error"
                raise FlexpError(
                    f"{party.name} ended {party.starts} times {how}: {party.last_words()}; to go on: flexp fleet with "
                    f"--out {self.out}"
                )
            how = "left before the run was over" if left else f"ended with code {party.code}"
            self.say(f"{party.name} {how}; starting it again")
            self.start_server() if party is self.server else self.start_client(party.name)
        return (self.server.ended or self._stays) and all(party.ended for party in self.clients.values())

    def run(self) -> None:
        """From the start to the end.

        Raises:
            FlexpError: somebody fell too often, or the server was stopped before the run was over.
        """
        told = 0
        with interrupted_by_term():
            try:
                self.start()
                self.say(f"server at {self.address}, {len(self.clients)} clients; their logs are in {self.out}")
                while not self.watch() and not self._stopped:
                    time.sleep(0.2)
                    told = self._tell(told)
            finally:
                self.stop()
        if self._stopped:
            self._tell(told)
            steps = sum(map(len, self._steps.values()))
            raise FlexpError(
                f"the server was stopped before the run was over, after {steps} of {self._total} steps; to go on: "
                f"flexp fleet with --out {self.out}"
            )

    def stop(self, seconds: float = 20.0) -> None:
        """Ask whoever still runs to stop, and wait for it."""
        parties = (*self.clients.values(), self.server)
        running = [p.process for p in parties if p.process is not None and p.code is None]
        for process in running:
            process.terminate()
        for process in running:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                process.join()

    def results(self) -> list[dict[str, Any]]:
        """The last score and the steps of every client, from what each has written."""
        rows = []
        for name in self.clients:
            path = self.folder(name) / "metrics.jsonl"
            records = read_log(path) if path.exists() else []
            scores = [record["personal"] for record in records if record["kind"] == "eval"]
            steps = {record["step"] for record in records if record["kind"] == "step"}  # some were done again
            cuts = [list(self.cuts[name]), *(record["cut"] for record in records if record["kind"] == "move")]
            rows.append({"name": name, "cut": cuts[-1], "steps": len(steps),
                         "first": scores[0] if scores else None, "last": scores[-1] if scores else None})  # fmt: skip
        return rows

    def _tell(self, told: int) -> int:
        for name, diary in self._diaries.items():
            self._steps[name] |= {record["step"] for record in diary.new() if record["kind"] == "step"}
        steps = sum(map(len, self._steps.values()))
        tenth: int = 10 * steps // max(1, self._total)
        if tenth > told:
            self.say(f"step {steps}/{self._total}")
        return max(told, tenth)

    @property
    def _stopped(self) -> bool:
        """Whether the server has ended and the run has not; clients that had not joined yet would wait for it."""
        return self.server.ended and not is_over(newest_facts(Store(self.out / "server")), self.config.train)

    @property
    def _total(self) -> int:
        return self.config.train.total_steps * len(self.clients)

    def _write_config(self, deployment: dict[str, Any]) -> None:
        """The run's configuration with the table ``[deployment]``, for all processes."""
        content, everybody = self.config.resolved(), list(self.cuts)
        content["deployment"] = {"schedule": "deterministic", **deployment, "clients": everybody}
        listed = deployment.get("clients")
        if listed is not None and set(listed) != set(everybody):
            raise ConfigError(
                f"deployment.clients names {', '.join(listed)}, and the data have {', '.join(everybody)}: a fleet "
                "starts all of them; choose among them with data.clients.names"
            )
        DeploymentConfig.checked(content["deployment"], str(self.out), "deployment")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "config.json", self.config.resolved())
        write_json(self._file, content)


def as_begun(config: RunConfig, out: Path) -> RunConfig:
    """The configuration; of what it leaves to the run (``method.meet.on = "auto"``) as a fleet in ``out`` began."""
    path = out / "config.json"
    if config.method.meet.on != "auto" or not path.is_file():
        return config
    return meeting(config, on=bool(read_json(path).get("method", {}).get("meet", {}).get("on", False)))


def command(arguments: list[str]) -> None:
    """``flexp`` with these arguments, in a process of its own."""
    sys.argv = ["flexp", *arguments]
    import_module("flexp.cli.main").main()
