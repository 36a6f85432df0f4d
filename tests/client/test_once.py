"""With a frozen head z of an example crosses once; what is trained is what sending it every time trains."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from flexp.client.exchange import Piece
from flexp.client.trainer import load_party, party_state
from flexp.config import CodecConfig, OptimizerConfig
from flexp.errors import ConfigError, LinkError, LinkLostError
from flexp.links.base import Link
from flexp.links.messages import ForwardRequest, KeptForwardRequest
from flexp.links.opening import loopback
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.run.keeping import cache_notes
from flexp.run.settle import build_world
from flexp.server.examples import Examples
from tests.harness import RecordingLink, equal, shared_weights, world
from tests.tiny import bert_folder, config


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    bert_folder(folder / "model")
    bert_folder(folder / "dropping" / "model", dropout=True)
    return folder


class Recorded(FlexpSfl):
    def connect(self, name: str) -> Link:
        return RecordingLink(super().connect(name))


def method(
    home: Path,
    *,
    forgets: bool = False,
    frozen: int = 1,
    room: int = 2**30,
    cache: str = "memory",
    reuse: float = 0.0,
    resumed: bool = False,
) -> Any:
    table = {"align": {"kind": "off"}, "personal": {"frozen_head_blocks": frozen}}
    train = {"steps_per_round": 6, "batch_size": 4}
    link = {"cache": cache, "reuse": reuse}
    settings: dict[str, Any] = {
        "data": {"clients": {"cut": [1, 4], "names": ["north", "south"]}},
        "train": train,
        "link": link,
    }
    made = Recorded(build_world(config(home, method=table, server={"max_examples_bytes": room}, **settings)))
    for trainer in made.clients.values():
        for step in range(6):  # twelve examples, three steps an epoch
            if forgets:
                trainer.model.rejoin()  # as after a restart of the server: all is asked for again
            if resumed and step == 4:
                state = {name: value.clone() for name, value in party_state(trainer).items()}
                trainer.model.sent = {0: torch.ones(1, 1)}
                load_party(trainer, state)
            trainer.step()
    return made


@pytest.mark.parametrize(
    ("folder", "table", "link", "said"),
    [
        ("dropping", {"personal": {"frozen_head_blocks": 1}}, {}, "dropout in the head makes another activation"),
        ("", {}, {}, "something below the cut is trained"),
        ("", {}, {"reuse": 0.1}, None),
        ("", {"personal": {"frozen_head_blocks": 1}}, {}, None),
    ],
)
def test_that_nothing_is_kept_is_said_before_the_first_step(
    home: Path, folder: str, table: dict[str, Any], link: dict[str, Any], said: str | None
) -> None:
    settings = {"method": {"align": {"kind": "off"}, **table}, "link": {"cache": "memory", **link}}
    made = FlexpSfl(build_world(config(home / folder, data={"clients": {"cut": [1, 4]}}, **settings)))
    drawn = torch.get_rng_state()
    lines = cache_notes(made.clients)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [line.partition(": ")[0] for line in lines] == ["link.cache does nothing for all clients"] * (
        said is not None
    )
    assert said is None or said in lines[0]
    for trainer in made.clients.values():
        trainer.step()
    kept = any(trainer.model.known for trainer in made.clients.values())  # the line says what is so
    assert kept == (said is None)


def trained(made: Any) -> dict[str, torch.Tensor]:
    own = {f"{name}/{key}": v for name, t in made.clients.items() for key, v in t.model.personal_state().items()}
    return own | shared_weights(made.server)


def test_sent_once_is_sent_every_time_bit_for_bit(home: Path) -> None:
    once, again, full = method(home), method(home, forgets=True), method(home, room=0)
    sealed = method(home, cache="disk")
    assert equal(trained(once), trained(again))
    assert equal(trained(once), trained(full))
    assert equal(trained(once), trained(sealed))
    assert sealed.account("north").training.bytes_up == once.account("north").training.bytes_up
    link = once.clients["north"].model.link
    requests = list(link.sent(KeptForwardRequest))
    assert not list(link.sent(ForwardRequest))
    fresh = [int(request.fresh_B.sum()) for request in requests]
    assert fresh[:3] == [4, 4, 4]
    assert not any(fresh[3:])
    assert all(request.hidden_BTH is None for request in requests[3:])
    for made in (again, full):
        assert all(bool(request.fresh_B.all()) for request in made.clients["north"].model.link.sent(KeptForwardRequest))
    spent, other = (made.account("north").training.bytes_up for made in (once, again))
    sent = list(again.clients["north"].model.link.sent(KeptForwardRequest))[3:]
    assert other - spent == sum(4 * request.hidden_BTH.numel() for request in sent)


def test_what_changes_crosses_every_time(home: Path) -> None:
    for made in (method(home, frozen=0), method(home / "dropping"), method(home, cache="off")):
        link = made.clients["north"].model.link
        assert not list(link.sent(KeptForwardRequest))
        assert list(link.sent(ForwardRequest))


def went(made: Any) -> list[int]:
    """How many examples went up in each of north's steps."""
    return [int(request.fresh_B.sum()) for request in made.clients["north"].model.link.sent(KeptForwardRequest)]


