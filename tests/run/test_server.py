"""A server that is a process of its own: it goes on from its file, stops between steps and says what it did."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import flexp
from flexp.errors import LinkError, StorageError
from flexp.links.grpc import connect
from flexp.models.zoo import save_tiny
from flexp.rng import RandomStream
from flexp.run.server import load, run_server, save
from flexp.run.store import LOCK, Store
from tests.harness import World, equal, shared_weights, world

ADDRESS = re.compile(r"at (127\.0\.0\.1:\d+)")


class Running:
    """``run_server`` in a thread, with what it said."""

    def __init__(self, here: World, state: Path | None, grace: float = 5.0, **options: bool) -> None:
        self.lines: list[str] = []
        self._stop, self._listening = threading.Event(), threading.Event()

        def say(line: str) -> None:
            self.lines.append(line)
            if ADDRESS.search(line):
                self._listening.set()

        self._thread = threading.Thread(
            target=lambda: run_server(
                here.server, "127.0.0.1:0", state=state, say=say, every=0.05, grace=grace, stop=self._stop, **options
            )
        )
        self._thread.start()
        assert self._listening.wait(30)
        found = ADDRESS.search("\n".join(self.lines))
        assert found
        self.url = f"grpc://{found[1]}"

    def stop(self) -> str:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        return "\n".join(self.lines)


def test_it_stops_and_goes_on(tmp_path: Path) -> None:
    def step(here: World, url: str, seed: int) -> None:
        link = connect(url, "a")
        model = here.client("a", (2, 4), link=link)
        with RandomStream(seed).active():  # the client's dropout
            model(**here.batch(seed=seed)).loss.backward()
        link.close()

    undisturbed, first, second = (world("bert", dropout=0.2) for _ in range(3))
    state = tmp_path / "folder" / "server"
    running = Running(undisturbed, None)
    for seed in range(4):
        step(undisturbed, running.url, seed)
    assert "nothing was saved" in running.stop()

    for here, seeds in ((first, (0, 1)), (second, (2, 3))):
        running = Running(here, state)
        for seed in seeds:
            step(here, running.url, seed)
        said = running.stop()
        assert f"saved in {state}" in said
        assert "a: joined with cut (2, 4)" in said
        assert ("going on from" in said) == (here is second)
    assert "stopped after 4 updates" in said
    assert equal(shared_weights(second.server), shared_weights(undisturbed.server))
    assert {path.name for path in state.iterdir()} == {LOCK, "checkpoint-00000001", "checkpoint-00000002"}

    last = world("bert", dropout=0.2)
    running = Running(last, state, frozen=True)
    model = last.client("a", (2, 4), link=connect(running.url, "a"))
    with torch.no_grad():
        model.eval()(**last.batch())
    with pytest.raises(LinkError, match="this server trains no more"):
        model.train()(**last.batch())
    model.link.close()
    assert "nothing was trained, so nothing was saved" in running.stop()
    assert Store(state).numbers() == [1, 2]
    with pytest.raises(StorageError, match="holds nothing that was trained"):
        run_server(last.server, "127.0.0.1:0", state=tmp_path / "none", say=print, frozen=True)


def test_an_unfinished_step_does_not_hold_it_up_for_ever(tmp_path: Path) -> None:
    here, state = world("llama"), tmp_path / "state"
    running = Running(here, state, grace=0.2)
    link = connect(running.url, "a")
    model = here.client("a", (2, 4), link=link)
    before = shared_weights(here.server)
    model(**here.batch())
    assert "saved in" in running.stop()
    assert not here.server._sessions
    other = world("llama")
    load(other.server, Store(state))
    assert equal(shared_weights(other.server), before)
    link.close()


def test_odd_states_are_refused(tmp_path: Path) -> None:
    here, store = world("llama"), Store(tmp_path / "state")
    store.save(1, {"server": {"x": torch.zeros(1)}})
    with pytest.raises(StorageError, match=r"no state of a server|not this server's"):
        load(here.server, store)
    save(here.server, store)
    assert store.numbers() == [1, 2]
    with pytest.raises(StorageError, match="not this server's"):
        load(world("llama", base_depth=2).server, store)
    file = next((tmp_path / "state").glob("checkpoint-00000002/*.safetensors"))
    file.write_bytes(b"no safetensors")
    with pytest.raises(StorageError, match=r"SHA-256 differs\); delete the folder checkpoint-00000002"):
        load(here.server, store)


def test_where_it_cannot_save_it_does_not_start(tmp_path: Path) -> None:
    """And it says what to do with the file that an older version kept its state in."""
    here = world("llama")
    (tmp_path / "file").write_bytes(b"an older state")
    for state, message in ((tmp_path / "file", "older versions"), (tmp_path / "file/in", "cannot be written")):
        with pytest.raises(StorageError, match=message) as caught:
            run_server(here.server, "127.0.0.1:0", state=state, say=lambda _: None)
        assert "\n" not in str(caught.value)


def test_the_command_as_a_user_types_it(tmp_path: Path) -> None:
    folder, state = save_tiny("llama", tmp_path / "model"), tmp_path / "state"
    arguments = ["--model", str(folder), "--listen", "127.0.0.1:0", "--state", str(state), "--set", "threads=1"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "flexp.cli.main", "server", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        found = ADDRESS.search(process.stdout.readline())
        assert found
        model = flexp.SplitModelForCausalLM.from_pretrained(folder, cut=(2, 4), link=f"grpc://clinic-a@{found[1]}")
        model.train()
        ids = torch.arange(6)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0
    assert "clinic-a: joined with cut (2, 4)" in rest
    assert f"stopped after 1 updates; saved in {state}" in rest
    server = flexp.Server.from_pretrained(folder)
    load(server, Store(state))
    assert server.shared.version == 1
    model.link.close()
