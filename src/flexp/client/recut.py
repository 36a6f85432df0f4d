"""Moving a client's cut between two steps of its training, without its loop, its step count or its link ending.

- A block that comes to the client starts from its own parked copy, if it had the block before; else from the server's
  current shared weights.
- A block that goes to the server ends the client's personal copy, which is parked with its optimiser's state.
- A block that the client is to follow (``align.follow``) starts from the server's in any case, also one that it has and
  trained until now; what it followed is not parked, and where it is to train it, it comes like a new one.
- Optimiser state: what stays keeps it, what comes back has what was parked, what is new begins without any. The
  schedule's step count is the client's and goes on.

Everything that may fail comes first (parking, reading, joining with the new cut, fetching); only then is anything
changed. If it fails, the client has its old cut, and joins with it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexp.client.model import SplitModel
from flexp.client.taking import fetched
from flexp.client.trainer import Trainer, cut_in, load_party, split_model_of
from flexp.errors import ConfigError, LinkError, ModelError
from flexp.links.asking import FetchRequest
from flexp.models.anatomy import Part, check_cut
from flexp.models.stage import Stage

Blocks = Callable[[Part], Stage]
"""Gives pretrained blocks, tuned as this client's own are."""

PERSONAL, OPTIMIZER, PARKED = "personal/", "optimizer/", "parked/"


class Parking(Protocol):
    """Keeps what a client had of blocks that went to the server: weights and optimiser state by their names."""

    def put(self, block: int, tensors: Mapping[str, Tensor]) -> None: ...
    def get(self, block: int) -> dict[str, Tensor] | None: ...


