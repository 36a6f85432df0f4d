"""Plan and replay: run any range of a model's blocks without rewriting anything of the model.

Every block's *instance* attribute ``forward`` is shadowed by a recorder and the model's own ``forward`` is called once.
That yields the embedded hidden state and, per block, its exact arguments (masks, rotary tables, positions): the
execution plan. Replaying it calls the very blocks with the very arguments, so that nothing can differ from the whole
model. Here are also the stand-ins for what a party does not own, through which the model's own code makes its plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexp.errors import ModelError
from flexp.rng import BlockDraws, draw_from_here, drawn


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block apart from the hidden state. ``keyword`` names it where it is no positional one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None


@dataclass(frozen=True)
class ExecutionPlan:
    """How each block of a model is to be called for one batch, and how many values it gives back in a tuple (0: the
    hidden state as it is)."""

    calls: tuple[BlockCall, ...]
    tuples: int

    def difference(self, other: ExecutionPlan) -> str:
        """Where ``other`` calls a block with arguments that are not equal bit for bit; empty: nowhere."""
        known: set[tuple[int, int]] = set()  # most blocks get the very arguments of the block before
        for index, (mine, theirs) in enumerate(zip(self.calls, other.calls, strict=True)):
            if len(mine.args) != len(theirs.args) or mine.keyword != theirs.keyword:
                return f"block {index} is called in another way there"
            pairs: dict[Any, tuple[Any, Any]] = dict(enumerate(zip(mine.args, theirs.args, strict=True), start=1))
            for name in {**mine.kwargs, **theirs.kwargs}:
                pairs[name] = mine.kwargs.get(name, _NOTHING), theirs.kwargs.get(name, _NOTHING)
            for name, (one, two) in pairs.items():
                if (id(one), id(two)) not in known and not same(one, two):
                    return f"block {index} gets another {name if isinstance(name, str) else f'argument {name}'} there"
                known.add((id(one), id(two)))
        return ""

    def replay(
        self,
        blocks: nn.ModuleList,
        hidden_BTH: Tensor,
        start: int,
        stop: int,
        places: Mapping[int, torch.device] | None = None,
        draws: BlockDraws | None = None,
    ) -> Tensor:
        """Run blocks [start, stop) on a hidden state (B, T, H).

        Args:
            places: their devices, where those are several.
            draws: what each of them draws; ``None``: as the generators go on.
        """
        known: dict[tuple[int, torch.device], Tensor] = {}  # most blocks get the very arguments of the block before
        for index in range(start, stop):
            call = self.calls[index]
            if places:
                args, kwargs = (_moved(value, places[index], known) for value in (call.args, call.kwargs))
                call, hidden_BTH = BlockCall(args, kwargs, call.keyword), hidden_BTH.to(places[index])
            if draws is not None:
                draws.begin(index, hidden_BTH.device)
            if call.keyword is None:
                output = blocks[index](hidden_BTH, *call.args, **call.kwargs)
            else:
                output = blocks[index](*call.args, **{call.keyword: hidden_BTH}, **call.kwargs)
            hidden_BTH = output[0] if isinstance(output, tuple | list) else output
        return hidden_BTH


class _Planned(Exception):  # noqa: N818  (a signal, not an error)
    """Leaves the model's forward once the last block has been recorded: final norm and head need not run."""


class _Mismatch(Exception):  # noqa: N818
    """A block was called out of order, or not given the very tensor that the block before it gave back."""


