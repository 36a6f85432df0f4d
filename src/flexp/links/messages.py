"""What crosses a link. Nothing else ever does: no token id, label, pixel or personal weight has a place here.

A message is declared here alone, or in :mod:`flexp.links.asking` or :mod:`flexp.links.passing`: its answer, its
tensors, their shapes and codecs, the bounds of its numbers (:mod:`flexp.links.declaring`).
:class:`flexp.server.Server` has a handler for each request; links carry whatever is declared. Every tensor is detached.
Shapes: B examples, T tokens, H hidden width.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from flexp.config import AlignConfig, CodecConfig, LoraConfig
from flexp.errors import FullError, LinkError, LinkLostError, StoppedError, plain
from flexp.links.declaring import (
    FLAGS,
    MASK,
    POSITIONS,
    ROWS,
    Count,
    Integer,
    Request,
    Tensors,
    hidden,
    message,
)

What = Literal["step", "evaluate", "meet", "average", "save", "restore", "stop"]


@message
class Refusal:
    """The answer to what is refused: one line that says why; ``again``: connecting and joining again may help;
    ``leave``: the server stops, and whoever takes part in its run is to save and leave; ``full``: its memory ran
    out."""

    error: str
    again: bool = False
    leave: bool = False
    full: bool = False

    @classmethod
    def of(cls, error: Exception | str) -> Refusal:
        """What an error comes to."""
        kinds = (isinstance(error, kind) for kind in (LinkLostError, StoppedError, FullError))
        return cls(plain(error), *kinds)

    def as_error(self) -> LinkError:
        """The error on the other side, with the words of this one."""
        lost = StoppedError if self.leave else LinkLostError
        return (lost if self.again else FullError if self.full else LinkError)(plain(self.error))


@message
class Welcome:
    """The server lets a client in, and says what it has to keep to.

    Attributes:
        base_depth: s_min, at which the shared blocks start.
        blocks: of the whole model.
        hidden: H.
        max_in_flight: forwards of a client that may wait for their backward.
        max_tokens: B·T of a message, at most; 0: within one process nothing is bounded.
        frame_bytes: bytes of a message's tensors, at most; 0: likewise.
        trained: a hash of the trained shared weights, where nobody trains them any more: servers with the same one can
            stand for each other. Empty: they may still change.
    """

    base_depth: Count
    blocks: Count
    hidden: Count
    max_in_flight: Count = 1
    max_tokens: Count = 0
    frame_bytes: Count = 0
    trained: Annotated[str, Field(max_length=64)] = ""


@message
class Join(Request[Welcome]):
    """A client's first message: who it is, what it keeps, and what it wants the server to do.

    Attributes:
        fingerprint: of the pretrained model (:func:`flexp.models.fingerprint.fingerprint`), which must be the server's.
        cut: (s, e); the server runs blocks [s, e) for this client.
        align: the alignment whose gradient the server is to compute.
        tuning: how the client trains its blocks; the `weights` alignment needs it to be the server's.
        lora: with what adapters, if it says so; they must be the server's if that has any.
        autocast: what it computes matrix products in, if not in ``dtype``; the server does the same.
        quantization: of the client's own blocks.
        weights: which pretrained weights it has (:func:`flexp.models.fingerprint.weights_fingerprint`), if it knows.
        numbering: which run of this client its step numbers belong to, 1 to 2⁶³ − 1; 0: it numbers none. Joining again
            with the same one goes on with the same steps.
        codec: in what form tensors are to cross, both ways; ``None``: as the link does by itself.
        examples_key: 32 bytes in hexadecimal with which the server seals examples that it keeps on its disk; empty: it
            keeps them in memory.
    """

    client: str
    fingerprint: str
    cut: tuple[Integer, Integer]
    dtype: str
    tuning: str
    align: AlignConfig
    lora: LoraConfig | None = None
    weights: str | None = None
    autocast: str = "off"
    quantization: str = "off"
    numbering: Integer = 0
    codec: CodecConfig | None = None
    examples_key: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""


@message
class ForwardReply:
    """``hidden_BTH``: what comes out of block e−1, of the rows that were asked for. ``align``: the alignment term, when
    it was due. ``kept``: whether the server keeps the examples that came, so that their numbers will do.
    ``teachers``: to the server before, z' at the aligned boundaries that are here, the cut last."""

    hidden_BTH: Annotated[Tensor, hidden("activation_down")]
    align: float | None = None
    kept: bool = False
    teachers: Annotated[tuple[Tensor, ...], Tensors()] = ()


