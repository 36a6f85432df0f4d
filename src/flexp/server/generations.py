"""Answers under way: for each of a client's, the keys and values of the blocks that the server runs for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexp.links.asking import ExtendRequest
from flexp.models.caching import PartCache, cached_plan
from flexp.models.stage import Stage


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


def bytes_of_token(stage: Stage) -> int:
    """Of the key and the value of one token in one block."""
    text = stage.model.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 1))
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    return 2 * keys * width * int(stage.model.dtype.itemsize)
