"""The ends of a model in 8 or 4 bits: its token embeddings, and a language model's head (``model.quantize_ends``).

transformers quantises neither, and of a client with few blocks they are most of what it holds. Here bitsandbytes packs
them a piece of rows at a time, straight from the checkpoint's file, so that no whole table is ever in memory; an
embedding unpacks the rows of its tokens, and a head multiplies with one piece after the other. Tied ones share what is
packed. nf4 has a scale for each 64 (or 32) numbers of a row, int8 one for each row; activations stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flexp.models.stored import PACKED, StoredTable, find, refused, tables_of, token_embedding, without

PIECE = 1 << 24
"""Numbers of a table that are unpacked at once, at most; packing, which takes more memory each, takes a sixteenth."""


class _Packed(nn.Module):
    """What a packed table is for both: ``weight`` (V, H/2 or H) in whole numbers, and their ``scales``."""

    weight: nn.Parameter
    scales: Tensor
    quantization: str
    dtype: torch.dtype
    blocksize: int

    def pack(self, table: StoredTable, quantization: str, dtype: torch.dtype) -> None:
        """Have the numbers of ``table``, as ``dtype`` has them, packed.

        Raises:
            ModelError: its rows do not divide into nf4's blocks.
        """
        rows, width = table.shape
        self.quantization, self.dtype = quantization, dtype
        self.blocksize = 64 if width % 64 == 0 else 32
        if quantization == "nf4" and width % self.blocksize:
            raise refused(f"rows of {width} numbers do not divide into nf4's blocks of 32", PACKED)
        four = quantization == "nf4"
        weight = torch.empty(rows, width // 2 if four else width, dtype=torch.uint8 if four else torch.int8)
        scales = torch.empty(rows, width // self.blocksize if four else 1)
        for piece in pieces(rows, width, PIECE // 16):
            numbers = table.read(range(piece.start, piece.stop)).to(dtype)
            packed, scale = self._packed(numbers)
            weight[piece], scales[piece] = packed.view(len(numbers), -1), scale.view(len(numbers), -1)
        self.have(nn.Parameter(weight, requires_grad=False), scales)

    def have(self, weight: nn.Parameter, scales: Tensor) -> None:
        """Use these, which another may use as well."""
        self._buffers.pop("weight", None)
        self.weight = weight
        self.register_buffer("scales", scales, persistent=False)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Some rows, unpacked: (…, H)."""
        from bitsandbytes import functional

        weight, scales = self.weight[which], self.scales[which]
        found: Tensor
        if self.quantization == "int8":
            found = functional.int8_vectorwise_dequant(weight, scales)
            return found.to(self.dtype)
        shape = torch.Size((*weight.shape[:-1], 2 * weight.shape[-1]))
        state = functional.QuantState(
            scales.reshape(-1), shape=shape, dtype=self.dtype, blocksize=self.blocksize, quant_type="nf4",
            code=functional.get_4bit_type("nf4", device=weight.device),
        )  # fmt: skip
        found = functional.dequantize_4bit(weight.reshape(-1, 1), state)
        return found

    def _packed(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes import functional

        if self.quantization == "nf4":
            packed, state = functional.quantize_4bit(numbers, blocksize=self.blocksize, quant_type="nf4")
            return packed, state.absmax
        peaks = numbers.float().abs().amax(1, keepdim=True)  # LLM.int8()'s rule, whose own function takes float16 alone
        return (numbers.float() * (127 / peaks.clamp_min(1e-30))).round().to(torch.int8), peaks


class PackedEmbedding(_Packed, nn.Embedding):  # type: ignore[misc]  # its weight is no table of numbers
    """A frozen embedding that unpacks the rows of its tokens."""

    def forward(self, input: Tensor) -> Tensor:
        """The rows (…, H) of token ids (…)."""
        return self.rows(input.reshape(-1)).view(*input.shape, -1)


class PackedHead(_Packed, nn.Linear):  # type: ignore[misc]
    """A frozen linear layer that never has more of its weight unpacked than a piece."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, V) from (…, H)."""
        found: Tensor = _InPieces.apply(input, self)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias.to(found.dtype)


class _InPieces(torch.autograd.Function):
    """x · Wᵀ, a piece of W's rows at a time; the gradient at x is summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: PackedHead) -> Tensor:
        ctx.head, ctx.dtype = head, x.dtype
        found = None
        for piece in pieces(head.out_features, head.in_features):
            part = nn.functional.linear(x, head.rows(piece))
            found = part.new_empty(*part.shape[:-1], head.out_features) if found is None else found
            found[..., piece] = part
        assert found is not None
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), head = grads, ctx.head
        total = torch.zeros(*grad.shape[:-1], head.in_features, dtype=torch.float32, device=grad.device)
        for piece in pieces(head.out_features, head.in_features):
            total += grad[..., piece] @ head.rows(piece).to(grad.dtype)
        return total.to(ctx.dtype), None


def pieces(rows: int, width: int, most: int = PIECE) -> Iterator[slice]:
    """All rows, in pieces of at most ``most`` numbers, but of one row at least."""
    step = max(1, most // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def ends_of(model: Any, *, embedding: bool = True) -> dict[str, tuple[Any, type[_Packed]]]:
    """The ends of ``model`` that can be packed, by their names, and as what.

    Args:
        embedding: whether that of the tokens is among them; it may stay in its file.

    Raises:
        ModelError: the model embeds something else, in its own way, or has another kind of head.
    """
    found: dict[str, tuple[Any, type[_Packed]]] = {}
    names = {id(module): path for path, module in model.named_modules()}
    if embedding:
        module = token_embedding(model, PACKED)
        found[names[id(module)]] = module, PackedEmbedding
    head = model.get_output_embeddings()
    if head is not None:
        if type(head) is not nn.Linear:
            raise refused(f"{type(model).__name__} has a head of its own kind", PACKED)
        if ".weight.dtype" in inspect.getsource(type(model).forward):  # Mamba and its kin
            raise refused(f"{type(model).__name__} asks its head's weight for a type", PACKED)
        found[names[id(head)]] = head, PackedHead
    return found


def without_ends(cls: Any, *, embedding: bool = True) -> Any:
    """A subclass of a model's class, made to be thrown away after loading, that never has the ends that are packed."""

    def emptied(model: Any) -> None:
        ends = ends_of(model, embedding=embedding)
        for module, kind in ends.values():
            without(module, kind)
        ties = model.all_tied_weights_keys
        own = {f"{path}.weight" for path in ends}
        model.ties = {key: value for key, value in ties.items() if {key, value} & own}
        model.all_tied_weights_keys = {key: value for key, value in ties.items() if key not in model.ties}

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        emptied(self)

    names = {"__init__": __init__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names)


def give_packed(model: Any, source: str, quantization: str, dtype: torch.dtype) -> None:
    """Let the ends of a ``model`` that was loaded without them be those in the files of ``source``, packed.

    Raises:
        ModelError: the files do not have them, or their shape cannot be packed.
    """
    ties: dict[str, str] = vars(model).pop("ties")
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **ties}
    first: _Packed | None = None
    for path, module in model.named_modules():
        if not isinstance(module, _Packed):
            continue
        shape: Any = (module.num_embeddings, module.embedding_dim) if isinstance(module, nn.Embedding) else (
            module.out_features, module.in_features
        )  # fmt: skip
        name = f"{path}.weight"
        other = ties.get(name) or next((key for key, value in ties.items() if value == name), None)
        if first is not None and other is not None:
            tables = dict(tables_of(source))
            if name in tables and other in tables and not alike(tables[name], tables[other]):
                raise refused("config.json ties head and embeddings, and the files have another table for each", PACKED)
            module.quantization, module.dtype, module.blocksize = first.quantization, first.dtype, first.blocksize
            module.have(first.weight, first.scales)
            continue
        module.pack(find([name, *([other] if other else [])], shape, source, PACKED), quantization, dtype)
        first = module