class ParkedInMemory:
    """For simulations; the content is part of a checkpoint."""

    def __init__(self) -> None:
        self.blocks: dict[int, dict[str, Tensor]] = {}

    def put(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        self.blocks[block] = {name: value.detach().clone() for name, value in tensors.items()}

    def get(self, block: int) -> dict[str, Tensor] | None:
        return self.blocks.get(block)

    def state(self) -> dict[str, Tensor]:
        """All of it, as flat named tensors."""
        items = self.blocks.items()
        return {f"{PARKED}{block}/{name}": value for block, own in items for name, value in own.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self.blocks = {}
        for key, value in state.items():
            if key.startswith(PARKED):
                block, _, name = key.removeprefix(PARKED).partition("/")
                self.blocks.setdefault(int(block), {})[name] = value


@dataclass(frozen=True)
class Move:
    """What a move was: the blocks that came (of these those ``restored`` from parking) and those that went."""

    before: tuple[int, int]
    after: tuple[int, int]
    came: tuple[int, ...]
    restored: tuple[int, ...]
    went: tuple[int, ...]
    seconds: float


def recut(trainer: Trainer, cut: tuple[int, int], blocks: Blocks, parking: Parking) -> Move:
    """Move the client to another cut; to be called between two steps.

    Raises:
        ConfigError: the cut does not fit the model or the server.
        LinkError: the server refuses, or the link was lost: the client has its old cut (after a lost link: rejoin).
        ModelError: the server's blocks are not this model's; the client has its old cut.
        StorageError: what goes to the server could not be parked; nothing has changed.
    """
    began, model = time.perf_counter(), split_model_of(trainer)
    before, stage = model.cut, model.stage
    cut = check_cut(cut, stage.anatomy.blocks)
    wanted = Part.client(cut, stage.anatomy.blocks)
    came, went = sorted(wanted.blocks - stage.part.blocks), sorted(stage.part.blocks - wanted.blocks)
    if cut == before:
        return Move(before, cut, (), (), (), 0.0)
    followed, taken = set(model.following(before)), set(model.following(cut))
    turned = sorted((taken ^ followed) & stage.part.blocks & wanted.blocks)  # stays, but is trained no longer, or again
    for block in {*went, *turned} - followed:
        parking.put(block, _of_block(trainer, block))
    fresh = blocks(Part(frozenset(came), ends=False)) if came else None
    wanted_shapes = {} if fresh is None else {name: value.shape for name, value in fresh.trainable().items()}
    wanted_shapes |= {name: value.shape for name, value in stage.own().items() if stage.block_of(name) in turned}
    arriving = [*came, *turned]
    mine = [block for block in arriving if block not in taken]
    parked = {block: own for block in mine if (own := _parked(parking, block, wanted_shapes, stage)) is not None}
    try:
        model.rejoin(cut=cut)
        pretrained: Mapping[str, Tensor] = {} if fresh is None else fresh.trainable()
        shared = _current(model, [block for block in arriving if block not in parked], wanted_shapes, pretrained)
    except (LinkError, ConfigError, ModelError):
        with suppress(LinkError):  # lost: whoever makes a new link joins with the old cut
            model.rejoin(cut=before)
        model.cut = before
        raise
    _reshape(trainer, fresh, went)
    _fill(trainer, shared)
    for own in parked.values():
        _fill(trainer, _under(PERSONAL, own))
        trainer.updater.adopt(_under(OPTIMIZER, own))
    return Move(before, cut, tuple(came), tuple(sorted(parked)), tuple(went), time.perf_counter() - began)


def fit(trainer: Trainer, cut: tuple[int, int], blocks: Blocks) -> None:
    """Give the client the parameters of another cut, whose values are to be loaded next.

    Raises:
        LinkError: the server refuses.
    """
    model = split_model_of(trainer)
    if cut == model.cut:
        return
    stage, wanted = model.stage, Part.client(cut, model.stage.anatomy.blocks)
    came = wanted.blocks - stage.part.blocks
    fresh = blocks(Part(came, ends=False)) if came else None
    model.rejoin(cut=cut)
    _reshape(trainer, fresh, stage.part.blocks - wanted.blocks)


def move_party(trainer: Trainer, state: Mapping[str, Tensor], parking: Parking) -> list[str]:
    """Go on from what :func:`flexp.client.trainer.party_state` gave with another cut than the client has now.

    The same rules hold as for :func:`recut`, whose way is not open where the earlier cut would not fit any more.

    Returns:
        The names of the parameters that are new to the client.

    Raises:
        LinkError: the server does not give its weights.
        StorageError: what goes to the server could not be parked.
    """
    model, stage = split_model_of(trainer), split_model_of(trainer).stage
    own = stage.own()
    had = cut_in(state)
    followed = set() if had is None else set(model.following(had))
    taken = set(model.following(model.cut))
    by_block: dict[int | None, dict[str, Tensor]] = {}
    for key, value in state.items():
        name = _name(key)
        if name is not None:
            by_block.setdefault(stage.block_of(name), {})[key] = value
    for block in [block for block in by_block if block is not None]:
        stays = block in stage.part.blocks and (block in taken) == (block in followed)
        if not stays:
            tensors = by_block.pop(block)
            if block not in followed:
                parking.put(block, tensors)
    merged = {key: value for key, value in state.items() if _name(key) is None}
    merged |= {key: value for part in by_block.values() for key, value in part.items() if _name(key) in own}
    shapes = {name: value.shape for name, value in own.items()}
    missing: list[int] = []
    for block in sorted(stage.part.blocks - by_block.keys()):
        parked = None if block in taken else _parked(parking, block, shapes, stage)
        if parked is None:
            missing.append(block)
        else:
            merged |= parked
    new = [name for name in own if PERSONAL + name not in merged]
    shared = _current(model, missing, shapes, {})  # of what it may have trained it tells not even a hash
    merged |= {PERSONAL + name: shared.get(name, own[name].detach()) for name in new}
    load_party(trainer, merged)
    return new


def _name(key: str) -> str | None:
    """The parameter that an entry of a client's state belongs to."""
    if key.startswith(PERSONAL):
        return key.removeprefix(PERSONAL)
    return key.removeprefix(OPTIMIZER).partition("/")[2] or None if key.startswith(OPTIMIZER) else None


def _reshape(trainer: Trainer, fresh: Stage | None, went: Iterable[int]) -> None:
    stage = split_model_of(trainer).stage
    if fresh is not None:
        stage.take(fresh)
    stage.give_up(went)
    split_model_of(trainer).settle()
    trainer.updater.change(stage.trainable(), stage.new)


def _of_block(trainer: Trainer, block: int) -> dict[str, Tensor]:
    stage = split_model_of(trainer).stage
    own = {name: value for name, value in stage.own().items() if stage.block_of(name) == block}
    state = trainer.updater.state().items()
    kept = {f"{OPTIMIZER}{entry}": value for entry, value in state if entry.partition("/")[2] in own}
    return kept | {f"{PERSONAL}{name}": value for name, value in own.items()}


def _current(
    model: SplitModel, blocks: Iterable[int], shapes: Mapping[str, torch.Size], fresh: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The server's current shared weights of some blocks, as far as they are this client's own; ``fresh`` as they came.

    Raises:
        LinkError: the server does not give them.
        ModelError: they are not of the ``shapes`` that they must have.
    """
    weights: dict[str, Tensor] = {}
    for block in blocks:
        if block >= model.base_depth:
            held = {name: value.detach() for name, value in fresh.items() if model.stage.block_of(name) == block}
            for piece in fetched(model.link, FetchRequest(block), held):
                weights |= {name: value for name, value in piece.weights.items() if name in shapes}
    odd = [name for name, value in weights.items() if value.shape != shapes[name]]
    if odd:
        raise ModelError(f"the server's {odd[0]} is {tuple(weights[odd[0]].shape)}, expected {tuple(shapes[odd[0]])}")
    return weights


def _parked(parking: Parking, block: int, shapes: Mapping[str, torch.Size], stage: Stage) -> dict[str, Tensor] | None:
    """What is parked of a block, if it is all of what the client would train there."""
    found = parking.get(block)
    if found is None:
        return None
    had = {name: value.shape for name, value in _under(PERSONAL, found).items()}
    return found if had == {name: shape for name, shape in shapes.items() if stage.block_of(name) == block} else None


def _fill(trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
    own = split_model_of(trainer).stage.own()
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
