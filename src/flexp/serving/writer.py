"""A trained language model and its tokenizer: prompts in, text out."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flexp.data.tasks import task_of
from flexp.data.tasks.chat import ROLES, ChatForm
from flexp.data.tasks.text import pad_id
from flexp.errors import ConfigError, DataError, ModelError
from flexp.export.client_folder import Connect
from flexp.export.opening import open_trained
from flexp.export.trained import LAST
from flexp.kinds import KINDS
from flexp.rng import RandomStream
from flexp.serving.stream import Ending, TextStream

COLDEST = 1e-4
"""A temperature below is 0: logits divided by it are more than a softmax can tell apart, or than a float holds."""
MOST_LETTERS = 32
"""Of a token, on average over a prompt; a longer text cannot fit the model, and is not tokenized to see that."""
ONE = {"num_beams": 1, "num_return_sequences": 1, "num_beam_groups": None, "diversity_penalty": None,
       "stop_strings": None}  # fmt: skip
"""Whatever the model's ``generation_config.json`` says: one answer, token by token as it is written. (Its stops are
:class:`TextStream`'s to find.)"""
Message = Mapping[str, str]


@dataclass(frozen=True)
class GenerationConfig:
    """How to write; ``None`` leaves it to the model's own ``generation_config.json``.

    Attributes:
        temperature: 0 always takes the likeliest token.
        stop: the answer ends before the first of these texts.
        seed: of sampling; ``None``: any.
        others: more options of transformers' ``generate``.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """For ``generate``.

        Raises:
            ConfigError: a value makes no sense.
        """
        for name, value, fits in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1),
            ("temperature", self.temperature, self.temperature is None or self.temperature >= 0),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty is None or 0.01 <= self.repetition_penalty <= 100,
            ),
            ("seed", self.seed, self.seed is None or -(1 << 63) <= self.seed < 1 << 64),
        ):
            if not fits:
                raise ConfigError(
                    f"{name} = {value} is not allowed: expected at least one token, a temperature of 0 or more, "
                    "0 < top_p <= 1, top_k of 1 or more, a penalty from 0.01 to 100 and a seed of 64 bits"
                )
        named = {key: getattr(self, key) for key in ("temperature", "top_p", "top_k", "repetition_penalty")}
        chosen = {key: value for key, value in named.items() if value is not None}
        if chosen.get("temperature", 1.0) < COLDEST:
            chosen = {key: value for key, value in chosen.items() if key == "repetition_penalty"}
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **chosen, **self.others}
        sampling = {"do_sample": True} if chosen.keys() - {"repetition_penalty"} else {}
        return {**sampling, **chosen, **self.others}


@dataclass(frozen=True)
class Written:
    """An answer. ``reason``: ``stop``, or ``length`` where it would have gone on; ``seconds``: it took."""

    text: str
    prompt_tokens: int
    tokens: int
    reason: Literal["stop", "length"]
    seconds: float


def _nothing(_: str) -> None:
    pass


def _never() -> bool:
    return False


def _check(_: Any, scores_BV: Any) -> Any:
    """Let logits pass that something is likeliest of; -inf is of what cannot be."""
    if bool(scores_BV.isnan().any() | scores_BV.isposinf().any()):
        raise ModelError(
            "the model answers with numbers that are not finite, so it writes nothing: it diverged in training"
        )
    return scores_BV


class Writer:
    """Writes with a model, one answer at a time.

    Args:
        client: whose model it is.
        model: what has transformers' ``generate``: a whole model, or a split one.
        positions: the longest text in tokens, where there is a limit.
        prompt: stands for the tokenizer's chat template: a text with ``{prompt}``.
        close: lets go of links.
    """

    def __init__(
        self,
        client: str,
        tokenizer: Any,
        model: Any,
        positions: int | None,
        *,
        prompt: str | None = None,
        about: str = "",
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.client, self.tokenizer, self.about = client, tokenizer, about
        self.close = close
        self._model, self._form = model, ChatForm(tokenizer, prompt)
        self._most = positions
        self._lock = threading.Lock()
        settings = getattr(getattr(model, "model", model), "generation_config", None) or model.generation_config
        ends = settings.eos_token_id
        known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        own = tokenizer.eos_token_id
        self._ends = sorted({*known, *([] if own is None else [own])})
        self._temperature = getattr(settings, "temperature", None)
        stops = getattr(settings, "stop_strings", None) or ()
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        self._pad = own if tokenizer.pad_token_id is None and own is not None else pad_id(tokenizer)

    def ids_of(self, text: str) -> list[int]:
        """The tokens of a prompt.

        Raises:
            DataError: there are none, or more than fit.
        """
        self._check_length(text)
        ids = [int(token) for token in self.tokenizer(text)["input_ids"]]
        if len(ids) > 1 and ids[-1] in self._ends:
            plain = [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
            if ids[-len(plain) :] != plain:
                ids = ids[:-1]  # a tokenizer that closes every text; what ends the prompt itself stays
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [int(self.tokenizer.bos_token_id)]
        if not ids:
            raise DataError("the prompt is empty; say something to go on from")
        return ids

    def ids_of_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a chat, up to where its next answer begins.

        Raises:
            DataError: no message, an unknown role, or the template refuses them.
            ConfigError: the tokenizer has no chat template, and the run's task has none that stands for it; or one with
                more fields than a question can fill.
        """
        if not messages or any(message.get("role") not in ROLES for message in messages):
            raise DataError(f"a chat needs messages, each with one of the roles {', '.join(ROLES)}")
        if self._form.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "this model's tokenizer has no chat template, so it cannot chat; use flexp generate or completions"
            )
        self._form.check()
        text = self._form.text(messages, asks=True)
        self._check_length(text)
        return self._form.ids(text)

    def _check_length(self, text: str) -> None:
        if self._most is not None and len(text) > MOST_LETTERS * self._most:
            raise DataError(
                f"the prompt has {len(text)} letters, which {self._most} tokens of this model cannot hold; shorten it"
            )

    def write(
        self,
        ids: Sequence[int],
        generation: GenerationConfig | None = None,
        say: Callable[[str], None] = _nothing,
        cancelled: Callable[[], bool] = _never,
        *,
        chat: bool = False,
    ) -> Written:
        """Go on from a prompt.

        Args:
            ids: its tokens.
            say: told every new piece of text at once.
            cancelled: asked after every token; the answer ends there when it says yes.
            chat: the prompt is :meth:`ids_of_chat`, so the answer's text does not begin with what parts it from that.

        Raises:
            ConfigError: a setting makes no sense, here or in the model's ``generation_config.json``.
            DataError: the prompt leaves no room, or has tokens that the model does not know.
            LinkError: the server refuses, or cannot be reached any more.
            ModelError: the model answers with numbers that are not finite, of which the likeliest is no token.
        """
        import torch

        generation = generation or GenerationConfig()
        if generation.temperature is None and self._temperature is not None and 0 <= self._temperature < COLDEST:
            generation = replace(generation, temperature=0.0)
        options = generation.options()
        room = generation.max_new_tokens if self._most is None else self._most - len(ids)
        if not ids or room < 1:
            raise DataError(f"the prompt has {len(ids)} tokens, expected 1 to {(self._most or 2) - 1}; shorten it")
        if min(ids) < 0 or max(ids) >= len(self.tokenizer):
            raise DataError(f"the prompt has tokens that do not exist: expected 0 to {len(self.tokenizer) - 1}")
        most = min(generation.max_new_tokens, room)
        stream = TextStream(self.tokenizer, say, (*generation.stop, *self._stops), alone=chat)
        prompt = torch.tensor([list(ids)], device=self._model.device)
        seed = secrets.randbits(62) if generation.seed is None else generation.seed
        with self._lock, RandomStream(seed).active():
            began = time.perf_counter()
            try:
                self._model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=most,
                    max_length=None,
                    eos_token_id=self._ends or None,
                    pad_token_id=self._pad,
                    streamer=stream,
                    stopping_criteria=[Ending(stream, cancelled)],
                    logits_processor=[_check],
                    **{**ONE, **options},
                )
            except ValueError as error:  # transformers looks at all settings together
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ConfigError(
                    f"the model cannot write with these settings ({first}); see its generation_config.json"
                ) from error
            seconds = time.perf_counter() - began
        ended = stream.stopped or (bool(stream.ids) and stream.ids[-1] in self._ends)
        return Written(stream.text, len(ids), len(stream.ids), "stop" if ended else "length", seconds)


def open_writer(
    place: Path,
    client: str | None = None,
    which: str = LAST,
    connect: Connect | None = None,
    device: str | None = None,
) -> Writer:
    """The trained language model in ``place``, ready to write; see :func:`flexp.export.opening.open_trained`.

    Raises:
        FlexpError: there is no such model, or it writes no text.
    """
    model = open_trained(place, client, which, connect, device=device)
    data = model.config.data
    task = task_of(data)
    if KINDS[task.model_kind].answers != "next-token":
        raise ConfigError(f"the model in {place} writes no text: its task is {data.task}; use flexp predict")
    return Writer(
        model.client,
        model.processor,
        model.generator,
        model.positions,
        prompt=task.chat_template(data, own=bool(getattr(model.processor, "chat_template", None))),
        about=model.about,
        close=model.close,
    )
