"""Caches of answers on the server: what it holds, for how long, how much of it, and what it refuses in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.config import ServerConfig
from flexp.errors import LinkError
from flexp.links.asking import EndGeneration, ExtendRequest
from flexp.links.messages import Leave
from flexp.server import generations
from flexp.server.generations import bytes_of_token
from tests.harness import World, seeded, world

H = 32
CUT = (1, 4)


def draw(batch: int, new: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, new, H, generator=seeded(seed))


def joined(config: ServerConfig | None = None, name: str = "llama", clients: str = "a") -> World:
    here = world(name, config=config, tuning="frozen")
    for client in clients:
        here.join(client, CUT)
    return here


def extend(here: World, number: int, past: int, z_BTH: Tensor, client: str = "a", **more: Any) -> Tensor:
    return here.server.answer(client, ExtendRequest(number, past, z_BTH, **more)).hidden_BTH


def test_token_by_token_is_all_at_once() -> None:
    here, z_BTH = joined(), draw(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    whole = extend(here, 1, 0, z_BTH, mask_BT=mask)
    pieces = [
        extend(here, 2, start, z_BTH[:, start:stop], mask_BT=mask[:, start:stop])
        for start, stop in ((0, 3), (3, 5), (5, 6))
    ]
    assert torch.allclose(torch.cat(pieces, dim=1)[1], whole[1], atol=1e-5)
    assert torch.allclose(torch.cat(pieces, dim=1)[0, 2:], whole[0, 2:], atol=1e-5)


def test_rows_go_on_from_the_rows_that_are_named() -> None:
    here = joined()
    first, new = draw(2, 4), draw(3, 1, seed=1)
    extend(here, 1, 0, first)
    rows = torch.tensor([1, 1, 0])
    found = extend(here, 1, 4, new, rows_B=rows)
    extend(here, 2, 0, first[rows])
    assert torch.allclose(found, extend(here, 2, 4, new), atol=1e-6)


@pytest.mark.parametrize(
    ("past", "batch", "changes", "message"),
    [
        (3, 2, {}, "goes on after 3 tokens, but the server holds 4 of it; send all of it again"),
        (5, 2, {}, "goes on after 5 tokens, but the server holds 4"),
        (-1, 2, {}, "the server holds 4"),
        (4, 3, {}, "has 3 rows now, expected 2"),
        (4, 2, {"rows_B": torch.tensor([0, 2])}, r"the rows \[0, 2\] do not exist, expected 0 to 1"),
        (4, 2, {"rows_B": torch.tensor([0, -1])}, "do not exist"),
        (4, 2, {"rows_B": torch.tensor([0, 1], dtype=torch.int32)}, "the rows are torch.int32"),
        (4, 2, {"rows_B": torch.tensor([0])}, r"the rows has shape \(1,\), expected \(2,\)"),
        (4, 2, {"mask_BT": torch.ones(2, 1)}, "began without a mask and goes on with one"),
        (4, 2, {"mask_BT": torch.ones(2, 5)}, r"the mask has shape \(2, 5\), expected \(2, 1\)"),
        (4, 2, {"positions_BT": torch.ones(3, 1)}, "the positions"),
        (4, 2, {"hidden_BTH": torch.zeros(2, 1, H + 1)}, r"expected \(B, T, 32\)"),
        (4, 2, {"hidden_BTH": torch.zeros(2, 1, H, dtype=torch.float64)}, "float64"),
    ],
)
def test_what_does_not_go_on_is_refused(past: int, batch: int, changes: dict[str, Any], message: str) -> None:
    here = joined()
    extend(here, 1, 0, draw(2, 4))
    request = replace(ExtendRequest(1, past, draw(batch, 1)), **changes)
    with pytest.raises(LinkError, match=message):
        here.server.answer("a", request)
    extend(here, 1, 4, draw(2, 1))  # a refusal changes nothing


def test_past_0_begins_anew_and_an_unknown_answer_is_said_to_hold_nothing() -> None:
    here = joined()
    extend(here, 1, 0, draw(2, 4))
    assert torch.equal(extend(here, 1, 0, draw(1, 3)), extend(here, 2, 0, draw(1, 3)))
    with pytest.raises(LinkError, match="goes on after 2 tokens, but the server holds 0"):
        extend(here, 9, 2, draw(1, 1))


def test_how_many_answers_and_how_many_tokens() -> None:
    here = joined(ServerConfig(max_generations=2, max_generations_total=3, max_cached_tokens=20), clients="abc")
    for number in (1, 2):
        extend(here, number, 0, draw(2, 4))
    with pytest.raises(LinkError, match=r"2 answers are under way, the most that server.max_generations"):
        extend(here, 3, 0, draw(1, 1))
    extend(here, 2, 4, draw(2, 2))
    with pytest.raises(LinkError, match=r"would have 22 tokens, server.max_cached_tokens allows at most 20"):
        extend(here, 1, 4, draw(2, 1))
    extend(here, 1, 0, draw(2, 2))  # beginning anew counts the new one alone
    extend(here, 1, 0, draw(2, 4), client="b")
    with pytest.raises(LinkError, match=r"3 answers of all clients are under way.*max_generations_total"):
        extend(here, 1, 0, draw(1, 1), client="c")
    here.server.answer("a", EndGeneration(1))
    here.server.answer("a", EndGeneration(77))
    extend(here, 1, 0, draw(1, 1), client="c")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_how_many_bytes(name: str) -> None:
    """What is foretold is what is then held."""
    here = joined(name=name)
    extend(here, 1, 0, draw(2, 4))
    held = here.server._sessions["a"].generations.bytes
    assert held == 2 * 4 * 3 * bytes_of_token(here.server.shared.stage)
    here = joined(ServerConfig(max_cached_bytes=held + 1), name, "ab")
    extend(here, 1, 0, draw(2, 4))
    with pytest.raises(LinkError, match=f"server.max_cached_bytes allows at most {held + 1}"):
        extend(here, 1, 0, draw(1, 1), client="b")


def test_unused_answers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(generations.time, "monotonic", lambda: now[0])
    here = joined(ServerConfig(generation_seconds=60.0), clients="ab")
    extend(here, 1, 0, draw(1, 2))
    extend(here, 2, 0, draw(1, 2))
    now[0] += 50
    extend(here, 2, 2, draw(1, 1))
    now[0] += 20
    extend(here, 1, 0, draw(1, 2), client="b")
    assert list(here.server._sessions["a"].generations.answers) == [2]
    with pytest.raises(LinkError, match="holds 0"):
        extend(here, 1, 2, draw(1, 1))


def test_leaving_and_joining_anew_forget_answers() -> None:
    here = joined()
    extend(here, 1, 0, draw(1, 2))
    here.join("a", CUT)
    with pytest.raises(LinkError, match="holds 0"):
        extend(here, 1, 2, draw(1, 1))
    here.server.answer("a", Leave())
    with pytest.raises(LinkError, match="has not joined"):
        extend(here, 1, 0, draw(1, 2))


def test_an_answer_lost_in_its_middle_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some blocks may have their keys already, others not."""
    here = joined()
    extend(here, 1, 0, draw(1, 2))
    stage = here.server.shared.stage
    with monkeypatch.context() as broken:
        broken.setattr(stage, "run", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            extend(here, 1, 2, draw(1, 1))
    with pytest.raises(LinkError, match="holds 0"):
        extend(here, 1, 2, draw(1, 1))


def test_classifiers_write_nothing() -> None:
    here = world("vit", tuning="frozen")
    here.join("a", CUT)
    with pytest.raises(LinkError, match="writes no text"):
        here.server.answer("a", ExtendRequest(1, 0, draw(1, 10)))
