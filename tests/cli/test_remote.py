"""A client's folder and a running server, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexp.links.grpc.link import GrpcLink
from tests.export.remote_tools import STEPS, Remote, remote
from tests.links.grpc_tools import vanish

from .test_write import Shell, shell

__all__ = ["shell"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with remote(tmp_path_factory.mktemp("cli"), "bert") as made:
        yield made


def test_export_evaluate_predict(here: Remote, tmp_path: Path, shell: Shell) -> None:
    state, at = str(here.state), ("--server", here.address)
    shown, _ = shell("export", state, *at, "--out", str(tmp_path / "out"))
    assert "'north' after round 1: a whole model (float32)" in shown
    found = json.loads(shell("evaluate", state, *at, "--json")[0])
    assert list(found["scores"]["personal"]) == ["own test data"]
    opened, batch = here.opened, here.batch()
    logits = opened.forward(batch).logits
    vanish(cast(GrpcLink, opened.split.link))
    assert torch.equal(opened.forward(batch).logits, logits)  # over a new link
    opened.close()
    rows = tmp_path / "rows.csv"
    rows.write_text("text\nthe dog\nthe w3 dog\n", encoding="utf-8")
    for model, more, name in ((state, at, "a"), (str(tmp_path / "out"), (), "b")):
        shell("predict", model, *more, "--data", str(rows), "--out", str(tmp_path / f"{name}.csv"))
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == (tmp_path / "b.csv").read_text(encoding="utf-8")
    for wrong, message in (
        (["export", state, "--out", str(tmp_path / "x")], "say where with --server"),
        (["evaluate", state], "say where with --server"),
        (["evaluate", state, *at, "--pretrained"], "--pretrained needs the run"),
        (["export", str(tmp_path / "out"), *at, "--out", str(tmp_path / "x")], "leave out --server"),
        (["export", state, "--server", "example.org:1", "--out", str(tmp_path / "x")], "plaintext"),
    ):
        (line,) = shell(*wrong, code=2)[1].strip().splitlines()
        assert line.startswith("flexp: ")
        assert message in line


def test_generate_and_a_server_that_does_not_give(tmp_path: Path, shell: Shell) -> None:
    """The server is the first of two, which its users do not see."""
    more = ("--prompt", "the w3 dog", "--max-new-tokens", "5", "--temperature", "0")
    with remote(tmp_path, "llama", border=2) as here:
        at = ("--server", here.url)
        shell("export", str(here.state), *at, "--out", str(tmp_path / "out"))
        shell("evaluate", str(here.state), *at)
        facts = json.loads(shell("status", here.address, "--json")[0])
        assert (facts["blocks"], facts["updates"]) == ([1, 4], STEPS)
        assert {blocks: own["updates"] for blocks, own in facts["servers"].items()} == {"[2, 4)": STEPS}
        assert f"of them [2, 4) further on: {STEPS} updates" in shell("status", here.address)[0]
        here.server.allow_export = False  # its middle is used all the same
        split, facts = shell("generate", str(here.state), *at, *more)
        refused = shell("export", str(here.state), *at, "--out", str(tmp_path / "x"), code=2)[1]
    assert "split at (1, 3), its middle on a server: 5 tokens" in facts
    assert shell("generate", str(tmp_path / "out"), *more)[0] == split
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    there = here.servers[1].shared.updater.parameters
    second = {name: value for name, value in there.items() if ".layers.2." in name}
    assert second
    assert [name for name, value in second.items() if not torch.equal(value, written[name])] == []
    assert "its operator allows it with --allow-export" in refused


def test_back_up_and_restore(here: Remote, tmp_path: Path, shell: Shell) -> None:
    state, file = str(here.state), str(tmp_path / "north.safetensors")
    assert "not encrypted" in shell("state", "backup", state, "--out", file)[0]
    assert "after round 1 (3 steps)" in shell("state", "show", file)[0]
    shown, _ = shell("state", "restore", file, "--into", state)
    assert "as snapshot 4 after 3 steps\ngo on with the same flexp client command" in shown