def test_what_hardly_moved_stays_what_it_was(home: Path) -> None:
    """Whoever lost it, server or client, is given the same again: the weights are those of an undisturbed run."""
    always, once = method(home, frozen=0, cache="off"), method(home, frozen=0, reuse=0.9)
    assert equal(trained(method(home, frozen=0, reuse=1e-9)), trained(always))
    assert went(once) == [4, 4, 4, 0, 0, 0]
    assert not equal(trained(once), trained(always))
    some = method(home, frozen=0, reuse=2e-3)
    assert 0 < sum(went(some)[3:]) < 12
    for other in ({"forgets": True, "cache": "disk"}, {"resumed": True}, {"room": 2_000}):
        again = method(home, frozen=0, **{"reuse": 2e-3, **other})
        assert equal(trained(again), trained(some)), other
        assert sum(went(again)) >= sum(went(some))


def test_the_gradient_at_what_it_was_stands_for_that_at_z() -> None:
    here = world("bert", optimizer=OptimizerConfig(name="sgd", lr=1e-12))
    model = here.client("a", (2, 4))
    model.cache, model.reuse = "memory", 0.9
    batch = here.batch(padding="right")
    before: dict[int, torch.Tensor] = {}

    def as_before(_: Any, __: Any, output: Any) -> Any:
        """z as it was, in the whole model, with the gradient going to z as it is."""
        z = output[0] if isinstance(output, tuple) else output
        stale = before.setdefault(0, z.detach())
        changed = stale + (z - z.detach())
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    stage = deepcopy(here.whole)  # which other tests use, too
    whole = stage.model
    whole.load_state_dict(shared_weights(here.server) | model.personal_state(), strict=False)
    whole.requires_grad_(True).zero_grad()
    stage.blocks[1].register_forward_hook(as_before)
    parts = [model.stage.trainable(), dict(whole.named_parameters())]
    for _ in range(2):
        with model.part_of_step(Piece(examples=(0, 1, 2))):
            loss = model(**batch).loss
            loss.backward()
        expected = whole(**batch).loss
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for name, value in parts[0].items():
            torch.testing.assert_close(value.grad, parts[1][name].grad)
        for part in parts:  # the shared blocks hardly learn here
            for name, value in part.items():
                if name in parts[0] and value.grad is not None:
                    value.data -= 0.05 * value.grad
                value.grad = None


def test_a_head_that_diverges_does_not_hide_behind_what_went_up() -> None:
    here = world("bert")
    model = here.client("a", (2, 4))
    model.cache, model.reuse = "memory", 0.9

    def step() -> None:
        with model.part_of_step(Piece(examples=(0, 1, 2))):
            model(**here.batch(padding="right")).loss.backward()

    step()
    next(iter(model.stage.trainable().values())).data.fill_(float("nan"))
    with pytest.raises(LinkError, match="not finite"):
        step()


