"""The relay of python -m benchmarks chaos: what it does to frames, and that what comes through is what was asked."""

from __future__ import annotations

import torch

from benchmarks.tools.bad_network import Relay
from flexp.errors import LinkLostError
from flexp.links.grpc import connect, serve
from flexp.links.messages import ForwardRequest
from tests.harness import world

SOON = 30.0


def test_frames_that_come_twice_late_or_in_another_order_change_no_answer() -> None:
    here = world("llama")
    join = here.client("b", (2, 4))  # in process
    plain = [torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    wanted = [join.link.call(ForwardRequest(n + 1, z)).result(SOON).hidden_BTH for n, z in enumerate(plain)]
    with serve(here.server) as serving:
        relay = Relay(str(serving.address), rate=0.4, most=30, seed=1)
        got: dict[int, torch.Tensor] = {}
        links = 0
        while len(got) < len(plain):
            link = connect(f"grpc://{relay.address}", "a", codec="off")
            links += 1
            try:
                here.client("a", (2, 4), link=link)
                todo = [n for n in range(len(plain)) if n not in got][:8]
                for n, answer in [(n, link.call(ForwardRequest(n + 1, plain[n]))) for n in todo]:
                    got[n] = answer.result(SOON).hidden_BTH
            except LinkLostError:
                pass
            link.close()
        relay.close()
    assert all(torch.equal(got[n], wanted[n]) for n in range(len(plain)))
    assert relay.faults["duplicated"] > 3
    assert relay.faults["reordered"] > 3
    assert links < 40
