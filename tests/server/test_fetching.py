"""What a server gives of its shared blocks: nothing unless it may, then just what was trained."""

from __future__ import annotations

import pytest
import torch

from flexp.client.taking import fetched
from flexp.errors import LinkError
from flexp.links.asking import FetchRequest
from flexp.models.fingerprint import tensor_fingerprint
from tests.harness import RecordingLink, copied, equal, world


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_exactly_what_was_trained(tuning: str) -> None:
    here = world("llama", tuning=tuning, allow_export=True)
    here.join("a", (2, 4), lora=here.server.lora)
    shared = here.server.shared
    for block in (2, 3):
        own = {name: value for name, value in shared.updater.parameters.items() if shared.stage.block_of(name) == block}
        reply = here.server.answer("a", FetchRequest(block))
        assert (reply.version, reply.total) == (0, len(own))
        assert equal(reply.weights, copied(own))
        assert bool(own) == (tuning != "frozen")
        assert all("lora_" in name for name in own) or tuning == "full"


def test_copies_that_no_update_changes() -> None:
    """Taken while another client's forward is in flight, and compared after the update that follows."""
    here = world("llama", allow_export=True)
    model = here.client("b", (1, 4))
    here.join("a", (1, 4))
    loss = model(**here.batch()).loss
    before = here.server.answer("a", FetchRequest(2))
    kept = copied(before.weights)
    loss.backward()
    assert equal(before.weights, kept)
    after = here.server.answer("a", FetchRequest(2))
    assert (before.version, after.version) == (0, 1)
    assert not any(torch.equal(value, kept[name]) for name, value in after.weights.items())


def test_only_with_permission_and_only_the_clients_blocks() -> None:
    here = world("llama")
    here.join("a", (2, 3))
    with pytest.raises(LinkError, match=r"client a: this server gives no shared blocks away; .* --allow-export"):
        here.server.answer("a", FetchRequest(2))
    here.server.allow_export = True
    here.server.answer("a", FetchRequest(2))
    for block in (-1, 0, 4):
        with pytest.raises(LinkError, match=rf"client a: block {block} .* expected one of the shared blocks \[1, 4\)"):
            here.server.answer("a", FetchRequest(block))
    assert not here.server.answer("a", FetchRequest(2, 10**6)).weights


def test_what_a_client_has_does_not_come_again() -> None:
    """Of one of the block's tensors it has the bits, of one others; what it has not comes."""
    here = world("llama", allow_export=True)
    here.join("a", (2, 4))
    whole = here.server.answer("a", FetchRequest(2)).weights
    first, second, *_ = sorted(whole)
    held = {first: whole[first].clone(), second: whole[second] + 1}
    known = {name: tensor_fingerprint(value) for name, value in held.items()}
    reply = here.server.answer("a", FetchRequest(2, known=known))
    assert (reply.same, reply.total) == ((first,), len(whole))
    assert equal(reply.weights, {name: value for name, value in whole.items() if name != first})
    link = RecordingLink(here.server.connect("a"))
    pieces = list(fetched(link, FetchRequest(2), {**held, second: whole[second]}))
    assert equal({name: value for piece in pieces for name, value in piece.weights.items()}, whole)
    assert link.meter.evaluation.bytes_down == sum(value.nbytes for value in whole.values()) - sum(
        whole[name].nbytes for name in (first, second)
    )
    for changed in (whole[first].bfloat16(), whole[first][None], -whole[first]):
        assert tensor_fingerprint(changed) != known[first]
