"""Stopping and going on from what was saved equals never having stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexp.client.exchange import Piece
from flexp.client.model import SplitModel
from flexp.config import AlignConfig, OptimizerConfig, ServerConfig
from flexp.errors import LinkError, ModelError, StorageError
from flexp.links.messages import ForwardRequest
from flexp.optim import Updater
from flexp.rng import RandomStream
from tests.harness import LORA, World, copied, equal, shared_weights, world

CUTS = {"a": (1, 4), "b": (3, 4)}
MOMENTUM = OptimizerConfig(
    name="sgd", lr=0.05, momentum=0.9, weight_decay=0.01, schedule="cosine", warmup_steps=2, clip=0.5
)
ADAM = OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.1, schedule="linear", warmup_steps=1)


class Federation:
    """Two clients in turns, with all that a run has to remember."""

    def __init__(self, name: str, tuning: str, optimizer: OptimizerConfig, config: ServerConfig, kind: Any) -> None:
        self.here: World = world(
            name, tuning=tuning, optimizer=optimizer, config=config, dropout=0.2, total_steps=16, seed=5
        )
        self.clients: dict[str, tuple[SplitModel, Updater, RandomStream]] = {}
        for seed, (client, cut) in enumerate(CUTS.items()):
            model = self.here.client(client, cut, AlignConfig(kind=kind, weight=0.3, pull=0.3))
            updater = Updater(model.stage.trainable(), optimizer, total_steps=8)
            self.clients[client] = (model, updater, RandomStream(seed))
        self.losses: list[float] = []

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            for client, (model, updater, random) in self.clients.items():
                batch = self.here.batch(seed=2 * step + (client == "b"), padding="right")
                with random.active():
                    loss = model(**batch).loss
                    loss.backward()
                updater.step()
                model.after_step()
                self.losses.append(loss.item())

    def save(self, folder: Path) -> None:
        save_file({key: value.contiguous() for key, value in self.here.server.state().items()}, folder / "server")
        for client, (model, updater, random) in self.clients.items():
            save_file(model.personal_state(), folder / f"{client}-personal")
            save_file(updater.state(), folder / f"{client}-optimizer")
            save_file({"random": random.state, "steps": torch.tensor(model.steps.done)}, folder / f"{client}-random")

    def load(self, folder: Path) -> None:
        self.here.server.load(load_file(folder / "server"))
        for client, (model, updater, random) in self.clients.items():
            model.load_personal_state(load_file(folder / f"{client}-personal"))
            updater.load(load_file(folder / f"{client}-optimizer"))
            own = load_file(folder / f"{client}-random")
            random.state = own["random"]
            model.go_on(int(own["steps"]))

    def everything(self) -> dict[str, Tensor]:
        flat = {f"server/{key}": value for key, value in copied(self.here.server.state()).items()}
        del flat["server/compute_seconds"]
        for client, (model, updater, _) in self.clients.items():
            flat |= {f"{client}/{key}": value for key, value in copied(model.personal_state()).items()}
            flat |= {f"{client}-optimizer/{key}": value for key, value in copied(updater.state()).items()}
        return flat


AT_ONCE = ServerConfig()
OF_THREE = ServerConfig(update="mean", mean_over=3, memory="recompute")
OF_FOUR = ServerConfig(update="mean", mean_over=4)
OWN = ServerConfig(adapters="own")


@pytest.mark.parametrize(
    ("name", "config", "kind", "tuning", "optimizer"),
    [
        ("bert", AT_ONCE, "kl", "full", MOMENTUM),
        ("bert", AT_ONCE, "kl", "lora", ADAM),
        ("gpt2", OF_THREE, "weights", "full", ADAM),
        ("gpt2", OF_THREE, "weights", "lora", MOMENTUM),
        ("llama", OF_FOUR, "off", "full", ADAM),
        ("llama", OF_FOUR, "off", "lora", MOMENTUM),
        ("llama", OWN, "weights", "lora", ADAM),
    ],
)
def test_resumed_equals_undisturbed(
    tmp_path: Path, name: str, tuning: str, optimizer: OptimizerConfig, config: ServerConfig, kind: str
) -> None:
    undisturbed = Federation(name, tuning, optimizer, config, kind)
    undisturbed.steps(0, 3)
    undisturbed.save(tmp_path)
    if config.update == "mean":
        assert undisturbed.here.server.shared._gathered.steps in (0, 2)
        assert (undisturbed.here.server.shared._gathered.steps == 2) == (config.mean_over == 4)
    undisturbed.steps(3, 6)

    resumed = Federation(name, tuning, optimizer, config, kind)
    resumed.load(tmp_path)
    resumed.steps(3, 6)
    assert resumed.losses == undisturbed.losses[6:]
    assert equal(resumed.everything(), undisturbed.everything())

    # Going back in the same process is the same: nothing of what came after the save is left over.
    undisturbed.load(tmp_path)
    undisturbed.losses.clear()
    undisturbed.steps(3, 6)
    assert undisturbed.losses == resumed.losses
    assert equal(undisturbed.everything(), resumed.everything())


def test_going_back_to_before_the_first_step(tmp_path: Path) -> None:
    """A state without moments puts the optimiser back to none."""
    federation = Federation("llama", "full", ADAM, ServerConfig(), "off")
    federation.save(tmp_path)
    federation.steps(0, 2)
    losses, after = federation.losses[:], federation.everything()
    federation.load(tmp_path)
    federation.losses.clear()
    federation.steps(0, 2)
    assert federation.losses == losses
    assert equal(federation.everything(), after)


def test_clients_may_join_before_or_after_loading(tmp_path: Path) -> None:
    federation = Federation("bert", "full", ADAM, ServerConfig(), "off")
    federation.steps(0, 2)
    federation.save(tmp_path)
    late = world("bert", optimizer=ADAM, dropout=0.2, total_steps=16, seed=5)
    late.server.load(load_file(tmp_path / "server"))
    late.client("a", CUTS["a"])
    late.client("b", CUTS["b"])
    assert equal(copied(late.server.state()), copied(federation.here.server.state()))


def test_dropout_follows_from_client_exchange_and_block() -> None:
    """Whatever was computed before; on whichever server a block is."""
    one, low, high = (world("bert", dropout=0.2, base_depth=s, end=e) for s, e in ((1, 4), (1, 2), (2, 4)))

    def run(here: World, cut: tuple[int, int], z: Tensor, exchange: int, client: str = "a") -> Tensor:
        here.join(client, cut)
        there: Tensor = here.server.answer(client, ForwardRequest(exchange, z, train=True, step=1)).hidden_BTH
        return there

    z = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    other, client, expected = run(one, (1, 4), z, 7), run(one, (1, 4), z, 8, "b"), run(one, (1, 4), z, 8)
    assert not torch.equal(expected, other)
    assert not torch.equal(expected, client)
    assert torch.equal(run(high, (2, 4), run(low, (1, 2), z, 8), 8), expected)
    assert torch.equal(run(one, (1, 4), z, 8), expected)


def test_the_seconds_are_counted_on() -> None:
    here, other = world("llama"), world("llama")
    here.client("a", (2, 4))(**here.batch()).loss.backward()
    other.server.load(here.server.state())
    assert other.server.compute_seconds == here.server.compute_seconds > 0


def test_the_middle_of_a_step_is_no_time_to_save_or_to_load() -> None:
    here = world("llama")
    model = here.client("a", (2, 4))
    state = copied(here.server.state())
    loss = model(**here.batch()).loss
    for call in (here.server.state, lambda: here.server.load(state)):
        with pytest.raises(LinkError, match="in the middle of a step of a"):
            call()
    with pytest.raises(LinkError, match="in the middle of a step of a"):
        here.server.state()
    loss.backward()
    with model.part_of_step(Piece(1, 2, 0.5, 0.5)):
        model(**here.batch()).loss.backward()
    with pytest.raises(LinkError, match="in the middle of a step of a"):
        here.server.state()
    with model.part_of_step(Piece(2, 2, 0.5, 0.5)):
        model(**here.batch()).loss.backward()
    here.server.load(state)
    assert here.server.shared.version == 0


@pytest.mark.parametrize(("tuning", "depth"), [("lora", 1), ("full", 2)])
def test_states_of_other_blocks_or_tuning_are_refused(tuning: str, depth: int) -> None:
    here, other = world("llama"), world("llama", tuning=tuning, base_depth=depth)
    before = shared_weights(here.server)
    with pytest.raises(StorageError, match="not this server's"):
        here.server.load(other.server.state())
    assert equal(shared_weights(here.server), before)


def test_personal_states_of_another_cut_are_refused() -> None:
    here = world("llama")
    a, b = here.client("a", (1, 4)), here.client("b", (2, 4))
    with pytest.raises(ModelError, match="does not fit this cut and tuning"):
        a.load_personal_state(b.personal_state())
    updater, other = Updater(b.stage.trainable(), ADAM), Updater(a.stage.trainable(), ADAM)
    for value in updater.parameters.values():
        value.grad = torch.ones_like(value)
    updater.step()
    with pytest.raises(StorageError, match="is not trained here"):
        other.load(updater.state())


def test_a_state_holds_nothing_but_tensors_and_no_personal_name() -> None:
    federation = Federation("llama", "lora", ADAM, ServerConfig(), "off")
    federation.steps(0, 1)
    state = federation.here.server.state()
    assert all(isinstance(value, Tensor) for value in state.values())
    weights = [key for key in state if key.startswith("shared/weights/")]
    assert weights
    assert all("lora_" in key and ".layers.0." not in key for key in weights)
    assert LORA.rank == 2
