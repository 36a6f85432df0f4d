"""The endpoint as a web application: one answer at a time, others wait in line."""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flexp.errors import ConfigError, DataError, FlexpError, LinkError
from flexp.serving.requests import ChatRequest, CompletionRequest, Refused, read
from flexp.serving.writer import GenerationConfig, Writer, Written

MOST_BYTES = 4 << 20
MOST_WAITING = 32
COMPLETION_TOKENS = 16  # as OpenAI's /v1/completions
DONE = b"data: [DONE]\n\n"
LOOPBACK = ["127.0.0.1", "localhost", "[::1]", "testserver"]

Prompt = Callable[[], list[int]]
"""Makes a prompt's tokens."""
Write = Callable[..., Written]


@dataclass(frozen=True)
class Shape:
    """How chats and completions differ: their names, and what a piece and a whole answer look like."""

    prefix: str
    name: str
    piece_name: str
    piece: Callable[[str], dict[str, Any]]
    whole: Callable[[str], dict[str, Any]]
    openings: tuple[dict[str, Any], ...] = ()


CHAT = Shape(
    "chatcmpl", "chat.completion", "chat.completion.chunk",
    lambda text: {"delta": {"content": text} if text else {}},
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    ({"delta": {"role": "assistant", "content": ""}},),
)  # fmt: skip
COMPLETION = Shape(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}
)


class Endpoint:
    """Answers for one writer.

    Args:
        api_key: what applications must say, if anything.
        chat_tokens: of a chat's answer where the application sets no limit.
    """

    def __init__(self, writer: Writer, api_key: str | None = None, chat_tokens: int = 512) -> None:
        self._writer, self._key, self._chat_tokens = writer, api_key, chat_tokens
        self._began = int(time.time())
        self._line = asyncio.Lock()
        self._waiting = 0

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        asked: ChatRequest = await self._read(request, ChatRequest)
        messages = [message.plain() for message in asked.messages]
        generation = asked.generation(asked.most or self._chat_tokens)
        return await self._answer(request, asked, CHAT, [lambda: self._writer.ids_of_chat(messages)], generation)

    async def completion(self, request: Request) -> Response:
        asked: CompletionRequest = await self._read(request, CompletionRequest)
        prompts = [partial(self._ids, item) for item in asked.prompts]
        if not prompts or len(prompts) > MOST_WAITING:
            raise Refused(400, f"{len(prompts)} prompts came, expected 1 to {MOST_WAITING}", "prompt")
        return await self._answer(
            request, asked, COMPLETION, prompts, asked.generation(asked.most or COMPLETION_TOKENS)
        )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self._writer.ids_of(prompt) if isinstance(prompt, str) else prompt

    async def _answer(
        self, request: Request, asked: Any, shape: Shape, prompts: Sequence[Prompt], generation: GenerationConfig
    ) -> Response:
        head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._writer.client}
        if asked.stream:
            pieces = self._stream(head, shape, prompts, generation, asked.usage_in_stream)
            first = await anext(pieces)  # what is refused at once is an error, not a stream
            return StreamingResponse(_after(first, pieces), media_type="text/event-stream")
        choices, found, write = [], [], partial(self._writer.write, chat=shape is CHAT)
        async with self._turn():
            for index, prompt in enumerate(prompts):
                ids, cancelled = await _tokens(prompt, shape), threading.Event()
                work = asyncio.create_task(_in_thread(write, ids, generation, lambda _: None, cancelled))
                written = await _unless_gone(request, work, cancelled)
                found.append(written)
                choices.append(_choice(index, shape.whole(written.text), written.reason))
        return JSONResponse({**head, "object": shape.name, "choices": choices, "usage": _usage(found)})

    async def _stream(
        self,
        head: dict[str, Any],
        shape: Shape,
        prompts: Sequence[Prompt],
        generation: GenerationConfig,
        with_usage: bool,
    ) -> AsyncIterator[bytes]:
        head = {**head, "object": shape.piece_name}
        found: list[Written] = []
        write = partial(self._writer.write, chat=shape is CHAT)
        loop, begun = asyncio.get_running_loop(), False
        async with self._turn():
            for index, prompt in enumerate(prompts):
                pieces: asyncio.Queue[str | None] = asyncio.Queue()
                ids, cancelled = await _tokens(prompt, shape), threading.Event()

                def say(text: str, pieces: asyncio.Queue[str | None] = pieces) -> None:
                    loop.call_soon_threadsafe(pieces.put_nowait, text)

                work = asyncio.create_task(_in_thread(write, ids, generation, say, cancelled))
                work.add_done_callback(lambda _, pieces=pieces: pieces.put_nowait(None))  # type: ignore[misc]
                try:
                    text = await pieces.get()
                    if text is None:
                        await work  # perhaps it was refused
                    for opening in shape.openings:
                        yield _event(head, [_choice(index, opening)])
                    begun = True
                    while text is not None:
                        yield _event(head, [_choice(index, shape.piece(text))])
                        text = await pieces.get()
                    found.append(await work)
                    yield _event(head, [_choice(index, shape.piece(""), found[-1].reason)])
                except Refused as error:
                    if not begun:
                        raise
                    yield b"data: " + json.dumps(error.body()).encode() + b"\n\n"
                    return
                finally:
                    cancelled.set()  # the application may have gone in the middle of the answer
            if with_usage:
                yield _event({**head, "usage": _usage(found)}, [])
            yield DONE

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._waiting >= MOST_WAITING:
            raise Refused(429, f"{self._waiting} requests are waiting already; try again later", code="busy")
        self._waiting += 1
        try:
            async with self._line:
                yield
        finally:
            self._waiting -= 1

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Else any web page could send requests from its reader's browser, unasked.
            raise Refused(415, "expected a body of the type application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                raise Refused(413, f"the request is larger than {MOST_BYTES} bytes")
        try:
            content = from_json(bytes(body), allow_inf_nan=False)  # and no half of a surrogate pair
        except ValueError as error:
            raise Refused(400, f"the body is no JSON ({error})") from error
        asked = read(kind, content)
        self._check_model(asked.model)
        return asked

    def _check_key(self, request: Request) -> None:
        said = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key is not None and not hmac.compare_digest(said.encode(), self._key.encode()):
            raise Refused(401, "the API key is missing, or is not the one of this endpoint", code="invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._writer.client:
            raise Refused(
                404, f"there is no model {name!r} here, only {self._writer.client!r}", "model", "model_not_found"
            )

    def _card(self) -> dict[str, Any]:
        return {"id": self._writer.client, "object": "model", "created": self._began, "owned_by": "flexp"}


def make_app(writer: Writer, api_key: str | None = None, chat_tokens: int = 512, *, loopback: bool = True) -> Starlette:
    """The web application. On loopback it answers to names of this machine alone, so that no web page can reach it."""
    endpoint = Endpoint(writer, api_key, chat_tokens)
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)] if loopback else []
    return Starlette(
        routes=[
            Route("/v1/models", endpoint.models),
            Route("/v1/models/{name:path}", endpoint.model),
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
            Route("/v1/completions", endpoint.completion, methods=["POST"]),
        ],
        middleware=hosts,
        exception_handlers={Refused: _refusal, 404: _unknown, 405: _unknown, 500: _failed},
    )


