"""Random numbers: one stream per party, drawn from as the whole model does, whoever else computes in the process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.client.pretrained import SplitModelForCausalLM
from flexp.config import ModelConfig
from flexp.models.anatomy import Part
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_batch, tiny_model
from tests.models.tools import TEXT, client_of, equal, parties


def train(split: Any, batch: dict[str, Tensor], steps: int = 2) -> dict[str, Tensor]:
    parameters = list(split.stage.trainable().values())
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    for _ in range(steps):
        split(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in split.stage.trainable().items()}


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_equal_seeds_give_equal_training_with_dropout(name: str, memory: str) -> None:
    batch = tiny_batch(tiny_model(name))

    def run(seed: int, memory: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        server, split = parties(name, dropout=0.2, memory=memory, seed=3)
        torch.manual_seed(seed)
        return train(split, batch), dict(server.shared.updater.parameters)

    client, server = run(1, memory)
    for again in (run(1, memory), run(1, "keep")):
        assert equal(client, again[0])
        assert equal(server, again[1])
    assert not equal(client, run(2, memory)[0])


def test_checkpointed_blocks_drop_the_same_again() -> None:
    source = Stage.whole(tiny_model("gpt2", dropout=0.2))
    batch = tiny_batch(source.model)
    gradients = []
    for checkpointing in (False, True):
        server, _ = parties("gpt2", (2, 3), dropout=0.2)
        stage = carve(source, Part.client((2, 3), 4))
        tune(stage, ModelConfig(id="any", train_embeddings=True, gradient_checkpointing=checkpointing))
        split = SplitModelForCausalLM(stage, (2, 3), server.connect("b")).train()
        torch.manual_seed(0)
        split(**batch).loss.backward()
        gradients.append({name: value.grad for name, value in stage.trainable().items()})
    assert equal(*gradients)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_server_draws_for_each_client_apart(name: str) -> None:
    """What the server drops for A does not depend on whether B computes there, before or in between."""
    source = Stage.whole(tiny_model(name, dropout=0.3))
    batch = tiny_batch(source.model)

    def forwards(others: int) -> list[Tensor]:
        server, _ = parties(name, dropout=0.3)
        one, other = client_of(server, source, (1, 3), "A"), client_of(server, source, (1, 3), "B")
        seen = []
        for step in range(3):
            for _ in range(others):
                other.head(batch).call.forward()
                server._sessions["B"].drop()
            torch.manual_seed(step)
            seen.append(one.head(batch).call.forward())
            server._sessions["A"].drop()
        return seen

    alone = forwards(0)
    assert not torch.equal(alone[0], alone[1])
    for others in (1, 2):
        assert all(torch.equal(*pair) for pair in zip(alone, forwards(others), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "vit"])
def test_making_a_plan_for_the_server_draws_nothing(name: str) -> None:
    """Dropout on the stub's zeros draws too; in one process those numbers would be missing from the client's."""
    stage = carve(Stage.whole(tiny_model(name, dropout=0.5)), Part.server(1, 3))
    stage.model.train()
    before = torch.get_rng_state()
    stage.plan_without_inputs(torch.zeros(2, 10, 32), None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "vit"])
def test_finishing_draws_no_second_dropout_for_the_embedding(name: str) -> None:
    """Embedding, blocks and head draw as the whole model does, in that order: equal seeds give equal outputs."""
    task = "sequence-classification" if name == "bert" else None
    model: Any = tiny_model(name, task=task, dropout=0.3).train()  # type: ignore[arg-type]
    stage, batch = Stage.whole(copy.deepcopy(model)), tiny_batch(model)
    torch.manual_seed(0)
    expected = model(**batch).loss
    after = torch.get_rng_state()
    stage.plan(batch)  # the first plan looks whether the model can be split, which must not be noticed either
    torch.manual_seed(0)
    hidden, plan = stage.plan(batch)
    hidden = stage.run(hidden, plan, 0, 4)
    assert torch.equal(stage.finish(hidden, batch, plan).loss, expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_the_first_plan_draws_what_every_plan_draws() -> None:
    model: Any = tiny_model("gpt2", dropout=0.3).train()
    stage, batch = Stage.whole(model), tiny_batch(model)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        stage.plan(batch)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", [name for name in TEXT if tiny_model(name).get_output_embeddings() is not None])
def test_finding_out_whether_blocks_give_tuples_draws_nothing(name: str) -> None:
    """A run that is resumed plans its first batch in training, an undisturbed one planned in evaluation long before."""
    model: Any = tiny_model(name, dropout=0.2)
    batch = tiny_batch(model)
    results = []
    for settled in (False, True):
        stage = Stage.whole(copy.deepcopy(model).eval())
        if settled:
            stage.plan(batch)
        stage.model.train()
        torch.manual_seed(0)
        hidden, plan = stage.plan(batch)
        results.append((stage.run(hidden, plan, 0, stage.anatomy.blocks), torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