def test_the_server_forgets_who_leaves(home: Path) -> None:
    made = method(home)
    session = made.server._sessions["north"]
    assert len(session.examples.kept) == 12
    made.close()
    assert "north" not in made.server._sessions


def test_over_a_network_as_in_process() -> None:
    found = []
    for network in (False, True):
        here = world("bert")
        with loopback(here.server, "a") as far:
            model = here.client("a", (1, 4), link=far if network else None, codec=CodecConfig.all("int8-row"))
            model.cache = "memory"
            for name, value in model.stage.model.named_parameters():
                value.requires_grad_(value.requires_grad and not model.stage.within(name, 0, 1))
            for examples in ((0, 1, 2), (2, 0, 1)):
                batch = here.batch(padding="right")
                with model.part_of_step(Piece(examples=examples)):
                    model(**{key: value[list(examples)] for key, value in batch.items()}).loss.backward()
            traffic = model.link.meter.training
            found.append((shared_weights(here.server), traffic.bytes_up, traffic.bytes_down))
    assert equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_another_head_is_sent_anew() -> None:
    here = world("bert")
    model = here.client("a", (1, 4))
    model.cache, model.link = "memory", RecordingLink(model.link)
    head = {name: value for name, value in model.stage.model.named_parameters() if model.stage.within(name, 0, 1)}
    batch = here.batch(padding="right")
    for changed in (False, False, True):
        for value in head.values():
            value.requires_grad_(False)
            if changed:
                value.add_(0.1)
        with model.part_of_step(Piece(examples=(0, 1, 2))):
            model(**batch).loss.backward()
    assert [int(request.fresh_B.sum()) for request in model.link.sent(KeptForwardRequest)] == [3, 0, 3]


def test_on_the_disk_nothing_is_readable() -> None:
    key, value = "ab" * 32, torch.randn(5, 32)
    examples = Examples(key)
    assert examples.keep({4: value, 7: 2 * value}, 2 * (640 + 28))
    assert not examples.keep({8: value}, 667)
    assert examples.bytes == 2 * (640 + 28)
    file = examples.kept._file.fileno()  # type: ignore[union-attr]
    assert os.fstat(file).st_nlink == 0
    content = os.pread(file, 1 << 20, 0)
    assert len(content) == examples.bytes
    assert value.numpy().tobytes() not in content
    nonce, sealed = content[:12], content[12:668]
    assert AESGCM(bytes.fromhex(key)).decrypt(nonce, sealed, (4).to_bytes(8, "big")) == value.numpy().tobytes()
    assert torch.equal(examples.kept[7], 2 * value)
    os.pwrite(file, content[:668], 668)  # example 4 in the place of 7
    mask, old = torch.ones(1, 5, dtype=torch.long), torch.tensor([False])
    with pytest.raises(LinkLostError, match="example 7 is not kept here any more"):
        examples.whole(KeptForwardRequest(1, mask, torch.tensor([7]), old), "a")


def test_what_is_not_kept_is_refused() -> None:
    here = world("bert")
    here.join("a", (1, 4))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    first = KeptForwardRequest(
        1, mask, torch.tensor([4, 7]), torch.tensor([True, True]), hidden_BTH=torch.ones(1, 5, 32)
    )
    assert here.server.answer("a", first).kept
    for changes, words in (
        (
            {"examples_B": torch.tensor([4, 8]), "fresh_B": torch.tensor([False, False]), "hidden_BTH": None},
            "example 8",
        ),
        ({"examples_B": torch.tensor([7, 4]), "fresh_B": torch.tensor([False, False]), "hidden_BTH": None}, "3 tokens"),
        ({"hidden_BTH": torch.ones(1, 4, 32)}, "4 tokens came, expected 5"),
        ({"mask_BT": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "an example without a token"),
    ):
        with pytest.raises(LinkError, match=words) as error:
            here.server.answer("a", replace(first, exchange=2, **changes))  # type: ignore[arg-type]
        assert isinstance(error.value, LinkLostError) == (words == "example 8")  # joining anew helps there alone


def test_rounding_by_what_comes_along_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="int8-row"):
        config(home, link={"cache": "memory", "codec": {"activation": "int8-channel"}})
