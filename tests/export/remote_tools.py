"""A client of a network and a server, without the network's run: what each has after some steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from flexp.client.trainer import party_state
from flexp.config import DeploymentConfig, RunConfig
from flexp.config.loading import validate
from flexp.export.client_folder import ClientModel
from flexp.export.opening import open_trained
from flexp.files import write_json
from flexp.kinds import ModelKind
from flexp.links.base import Link
from flexp.links.grpc import connect, serve
from flexp.report.metrics import MetricsLog
from flexp.run.chaining import take_place
from flexp.run.folder import write_facts
from flexp.run.server import make_server
from flexp.run.settle import ClientSetup, settle_client
from flexp.run.status import StatusReporter
from flexp.run.store import Store, party_of
from flexp.server import Server
from flexp.server.chain import PREVIOUS

from .tools import content_of, of_text

STEPS = 3


class Remote:
    """A served server and its client's folder, trained for :data:`STEPS` steps."""

    def __init__(
        self, folder: Path, servers: list[Server], config: RunConfig, setup: ClientSetup, address: str
    ) -> None:
        self.folder, self.servers, self.config, self.setup, self.address = folder, servers, config, setup, address
        self.server = servers[0]
        self.state = folder / "client"

    @property
    def opened(self) -> ClientModel:
        found = open_trained(self.state, connect=self.reach)
        assert isinstance(found, ClientModel)
        return found

    @property
    def url(self) -> str:
        return f"grpc://{self.address}"

    def reach(self, name: str) -> Link:
        return connect(self.url, name, codec="off")

    def batch(self) -> dict[str, torch.Tensor]:
        examples = self.setup.data.test or self.setup.data.train
        batch = self.setup.run.federation.task.collate(examples[:6])
        return {key: value for key, value in batch.items() if key != "labels"}

    def expected(self) -> torch.Tensor:
        """Logits of the personal model, its middle over the link."""
        model = self.opened.split.eval()
        with torch.no_grad():
            logits: torch.Tensor = model(**self.batch()).logits
        model.link.close()
        return of_text(logits, self.batch())


def chained(config: RunConfig, kind: ModelKind, border: int, stack: ExitStack) -> list[Server]:
    """Two servers; the one behind has the blocks from ``border`` on."""
    last = DeploymentConfig(blocks=(border, 4))
    behind = make_server(config, 1, None, kind, None, deployment=last)
    take_place(behind, config, last, None, None, print)
    there = stack.enter_context(serve(behind, bearer=PREVIOUS))
    first = DeploymentConfig(blocks=(1, border), next=f"grpc://{there.address}")
    server = make_server(config, 1, None, kind, None, deployment=first)
    take_place(server, config, first, None, lambda name: connect(f"grpc://{there.address}", name, codec="off"), print)
    assert server.chain is not None
    stack.callback(server.chain.close)
    return [server, behind]


@contextmanager
def remote(
    folder: Path, arch: str, cut: tuple[int, int | None] = (1, 3), border: int | None = None, **tables: Any
) -> Iterator[Remote]:
    """One client trains over loopback gRPC, saves and leaves; the server goes on. With ``border`` it is a chain."""
    config = validate(content_of(folder, arch, **tables), "test")
    setup = settle_client(config, "client-1" if arch == "vit" else "north", cut)
    name = setup.data.name
    kind = setup.run.federation.task.model_kind
    with ExitStack() as stack:
        servers = chained(config, kind, border, stack) if border else [make_server(config, 1, None, kind, [name])]
        server = servers[0]
        server.allow_export = True
        serving = stack.enter_context(serve(server, facts=StatusReporter(server).facts))
        server.submit = serving.submit
        state = folder / "client"
        trainer, model = setup.join(connect(f"grpc://{serving.address}", name))
        log = MetricsLog(state / "metrics.jsonl")
        for _ in range(STEPS):
            trainer.step()
        log.write({"kind": "eval", "round": 1, "client": name, "personal": {setup.run.federation.task.metric: 0.5}})
        log.close()
        save(state, trainer, model, setup, config)
        model.link.close()
        yield Remote(folder, servers, config, setup, str(serving.address))


def save(state: Path, trainer: Any, model: Any, setup: ClientSetup, config: RunConfig, number: int = 4) -> None:
    """As ``flexp client`` does."""
    numbering = model.steps.numbering
    facts = {"run": "r", "client": setup.data.name, "numbering": numbering, "steps": trainer.steps}
    parties = {party_of(setup.data.name): party_state(trainer)}
    Store(state / "snapshots").save(number, parties, {**facts, "cut": list(model.cut)})
    write_json(state / "config.json", config.resolved())
    write_facts(state, setup.data, setup.run.federation, setup.cut)
