"""What crosses a link. Nothing else ever does: no token id, label, pixel or personal weight has a place here.

A message is declared here alone: its answer, its tensors, their shapes and codecs, the bounds of its numbers
(:mod:`flexp.links.declaring`). :class:`flexp.server.Server` has a handler for each request; links carry whatever is
declared. Every tensor is detached. Shapes: B examples, T tokens, H hidden width.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from flexp.config import AlignConfig, CodecConfig, LoraConfig
from flexp.errors import LinkError, LinkLostError, StoppedError, plain
from flexp.links.declaring import (
    FLAGS,
    INTEGERS,
    MASK,
    POSITIONS,
    ROWS,
    WEIGHTS,
    Count,
    Integer,
    Request,
    Tensors,
    hidden,
    message,
)

What = Literal["step", "evaluate", "meet", "save", "restore", "stop"]


@message
class Refusal:
    """The answer to what is refused: one line that says why; ``again``: connecting and joining again may help;
    ``leave``: the server stops, and whoever takes part in its run is to save and leave."""

    error: str
    again: bool = False
    leave: bool = False

    @classmethod
    def of(cls, error: Exception | str) -> Refusal:
        """What an error comes to."""
        return cls(plain(error), isinstance(error, LinkLostError), isinstance(error, StoppedError))

    def as_error(self) -> LinkError:
        """The error on the other side, with the words of this one."""
        lost = StoppedError if self.leave else LinkLostError
        return (lost if self.again else LinkError)(plain(self.error))


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
class PullReply:
    """The trained shared parameters of the aligned blocks, by their names in the model.

    Attributes:
        total: how many there are; ``weights`` holds some of them.
        same: others of them, which the client said it has.
    """

    total: Integer
    same: tuple[str, ...] = ()
    weights: Annotated[dict[str, Tensor], WEIGHTS] = field(default_factory=dict)


@message
class PullRequest(Request[PullReply]):
    """Ask for the shared weights of blocks [start, stop), which lie in [s_min, s), for alignment in weight space.

    Attributes:
        step: the client's step that it ends, whose pulls all have the same weights; 0: not numbered.
        first, most: as in :class:`FetchRequest`.
        known: of tensors of which the client holds copies, by their names, the fingerprints
            (:func:`flexp.models.fingerprint.tensor_fingerprint`): what has the same does not come. Who was cut off in
            the middle names what has come.
    """

    trains: ClassVar[bool | None] = True

    start: Integer
    stop: Integer
    step: Integer = 0
    first: Integer = 0
    most: Integer = 64 << 20
    known: dict[str, str] = field(default_factory=dict)


@message
class SumReply:
    """``values_N``: what the clients of the run gave under the request's number, added up modulo 2⁶⁴; ``notes``: what
    each said with it, by its name."""

    values_N: Annotated[Tensor | None, INTEGERS] = None
    notes: dict[str, str] = field(default_factory=dict)


@message
class SumRequest(Request[SumReply]):
    """Give integers to be added up over all clients of the run, modulo 2⁶⁴, with a note for all of them.

    What they stand for is the clients' business (:mod:`flexp.client.adding`: fixed-point numbers under masks; public
    keys). The answer comes when all have given theirs. The server sums in runs alone whose configuration says that
    clients meet.

    Attributes:
        number: which sum; asked again, it is the same one.
    """

    trains: ClassVar[bool | None] = True

    number: Count
    values_N: Annotated[Tensor | None, INTEGERS] = None
    note: Annotated[str, Field(max_length=1 << 16)] = ""


@message
class FetchReply:
    """Trained shared parameters of one block, by their names in the model.

    Attributes:
        version: how many updates the shared blocks have had; parts of one model must have the same.
        total: how many trained tensors the block has; ``weights`` holds some of them.
        same: others of them, which the client said it has.
    """

    version: Integer
    total: Integer
    same: tuple[str, ...] = ()
    weights: Annotated[dict[str, Tensor], WEIGHTS] = field(default_factory=dict)


@message
class FetchRequest(Request[FetchReply]):
    """Ask for the trained shared weights of one block: one that the client keeps a copy of itself (to begin with), or
    with the operator's permission one of the blocks [s, e) that the server runs for it.

    Attributes:
        block: its index in the model.
        first: of the block's trained tensors, in the order of their names, the first to send: a large block comes in
            several answers.
        known: as in :class:`PullRequest`.
        most: bytes of tensors that one answer may have; a single tensor that is larger comes alone.
    """

    trains: ClassVar[bool | None] = False

    block: Integer
    first: Integer = 0
    most: Integer = 64 << 20
    known: dict[str, str] = field(default_factory=dict)


@message
class ExtendReply:
    """``hidden_BTH``: what comes out of block e−1, for the new tokens."""

    hidden_BTH: Annotated[Tensor, hidden()]


@message
class ExtendRequest(Request[ExtendReply]):
    """Run blocks [s, e) on the next tokens of an answer, with the keys and values of those before.

    Attributes:
        generation: numbers this client's answers; the server keeps a cache for each.
        past: how many tokens came before, which must be what the server holds; 0 begins anew.
        hidden_BTH: the activations of the new tokens alone.
        mask_BT: of the new tokens alone; an answer that begins with a mask has one all the way.
        positions_BT: explicit positions of the new tokens, if the model takes any.
        rows_B: which row of the cache each row goes on from, where that is not the same one (beam search).
    """

    trains: ClassVar[bool | None] = False

    generation: Integer
    past: Integer
    hidden_BTH: Annotated[Tensor, hidden()]
    mask_BT: Annotated[Tensor | None, MASK] = None
    positions_BT: Annotated[Tensor | None, POSITIONS] = None
    rows_B: Annotated[Tensor | None, ROWS] = None


@message
class Done:
    """The answer to what only makes the server forget something."""


@message
class EndGeneration(Request[Done]):
    """An answer is complete, or given up: the server forgets its cache, if it has one."""

    generation: Integer


@message
class Abort(Request[Done]):
    """Give up all that this client has in flight, and what its unfinished steps have gathered."""


@message
class Leave(Request[Done]):
    """The client goes; what it has in flight is dropped, and so are its caches."""


@message
class Order:
    """What a client does next.

    Attributes:
        what: ``step``: ``count`` steps. ``evaluate``: score the personal model after round ``number``. ``meet``: the
            meeting ``number``, 0 before the first step, 1 after the last (``method.meet``). ``save``:
            keep a snapshot with that number. ``restore``: go back to that snapshot. ``stop``: the run is over.
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
        met: the meetings that it has been at (``method.meet``).
        planned: steps that the whole run has for it, by which its learning rate falls; 0: it does not fall.
    """

    steps: Integer
    done: Integer | None = None
    run: str = ""
    snapshots: tuple[Integer, ...] = ()
    saved: Integer = 0
    facts: dict[str, float] = field(default_factory=dict)
    planned: Integer = 0
    met: Count = 0


@message
class PassedReply:
    """The answer of a server that runs the blocks further on, which has applied nothing yet.

    Attributes:
        grad_BTH: at the activation that came; ``base_BTH``: at what came to be taught.
        names, norms_N: the gradients of its trained tensors of this exchange, and of the servers behind it.
        all_names, all_N: likewise of the step's exchanges so far, added up.
    """

    grad_BTH: Annotated[Tensor, hidden()]
    base_BTH: Annotated[Tensor | None, hidden()] = None
    names: tuple[str, ...] = ()
    norms_N: Annotated[Tensor | None, Tensors()] = None
    all_names: tuple[str, ...] = ()
    all_N: Annotated[Tensor | None, Tensors()] = None


@message
class PassedBackward(Request[PassedReply]):
    """A :class:`BackwardRequest` from one server to the next: its gradient is kept until a :class:`Settle` says what
    becomes of the step. ``base_BTH``: what the blocks before, where they are taught, made of z_base."""

    trains: ClassVar[bool | None] = True

    exchange: Integer
    grad_BTH: Annotated[Tensor, hidden()]
    base_BTH: Annotated[Tensor | None, Tensors()] = None
    step: Integer = 0
    exchanges: Integer = 1
    tokens: float = 1.0
    weight: float = 1.0


@message
class Behind:
    """What the servers further on say to the one before them.

    Attributes:
        end: behind the last block that they hold.
        run, snapshots: whose snapshots all of them hold, and which.
        names, norms_N: what an update is to come to that waits for its norm.
        facts: of each, by its blocks: counts for the operator.
    """

    end: Count = 0
    run: str = ""
    snapshots: tuple[Integer, ...] = ()
    names: tuple[str, ...] = ()
    norms_N: Annotated[Tensor | None, Tensors()] = None
    facts: dict[str, dict[str, float]] = field(default_factory=dict)


@message
class Lead(Request[Behind]):
    """The first word of the server before: the ``settings`` that must be the same here, by their names, and its
    ``run``, which comes later from one that is led itself, and goes on to the servers behind."""

    settings: dict[str, str] = field(default_factory=dict)
    run: str = ""


@message
class Settle(Request[Behind]):
    """A client's step is complete and judged.

    Attributes:
        client, step: whose gradient, kept since :class:`PassedBackward`; none is, where the client's cut ends before.
        take: whether it is to train the blocks; otherwise it is dropped. Without ``client``: what the update rule has
            gathered is to train them now.
        weight, scale: as the update rule has it; the gradient is scaled first.
        norm: of the whole update, which is then applied; ``None``: it is asked for, and comes with :class:`Update`.
    """

    trains: ClassVar[bool | None] = True

    client: str
    step: Integer = 0
    take: bool = True
    reaches: bool = True
    weight: float = 1.0
    scale: float | None = None
    norm: float | None = None


@message
class Update(Request[Behind]):
    """Apply what waits for its norm."""

    trains: ClassVar[bool | None] = True

    norm: float


@message
class Keep(Request[Behind]):
    """Save the state as snapshot ``number`` of ``run``, or go ``back`` to it; ``over``: the run has ended.

    Attributes:
        held: snapshots that the first server has: others may go.
    """

    number: Integer = -1
    run: str = ""
    held: tuple[Integer, ...] = ()
    back: bool = False
    over: bool = False