def record(
    model: Any, blocks: nn.ModuleList, inputs: Mapping[str, Any], tuples: int | None
) -> tuple[Tensor, ExecutionPlan]:
    """Embed ``inputs`` and make the plan of all blocks.

    Args:
        tuples: as the plan has it; ``None`` when that is not known yet.

    Returns:
        The hidden state (B, T, H) that enters block 0, and the plan.

    Raises:
        ModelError: the model changes the hidden state between its blocks, calls them in another order, or hands
            them tensors that need gradients.
    """
    generator = _generator_state(inputs) if tuples is None else None
    for attempt in range(_MOST + 1) if tuples is None else (tuples,):
        if generator is not None and attempt:  # an earlier try drew dropout too, which must not be noticed
            draw_from_here(*generator)
        calls: list[BlockCall] = []
        hiddens: list[Tensor] = []
        recorders = [_recorder(calls, hiddens, attempt, index, len(blocks)) for index in range(len(blocks))]
        try:
            with shadowed(blocks, recorders):
                model(**inputs)
        except _Planned:
            _refuse_gradients(model, calls)
            return hiddens[0], ExecutionPlan(tuple(calls), attempt)
        except _Mismatch:
            continue
        except ModelError:
            raise
        except Exception as error:
            if tuples is not None:
                raise
            if attempt < _MOST and len(calls) == 1:
                continue  # the model could not take that from its first block
            if not calls and not isinstance(error, AttributeError):  # which is a block's that is elsewhere
                raise ModelError(
                    f"the batch does not fit this {type(model).__name__}, whose own code failed before its first block "
                    f"({type(error).__name__}: {_one_line(error)}); expected tokens below its vocabulary's size, no "
                    "more of them than it has positions, and images of the size that its config.json names"
                ) from error
            raise ModelError(
                f"{type(model).__name__} cannot be split, or the batch does not fit it: its own code failed when its "
                f"blocks were stepped over ({type(error).__name__}: {_one_line(error)}); use an architecture that "
                "`flexp verify --list` names"
            ) from error
    raise ModelError(
        f"{type(model).__name__} cannot be split: it changes the hidden state between its blocks, or does not call "
        "each of them once and in order; use an architecture that `flexp verify --list` names"
    )


