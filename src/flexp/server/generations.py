"""Answers under way: for each of a client's, the keys and values of the blocks that the server runs for it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexp.errors import LinkError
from flexp.links.messages import ExtendRequest
from flexp.models.caching import PartCache, cached_plan
from flexp.models.stage import Stage

if TYPE_CHECKING:
    from flexp.server.session import Session


@dataclass
class Answer:
    """One answer under way. ``mask_BT`` is over all tokens so far; ``used`` in seconds of the monotonic clock."""

    cache: PartCache
    batch: int
    mask_BT: Tensor | None
    used: float = 0.0

    @property
    def tokens(self) -> int:
        """batch × length."""
        return self.batch * self.cache.length


@dataclass
class Generations:
    """The answers of one client, by their numbers."""

    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers.values())

    @property
    def bytes(self) -> int:
        return sum(answer.cache.bytes for answer in self.answers.values())

    def extend(self, request: ExtendRequest, stage: Stage, cut: tuple[int, int]) -> Tensor:
        """Run the new tokens through blocks [s, e); (B, T, H)."""
        answer = self.answers.pop(request.generation, None)  # if this fails in its middle, the answer is lost
        batch, new = request.hidden_BTH.shape[:2]
        if stage.model.training:  # telling every module takes as long as a small block
            stage.model.train(False)
        with torch.no_grad():
            if answer is None or not request.past:
                answer = Answer(PartCache(stage.model, frozenset(range(*cut))), batch, request.mask_BT)
            else:
                if request.rows_B is not None:
                    answer.cache.reorder_cache(request.rows_B)
                    answer.batch = batch
                    answer.mask_BT = None if answer.mask_BT is None else answer.mask_BT[request.rows_B]
                if request.mask_BT is not None and answer.mask_BT is not None:
                    answer.mask_BT = torch.cat([answer.mask_BT, request.mask_BT.to(answer.mask_BT)], dim=1)
            plan = cached_plan(stage, request.hidden_BTH, answer.mask_BT, request.positions_BT, answer.cache)
            hidden_BTH = stage.run(request.hidden_BTH, plan, *cut)
        answer.cache.advance(new)
        answer.used = time.monotonic()
        self.answers[request.generation] = answer
        return hidden_BTH

    def end(self, generation: int) -> None:
        """Forget an answer, if it is there."""
        self.answers.pop(generation, None)

    def drop_unused(self, seconds: float) -> None:
        """Forget the answers that had no new token for so long."""
        oldest = time.monotonic() - seconds
        self.answers = {number: answer for number, answer in self.answers.items() if answer.used >= oldest}


def drop_unused(sessions: Iterable[Session], seconds: float) -> None:
    """Forget what nobody has used for so long, of all clients."""
    for session in sessions:
        session.generations.drop_unused(seconds)


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


def bytes_of_token(stage: Stage) -> int:
    """Of the key and the value of one token in one block."""
    text = stage.model.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 1))
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    return 2 * keys * width * int(stage.model.dtype.itemsize)
