"""A deployed client's audit: what it attacks, and that nothing which goes wrong in it ends the client."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flexp.audit.watching import Exchange, Watch
from flexp.config import DeploymentConfig, RunConfig
from flexp.errors import DataError
from flexp.run import audited
from flexp.run.audited import OwnAudit
from flexp.run.client import run_client
from flexp.run.folder import said, told
from flexp.run.settle import settle_client
from tests import tiny
from tests.harness import seeded

from .tools import Server, plain

NAME = "north"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("audited")
    tiny.bert_folder(place / "model")
    (place / "public.txt").write_text("good bad fine poor and many other words that people use\n" * 4, encoding="utf-8")
    return place


def config(folder: Path, public: str = "public.txt") -> RunConfig:
    return tiny.config(
        folder,
        method={"align": {"kind": "off"}},
        privacy={"audit": True, "public": str(folder / public)},
        train={"rounds": 2, "steps_per_round": 1},
    )


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            RuntimeError("Expected all tensors to be on the same device\nand more"),
            "Expected all tensors to be on the sa",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "memory ran out"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_audit_that_fails_says_so_and_looks_no_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    def fails(watch: Watch, **_: Any) -> None:
        raise error

    monkeypatch.setattr(audited, "attacked", fails)
    lines: list[str] = []
    audit = OwnAudit(settle_client(config(folder), NAME, (1, 4)), tmp_path, lines.append)
    watch = audit._watch
    assert watch is not None
    watch.exchanges.append(exchange((1, 4)))
    audit.attack()
    (line,) = lines
    assert line.startswith(f"{NAME}: the audit failed: {why}")
    assert "\n" not in line
    assert told(tmp_path).startswith(f"what the server can read: not audited (failed: {why}")
    assert not watch.exchanges
    audit.attack()
    assert len(lines) == 1


def test_a_client_whose_audit_fails_trains_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says at its end that it was not audited."""
    monkeypatch.setattr(OwnAudit, "_known", lambda *_: 1 / 0)
    asked = DeploymentConfig(schedule="free", clients=[NAME], save_every=4)
    server = Server(config(folder), asked, None)
    console = Console(file=io.StringIO(), width=200)
    setup = settle_client(config(folder), NAME, None)
    try:
        assert run_client(setup, asked, lambda: plain(server)(NAME), tmp_path, codec=setup.config.link.codec,
                          console=console)  # fmt: skip
    finally:
        server.end()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{NAME}: the audit failed: division by zero" in text
    assert "the run is over after 2 steps" in text
    assert "not audited (failed: division by zero)" in text


def test_public_texts_that_cannot_be_read_are_refused_at_the_start(folder: Path, tmp_path: Path) -> None:
    setup = settle_client(config(folder, "absent.txt"), NAME, None)
    with pytest.raises(DataError, match=r"absent.txt: cannot be read as text"):
        run_client(
            setup, DeploymentConfig(), lambda: pytest.fail("it has joined"), tmp_path, console=Console(quiet=True)
        )


def test_what_was_sent_from_another_cut_is_attacked_as_well(folder: Path, tmp_path: Path) -> None:
    """Of a client that moved in its first round: with the blocks of all its cuts, in which labels are sought, too."""
    lines: list[str] = []
    audit = OwnAudit(settle_client(config(folder), NAME, (1, 4)), tmp_path, lines.append)
    watch = audit._watch
    assert watch is not None
    watch.exchanges += [exchange((1, 4)), exchange((3, 4)), exchange((1, 2))]
    audit.attack()
    assert "the server can read" in lines[0], lines
    assert "failed" not in str(said(tmp_path))


def exchange(cut: tuple[int, int]) -> Exchange:
    """As if a client had sent noise."""
    batch = {"input_ids": torch.randint(5, 15, (4, 6), generator=seeded(0)), "labels": torch.tensor([0, 1, 0, 1])}
    z_BTH, h_BTH, grad_BTH = torch.randn(3, 4, 6, 32, generator=seeded(1))
    return Exchange(NAME, 1, batch, cut, z_BTH, 1, None, h_BTH=h_BTH, grad_BTH=grad_BTH)
