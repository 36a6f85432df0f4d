"""A run whose clients NVIDIA FLARE starts, each in a process of its simulator, has the weights of the simulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexp.run import runner
from tests import tiny
from tests.harness import equal

from .tools import newest, without_meters

pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed")

from nvflare.recipe import SimEnv

from flexp.flare import recipe


@pytest.mark.timeout(900)
def test_it_equals_the_simulation(home: Path) -> None:
    changes = {"train": {"rounds": 2, "steps_per_round": 2}, "model": {"base_depth": 1}}
    runner.run(tiny.config(home, **changes), home / "sim")
    deployment = {"schedule": "deterministic", "clients": list(tiny.CLIENTS)}
    content = tiny.content(home, **changes, deployment=deployment, link={"rows": "loss"})
    home.joinpath("run.json").write_text(json.dumps(content), encoding="utf-8")
    sites = SimEnv(clients=list(tiny.CLIENTS), workspace_root=str(home / "flare"))
    recipe(home / "run.json", state=str(home / "server")).execute(sites)
    here = {f"client-{name}": home / f"flare/flexp/{name}/flexp-clients/{name}/snapshots" for name in tiny.CLIENTS}
    there = tiny.checkpoint(home / "sim")
    assert there.keys() == {"server", *here}
    for party, folder in {"server": home / "server", **here}.items():
        assert equal(without_meters(there[party]), without_meters(newest(folder))), party
