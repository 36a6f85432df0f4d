"""A message is its declaration and its handler; every link carries it, within the bounds that it declares."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from flexp.config import CodecConfig
from flexp.errors import LinkError
from flexp.links.base import ask
from flexp.links.declaring import MESSAGES, Request, hidden, message
from flexp.links.opening import loopback
from flexp.server import Server
from tests.harness import world


@message
class Doubled:
    value_BTH: Annotated[Tensor, hidden("activation_down")]


@message
class Double(Request[Doubled]):
    trains: ClassVar[bool | None] = False
    times: Annotated[int, Field(ge=1, le=4)]
    value_BTH: Annotated[Tensor, hidden("activation")]


for kind in (Doubled, Double):
    del MESSAGES[kind.__name__]  # other tests look at all messages


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The declarations above, and a handler."""

    def handle(_: Server, request: Double, __: str) -> Doubled:
        return Doubled(request.value_BTH * 2**request.times)

    for kind in (Doubled, Double):
        monkeypatch.setitem(MESSAGES, kind.__name__, kind)
    Server._handle.register(Double, handle)


@pytest.mark.parametrize("codec", ["off", "int8-row"])
def test_a_message_takes_a_declaration_and_a_handler(codec: str) -> None:
    here = world("llama")
    near = here.server.connect("a")
    here.client("a", (2, 4), link=near, codec=CodecConfig.all(codec))  # type: ignore[arg-type]
    value = torch.randn(2, 3, 32)
    wanted = ask(near, Double(2, value)).value_BTH
    assert torch.allclose(wanted, 4 * value, atol=0 if codec == "off" else 0.1)
    with loopback(here.server, "b") as far:
        here.client("b", (2, 4), link=far, codec=CodecConfig.all(codec))  # type: ignore[arg-type]
        assert torch.equal(ask(far, Double(2, value)).value_BTH, wanted)
        assert far.meter.evaluation.bytes_up == near.meter.evaluation.bytes_up
        assert far.meter.evaluation.bytes_down == near.meter.evaluation.bytes_down
        with pytest.raises(LinkError, match="expected"):
            ask(far, Double(2, torch.randn(2, 3, 31)))
        with pytest.raises(LinkError, match=r"Double cannot be read: .*less than or equal to 4"):
            ask(far, Double(5, value))
