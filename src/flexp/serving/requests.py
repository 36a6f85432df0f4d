"""What applications may ask for: the parts of the OpenAI API that a text model has, and clear words about the rest."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexp.serving.writer import GenerationConfig

MOST_STOPS = 16
MOST_TOKENS = 1 << 24
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "response_format": ({"type": "text"},), "prediction": (), "web_search_options": (),
}  # fmt: skip
"""What would change an answer and cannot be had, with the values that ask for nothing."""


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
    """Keys that this does not know are left alone: they ask for nothing that changes the text."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)  # not OpenAI's, but many servers'
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)  # the same
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)

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

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Asked):
    """``POST /v1/completions``; a prompt is a text or its tokens, and there may be several."""

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
    for key, nothing in NOT_HERE.items():
        value = body.get(key)
        if value is not None and value not in nothing:
            raise Refused(400, f"{key} = {value!r} cannot be had of this model; leave it out", key, "unsupported")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(400, f"{where}: {first['msg']}", where) from error
