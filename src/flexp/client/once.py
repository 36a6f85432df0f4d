"""A head that does not change gives an example the same activation in every epoch: it crosses once.

z of an example is what the head makes of it *alone*, without padding, so it depends neither on the batch that it first
came in nor on whether a server has lost it: sent again, it is the same, bit for bit. (Made in a batch, as without
``link.cache``, the last bits may be others.)

Where the head is trained, ``link.reuse`` lets z of an example stand for what it has hardly moved from (SplitCom, arXiv
2602.10564): the server goes on with what went up last, whose gradient stands for that at z. What moves is compared with
that and no earlier z, so small moves add up until it goes up again. The client keeps what went up: to a server that has
lost it the same goes up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexp.links.messages import ForwardRequest, KeptForwardRequest
from flexp.links.packing import Places
from flexp.models.stage import Stage
from flexp.rng import undisturbed


def right_padded(mask_BT: Tensor | None) -> bool:
    """Whether padding comes after each text, so that its tokens have the places that they have without."""
    return mask_BT is not None and bool((mask_BT[:, :-1] >= mask_BT[:, 1:]).all()) and bool(mask_BT[:, 0].all())


FLOAT = torch.float32
Standing = tuple[tuple[int, int], ...]
"""Of weights: where each is, and how often it was written into."""


def standing(stage: Stage, start: int) -> Standing | None:
    """The weights that make z of an example, as they stand; ``None``: some of blocks [0, ``start``) are trained.

    What is before the blocks gives what enters the first of them, which is asked for its gradient elsewhere.
    """
    own = stage.own()
    if any(stage.within(name, 0, start) for name in own):
        return None
    return tuple(
        (value.data_ptr(), value._version)
        for name, value in stage.model.named_parameters()
        if name not in own and (stage.block_of(name) is None or stage.within(name, 0, start))
    )


def alone(stage: Stage, inputs: Mapping[str, Any], row: int, tokens: int, start: int) -> Tensor | None:
    """z (1, ``tokens``, H) of one example of a batch; ``None``: the head draws random numbers for it."""
    shape = inputs["attention_mask"].shape
    one = {
        key: value[row : row + 1, :tokens]
        for key, value in inputs.items()
        if isinstance(value, Tensor) and value.shape[:2] == shape
    }
    with torch.no_grad(), undisturbed(one["input_ids"].device):
        before = torch.get_rng_state()
        hidden_BTH, plan = stage.plan(one)
        z_BTH = stage.run(hidden_BTH, plan, 0, start)
        return z_BTH if torch.equal(before, torch.get_rng_state()) else None


def request_once(
    whole: ForwardRequest,
    stage: Stage,
    inputs: Mapping[str, Any],
    examples: tuple[int, ...],
    known: set[int],
    start: int,
) -> KeptForwardRequest | None:
    """What crosses of a forward whose examples have numbers, of which ``known`` are kept; ``None``: it cannot be."""
    assert whole.mask_BT is not None
    fresh = [number not in known for number in examples]
    lengths = whole.mask_BT.sum(1).tolist()
    made = []
    for row in (row for row, new in enumerate(fresh) if new):
        z_BTH = alone(stage, inputs, row, lengths[row], start)
        if z_BTH is None:
            return None
        made.append(z_BTH)
    return _crossing(whole, examples, fresh, torch.cat(made, dim=1) if made else None)


def request_moved(
    whole: ForwardRequest, examples: tuple[int, ...], went: dict[int, Tensor], known: set[int], share: float
) -> tuple[ForwardRequest, KeptForwardRequest]:
    """A forward from what ``went`` up last of each example where z has not moved by more than ``share`` of its norm,
    and what crosses of it. ``went`` is changed to what it is from now on, ``known`` to what the server surely has.
    """
    assert whole.mask_BT is not None
    places = Places.of(whole.mask_BT)
    z_each = torch.split(places.pack(whole.hidden_BTH)[0], whole.mask_BT.sum(1).tolist())
    beyond = []  # by how much it moved more than it may, on the blocks' device: one look at all of them
    for number, z in zip(examples, z_each, strict=True):
        last = went.get(number, z.new_empty(0))
        near = last.shape == z.shape
        beyond.append((z - last).float().norm() - share * last.float().norm() if near else z.new_ones((), dtype=FLOAT))
    for number, z, more in zip(examples, z_each, torch.stack(beyond).tolist(), strict=True):
        if not more <= 0:  # nor is it a number, which the server is to refuse
            went[number] = z.clone()
            known.discard(number)  # a server that keeps it keeps the z before, until it says otherwise
    fresh = [number not in known for number in examples]
    new = [went[number] for number, is_new in zip(examples, fresh, strict=True) if is_new]
    crosses = _crossing(whole, examples, fresh, torch.cat(new).unsqueeze(0) if new else None)
    used_BTH = places.unpack(torch.cat([went[number] for number in examples]).unsqueeze(0))
    return replace(whole, hidden_BTH=used_BTH), crosses


def _crossing(
    whole: ForwardRequest, examples: tuple[int, ...], fresh: list[bool], new_BTH: Tensor | None
) -> KeptForwardRequest:
    """The forward ``whole``, of which the tokens ``new_BTH`` (1, T, H) of the ``fresh`` examples cross alone."""
    assert whole.mask_BT is not None
    numbers, is_new = torch.tensor(examples), torch.tensor(fresh)
    return KeptForwardRequest(
        whole.exchange, whole.mask_BT, numbers, is_new, whole.step, whole.rows_BT, hidden_BTH=new_BTH
    )
