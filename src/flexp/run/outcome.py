"""What a run comes to: the facts of its ``summary.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexp.client.noise import ledger, told
from flexp.gaussian import DELTA, epsilon
from flexp.machine import machine, versions
from flexp.methods import Method, World
from flexp.report.metrics import Record
from flexp.report.summary import build_summary
from flexp.run.costs import MemoryProbes
from flexp.run.participants import Dropped
from flexp.run.virtual import client_facts, cuts_by_round

Summary = dict[str, Any]


def summary_of(
    world: World,
    method: Method,
    probes: MemoryProbes,
    records: Sequence[Record],
    *,
    dropped: Sequence[Dropped],
    stopped: bool,
    server_reads: str,
) -> Summary:
    """What a simulated run comes to so far.

    Args:
        records: its diary.
        dropped: clients that their devices cannot hold.
        stopped: it ends early.
        server_reads: what its audit says, in a line.
    """
    config, task = world.config, world.federation.task
    names = [client.name for client in world.federation.clients]
    model, anatomy = world.source.model, world.source.anatomy
    accounts = {name: method.account(name) for name in names}
    done = max((int(r["round"]) for r in records if r["kind"] == "round"), default=0)
    cuts = world.cuts if not done else {k: v["cut"] for k, v in cuts_by_round(world, records, done)[-1].items()}
    clients = [
        {
            "name": data.name,
            "cut": list(cuts[data.name]),
            "train_examples": len(data.train),
            "test_examples": len(data.test),
            "personal_parameters": accounts[data.name].personal_parameters,
            "bytes_up": accounts[data.name].training.bytes_up,
            "bytes_down": accounts[data.name].training.bytes_down,
            "client_seconds": accounts[data.name].client_seconds,
            "server_seconds": accounts[data.name].server_seconds,
            "peak_memory_bytes": probes.peak(data.name),
        }
        for data in world.federation.clients
    ]
    facts, virtual = client_facts(world, method, records)
    clients = [{**client, **facts.get(str(client["name"]), {})} for client in clients]
    evaluation = [account.evaluation for account in accounts.values()]
    spent, server = ledger(config, world.federation, anatomy.hidden), method.server_facts()
    if "told" in server:
        spent |= {"delta": DELTA, "shared": epsilon(server["told"])}
    devices = {} if not config.on_devices else {"dropped": dropped, "virtual": virtual}
    return (
        build_summary(
            name=config.name,
            method=config.method.name,
            seed=config.seed,
            finished=done == config.train.rounds or stopped,
            metric=task.metric,
            higher_is_better=task.higher_is_better,
            model={
                "id": config.model.id,
                "kind": task.model_kind,
                "labels": task.label_names,
                "blocks": anatomy.blocks,
                "hidden": anatomy.hidden,
                "parameters": sum(value.numel() for value in model.parameters()),
                "tuning": config.model.tuning,
                "dtype": config.model.dtype,
            },
            clients=clients,
            records=records,
            server=server,
            totals={
                "bytes_up": sum(client["bytes_up"] for client in clients),
                "bytes_down": sum(client["bytes_down"] for client in clients),
                "seconds": max((float(r["seconds"]) for r in records if r["kind"] == "round"), default=0.0),
                "eval_bytes_up": sum(account.bytes_up for account in evaluation),
                "eval_bytes_down": sum(account.bytes_down for account in evaluation),
            },
            machine=machine(),
            versions=versions(),
            warnings=world.federation.warnings,
            server_reads=server_reads,
            rounds=done,
        )
        | devices
        | ({"epsilon": spent | {"line": told(spent)}} if spent else {})
    )
