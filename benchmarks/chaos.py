"""Everything goes wrong: a fleet behind a bad network whose processes are killed, and whose disks are full.

The run ends with the weights of the undisturbed simulation, bit for bit, or the bench says where not. With several
exchanges in flight the order in which a client draws depends on time, so only without dropout is a run with
``--in-flight`` above 1 the same each time; with one, no frame can come before an earlier one.
"""

from __future__ import annotations

import random
import resource
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import psutil
import torch
import typer
from rich.console import Console

from benchmarks.tools.bad_network import BadNetwork, Relay
from benchmarks.tools.command import Result, say
from benchmarks.tools.tiny_run import tiny_run
from flexp.errors import ConfigError, FlexpError
from flexp.report.progress import Progress
from flexp.run import runner
from flexp.run.fleet import Fleet, Process
from flexp.run.settle import settle
from flexp.run.store import CHECKPOINTS, SNAPSHOTS, Parties, Store

METERS = ("meter/", "seconds", "compute_seconds", "progress/")
FULL_DISK_SECONDS = 1.0


def measure(
    faults: Annotated[int, typer.Option(min=1, help="In all.")] = 500,
    kills: Annotated[int, typer.Option(min=0, help="Of these: processes killed, the server among them.")] = 20,
    full_disks: Annotated[int, typer.Option(min=0, help="Of these: disks that are full for a second.")] = 5,
    steps: Annotated[int, typer.Option(min=20, help="Of each of the three clients.")] = 2000,
    rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of faults on the network, for each piece of up to 16 KiB.")
    ] = 0.02,
    relayed: Annotated[
        int, typer.Option(min=0, help="Of the faults: frames that come twice, late, or after the next one.")
    ] = 120,
    relay_rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of these, for each frame either way.")] = 0.01,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="Of the model; needs --in-flight 1.")] = 0.0,
    in_flight: Annotated[
        int, typer.Option(min=1, max=4, help="Exchanges under way at once; 1: frames keep their order.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of all that goes wrong.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Keep everything there; default: a temporary folder.")] = None,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds for the fleet.")] = 3600.0,
) -> Result:
    """Kill, cut, damage and delay while a fleet trains, and compare its weights with an undisturbed run's."""
    if dropout and in_flight > 1:
        raise ConfigError("--dropout needs --in-flight 1: with more, what a client draws depends on time")
    if relayed + kills + full_disks > faults:
        raise ConfigError(f"--relayed, --kills and --full-disks are more than --faults {faults}")
    with TemporaryDirectory() as spare:
        folder = out or Path(spare)
        config = tiny_run(folder, rounds=2, steps_per_round=steps // 2, dropout=dropout, in_flight=in_flight, seed=seed)
        torch.set_num_threads(1)
        runner.run(config, folder / "simulation", progress=partial(Progress, console=Console(quiet=True)))
        fleet = Fleet(
            settle(config), folder / "fleet", schedule="deterministic", save_every=10, restarts=10**9,
            answer_seconds=10.0,  # a bit turned in HTTP/2's own frames may make an answer vanish
            say=say,
        )  # fmt: skip
        began = time.monotonic()
        fleet.start_server()
        relay = Relay(fleet.address, rate=relay_rate, most=relayed, seed=seed)
        network = BadNetwork(relay.address, rate=rate, most=faults - kills - full_disks - relayed, seed=seed)
        fleet.way = network.address
        for name in fleet.clients:
            fleet.start_client(name)
        hand = _Hand(fleet, kills, full_disks, steps, seed)
        told = 0
        try:
            while not fleet.watch():
                if time.monotonic() - began > limit:
                    raise FlexpError(f"the fleet was not through after {limit:g} s; its logs are in {fleet.out}")
                time.sleep(0.1)
                hand.act()
                done = network.faults.total() + relay.faults.total() + hand.faults.total()
                if done // 50 > told:
                    told = done // 50
                    say(f"{done} faults, {sum(row['steps'] for row in fleet.results())} steps")
        finally:
            fleet.stop(5.0)
            network.close()
            relay.close()
        compared, different = _differences(folder / "simulation", folder / "fleet", list(fleet.clients))
    counts = dict(network.faults + relay.faults + hand.faults)
    facts = {
        "faults": sum(counts.values()), "by_kind": counts, "steps": steps * len(fleet.clients),
        "starts": {party.name: party.starts for party in (fleet.server, *fleet.clients.values())},
        "seconds": time.monotonic() - began, "compared": compared, "different": different,
    }  # fmt: skip
    kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))
    rows = [
        ("faults", f"{facts['faults']}: {kinds}"),
        ("steps", f"{facts['steps']} in {facts['seconds']:.0f} s"),
        ("tensors compared with the undisturbed run's", str(compared)),
        ("of these differ", str(len(different))),
    ]
    failed = f"the weights are not those of the undisturbed run: {', '.join(different[:3])}, …" if different else None
    return Result(facts, rows, failed=failed)


class _Hand:
    """Kills processes and fills disks, spread over the run."""

    def __init__(self, fleet: Fleet, kills: int, full_disks: int, steps: int, seed: int) -> None:
        self.faults: Counter[str] = Counter()
        self._fleet, self._random = fleet, random.Random(seed)
        total = steps * len(fleet.clients)
        plan = ["kill"] * kills + ["full disk"] * full_disks
        self._random.shuffle(plan)
        # Not in the last tenth: who is killed there needs the others, and they are still to be there.
        self._plan = [(int(0.9 * total * (index + 0.5) / len(plan)), what) for index, what in enumerate(plan)]
        self._full: tuple[psutil.Process, float] | None = None

    def act(self) -> None:
        """What is due at this point of the run, if everybody runs."""
        parties = [self._fleet.server, *self._fleet.clients.values()]
        if self._full is not None and time.monotonic() > self._full[1]:
            _limit_files(self._full[0], resource.RLIM_INFINITY)
            self._full = None
        if not self._plan or any(party.process is None or party.code is not None for party in parties):
            return
        steps = sum(row["steps"] for row in self._fleet.results())
        if steps < self._plan[0][0]:
            return
        party: Process = self._random.choice(parties)
        assert party.process is not None
        _, what = self._plan.pop(0)
        if what == "kill":
            who = "server" if party is self._fleet.server else "client"
            self.faults[f"kill of a {who}"] += 1
            party.process.kill()
        elif self._full is None:
            self.faults["full disk"] += 1
            process = psutil.Process(party.process.pid)
            _limit_files(process, 1024)
            self._full = (process, time.monotonic() + FULL_DISK_SECONDS)


def _limit_files(process: psutil.Process, size: int) -> None:
    """No file of the process grows beyond ``size``: what a full disk does to it."""
    with suppress(psutil.NoSuchProcess):
        process.rlimit(psutil.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _newest(folder: Path) -> Parties:
    store = Store(folder)
    return store.load(max(store.numbers()))


def _differences(simulation: Path, fleet: Path, names: list[str]) -> tuple[int, list[str]]:
    wanted = _newest(simulation / CHECKPOINTS)
    folders = {"server": fleet / "server"} | {f"client-{n}": fleet / "clients" / n / SNAPSHOTS for n in names}
    compared, different = 0, []
    for party, state in wanted.items():
        got = _newest(folders[party])[party]
        for name, value in state.items():
            if not name.startswith(METERS):
                compared += 1
                if name not in got or not torch.equal(value, got[name]):
                    different.append(f"{party}: {name}")
    return compared, different
