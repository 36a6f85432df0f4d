"""What applications may ask for: the parts of the OpenAI API that a text model has, and clear words about the rest."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexp.serving.writer import GenerationConfig

MOST_STOPS = 16
MOST_TOKENS = 1 << 24
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "response_format": ({"type": "text"},), "prediction": (), "web_search_options": (), "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    # Not OpenAI's, but other servers': how to choose, when to end, and what to make of the messages.
    "min_p": (0,), "typical_p": (1,), "top_a": (0,), "tfs": (1,), "tfs_z": (1,), "mirostat": (0,), "min_tokens": (0,),
    "max_new_tokens": (), "n_predict": (-1,), "repeat_penalty": (1,), "length_penalty": (1,),
    "no_repeat_ngram_size": (0,), "use_beam_search": (False,), "num_beams": (1,), "beam_width": (1,),
    "early_stopping": (False,), "do_sample": (True,),
    "stop_token_ids": ([],), "ignore_eos": (False,), "include_stop_str_in_output": (False,), "bad_words": ([],),
    "allowed_token_ids": ([],), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (), "prompt_logprobs": (), "logits_processors": ([],), "structured_outputs": ({},),
    "guided_choice": ([],), "guided_json": (), "guided_regex": (), "guided_grammar": (), "grammar": ("",),
    "json_schema": (), "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],),
    "continue_final_message": (False,), "add_generation_prompt": (True,),
}  # fmt: skip
"""What would change an answer and cannot be had, with the values that ask for nothing."""
NOT_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],), "function_call": (), "tool_call_id": (), "audio": (), "prefix": (False,),
}  # fmt: skip
"""The same of one message: parts of it that the model would not be told of."""


class Refused(Exception):  # noqa: N818  (an answer, not a failure)
    """A request that gets an error; ``param``: the part of it that is at fault."""

    def __init__(self, status: int, text: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(text)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Asked(BaseModel):
    """Keys that neither this nor :data:`NOT_HERE` knows are left alone: such as say who asks, or what to keep."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)  # not OpenAI's, but many servers'
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)  # the same
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def generation(self, most: int) -> GenerationConfig:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS:
            raise Refused(400, f"stop has {len(stops)} texts, expected at most {MOST_STOPS}", "stop")
        seed = None if self.seed is None else self.seed % 2**62
        return GenerationConfig(
            most, self.temperature, self.top_p, self.top_k, self.repetition_penalty, tuple(stops), seed
        )


class ChatRequest(_Asked):
    """``POST /v1/chat/completions``."""

    NOTHING: ClassVar = {"add_special_tokens": (False,)}
    messages: list[_Message] = Field(min_length=1)


class CompletionRequest(_Asked):
    """``POST /v1/completions``; a prompt is a text or its tokens, and there may be several."""

    NOTHING: ClassVar = {"add_special_tokens": (True,), "logprobs": ()}  # 0 asks for those of the tokens that it wrote
    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


def read(kind: type[Any], body: Any) -> Any:
    """The request in a JSON body.

    Raises:
        Refused: it is none, or asks for what cannot be had.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the body is no JSON object")
    _refuse(body, NOT_HERE | kind.NOTHING)
    messages = body.get("messages")
    for at, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            _refuse(message, NOT_IN_MESSAGES, f"messages.{at}.")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(400, f"{where}: {first['msg']}", where) from error


def _refuse(body: dict[str, Any], unknown: dict[str, tuple[Any, ...]], where: str = "") -> None:
    for key, nothing in unknown.items():
        value = body.get(key)
        if value is None or any(type(value) is type(one) or _number(value, one) for one in nothing if one == value):
            continue
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        raise Refused(
            400, f"{where}{key} = {shown} cannot be had of this model; leave it out", f"{where}{key}", "unsupported"
        )


def _number(value: Any, other: Any) -> bool:
    """Whether both are numbers; a truth value is none."""
    return not isinstance(value, bool) and not isinstance(other, bool) and isinstance(value, (int, float))