async def _tokens(prompt: Prompt, shape: Shape) -> list[int]:
    """A prompt's tokens, which take their time."""
    try:
        return await asyncio.to_thread(prompt)
    except (ConfigError, DataError) as error:
        raise Refused(400, str(error), "messages" if shape is CHAT else "prompt") from error


async def _in_thread(
    write: Write, ids: list[int], generation: GenerationConfig, say: Callable[[str], None], cancelled: threading.Event
) -> Written:
    try:
        return await asyncio.to_thread(write, ids, generation, say, cancelled.is_set)
    except LinkError as error:
        raise Refused(503, f"the server of the model's middle: {error}", code="link") from error
    except DataError as error:
        raise Refused(400, str(error), "prompt", "context_length_exceeded") from error
    except FlexpError as error:
        raise Refused(400, str(error)) from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise Refused(400, "these settings leave no probabilities to choose by; use milder ones") from error


async def _unless_gone(request: Request, work: asyncio.Task[Written], cancelled: threading.Event) -> Written:
    """The answer; if the application goes away first, the model stops."""
    try:
        while not work.done():
            await asyncio.wait([work], timeout=0.25)
            if not work.done() and await request.is_disconnected():
                cancelled.set()
        return await work
    finally:
        cancelled.set()


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def _choice(index: int, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def _usage(found: list[Written]) -> dict[str, int]:
    prompt, new = sum(item.prompt_tokens for item in found), sum(item.tokens for item in found)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _event(head: dict[str, Any], choices: list[dict[str, Any]]) -> bytes:
    return b"data: " + json.dumps({**head, "choices": choices}, ensure_ascii=False).encode() + b"\n\n"


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body(), status_code=error.status)


async def _unknown(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    offered = "/v1/models, /v1/chat/completions and /v1/completions"
    text = f"{request.method} {request.url.path} is not offered here; there are {offered}"
    return JSONResponse(Refused(status, text).body(), status_code=status)


async def _failed(_: Request, error: Exception) -> Response:
    text = f"the endpoint failed ({type(error).__name__}); its own output says more"
    return JSONResponse(Refused(500, text).body(), status_code=500)
