"""What a trained client's head alone tells is what the client would send, and what needs the middle is not attacked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flexp.audit import Watch
from flexp.cli.main import app
from flexp.client.trainer import split_model_of
from flexp.errors import ConfigError, DataError
from flexp.export import heads
from flexp.export.heads import _Heard, audit_head
from flexp.export.saved import open_run
from flexp.links.packing import arrived
from flexp.methods.split import Split
from tests.data.tools import jsonl

from .remote_tools import Remote, remote
from .tools import train


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with remote(tmp_path_factory.mktemp("heads"), "bert", cut=(2, 3)) as made:
        yield made


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watch]:
    """What is attacked, which here is not."""
    seen: list[Watch] = []
    monkeypatch.setattr(heads, "attacked", lambda watch, **_: seen.append(watch))
    return seen


def test_the_command_reads_a_clients_folder(here: Remote, tmp_path: Path) -> None:
    """A stranger's lines, and rows of the client's task; labels are said to be not attacked."""
    (tmp_path / "lines.txt").write_text("the w1 dog runs fast\nthe w2 dog now\n", encoding="utf-8")
    public = tmp_path / "public.txt"
    public.write_text("good bad fine poor and many other words that people use\n" * 20, encoding="utf-8")
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": "a w3 dog"}])
    for source, texts in (([], len(here.setup.data.train)), (["--data", str(tmp_path / "lines.txt")], 2),
                          (["--data", str(rows)], 1)):  # fmt: skip
        ran = CliRunner().invoke(app, ["audit", str(here.state), *source, "--public", str(public), "--json"])
        assert ran.exit_code == 0, ran.output
        found = json.loads(ran.output)
        assert (found["texts"], found["cuts"], found["labels"]) == (texts, {"north": [2, 3]}, {})
        assert {one["depth"] for one in found["readings"]} == {2}
        assert found["not_attacked"] == ["labels", "membership", "texts by gradients"]
        assert found["line"].endswith("labels were not attacked")


def test_its_trained_head_is_what_is_attacked(here: Remote, watched: list[Watch]) -> None:
    audit_head(here.state)
    (seen,) = watched
    stage = here.opened.split.stage
    for one in seen.exchanges:
        hidden_BTH, plan = stage.plan(one.batch)
        z_BTH = stage.run(hidden_BTH, plan, 0, 2).detach()
        torch.testing.assert_close(one.z_BTH[one.mask], z_BTH[one.mask])
        assert "labels" not in one.batch


@pytest.mark.parametrize("privacy", [{"noise": 0.5}, {"noise": 0.5, "pool": True}])
def test_defences_are_those_of_training(tmp_path: Path, watched: list[Watch], privacy: dict[str, object]) -> None:
    """Of a client in a run's folder: its own key's noise, on tokens or on means."""
    run = train(tmp_path, "bert", ("north",), privacy=privacy, method={"align": {"kind": "off"}},
                model={"pooling": "mean"}, data={"clients": {"each": [{"cut": [2, 4]}]}})  # fmt: skip
    audit_head(run, "north")
    method = open_run(run).method
    assert isinstance(method, Split)
    model = split_model_of(method.clients["north"]).eval()
    link = model.link = _Heard(4, 32, 2)  # in place of the run's own server
    for one in watched[0].exchanges:
        with torch.no_grad():
            model.head(one.batch)
        whole, _ = arrived(link.heard, "north")
        assert torch.equal(one.z_BTH, one.of_tokens(whole.hidden_BTH))


@pytest.mark.parametrize(
    ("place", "said", "match"),
    [
        ("client", {"client": "south"}, "is of the client 'north', not of 'south'"),
        ("client", {"source": "absent.txt"}, "no such file"),
        ("client", {"only": ["nearest"]}, "--attack nearest"),
        ("model", {"source": "x.txt"}, "go with a trained client"),
    ],
)
def test_a_refusal_is_a_line(here: Remote, place: str, said: dict[str, str], match: str) -> None:
    with pytest.raises((ConfigError, DataError), match=match) as told:
        audit_head(here.folder / place, **said)  # type: ignore[arg-type]
    assert "\n" not in str(told.value)