def alike(one: StoredTable, other: StoredTable) -> bool:
    """Whether two tables have the same numbers."""
    rows, width = one.shape
    return one.shape == other.shape and all(
        torch.equal(one.read(range(piece.start, piece.stop)), other.read(range(piece.start, piece.stop)))
        for piece in pieces(rows, width, PIECE // 16)
    )


def table_of(module: Any) -> Tensor:
    """All of the weight (V, H) of an embedding or a head as numbers, packed or not."""
    return module.rows(slice(None)) if isinstance(module, _Packed) else module.weight.detach()


def plain_ends(model: Any) -> None:
    """Give a model plain ends again, in place, with the numbers that the packed ones stand for."""
    made: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        if not isinstance(module, _Packed):
            continue
        if id(module.weight) not in made:
            made[id(module.weight)] = nn.Parameter(table_of(module), requires_grad=False)
        weight = made[id(module.weight)]
        if isinstance(module, nn.Embedding):
            new: Any = nn.Embedding(*weight.shape, padding_idx=module.padding_idx, device="meta")
        else:
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            new.bias = module.bias
        new.weight = weight
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)


def saved_by_packing(model: Any, quantization: str, *, embedding: bool = True) -> tuple[int, int]:
    """Bytes that packing the ends of ``model``, which are plain, saves; and those of the piece that is unpacked.

    Args:
        embedding: as for :func:`ends_of`.
    """
    ends = ends_of(model, embedding=embedding)
    weights = {id(module.weight): module.weight for module, _ in ends.values()}
    saved = 0
    heads = [module.weight for module, kind in ends.values() if kind is PackedHead]  # of embeddings rows alone
    largest = max((min(PIECE, value.numel()) * value.element_size() for value in heads), default=0)
    for value in weights.values():  # tied ones are one
        rows, width = value.shape
        four = quantization == "nf4"
        packed = value.numel() // 2 + 4 * value.numel() // (64 if width % 64 == 0 else 32)
        saved += value.numel() * value.element_size() - (packed if four else value.numel() + 4 * rows)
    return saved, largest
