"""Texts that are being written: the next tokens of an answer, whose keys and values the server keeps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from flexp.errors import LinkError
from flexp.links.asking import EndGeneration, ExtendReply, ExtendRequest
from flexp.links.messages import Done
from flexp.links.packing import arrived, on, pack
from flexp.models.stage import Stage
from flexp.server.checks import check_positions
from flexp.server.exchanges import Exchanges
from flexp.server.generations import Answer, bytes_of_token
from flexp.server.session import Session
from flexp.server.turns import Steps, handles


class Extending(Exchanges):
    """A server with whose blocks clients write."""

    @handles.register
    def _extend(self, request: ExtendRequest, client: str) -> Steps[ExtendReply]:
        """Blocks [s, e) on the next tokens of an answer, whose cache is kept here."""
        session = self._sessions[client]
        request, sent = arrived(request, f"client {client}")
        for other in self._sessions.values():
            other.generations.drop_unused(self.config.generation_seconds)
        stage, origin = self.shared.stage, request.hidden_BTH.device
        check_extend(session, request, stage, self._sessions.values())
        hidden_BTH = session.generations.extend(on(request, stage.model.device), stage, session.join.cut)
        reply = ExtendReply(pack(hidden_BTH, sent).to(origin))
        if session.further is not None:
            try:
                reply = yield session.further.call(replace(request, hidden_BTH=reply.hidden_BTH))
            except LinkError:
                session.generations.end(request.generation)  # whoever asks again sends all of it
                raise
        return reply

    @handles.register
    def _end_generation(self, request: EndGeneration, client: str) -> Done:
        session = self._sessions[client]
        session.generations.end(request.generation)
        if session.further is not None:
            session.further.call(request)
        return Done()


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
