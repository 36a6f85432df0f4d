"""A client as a process of its own whose memory the kernel limits: ``python -m tests.run.limited``.

It first trains its part, with the cut that ``"auto"`` gives under the limit, to the end of the run; then it tunes the
whole model for a step, under the same limit and without one.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  (what reading the data imports is no part of the limit)
import torch
from rich.console import Console

from flexp.config import DeploymentConfig, ModelConfig, OptimizerConfig
from flexp.config.loading import validate
from flexp.cost.device import Limit, for_training, memory_limits
from flexp.limits import out_of_memory
from flexp.links.grpc import connect
from flexp.models.loading import load_stage
from flexp.models.tuning import tune
from flexp.optim import Updater
from flexp.run.client import run_client
from flexp.run.settle import ClientSetup, settle_client


def limit(mib: int | None) -> None:
    """From now on ``mib`` MiB more than the process has, threads' stacks apart; ``None``: as much as it likes."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if mib is None:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        return
    far = 2**50
    resource.setrlimit(resource.RLIMIT_DATA, (far, hard))
    used = far - next(found for found in memory_limits() if found.name == "RLIMIT_DATA").free_bytes
    stacks = far - for_training(Limit("RLIMIT_DATA", far))
    resource.setrlimit(resource.RLIMIT_DATA, (used + stacks + mib * 2**20, hard))


def whole(setup: ClientSetup) -> str | None:
    """One step of tuning all of the model; gives what went wrong, if memory ran out."""
    try:
        stage = load_stage(setup.run.model_id, "sequence-classification", labels=["a", "b"])
        tune(stage, ModelConfig(id="any"))
        updater = Updater(stage.trainable(), OptimizerConfig())
        ids = torch.ones(4, 16, dtype=torch.long)
        stage.model(input_ids=ids, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
        updater.step()
    except Exception as error:
        line = out_of_memory(error)
        if line is None and "memory ran out" not in str(error):
            raise
        return line or str(error)
    return None


def main(address: str, content: Any, state: Path, mib: int) -> None:
    torch.set_num_threads(1)
    config = validate(content, "limited")
    limit(mib)
    setup = settle_client(config, "north", None)
    reach = lambda: connect(f"grpc://{address}", "north")  # noqa: E731
    over = run_client(setup, DeploymentConfig(), reach, state, codec=config.link.codec, console=Console(quiet=True))
    limit(mib)
    under = whole(setup)
    limit(None)
    facts = {"over": over, "cut": setup.cut, "notes": setup.run.federation.notes, "under": under, "free": whole(setup)}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
