"""What a model costs: parameters, activations and operations of every block, without loading a weight.

The model's own code runs on tensors without content (:mod:`flexp.cost.skeleton`), once for each kind of block, and a
ledger notes what is alive and what is computed. Everything is linear in the examples of an exchange, so two sizes of it
are counted and the others follow.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from flexp.assets import resolve
from flexp.config import ModelConfig
from flexp.cost.counting import Counted, count_pieces
from flexp.cost.skeleton import Skeleton, bare_model, kinds
from flexp.errors import ModelError
from flexp.models import losses
from flexp.models.anatomy import dissect
from flexp.models.batches import pooled
from flexp.models.fingerprint import fingerprint
from flexp.models.loading import DTYPES
from flexp.models.packed import saved_by_packing
from flexp.models.quantized import held_bytes
from flexp.models.stored import check_table, token_embedding

SIZES = (2, 16)
"""Examples of the exchanges that are counted. A peak is the largest of several moments, so it lies on or below the line
between two sizes: far apart, they err on the safe side."""

STATE = {"adamw": 2, "adam": 2, "sgd": 1, "sgd-plain": 0}
"""Numbers that an optimiser keeps for each trained one; ``sgd`` with momentum."""


@dataclass(frozen=True)
class PieceCost:
    """One block, the embeddings, or the head with its loss, in one exchange.

    Attributes:
        parameters: numbers; ``weight_bytes`` theirs, buffers included.
        trained: numbers that are trained; ``trained_bytes`` theirs, and their gradients'.
        kept_bytes: activations that stay from the forward to the backward, the piece's output included.
        forward_extra: most bytes that the forward holds besides, at its worst moment.
        backward_extra: most bytes that the backward adds to what was there when it began, its gradients included.
        released_bytes: what the backward leaves less than it found, its gradients counted against it.
        forward_flops: floating-point operations; ``backward_flops`` with what is computed again.
    """

    parameters: int
    weight_bytes: int
    trained: int
    trained_bytes: int
    kept_bytes: int
    forward_extra: int
    backward_extra: int
    released_bytes: int
    forward_flops: float
    backward_flops: float


@dataclass(frozen=True)
class ShapeCost:
    """All pieces of a model at one micro-batch, rank and checkpointing.

    Attributes:
        first: block 0 of a client that trains nothing below it, which needs no gradient at its input.
        blocks: all L, with a gradient at their input.
        message_bytes: of one activation (B, T, H) in the weights' type, before any codec.
        input_bytes: of the batch; ``mask_bytes``: of its attention mask on the wire.
    """

    embed: PieceCost
    first: PieceCost
    blocks: tuple[PieceCost, ...]
    head: PieceCost
    message_bytes: int
    input_bytes: int
    mask_bytes: int


HEADS = ("classifier", "summary", "cls", "pooler")
"""How dropouts are called that come after the blocks."""

_COUNTED: dict[Any, ShapeCost] = {}
"""What this process has counted, by all that it depends on: each client of a run asks for the same."""


class ModelCost:
    """Counts when a rank or checkpointing is first asked for; see :func:`model_cost`.

    Attributes:
        config: of the model, found where its ``id`` says; rank and checkpointing of the adapters are asked for.
        fingerprint: of the model's configuration, as :class:`flexp.cost.profile.ModelSeconds` names it.
        blocks: L; ``hidden``: H.
        pooled: which token of a text a classifier's head reads (:func:`flexp.models.batches.pooled`).
        after: of pooled texts (``privacy.pool``) what follows the cut costs, at one token a text; ``None``: of all.
        draws: whether its configuration names a dropout before the head, with which z of an example is another one
            each time.
        optimizer: of what is trained, a key of :data:`STATE`.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        length: int,
        labels: int,
        optimizer: str,
        after: ModelCost | None = None,
    ) -> None:
        self.after = after
        if optimizer not in STATE:
            raise ModelError(f"optimizer {optimizer!r} is not known: expected one of {', '.join(STATE)}")
        self.config, self.kind, self.length, self.labels, self.optimizer = config, kind, length, labels, optimizer
        bare = bare_model(config, kind, labels=labels)
        if config.embeddings == "file":
            check_table(bare, config.id, DTYPES[config.dtype])
        anatomy = dissect(bare)
        self.fingerprint = fingerprint(bare.config)
        own = {key: value for key, value in bare.config.to_dict().items() if key != "_name_or_path"}
        of_run = config.model_dump(mode="json", exclude={"id", "tuning", "lora"})  # these two are asked for
        self._known_by = json.dumps([own, of_run, kind, length, labels], sort_keys=True, default=str)
        self._words = getattr(bare.config.get_text_config(), "vocab_size", 0) if kind == "causal-lm" else 0
        self.blocks, self.hidden = anatomy.blocks, anatomy.hidden
        self.kinds = kinds(bare)
        self._chosen = sorted(set(self.kinds))
        self.pooled = pooled(bare)
        self.draws = any(
            isinstance(value, float) and value > 0 and "drop" in key and not key.startswith(HEADS)
            for key, value in {**own, **vars(bare.config.get_text_config())}.items()
        )
        self._real = False
        self._shapes: dict[Any, ShapeCost] = {}

    def at(
        self, micro_batch: int, rank: int | None = None, checkpointing: bool = False, *, still: bool = False
    ) -> ShapeCost:
        """The cost of every piece in one exchange of ``micro_batch`` examples; ``rank`` ``None``: full tuning.

        ``still``: of blocks of which nothing is trained, nor anything before them.

        Raises:
            ModelError: the model's own code cannot be run without its weights, or is quantised and to be trained whole.
        """
        if self.config.quantization != "off" and rank is None and not still:
            raise ModelError(
                f"{self.config.id}: full tuning of blocks in {self.config.quantization} costs nothing that could be "
                "counted, since they cannot be trained; say the rank of the adapters"
            )
        key = (micro_batch, rank, checkpointing, still)
        if key not in self._shapes:
            low, high = self._sizes(micro_batch)
            few, more = (self._counted(size, rank, checkpointing, still) for size in (low, high))
            self._shapes[key] = _between(few, more, (micro_batch - low) / max(1, high - low))
        return self._shapes[key]

    def cut(self, start: int, micro_batch: int, rank: int | None = None, checkpointing: bool = False) -> ShapeCost:
        """:meth:`at`, of a model that is cut at ``start``: of pooled texts one vector crosses, and goes on.

        Raises:
            ModelError: as :meth:`at`.
        """
        whole = self.at(micro_batch, rank, checkpointing)
        if self.after is None:
            return whole
        one = self.after.at(micro_batch, rank, checkpointing)
        blocks = (*whole.blocks[:start], *one.blocks[start:])
        return replace(whole, blocks=blocks, head=one.head, message_bytes=one.message_bytes, mask_bytes=one.mask_bytes)

    def exactly(
        self, micro_batch: int, rank: int | None = None, checkpointing: bool = False, *, still: bool = False
    ) -> ShapeCost:
        """:meth:`at`, counted at this very size instead of following from two others."""
        key = (self._known_by, micro_batch, rank, checkpointing, still)
        try:
            if key not in _COUNTED:
                _COUNTED[key] = self._count(micro_batch, rank, checkpointing, still)
            return _COUNTED[key]
        except ModelError:
            raise
        except Exception as error:
            if self._real:
                raise ModelError(
                    f"{self.config.id}: what it costs cannot be counted, since its own code failed without its weights "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
                ) from error
            self._real = True  # its code looks into its tensors: give it some
            return self.exactly(micro_batch, rank, checkpointing, still=still)

    def server_weights(self, start: int, stop: int, rank: int | None = None) -> int:
        """Bytes of shared blocks [start, stop) with their optimiser's state, one copy for all clients."""
        pieces = self.at(SIZES[0], rank).blocks[start:stop]
        return sum(piece.weight_bytes + STATE[self.optimizer] * piece.trained_bytes for piece in pieces)

    def _sizes(self, micro_batch: int) -> tuple[int, int]:
        """Those between which a line leads through ``micro_batch``: their losses come at once, or in pieces, as its."""
        most = losses.PIECE // (self.length * self._words) if self._words else micro_batch  # at once
        if micro_batch <= most:
            return SIZES if most >= SIZES[1] or not self._words else (1, most)
        return SIZES if most < SIZES[0] else (most + 1, 2 * max(most + 1, SIZES[1]))

    def _counted(self, size: int, rank: int | None, checkpointing: bool, still: bool) -> ShapeCost:
        key = ("counted", size, rank, checkpointing, still)
        if key not in self._shapes:
            self._shapes[key] = self.exactly(size, rank, checkpointing, still=still)
        return self._shapes[key]

    def _count(self, examples: int, rank: int | None, checkpointing: bool, still: bool) -> ShapeCost:
        skeleton = Skeleton(
            bare_model(self.config, self.kind, labels=self.labels),
            self._chosen,
            self.config.tuned(rank, checkpointing=checkpointing),
            real=self._real,
            still=still,
        )
        stage = skeleton.stage
        logging.disable(logging.ERROR)  # torch logs what a fake tensor cannot do, which is caught
        try:
            embed, blocks, head = count_pieces(
                skeleton, self._chosen, self.kind, examples, self.length, below=not still
            )
            firsts = blocks
            if not still:
                _, firsts, _ = count_pieces(skeleton, self._chosen[:1], self.kind, examples, self.length, below=False)
        finally:
            logging.disable(logging.NOTSET)
        outside = [
            (name, value, name in stage.trainable())
            for name, value in stage.model.named_parameters()
            if stage.block_of(name) is None
        ]
        buffers = sum(
            value.numel() * value.element_size()
            for name, value in stage.model.named_buffers()
            if stage.block_of(name) is None
        )
        packed = self.config.quantization
        of_kind = {
            index: _piece(blocks[number], stage.blocks[index], packed) for number, index in enumerate(self._chosen)
        }
        own = [value for _, value, _ in outside]
        in_file = token_embedding(stage.model).weight if self.config.embeddings == "file" else None
        held = [value for value in own if value is not in_file]
        saved, unpacked = 0, 0
        if self.config.quantize_ends:
            saved, unpacked = saved_by_packing(stage.model, packed, embedding=in_file is None)
        trained = [value for _, value, is_trained in outside if is_trained]
        ends = PieceCost(
            sum(value.numel() for value in own),
            sum(value.numel() * value.element_size() for value in held) + buffers - saved,
            sum(value.numel() for value in trained),
            sum(value.numel() * value.element_size() for value in trained),
            *_figures(head),
        )
        ends = replace(ends, forward_extra=ends.forward_extra + unpacked, backward_extra=ends.backward_extra + unpacked)
        with skeleton.mode:
            batch = skeleton.batch(self.kind, examples, self.length)
            inputs = sum(value.numel() * value.element_size() for value in batch.values())
            ids = batch.get("input_ids")
            mask = 0 if ids is None else ids.numel()
            hidden, _ = stage.plan(batch)
        return ShapeCost(
            embed=PieceCost(0, 0, 0, 0, *_figures(embed)),
            first=_piece(firsts[0], stage.blocks[self._chosen[0]], packed),
            blocks=tuple(of_kind[index] for index in self.kinds),
            head=ends,
            message_bytes=hidden.numel() * hidden.element_size(),
            input_bytes=inputs,
            mask_bytes=mask,
        )