@message
class ForwardRequest(Request[ForwardReply]):
    """Run blocks [s, e).

    Attributes:
        exchange: numbers this client's exchanges; a backward names the forward that it belongs to.
        hidden_BTH: the smashed activation z_k; (1, N, H) are the N tokens under the mask, and so with the other
            activations.
        mask_BT: the attention mask, if the client uses one.
        positions_BT: explicit positions, if the client uses any.
        base_BTH: z_base, when alignment is due on this exchange; from the server before, z' where its blocks end.
        inner_BTH: with alignment at every block, the activations after blocks s_min … s−2, in order.
        train: whether a backward will follow.
        step: of the client's steps the one that it belongs to, as in its backward; 0: not numbered. Without ``train``
            the client does it alone: the blocks run as in evaluation, and with this the step is done.
        rows_BT: the rows of h that the client reads: these alone come down, (1, R, H), and go up as ∂task/∂h; ``None``:
            those of ``hidden_BTH``.
    """

    trains: ClassVar[bool | None] = True

    exchange: Integer
    hidden_BTH: Annotated[Tensor, hidden("activation")]
    mask_BT: Annotated[Tensor | None, MASK] = None
    positions_BT: Annotated[Tensor | None, POSITIONS] = None
    base_BTH: Annotated[Tensor | None, hidden("aligned")] = None
    inner_BTH: Annotated[tuple[Tensor, ...], hidden("aligned")] = ()
    train: bool = False
    step: Integer = 0
    rows_BT: Annotated[Tensor | None, MASK] = None


@message
class KeptForwardRequest(Request[ForwardReply]):
    """A training forward of examples whose z never changes, so that each crosses once.

    Attributes:
        hidden_BTH: (1, N, H): the tokens of the fresh examples, one after the other, without padding; ``None``: there
            are none.
        mask_BT: the attention mask of the exchange.
        examples_B: the client's number of each example; the server knows nothing else of them.
        fresh_B: which of them come along; the others are kept.
        exchange, rows_BT, step: as in :class:`ForwardRequest`.
    """

    trains: ClassVar[bool | None] = True
    train: ClassVar[bool] = True

    exchange: Integer
    mask_BT: Annotated[Tensor, MASK]
    examples_B: Annotated[Tensor, ROWS]
    fresh_B: Annotated[Tensor, FLAGS]
    step: Integer = 0
    rows_BT: Annotated[Tensor | None, MASK] = None
    hidden_BTH: Annotated[Tensor | None, hidden("activation")] = None


@message
class BackwardReply:
    """``grad_BTH``: ∂total/∂z_k, unless the client said that it needs none. ``inner_BTH``: gradients at the inner
    activations, where alignment was due."""

    grad_BTH: Annotated[Tensor | None, hidden("gradient_down")] = None
    inner_BTH: Annotated[tuple[Tensor, ...], hidden("gradient_down")] = ()


@message
class BackwardRequest(Request[BackwardReply]):
    """Run blocks [s, e) backward, for an earlier forward.

    Attributes:
        grad_BTH: ∂task/∂h of the rows that came down, scaled by what this exchange counts in its step.
        step: numbers this client's steps from 1; one that was applied already is answered, and not applied again. 0:
            not numbered. A step is complete when all of its exchanges have arrived, in whatever order.
        exchanges: how many exchanges the step has, as far as is known: a later one may say more. Micro-batches share
            one.
        tokens: this exchange's share of the step's unmasked tokens, 0 < tokens ≤ 1, which its alignment counts.
        weight: how many items (tokens, examples) of the loss this exchange stands for.
        back: whether ∂total/∂z_k is to come back; a client that trains nothing below its cut needs none.
    """

    trains: ClassVar[bool | None] = True
    urgent: ClassVar[bool] = True  # behind other exchanges' z, gradients would come down only when all z are up

    exchange: Integer
    grad_BTH: Annotated[Tensor, hidden("gradient")]
    step: Integer = 0
    exchanges: Integer = 1
    tokens: float = 1.0
    weight: float = 1.0
    back: bool = True


@message
class Done:
    """The answer to what only makes the server forget something."""


@message
class Abort(Request[Done]):
    """Give up all that this client has in flight, and what its unfinished steps have gathered."""


@message
class Leave(Request[Done]):
    """The client goes; what it has in flight is dropped, and so are its caches."""


AGAIN = "asked again since"
"""Why a request that waits (:attr:`~flexp.links.declaring.Request.waits`) is refused that has come again."""


@message
class Order:
    """What a client does next.

    Attributes:
        what: ``step``: ``count`` steps. ``evaluate``: score the personal model after round ``number``. ``meet``: the
            meeting ``number``, 0 before the first step, 1 after the last (``method.meet``). ``average``: the average of
            everybody's weights after round ``number``. ``save``: keep a snapshot with that number. ``restore``: go
            back to that snapshot. ``stop``: the run is over.
        run: the run's name, the same after a restart of the server.
        place: in the schedule; the client's next :class:`Ready` says that it is done.
        save: with any order, first keep a snapshot with this number.
    """

    what: What
    run: str
    place: Integer = 0
    number: Integer = 0
    count: Integer = 1
    save: Integer | None = None


@message
class Ready(Request[Order]):
    """A client waits for its next order.

    Attributes:
        steps: that it has done in all.
        done: the place in the schedule that its last order named, and which is done; ``None``: it has just come.
        run: the run that its snapshots belong to; empty: it has none.
        snapshots: that it holds, by their numbers.
        saved: the steps that its newest snapshot has.
        facts: for the operator: losses, scores, seconds, bytes.
        met: the meetings and averages that it has been at.
        planned: steps that the whole run has for it; 0: it does not say.
    """

    waits: ClassVar[bool] = True

    steps: Integer
    done: Integer | None = None
    run: str = ""
    snapshots: tuple[Integer, ...] = ()
    saved: Integer = 0
    facts: dict[str, float] = field(default_factory=dict)
    planned: Integer = 0
    met: Count = 0
