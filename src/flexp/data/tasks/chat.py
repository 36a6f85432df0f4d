"""Chats: messages in turns as one text, by the model's own chat template or by one of ours, and which tokens answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexp.data.tasks.base import Limit
from flexp.data.tasks.text import answer_example, fields, fill, kept, opening_ids
from flexp.data.types import Example
from flexp.errors import ConfigError, DataError

Message = Mapping[str, Any]
ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT)
_FROM = {"human": "user", "gpt": ASSISTANT, "system": "system"}
"""Roles as ShareGPT calls them."""


class ChatForm:
    """How a chat becomes the text that a model reads.

    Args:
        template: with the field ``{prompt}``, for each question; an answer follows it, closed by the end-of-text token.
            ``None``: the tokenizer's own chat template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._opening = [] if template is None else opening_ids(tokenizer)

    def check(self) -> None:
        """Refuse a template that is no form of a chat, whose questions fill one field. Raises ConfigError."""
        if self.template is not None and fields(self.template) != ["prompt"]:
            raise ConfigError(f"data.template = {self.template!r} needs one field, {{prompt}}, for chats")

    def text(self, messages: Sequence[Message], asks: bool) -> str:
        """The whole chat; ``asks``: up to where the next answer begins.

        Raises:
            DataError: the template refuses these messages, or has no place for one of them.
        """
        said = [message["role"] for message in reversed(messages) if message["role"] != ASSISTANT]
        if self.template is not None and said[:1] == ["system"]:
            raise DataError(
                "a message of the system comes after the user's last one, and has no place there: the template puts it "
                "before a question; move it up"
            )
        return self._text(messages, asks)

    def _text(self, messages: Sequence[Message], asks: bool) -> str:
        """The same of a part of a chat; what comes later may have the place for its last messages."""
        if self.template is not None:
            return self._filled(messages, self.template)
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=asks, tokenize=False
            )
        except Exception as error:  # a template is a program of the model's maker, and says no in its own words
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"the model's chat template refuses these messages ({first})") from error
        return text

    def examples(self, messages: Sequence[Message], limit: Limit, place: str) -> list[Example]:
        """A chat with loss on the assistant's turns, from where an answer begins to where its turn ends.

        It is one example; or one for each answer, with what came before, where the template writes earlier turns
        otherwise than the last (some leave out an earlier answer's thoughts). What is too long loses its beginning.

        Raises:
            DataError: there is no answer, or the template does not let one see where an answer begins.
        """
        answers = [index for index, message in enumerate(messages) if index and message["role"] == ASSISTANT]
        if not answers:
            raise DataError(f"{place}: the chat has no answer of the {ASSISTANT} to something; remove the row")
        messages = messages[: answers[-1] + 1]
        try:
            spans = [(self._text(messages[:i], True), self._text(messages[: i + 1], False)) for i in answers]
            whole = self.text(messages, False)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if any(not end.startswith(start) for start, end in spans):
            raise DataError(
                f"{place}: the model's chat template begins an answer in another way than it asks for one, so that "
                "what was trained would never be asked for; set data.template, with the field {prompt}"
            )
        if all(whole.startswith(end) for _, end in spans):
            chats = [(whole, [(len(start), len(end)) for start, end in spans])]
        else:
            chats = [(end, [(len(start), len(end))]) for start, end in spans]
        return [_example(self.tokenizer, *self._tokens(text, parts), limit, place) for text, parts in chats]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that :meth:`text` made. (The model's own template writes opening tokens out.)"""
        plain = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*self._opening, *map(int, plain)]

    def _filled(self, messages: Sequence[Message], template: str) -> str:
        end, text, system = self.tokenizer.eos_token or "\n\n", "", ""
        for message in messages:
            if message["role"] == "system":
                system += message["content"] + "\n\n"
            elif message["role"] == ASSISTANT:
                text += ("" if not text or text[-1].isspace() else " ") + message["content"] + end
            elif message["role"] == "user":
                text += fill(template, {"prompt": system + message["content"]})
                system = ""
            else:
                raise DataError(f"a chat has messages of {', '.join(ROLES)} here, not of {message['role']!r}")
        return text

    def _tokens(self, text: str, parts: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The tokens of ``text``, and which of them reach into one of its ``parts``."""
        if not getattr(self.tokenizer, "is_fast", False):
            ids, marked = self.ids(text), list[int]()
            for start, end in parts:
                marked += range(*(_common(ids, self.ids(text[:border])) for border in (start, end)))
            return ids, marked
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        marked = [
            at
            for at, (first, last) in enumerate(made["offset_mapping"], start=len(self._opening))
            if any(first < end and last > start for start, end in parts)
        ]
        return [*self._opening, *made["input_ids"]], marked


def messages_of(value: Any, column: str, place: str) -> list[Message]:
    """A chat from a row: a list of messages with ``role`` and ``content``, or as ShareGPT names them.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, dict) and all(isinstance(item, list) for item in value.values()):  # a struct of lists
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(
            f"{place}: the column {column!r} holds no chat; expected a list of messages, each with role and content"
        )
    messages: list[Message] = []
    for number, item in enumerate(value, start=1):
        said = {key: held for key, held in item.items() if held is not None}
        role = said.pop("role", None) or _FROM.get(str(said.get("from")), said.get("from"))
        content = said.pop("content", None) or said.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{place}: message {number} of {column!r} has no text; expected role (or from) and content (or value)"
            )
        others = {key: held for key, held in said.items() if key not in ("from", "value")}
        messages.append({**others, "role": role, "content": content})
    return messages


def _example(tokenizer: Any, ids: list[int], marked: list[int], limit: Limit, place: str) -> Example:
    """The beginning goes where it is too long, as far as the last answer."""
    if not marked:
        raise DataError(f"{place}: the chat's answers are empty; fill them in or remove the row")
    mine, last = set(marked), marked[-1]
    while last - 1 in mine:
        last -= 1
    positions, _, cut = kept(tokenizer, ids, last, limit, place)
    new = [at for at, old in enumerate(positions) if old in mine]
    return answer_example([ids[at] for at in positions], new, cut, place)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