def _figures(counted: Counted) -> tuple[int, int, int, int, float, float]:
    return (
        counted.kept,
        counted.forward_extra,
        counted.backward_extra,
        counted.released,
        counted.forward_flops,
        counted.backward_flops,
    )


def _piece(counted: Counted, block: nn.Module, quantization: str) -> PieceCost:
    values = list(block.parameters())
    trained = [value for value in values if value.requires_grad]
    saved, unpacked = held_bytes(block, quantization)
    kept, forward, backward, released, forward_flops, backward_flops = _figures(counted)
    return PieceCost(
        sum(value.numel() for value in values),
        sum(value.numel() * value.element_size() for value in [*values, *block.buffers()]) - saved,
        sum(value.numel() for value in trained),
        sum(value.numel() * value.element_size() for value in trained),
        kept,
        forward + unpacked,  # one weight after the other is unpacked for its product
        backward + unpacked,
        released,
        forward_flops,
        backward_flops,
    )


def _between(few: Any, more: Any, share: float) -> Any:
    """What lies at ``share`` of the way from ``few`` to ``more``, also beyond them, number by number."""
    if isinstance(few, tuple):
        return tuple(_between(one, other, share) for one, other in zip(few, more, strict=True))
    if isinstance(few, int | float):
        value = few + share * (more - few)
        return round(value) if isinstance(few, int) else value
    return type(few)(
        **{item.name: _between(getattr(few, item.name), getattr(more, item.name), share) for item in fields(few)}
    )


def model_cost(
    model: ModelConfig | str,
    kind: str,
    *,
    length: int = 128,
    labels: int = 2,
    optimizer: str = "adamw",
    pools: bool = False,
) -> ModelCost:
    """Prepare to count; no weight is read.

    Args:
        model: its ``id`` as everywhere (folder, id, ``asset:NAME``, ``arch:NAME``); a name alone stands for the
            defaults. With ``embeddings = "file"`` those of tokens cost no memory.
        kind: a key of :data:`flexp.kinds.KINDS`.
        length: tokens of an example (images: not used).
        labels: classes, of classifiers.
        optimizer: a key of :data:`STATE`.
        pools: of each text one vector crosses, as with ``privacy.pool``.

    Raises:
        ModelError: there is no such model, it cannot be split, or its embeddings cannot stay in their file.
    """
    config = ModelConfig.of(model)
    config = config.at(resolve(config.id))
    after = ModelCost(config, kind, 1, labels, optimizer) if pools else None
    return ModelCost(config, kind, length, labels, optimizer, after)
