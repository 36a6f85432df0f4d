"""What a model costs: parameters, activations and operations of every block, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PieceCost:
    """One block, the embeddings, or the head with its loss, in one exchange.

    Attributes:
        parameters: numbers; ``weight_bytes`` theirs (buffers included).
        trained: numbers that are trained; ``trained_bytes`` theirs, and their gradients'.
        kept_bytes: activations that stay from the forward to the backward, the piece's output included.
        forward_extra: most bytes that the forward holds besides, at its worst moment.
        backward_extra: most bytes that the backward adds to what was there when it began, its gradients included.
        forward_flops: floating-point operations; ``backward_flops`` with what is computed again.
    """

    parameters: int
    weight_bytes: int
    trained: int
    trained_bytes: int
    kept_bytes: int
    forward_extra: int
    backward_extra: int
    forward_flops: float
    backward_flops: float


@dataclass(frozen=True)
class ShapeCost:
    """All pieces of a model at one micro-batch, rank and checkpointing; ``message_bytes``: of one activation (B, T, H)
    in the weights' type, before any codec."""

    embed: PieceCost
    blocks: tuple[PieceCost, ...]
    head: PieceCost
    message_bytes: int


class ModelCost:
    """Counts once for each shape that is asked for; see :func:`model_cost`.

    Attributes:
        model, kind, dtype, autocast, length: as given.
        fingerprint: of the model's configuration.
        blocks: L.
        hidden: H.
    """

    model: str
    kind: str
    dtype: str
    autocast: str
    length: int
    fingerprint: str
    blocks: int
    hidden: int

    def at(self, micro_batch: int, rank: int | None = None, checkpointing: bool = False) -> ShapeCost:
        """The cost of every piece in one exchange of ``micro_batch`` examples; ``rank`` ``None``: full tuning."""
        raise NotImplementedError

    def server_weights(self, start: int, stop: int, rank: int | None = None) -> int:
        """Bytes of shared blocks [start, stop) with their gradients and optimiser state, one copy for all clients."""
        raise NotImplementedError


def model_cost(
    model: str,
    kind: str,
    *,
    length: int = 128,
    labels: int = 2,
    dtype: str = "float32",
    autocast: str = "off",
    attention: str = "sdpa",
    train_embeddings: bool = False,
    optimizer: str = "adamw",
) -> ModelCost:
    """Prepare to count; ``model`` as everywhere (folder, id, ``asset:NAME``, ``arch:NAME``); no weight is read.

    Args:
        kind: causal-lm, sequence-classification or image-classification.
        length: tokens of an example.
        labels: classes, of classifiers.
        optimizer: of the client's own parameters: adamw and adam keep two numbers for each, sgd with momentum one.

    Raises:
        ModelError: there is no such model, or it cannot be split.
    """
    raise NotImplementedError
