"""What a server refuses, and the one line that says why. Nothing is computed for a message that does not fit."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from flexp.config import CodecConfig, LoraConfig
from flexp.errors import BadValuesError, LinkError, LinkLostError
from flexp.links.messages import (
    BackwardRequest,
    ExtendRequest,
    FetchRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    PassedBackward,
    PullRequest,
)
from flexp.models.fingerprint import fingerprint
from flexp.models.stage import Stage
from flexp.server.generations import Answer, bytes_of_token
from flexp.server.session import Pending, Session, size_kept

LONGEST = 1 << 24
"""Tokens of a text; where a model has no table of positions, it would take any number for one."""


def check_taking_part(
    client: str, request: Join, only: Collection[str] | None, tuning: str | None, quantization: str | None
) -> None:
    """Refuse a client that does not belong to the run, or has its blocks in another way than it.

    Args:
        only: who belongs to it; ``None``: everybody.
        tuning: of the run's clients; ``None``: any. Likewise their ``quantization``.

    Raises:
        LinkError: see above.
    """
    if only is not None and client not in only:
        raise LinkError(f"client {client} takes no part in this run: it has {', '.join(only)} (deployment.clients)")
    for key, own, wanted in (
        ("tuning", request.tuning, tuning),
        ("quantization", request.quantization, quantization),
    ):
        if wanted not in (None, own):
            raise LinkError(
                f"client {client} was refused: its {key} is {own}, that of this server's clients {wanted}; set the "
                f"same model.{key} on both sides"
            )


def check_join(
    client: str,
    request: Join,
    stage: Stage,
    blocks: tuple[int, int],
    tuning: str,
    lora: LoraConfig | None,
    codecs: Collection[str] | None = None,
) -> None:
    """Refuse a client whose model or cut does not go with the shared ``blocks`` of ``stage``, tuned as ``tuning``.

    ``codecs`` are those that it may ask for; ``None``: any.

    Raises:
        LinkError: see above.
    """
    start, stop = blocks
    cut_start, cut_stop = request.cut
    problem = None
    odd = [name for name in (request.codec or CodecConfig()).names() if codecs is not None and name not in codecs]
    if request.client != client:
        problem = f"its message names another client, {request.client}"
    elif not 0 <= request.numbering < 1 << 63:
        problem = f"it numbers its steps in the run {request.numbering}, expected 0 to 2**63 - 1"
    elif request.fingerprint != fingerprint(stage.model.config):
        problem = "its model is another one than the server's; load the same pretrained model on both sides"
    elif request.weights != stage.weights:
        problem = (
            f"its pretrained weights ({request.weights or 'unknown'}) are not the server's "
            f"({stage.weights or 'unknown'}); load the same pretrained model on both sides"
        )
    elif request.tuning == tuning == "lora" and request.lora != lora:
        problem = f"its LoRA settings ({request.lora}) are not the server's ({lora}); set the same model.lora"
    elif request.dtype != str(stage.model.dtype):
        problem = f"it computes in {request.dtype}, the server in {stage.model.dtype}; set the same model.dtype"
    elif request.autocast != stage.autocast_name:
        problem = (
            f"it computes with autocast = {request.autocast}, the server with {stage.autocast_name}; set the same "
            "model.autocast"
        )
    elif not start <= cut_start < cut_stop <= stop:
        problem = f"its cut {request.cut} needs blocks that the server does not hold: it has [{start}, {stop})"
    elif request.align.kind == "weights" and request.tuning != tuning:
        problem = (
            f"alignment in weight space needs the same tuning on both sides: the client's is {request.tuning}, "
            f"the server's {tuning}"
        )
    elif odd:
        problem = f"it asks for the codec {odd[0]}, the server has {', '.join(codecs or ())}; set another link.codec"
    if problem:
        raise LinkError(f"client {client} was refused: {problem}")


def check_forward(session: Session, request: ForwardRequest, stage: Stage, in_flight: int) -> None:
    """Refuse a forward that does not fit the model, what was agreed on joining, or the bound on what is in flight.

    Raises:
        LinkLostError: others keep so much that it may be answered later.
        LinkError: see above.
    """
    client, hidden = session.join.client, request.hidden_BTH
    if hidden.dim() != 3 or hidden.shape[2] != stage.anatomy.hidden or hidden.dtype != stage.model.dtype:
        raise LinkError(
            f"client {client}: the activation is {_facts(hidden)}, "
            f"expected (B, T, {stage.anatomy.hidden}) {stage.model.dtype}"
        )
    shape = tuple(hidden.shape[:2])
    one_row = (1, shape[1])  # models broadcast positions; a mask says of every token whether it counts
    for name, value, fits in (
        ("mask", request.mask_BT, {shape}),
        ("positions", request.positions_BT, {shape, one_row}),
        ("rows", request.rows_BT, {shape}),
    ):
        if value is not None and tuple(value.shape) not in fits:
            raise LinkError(f"client {client}: the {name} has shape {tuple(value.shape)}, expected {shape}")
    if request.rows_BT is not None and not bool(request.rows_BT.any()):
        raise LinkError(f"client {client}: no row of exchange {request.exchange} is read, expected one at least")
    check_positions(client, request.positions_BT, stage)
    _check_aligned(session, request, min(stage.part.blocks))
    if request.exchange in session.pending:
        raise LinkError(f"client {client}: exchange {request.exchange} is in flight already")
    if not request.train:
        return
    own, config = len(session.pending), session.config
    if own >= config.max_in_flight:
        raise LinkError(
            f"client {client}: {own} exchanges are in flight, the most that server.max_in_flight allows; "
            "send a backward first, give them up with model.abort(), or raise the bound"
        )
    if in_flight >= config.max_in_flight_total and not session.pending:
        raise LinkError(
            f"client {client}: {in_flight} exchanges of all clients are in flight, the most that "
            "server.max_in_flight_total allows, and its own thread holds some, so it cannot wait; send their backwards "
            "first, or raise the bound"
        )
    size = size_kept(request)
    if not session.has_room(size, graph=False):
        if not session.kept_bytes and size <= config.max_kept_bytes:
            raise LinkLostError(f"client {client}: others fill server.max_kept_bytes, and {size} more are beyond its "
                                f"share, {session.share_bytes}; do the step again")  # fmt: skip
        raise LinkError(
            f"client {client}: {session.kept_bytes} bytes wait for its backwards, and {size} more are beyond its share "
            f"of server.max_kept_bytes, {session.share_bytes}, while others need theirs; send a backward first, use "
            "smaller (micro-)batches, or raise the bound"
        )


def check_backward(session: Session, request: BackwardRequest | PassedBackward) -> Pending:
    """The forward in flight that ``request`` belongs to.

    Raises:
        LinkError: there is none, or the gradient does not fit it.
    """
    client = session.join.client
    pending = session.pending.get(request.exchange)
    if pending is None and request.exchange in session.late:
        since = session.late[request.exchange]
        session.progress.held(since)  # that long it takes, and may the next time
        raise LinkLostError(
            f"client {client}: the backward of exchange {request.exchange} comes after {time.monotonic() - since:.3g} "
            "s, and it was given up (server.exchange_seconds, or server.hold_seconds while others wait); do the step "
            "again"
        )
    if pending is None:
        raise LinkError(
            f"client {client}: exchange {request.exchange} has no forward in flight "
            f"(in flight: {sorted(session.pending) or 'none'})"
        )
    given, whole = request.grad_BTH, pending.input_BTH
    shape = whole.shape if pending.reads is None else (1, len(pending.reads), whole.shape[2])
    if tuple(given.shape) != tuple(shape) or given.dtype != whole.dtype:
        raise LinkError(
            f"client {client}: the gradient is {_facts(given)}, expected {tuple(shape)} {whole.dtype} as the activation"
        )
    base, sent = getattr(request, "base_BTH", None), pending.sent  # from the server before
    crossed = whole.shape if sent is None else (1, len(sent), whole.shape[2])
    if base is not None and (tuple(base.shape) != tuple(crossed) or base.dtype != whole.dtype):
        raise LinkError(f"client {client}: what is taught is {_facts(base)}, expected {tuple(crossed)} {whole.dtype}")
    most = whole.shape[0] * whole.shape[1]  # items are tokens or examples; more would outweigh the other clients'
    if not (0 < request.tokens <= 1 and 0 < request.weight <= most):
        raise LinkError(
            f"client {client}: exchange {request.exchange} counts tokens = {request.tokens} and weight = "
            f"{request.weight}, expected 0 < tokens <= 1 and 0 < weight <= {most}, its tokens"
        )
    step = session.gathered.get(request.step)
    least = step.exchanges if step else 1
    if request.exchanges < least:
        raise LinkError(
            f"client {client}: step {request.step} has {request.exchanges} exchanges now, "
            f"expected {f'{least} as before, or more' if step else 'at least 1'}"
        )
    if step is None and len(session.gathered) >= session.config.max_in_flight:
        raise LinkError(
            f"client {client}: {len(session.gathered)} steps are unfinished, the most that server.max_in_flight "
            "allows; send their other exchanges first, or give them up with model.abort()"
        )
    return pending


def alike(given: Tensor, answered: Tensor) -> bool:
    """Whether what comes again is of the size that was answered; else (smaller exchanges since) it is computed anew."""
    return given.shape == answered.shape and given.dtype == answered.dtype


def same_exchange(session: Session, request: ForwardRequest, answered: ForwardReply) -> bool:
    """Whether a forward that comes again, as it crossed, is the one that was answered so."""
    back = session.progress.answer(request.step, ("backward", request.exchange))
    given = request.hidden_BTH
    if back is not None and back.grad_BTH is not None and not alike(given, back.grad_BTH):
        return False
    if request.rows_BT is not None:
        return answered.hidden_BTH.shape[1] == int(request.rows_BT.sum())
    return alike(given, answered.hidden_BTH)


def check_pull(session: Session, request: PullRequest, base_depth: int) -> None:
    """Refuse to hand out weights of other blocks than this client's aligned ones.

    Raises:
        LinkError: see above.
    """
    stop = session.cut[0]
    if not base_depth <= request.start < request.stop <= stop:
        raise LinkError(
            f"client {session.join.client}: the weights of blocks [{request.start}, {request.stop}) were asked for, "
            f"expected some of its aligned blocks [{base_depth}, {stop})"
        )
    if request.first < 0 or request.most < 1:
        raise LinkError(
            f"client {session.join.client}: weights from tensor {request.first} on, {request.most} bytes at most, were "
            "asked for; expected a tensor from 0 on and at least one byte"
        )


def check_fetch(session: Session, request: FetchRequest, shared: tuple[int, int], allowed: bool) -> None:
    """Refuse to give a shared block to a client unless it keeps a copy of its own, which may begin with it; of the
    blocks that the server runs for it only where the operator gives them away.

    Args:
        shared: (s_min, e_max).

    Raises:
        LinkError: see above.
    """
    client, (start, stop), (low, high) = session.join.client, session.cut, shared
    if start <= request.block < stop and not allowed:
        raise LinkError(
            f"client {client}: this server gives no shared blocks away; its operator allows it with --allow-export "
            "(deployment.allow_export = true)"
        )
    if not low <= request.block < high or request.first < 0 or request.most < 1:
        raise LinkError(
            f"client {client}: block {request.block} from tensor {request.first} on, {request.most} bytes at most, was "
            f"asked for; expected one of the shared blocks [{low}, {high}), a tensor from 0 on and at least one byte"
        )


def check_positions(client: str, positions_BT: Tensor | None, stage: Stage) -> None:
    """Refuse positions that no text of this model has.

    Raises:
        BadValuesError: see above.
    """
    if positions_BT is None:
        return
    config = stage.model.config.get_text_config()
    turned = any(name.startswith(("rope", "rotary")) for name in config.to_dict())  # positions have no table
    most = LONGEST if turned else getattr(config, "max_position_embeddings", None) or LONGEST
    low, high = int(positions_BT.min()), int(positions_BT.max())
    if low < 0 or high >= most:
        raise BadValuesError(f"client {client}: its positions go from {low} to {high}, expected 0 to {most - 1}")


def check_finite(client: str, what: str, values: Iterable[Tensor]) -> None:
    """Refuse numbers that are not finite.

    Raises:
        BadValuesError: see above.
    """
    for value in values:
        if not bool(torch.isfinite(value).all()):
            raise BadValuesError(f"client {client}: {what} is not finite; lower train.personal.lr, or use float32")


def check_extend(session: Session, request: ExtendRequest, stage: Stage, everybody: Collection[Session]) -> None:
    """Refuse tokens that do not fit the model, or do not go on where the server is, or for which there is no room.

    Raises:
        LinkError: see above.
    """
    client, hidden, own = session.join.client, request.hidden_BTH, session.generations
    who = f"client {client}: answer {request.generation}"
    if hidden.dim() != 3 or hidden.shape[2] != stage.anatomy.hidden or hidden.dtype != stage.model.dtype:
        raise LinkError(
            f"{who}: the activation is {tuple(hidden.shape)} {hidden.dtype}, "
            f"expected (B, T, {stage.anatomy.hidden}) {stage.model.dtype}"
        )
    if stage.anatomy.image:
        raise LinkError(f"{who}: this server's model answers about images, it writes no text")
    batch, new = hidden.shape[:2]
    for name, value, fits in (
        ("mask", request.mask_BT, {(batch, new)}),
        ("positions", request.positions_BT, {(batch, new), (1, new)}),
        ("rows", request.rows_B, {(batch,)}),
    ):
        if value is not None and tuple(value.shape) not in fits:
            raise LinkError(f"{who}: the {name} has shape {tuple(value.shape)}, expected {min(fits, key=len)}")
    check_positions(client, request.positions_BT, stage)
    answer = own.answers.get(request.generation)
    held = answer.cache.length if answer is not None else 0
    if request.past and request.past != held:
        raise LinkError(
            f"{who} goes on after {request.past} tokens, but the server holds {held} of it; send all of it again, "
            "with past = 0"
        )
    if request.past and answer is not None:
        _check_goes_on(who, request, answer)
    _check_room(session, request, stage, everybody)


def _check_goes_on(who: str, request: ExtendRequest, answer: Answer) -> None:
    batch = request.hidden_BTH.shape[0]
    if (request.mask_BT is None) != (answer.mask_BT is None):
        begun, now = ("without", "with") if answer.mask_BT is None else ("with", "without")
        raise LinkError(f"{who} began {begun} a mask and goes on {now} one; keep to one of them")
    if request.rows_B is None and batch != answer.batch:
        raise LinkError(f"{who} has {batch} rows now, expected {answer.batch} as before, or rows that say which")
    if request.rows_B is not None:
        rows = request.rows_B
        if rows.dtype != torch.int64:
            raise LinkError(f"{who}: the rows are {rows.dtype}, expected torch.int64")
        if int(rows.min()) < 0 or int(rows.max()) >= answer.batch:
            raise LinkError(f"{who}: the rows {rows.tolist()[:8]} do not exist, expected 0 to {answer.batch - 1}")


def _check_room(session: Session, request: ExtendRequest, stage: Stage, everybody: Collection[Session]) -> None:
    config, client, own = session.config, session.join.client, session.generations
    others = {number: answer for number, answer in own.answers.items() if number != request.generation}
    if len(others) >= config.max_generations:
        raise LinkError(
            f"client {client}: {len(others)} answers are under way, the most that server.max_generations allows; end "
            "one of them, or raise the bound"
        )
    total = sum(len(other.generations.answers) for other in everybody) - (len(own.answers) - len(others))
    if total >= config.max_generations_total:
        raise LinkError(
            f"client {client}: {total} answers of all clients are under way, the most that "
            "server.max_generations_total allows; try again when some are through, or raise the bound"
        )
    batch, new = request.hidden_BTH.shape[:2]
    tokens = sum(answer.tokens for answer in others.values()) + batch * (request.past + new)
    if tokens > config.max_cached_tokens:
        raise LinkError(
            f"client {client}: its answers would have {tokens} tokens, server.max_cached_tokens allows at most "
            f"{config.max_cached_tokens}; use fewer or shorter ones, or raise the bound"
        )
    start, stop = session.join.cut
    added = batch * new * (stop - start) * bytes_of_token(stage)
    held = sum(other.generations.bytes for other in everybody)
    if held + added > config.max_cached_bytes:
        raise LinkError(
            f"client {client}: the caches of all clients would take {held + added} bytes, server.max_cached_bytes "
            f"allows at most {config.max_cached_bytes}; try again when some are through, or raise the bound"
        )


def _check_aligned(session: Session, request: ForwardRequest, base_depth: int) -> None:
    client, hidden = session.join.client, request.hidden_BTH
    given = [value for value in (request.base_BTH, *request.inner_BTH) if value is not None]
    if not given:
        return
    for value in given:
        if value.shape != hidden.shape or value.dtype != hidden.dtype:
            raise LinkError(f"client {client}: an aligned activation is {_facts(value)}, expected {_facts(hidden)}")
    depth, align = session.cut[0] - base_depth, session.align
    inner = depth - 1 if align.at == "every-block" and align.has_term and not session.led else 0
    wanted = depth > 0 and ((align.teach and not session.led) or align.has_term)
    if not wanted or request.base_BTH is None or len(request.inner_BTH) != inner:
        raise LinkError(
            f"client {client}: {len(given)} activations came for alignment, expected {1 + inner if wanted else 0} "
            f"with align.kind = {session.align.kind!r} at {session.align.at!r} and {depth} aligned blocks"
        )


def _facts(value: Tensor) -> str:
    return f"{tuple(value.shape)} {value.dtype}"
