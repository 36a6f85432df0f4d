"""Every method's trained weights make the very model that it scores, whoever held them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.export.whole import merged
from flexp.methods import METHODS
from tests.methods.tools import ADAPTERS, trained
from tests.tiny import CLIENTS, bert_folder

from .tools import answer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    bert_folder(folder / "model", dropout=True)
    return folder


def check(method: Any, exact: bool) -> None:
    lora = method.world.config.model.lora
    source = method.world.source
    before = {name: value.clone() for name, value in source.model.named_parameters()}
    answers = []
    for client in CLIENTS:
        data = next(data for data in method.world.federation.clients if data.name == client)
        batch = method.world.federation.task.collate(data.test[:5])
        del batch["labels"]
        expected = answer(method.personal(client), batch)
        weights = method.trained_weights(client)
        found = answer(merged(source, weights, lora.alpha / lora.rank), batch)
        assert torch.equal(found, expected) if exact else torch.allclose(found, expected, atol=2e-5)
        for value in weights.values():
            value.add_(1.0)  # copies: nothing that the method has moves
        assert torch.equal(answer(method.personal(client), batch), expected)
        answers.append(float((expected - answer(source.model, batch)).abs().max()))
    for name, value in source.model.named_parameters():
        assert torch.equal(value, before[name])
    if not isinstance(method, METHODS["pretrained"]):  # type: ignore[arg-type]
        assert min(answers) > 1e-4


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_model_that_is_scored(home: Path, name: str) -> None:
    own = {"own": {"cut_rank": 3}} if name == "splitft" else {"ranks": [1, 4, 2]} if name == "hetlora" else {}
    rate = {"lr": 1e-2}
    check(trained(home, name, rounds=1, **own, train={"personal": rate, "shared": rate}), exact=name not in ADAPTERS)


@pytest.mark.parametrize(
    ("client", "server"), [("lora", "lora"), ("lora", "full"), ("full", "lora"), ("lora", "frozen")]
)
def test_mixed_tuning(home: Path, client: str, server: str) -> None:
    rate = {"lr": 1e-2}
    method = trained(
        home,
        "flexp-sfl",
        rounds=1,
        train={"personal": rate, "shared": rate},
        model={"id": str(home / "model"), "tuning": client},
        server={"tuning": server},
    )
    check(method, exact=False)


@pytest.mark.parametrize("name", ["fedavg", "ditto", "splitfed-v2"])
def test_an_absent_client_has_what_it_is_scored_with(home: Path, name: str) -> None:
    rate = {"lr": 1e-2}
    check(trained(home, name, rounds=1, absent=["south"], train={"personal": rate, "shared": rate}), exact=True)
