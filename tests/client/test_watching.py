"""What a client sees of a server that makes its answers up; an honest one is never suspected."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.client.watching import EXCHANGES, TEXTS, Watch, _cka, most_alignment
from flexp.config import AlignConfig
from flexp.links.base import finished
from flexp.links.declaring import Request
from flexp.links.messages import BackwardRequest, ForwardRequest
from flexp.links.wrapping import Wrapping
from tests.harness import seeded, world

KL = AlignConfig(kind="kl", weight=0.25)


class Lying(Wrapping):
    """Makes up activations or gradients of the size that the right ones have."""

    lies: type[Any] | None = None

    def call(self, request: Request[Any]) -> Future[Any]:
        if type(request) is not self.lies:
            return self.inner.call(request)
        reply: Any = self.inner.call(request).result()
        field = "hidden_BTH" if self.lies is ForwardRequest else "grad_BTH"
        made_up = torch.randn(getattr(reply, field).shape, generator=seeded(int(request.exchange)))  # type: ignore[attr-defined]
        made_up *= getattr(reply, field).std()
        return finished(lambda: replace(reply, **{field: made_up}))


@pytest.mark.parametrize("align", [AlignConfig(kind="off"), KL], ids=lambda align: align.kind)
@pytest.mark.parametrize(
    ("lies", "said"), [(None, ""), (BackwardRequest, "gradients"), (ForwardRequest, "activations")]
)
def test_a_server_that_makes_things_up_is_told(lies: type[Any] | None, said: str, align: AlignConfig) -> None:
    here, heard = world("bert"), list[str]()
    link = Lying(here.server.connect("a"))
    model = here.client("a", (2, 4), align, link=link)
    model.watch, link.lies = Watch(heard.append), lies
    for number in range(EXCHANGES + 2):
        (10 * model(**here.batch(number, batch=TEXTS)).loss).backward()
    assert len(heard) == (0 if lies is None else 1)
    assert all(line.startswith(f"the server's {said} hardly depend") for line in heard)


@pytest.mark.parametrize(("batch", "exchanges"), [(1, EXCHANGES + 2), (TEXTS // 2, 2 * EXCHANGES)])
def test_rows_of_which_nothing_came_down_are_not_compared(batch: int, exchanges: int) -> None:
    here, heard = world("bert"), list[str]()
    model = here.client("a", (1, 4))
    model.watch = Watch(heard.append)
    for number in range(exchanges):
        model(**here.batch(number, batch=batch)).loss.backward()
    assert heard == []
    likeness = model.watch.likeness
    assert likeness is None if batch == 1 else likeness is not None and likeness > 0.05


def test_the_slope_and_the_bound_by_hand() -> None:
    def exchange(sent: Tensor, got: Tensor, align: float = 0.0) -> Watch:
        watch = Watch(lambda _: None)
        request = ForwardRequest(1, torch.randn(4, 5, 8, generator=seeded(1)))
        for _ in range(EXCHANGES):
            watch.exchange(request, request.hidden_BTH, sent, got, align)
        return watch

    sent = torch.ones(4, 5, 8) * torch.tensor([1.0, 10.0, 0.1, 0.0])[:, None, None]
    assert exchange(sent, 3 * sent).slope == pytest.approx(1.0)
    assert exchange(sent, torch.ones(4, 5, 8)).slope == pytest.approx(0.0, abs=1e-6)
    assert exchange(sent, sent.sqrt()).slope == pytest.approx(0.5)
    assert exchange(torch.ones(4, 5, 8), torch.ones(4, 5, 8)).slope is None  # alike: nothing to see
    assert exchange(sent, 3 * sent, align=1e9).slope is None  # all of it may be the alignment's
    assert exchange(sent, sent).likeness == pytest.approx(1.0, abs=1e-5)


def test_alignment_is_never_larger_than_its_bound() -> None:
    from flexp.server.alignment import alignment

    request = ForwardRequest(
        1, torch.randn(3, 5, 8) * 9, torch.ones(3, 5, dtype=torch.int64), base_BTH=torch.randn(3, 5, 8)
    )
    _, gradient = alignment(KL, torch.randn(3, 5, 8) * 9, request.hidden_BTH, request.mask_BT)
    largest = float((KL.weight * gradient).flatten(1).norm(dim=1).max())
    assert 0 < largest <= most_alignment(KL, request, 1.0) < 10 * largest
    assert most_alignment(KL, replace(request, base_BTH=None), 1.0) == 0
    assert most_alignment(AlignConfig(kind="mse"), request, 1.0) == float("inf")


def test_likeness_of_what_is_random_is_nought_on_average() -> None:
    generator = seeded(3)
    found = [
        _cka(torch.randn(40, 64, generator=generator), torch.randn(40, 64, generator=generator)) for _ in range(50)
    ]
    assert abs(sum(found) / 50) < 0.02
    rows = torch.randn(40, 64, generator=generator)
    turned = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    assert _cka(rows, 5 * rows @ turned + 3) == pytest.approx(
        1.0, abs=1e-4
    )  # turning, scaling, shifting change nothing
