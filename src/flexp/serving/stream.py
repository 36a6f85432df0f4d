"""From tokens to text, piece by piece: whole characters only, nothing of what ends an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

UNFINISHED = "\ufffd"  # what a tokenizer makes of a part of a character
CONTEXT = 8  # tokens of the prompt, the last: as many as a character and the word before it may take


class TextStream(BaseStreamer):  # type: ignore[misc]
    """Takes tokens from ``generate`` and hands on text as soon as it cannot change any more.

    Args:
        say: called with every new piece of text.
        stops: the answer ends before the first of them; so what may become one is kept back.
        alone: the answer is a text of its own, as in a chat. Else it goes on from the prompt: some tokenizers drop the
            space in front of a text's first word, which is then none.
    """

    def __init__(
        self, tokenizer: Any, say: Callable[[str], None], stops: Sequence[str] = (), *, alone: bool = False
    ) -> None:
        self._tokenizer, self._say, self._stops = tokenizer, say, tuple(stop for stop in stops if stop)
        self._alone = alone
        self._context: list[int] = []  # in front of ids[0]
        self.ids: list[int] = []
        self.text = ""  # all of it, with what is kept back
        self.stopped = False  # by one of ``stops``
        self._said = 0
        self._from = self._read = 0  # ids[_from:_read] are the tokens before the next ones: spaces depend on them
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt first, then token after token."""
        if self._prompt:
            self._prompt = False
            if not self._alone:
                self._look_back(value.reshape(-1)[-CONTEXT:].tolist())
            return
        self.ids += value.reshape(-1).tolist()
        if self.stopped:
            return
        before, now = self._decode(self._from, self._read), self._decode(self._from, len(self.ids))
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return
        self._from, self._read = self._read, len(self.ids)
        self._add(now[len(before) :])

    def end(self) -> None:
        """No more tokens: what was kept back is said."""
        if not self.stopped:
            self._add(self._decode(self._from, len(self.ids))[len(self._decode(self._from, self._read)) :])
        if not self.stopped:
            self._hand_on(len(self.text))

    def _add(self, new: str) -> None:
        start = max(0, len(self.text) - max((len(stop) for stop in self._stops), default=0))
        self.text += new
        found = [place for stop in self._stops if (place := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            self._hand_on(len(self.text))
        else:
            self._hand_on(len(self.text) - self._kept_back())

    def _kept_back(self) -> int:
        """How many of the last characters may be the beginning of a stop."""
        lengths = (size for stop in self._stops for size in range(1, len(stop)) if self.text.endswith(stop[:size]))
        return max(lengths, default=0)

    def _hand_on(self, until: int) -> None:
        if until > self._said:
            self._say(self.text[self._said : until])
            self._said = until

    def _look_back(self, prompt: list[int]) -> None:
        """Keep what the first token is read after, from where a character begins to where one ends."""
        while prompt and UNFINISHED in self._text(prompt):
            prompt = prompt[1:]
        self._context = prompt

    def _decode(self, start: int, stop: int) -> str:
        return self._text([*([] if start else self._context), *self.ids[start:stop]])

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class Ending(StoppingCriteria):  # type: ignore[misc]
    """Ends ``generate`` when the stream has met a stop, or somebody has lost interest."""

    def __init__(self, stream: TextStream, cancelled: Callable[[], bool]) -> None:
        self._stream, self._cancelled = stream, cancelled

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        over = self._stream.stopped or self._cancelled()
        return torch.full((input_ids.shape[0],), over, device=input_ids.device, dtype=torch.bool)