@contextlib.contextmanager
def shadowed(blocks: nn.ModuleList, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let ``blocks[i](...)`` call ``forwards[i]`` inside the ``with`` block."""
    earlier = [vars(block).get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, own in zip(blocks, earlier, strict=True):
            if own is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own


def finish(model: Any, blocks: nn.ModuleList, hidden_BTH: Tensor, inputs: Mapping[str, Any], tuples: int) -> Any:
    """Run final norm, head and loss on a hidden state (B, T, H), through the model's own ``forward``.

    The embedding runs once more on the way, without gradients and without moving the random generator, and what it
    gives is dropped.
    """
    grad = torch.is_grad_enabled()
    generator = drawn(hidden_BTH.device)

    def first(*_: Any, **__: Any) -> Any:
        draw_from_here(generator, hidden_BTH.device)
        torch.set_grad_enabled(grad)
        return given_back(hidden_BTH, tuples)

    def through(*args: Any, **kwargs: Any) -> Any:
        return given_back(args[0] if args else kwargs["hidden_states"], tuples)

    with torch.no_grad(), shadowed(blocks, [first] + [through] * (len(blocks) - 1)):
        return model(**inputs)


def _recorder(
    calls: list[BlockCall], hiddens: list[Tensor], tuples: int, index: int, blocks: int
) -> Callable[..., Any]:
    def record_call(*args: Any, **kwargs: Any) -> Any:
        keyword = None if args else "hidden_states"
        hidden = args[0] if args else kwargs.pop("hidden_states", None)
        in_order = index == len(calls) and (not hiddens or hidden is hiddens[-1])
        if not isinstance(hidden, Tensor) or not in_order:
            raise _Mismatch
        hiddens.append(hidden)
        calls.append(BlockCall(args[1:], kwargs, keyword))
        if len(calls) == blocks:
            raise _Planned
        return given_back(hidden, tuples)

    return record_call


def given_back(hidden_BTH: Tensor, tuples: int) -> Any:
    """What stands for a block's answer. A model may drop what comes with the hidden state, but not go on with it: that
    equals nothing, so a plan in which the next block gets it is refused."""
    return (hidden_BTH, *[_NOTHING] * (tuples - 1)) if tuples else hidden_BTH


def _refuse_gradients(model: Any, calls: Sequence[BlockCall]) -> None:
    for index, call in enumerate(calls):
        for value in (*call.args, *call.kwargs.values()):
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Tensor) and item.requires_grad:
                    raise ModelError(
                        f"{type(model).__name__} cannot be split: block {index} gets, besides the hidden state, a "
                        "tensor that is trained outside of the blocks, so its gradient would be lost; use an "
                        "architecture that `flexp verify --list` names"
                    )


def _moved(value: Any, device: torch.device, known: dict[tuple[int, torch.device], Tensor]) -> Any:
    """An argument of a block with its tensors on ``device``, each copied once; of a cache each block has its own."""
    if isinstance(value, Tensor):
        if (id(value), device) not in known:
            known[id(value), device] = value.to(device)
        return known[id(value), device]
    if isinstance(value, dict):
        return {key: _moved(each, device, known) for key, each in value.items()}
    return tuple(_moved(each, device, known) for each in value) if isinstance(value, tuple) else value


def same(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal bit for bit, and of a type that cannot carry state between blocks."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return bool(one) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        filled = bool(one) or isinstance(one, tuple)  # an empty list may be filled by a block, like a cache
        return filled and len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, _PLAIN) and one == other


_NOTHING = object()  # like nothing, itself included
_MOST = 3  # values that a block gives back
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _generator_state(inputs: Mapping[str, Any]) -> tuple[Tensor, torch.device] | None:
    """The state of the generators that embedding ``inputs`` draws from, and their device."""
    device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), None)
    return None if device is None else (drawn(device), device)


def _unheard(*_: Any, **__: Any) -> None:
    """What is said to a block that is not here."""


class Absent(nn.Module):
    """Stands where a block is that another party owns. Keeps the plain attributes that a model may ask for."""

    def __init__(self, index: int, block: nn.Module) -> None:
        super().__init__()
        kinds = [kind for kind in reversed(type(block).__mro__) if kind not in nn.Module.__mro__]
        plain = {
            key: value
            for holder in (*kinds, block)
            for key, value in vars(holder).items()
            if not key.startswith("_") and isinstance(value, str | int | float | bool | None)
        }
        # A model may tell all of its blocks something (BigBird which attention to take); those elsewhere hear it there.
        told = {key for kind in kinds for key in vars(kind) if key.startswith("set_")}
        self.__dict__.update({**plain, **dict.fromkeys(told, _unheard), "index": index})

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ModelError(f"block {self.index} was asked to run on a party that does not own it")


class ZeroEmbedding(nn.Module):
    """Stands where an embedding was: zeros of the right shape, so that the model's own code can make its plan."""

    weight: Tensor

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype
        self.register_buffer("weight", torch.zeros(0, dtype=dtype), persistent=False)  # some ask it for its device

    def forward(self, ids: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        shape = ids.shape if isinstance(ids, Tensor) else (1, 1)
        device = ids.device if isinstance(ids, Tensor) else None
        return torch.zeros(*shape, self.width, dtype=self.dtype, device=device)


class ZeroPatches(nn.Module):
    """Stands where an image model's patch embedding was. ``shape`` (B, T, H) is set before every plan."""

    def __init__(self, patch_dtype: torch.dtype) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = ()
        # ViT's forward asks its patch projection for a dtype before it embeds.
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Module()
        self.patch_embeddings.projection.weight = torch.zeros((), dtype=patch_dtype)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(self.shape, dtype=pixel_values.dtype, device=pixel_values.device)


class PassThrough(nn.Module):
    """Stands where a norm, a projection or a head was that a party does not own: gives back what it gets.

    Where the module changed the width (OPT's ``project_in``), zeros of the new ``width`` come back.
    """

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.width is None or self.width == hidden.shape[-1]:
            return hidden
        return hidden.new_zeros(*hidden.shape[:-1], self.width)
