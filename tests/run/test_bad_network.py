"""A fleet behind a network that cuts, damages, delays and stalls ends with the simulation's weights."""

from __future__ import annotations

from pathlib import Path

from benchmarks.tools.bad_network import BadNetwork
from benchmarks.tools.tiny_run import CLIENTS, tiny_run
from flexp.config import DeploymentConfig
from flexp.links.grpc import connect
from flexp.run import runner
from tests.harness import equal
from tests.tiny import checkpoint

from .tools import Client, Server, parties, without_meters


def test_the_weights_are_those_of_a_good_network(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, rounds=1, steps_per_round=15)
    runner.run(config, tmp_path / "sim")
    names = list(CLIENTS)
    fixed = DeploymentConfig(schedule="deterministic", clients=names, save_every=5)
    server = Server(config, fixed, tmp_path / "fleet" / "server")
    network = BadNetwork(server.address, rate=0.2, most=25, seed=1)
    clients = [
        Client(
            config,
            fixed,
            name,
            lambda own: connect(f"grpc://{network.address}", own),
            tmp_path / "fleet/clients" / name,
        )
        for name in names
    ]
    for client in clients:
        client.join()
    server.end()
    network.close()
    assert network.faults.total() >= 15
    assert len(network.faults) >= 4
    there, here = checkpoint(tmp_path / "sim"), parties(tmp_path / "fleet", names)
    for party, state in there.items():
        assert equal(without_meters(state), without_meters(here[party])), party
