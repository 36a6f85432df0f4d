"""A run, its exported folder and a running server write the same answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexp.errors import ConfigError, StorageError
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.export.saved import open_run
from flexp.links.asking import ExtendRequest
from flexp.links.grpc import connect, serve
from flexp.run.server import load
from flexp.run.store import Store
from flexp.server import Server
from flexp.serving.writer import GenerationConfig, Writer, open_writer
from tests.export.tools import train
from tests.harness import RecordingLink

GREEDY = GenerationConfig(max_new_tokens=8, temperature=0.0)


def answer(writer: Writer) -> str:
    found = writer.write(writer.ids_of("the w3 dog"), GREEDY)
    writer.close()
    assert found.tokens == 8 or found.reason == "stop"
    return found.text


def test_run_folder_and_server_write_the_same(tmp_path: Path) -> None:
    run = train(tmp_path, "llama", train={"rounds": 2, "steps_per_round": 2})
    texts = {client: answer(open_writer(run, client)) for client in ("north", "south")}
    assert all(texts.values())
    export(open_trained(run, "north"), tmp_path / "north")
    assert answer(open_writer(tmp_path / "north")) == texts["north"]

    (tmp_path / "rows.jsonl").unlink()  # with a server, nobody's data are needed
    server = Server.from_pretrained(tmp_path / "model")
    load(server, Store(run / "checkpoints"))
    for other in (run / "checkpoints/checkpoint-00000002").glob("*south*"):
        other.unlink()
    links: list[RecordingLink] = []
    with serve(server) as serving:

        def reach(name: str) -> RecordingLink:
            links.append(RecordingLink(connect(f"grpc://{serving.address}", name)))
            return links[-1]

        writer = open_writer(run, "north", connect=reach)
        assert "its middle on a server" in writer.about
        assert answer(writer) == texts["north"]
        with pytest.raises(ConfigError, match="the run has no client 'west'"):
            open_writer(run, "west", connect=reach)
        with pytest.raises(StorageError, match=r"has no checkpoint 7; it has 1, 2"):
            open_writer(run, "north", "7", connect=reach)
        with pytest.raises(StorageError, match="south"):
            open_writer(run, "south", connect=reach)
    assert [request.past for request in links[0].sent(ExtendRequest)][:2] == [0, 3]


@pytest.mark.parametrize(("method", "tuning"), [("fedavg", "full"), ("flexp-sfl", "lora"), ("local", "lora")])
def test_every_method_writes(tmp_path: Path, method: str, tuning: str) -> None:
    run = train(tmp_path, "gpt2", method={"name": method}, model={"id": str(tmp_path / "model"), "tuning": tuning})
    writer = open_writer(run, "south")
    ids = writer.ids_of("the w3 dog")
    expected = list(ids)
    forward = open_run(run).method.personal("south")
    for _ in range(8):
        logits = forward({"input_ids": torch.tensor([expected])}).logits
        expected.append(int(logits[0, -1].argmax()))
    text = writer.write(ids, GREEDY).text
    whole = writer.tokenizer.decode(expected, skip_special_tokens=True)
    assert writer.tokenizer.decode(ids, skip_special_tokens=True) + text == whole


def test_what_cannot_write_says_so(tmp_path: Path) -> None:
    run = train(tmp_path, "bert")
    with pytest.raises(ConfigError, match="writes no text: its task is classification; use flexp predict"):
        open_writer(run, "north")
    export(open_trained(run, "north"), tmp_path / "north")
    with pytest.raises(ConfigError, match="writes no text"):
        open_writer(tmp_path / "north")
    with pytest.raises(ConfigError, match="leave out --server"):
        open_writer(tmp_path / "north", connect=lambda name: pytest.fail("no link is needed"))
    with pytest.raises(StorageError, match="there is no folder"):
        open_writer(tmp_path / "nothing")
    with pytest.raises(StorageError, match="holds neither a run"):
        open_writer(tmp_path)
