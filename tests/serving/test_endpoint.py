"""The endpoint, as OpenAI's own client library and a plain HTTP client see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.testclient import TestClient

from flexp.errors import ConfigError, LinkError
from flexp.serving.app import make_app
from flexp.serving.listening import check_listening
from flexp.serving.requests import NOT_HERE, ChatRequest, CompletionRequest
from flexp.serving.writer import GenerationConfig, Writer

from .tools import Scripted, writer

KEY = "0123456789abcdef"
HELLO: Any = [{"role": "user", "content": "the dog"}]
WISHES: dict[str, Any] = {
    "min_p": 0.9, "stop_token_ids": [5], "ignore_eos": True, "min_tokens": 5, "guided_choice": ["a", "b"],
    "use_beam_search": True, "continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False},
    "skip_special_tokens": False, "reasoning_effort": "high", "n": True,
}  # fmt: skip
"""What another server would heed."""


@contextmanager
def running(model: Scripted, key: str | None = None, chats: bool = True) -> Iterator[str]:
    app = make_app(writer(model, chats), key)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def client(url: str, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)


def test_the_official_client() -> None:
    model = Scripted()
    with running(model) as url, client(url) as api:
        (card,) = api.models.list().data
        assert (card.id, card.owned_by) == ("north", "flexp")
        assert api.models.retrieve("north").id == "north"

        chat = api.chat.completions.create(model="north", messages=HELLO, temperature=0.5, seed=3)
        assert chat.choices[0].message.content == "the red dog runs fast now"
        assert (chat.object, chat.choices[0].finish_reason) == ("chat.completion", "stop")
        assert chat.usage is not None
        assert (chat.usage.completion_tokens, chat.usage.total_tokens) == (7, 7 + chat.usage.prompt_tokens)
        assert model.calls[-1]["temperature"] == 0.5

        short = api.chat.completions.create(model="north", messages=HELLO, max_completion_tokens=2)
        assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("the red", "length")

        parts = list(
            api.chat.completions.create(
                model="north", messages=HELLO, stream=True, stream_options={"include_usage": True}, stop=[" fast"]
            )
        )
        assert parts[0].choices[0].delta.role == "assistant"
        words = [part.choices[0].delta.content for part in parts if part.choices and part.choices[0].delta.content]
        assert words == ["the", " red", " dog", " runs"]
        assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "stop"
        assert parts[-1].usage is not None
        assert parts[-1].usage.completion_tokens == 5

        done = api.completions.create(model="north", prompt=["the dog", "the cat"], max_tokens=3)
        assert [choice.text for choice in done.choices] == [" the red dog"] * 2
        assert [choice.index for choice in done.choices] == [0, 1]
        tokens = api.completions.create(model="north", prompt=[5, 6], stream=True)
        assert "".join(part.choices[0].text for part in tokens) == " the red dog runs fast now"
        assert model.prompts[-1] == [5, 6]


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "there is no model 'gpt-4' here, only 'north'"),
        ({"n": 2}, openai.BadRequestError, "n = 2 cannot be had"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools = "),
        ({"temperature": 9}, openai.BadRequestError, "temperature: "),
        ({"messages": []}, openai.BadRequestError, "messages: "),
        ({"messages": [{"role": "assistant", "content": "a"}]}, openai.BadRequestError, "the user begins"),
        ({"messages": [{"role": "user", "content": "the " * 70}]}, openai.BadRequestError, "the prompt has"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "stop has 17 texts"),
        ({"messages": [{"role": "user", "content": "a" * 10_000}]}, openai.BadRequestError, "has .* letters"),
        ({"extra_body": {"repetition_penalty": 1e-320}}, openai.BadRequestError, "repetition_penalty: "),
        ({"max_tokens": 10**30}, openai.BadRequestError, "max_tokens: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_errors_in_its_own_form(more: dict[str, Any], error: Any, message: str, stream: bool) -> None:
    with running(Scripted()) as url, client(url) as api, pytest.raises(error, match=message):
        api.chat.completions.create(**{"model": "north", "messages": HELLO, "stream": stream, **more})


def asked(path: str, more: dict[str, Any]) -> httpx.Response:
    """The answer to a request that also says ``more``."""
    of = {"messages": HELLO} if path.startswith("chat") else {"prompt": "the"}
    with TestClient(make_app(writer(Scripted()))) as api:
        return api.post(f"/v1/{path}", json={"model": "north", "max_tokens": 2, **of, **more})


@pytest.mark.parametrize(
    ("path", "more"),
    [
        *((path, {key: value}) for path in ("completions", "chat/completions") for key, value in WISHES.items()),
        ("completions", {"logprobs": 0}),
        ("completions", {"add_special_tokens": False}),
        ("chat/completions", {"add_special_tokens": True}),
        ("chat/completions", {"logprobs": True}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_would_change_an_answer_is_refused_by_name(path: str, more: dict[str, Any]) -> None:
    ((key, value),) = more.items()
    error = asked(path, more)
    assert (error.status_code, error.json()["error"]["param"]) == (400, key)
    assert f"{key} = {value!r} cannot be had of this model" in error.json()["error"]["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_asks_for_nothing_is_answered(path: str) -> None:
    kind = CompletionRequest if path == "completions" else ChatRequest
    asks = {key: values[0] for key, values in (NOT_HERE | kind.NOTHING).items() if values}
    for more in (asks, dict.fromkeys(NOT_HERE)):
        done = asked(path, {**more, "stream": None, "user": "somebody", "store": False})
        assert (done.status_code, done.json()["usage"]["completion_tokens"]) == (200, 2)
    done = asked(path, {"max_completion_tokens": 1})
    assert (done.status_code, done.json()["usage"]["completion_tokens"]) == (200, 1)


def test_calls_of_tools_in_a_chat_are_refused() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [*HELLO, {"role": "assistant", "content": "runs", "tool_calls": [call]}, *HELLO]
    error = asked("chat/completions", {"messages": said})
    assert (error.status_code, error.json()["error"]["param"]) == (400, "messages.1.tool_calls")
    said[1] = {"role": "assistant", "content": "runs", "tool_calls": []}
    assert asked("chat/completions", {"messages": said}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "north", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\udfff", "messages": []}',
        b'{"model": "north", "messages": [], "stop": "\\ud83d"}',
        b'{"model": "north", "temperature": NaN, "messages": []}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_text_is_refused(body: bytes) -> None:
    with running(Scripted()) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"][:19]) == (400, "the body is no JSON")


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-320, 1e-5])
def test_a_temperature_of_next_to_nothing_is_none(temperature: float) -> None:
    assert GenerationConfig(temperature=temperature).options()["do_sample"] is False
    assert GenerationConfig(temperature=0.01).options()["temperature"] == 0.01


def test_a_long_prompt_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are made in a thread, and others are answered meanwhile."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(self: Writer, text: str) -> list[int]:
        begun.set()
        assert go_on.wait(20)
        return [5, 6]

    monkeypatch.setattr(Writer, "ids_of", slow)
    with running(Scripted()) as url, client(url) as api, ThreadPoolExecutor(1) as pool:
        work = pool.submit(api.completions.create, model="north", prompt="the dog")
        assert begun.wait(20)
        assert api.models.list().data
        go_on.set()
        assert work.result(20).choices[0].text


def test_a_model_that_cannot_chat_completes() -> None:
    with running(Scripted(), chats=False) as url, client(url) as api:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            api.chat.completions.create(model="north", messages=HELLO)
        assert api.completions.create(model="north", prompt="the", max_tokens=1).choices[0].text == " the"


def test_a_broken_link_before_and_in_the_middle_of_an_answer() -> None:
    model = Scripted()

    def fail(number: int) -> None:
        if number == model.given_before_failing:  # type: ignore[attr-defined]
            raise LinkError("the server has gone")

    model.fails = fail
    with running(model) as url, client(url) as api:
        model.given_before_failing = 0  # type: ignore[attr-defined]
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="the server has gone"):
                api.completions.create(model="north", prompt="the", stream=stream)  # type: ignore[call-overload]
        model.given_before_failing = 2  # type: ignore[attr-defined]
        got = []
        with pytest.raises(openai.APIError, match="the server has gone"):
            got += [part.choices[0].text for part in api.completions.create(model="north", prompt="the", stream=True)]
        model.given_before_failing = -1  # type: ignore[attr-defined]
        assert api.completions.create(model="north", prompt="the").choices[0].finish_reason == "stop"


def test_keys() -> None:
    with running(Scripted(), key=KEY) as url:
        with client(url, KEY) as api:
            assert api.models.list().data
        for path in ("/v1/models", "/v1/models/north"):
            assert httpx.get(url + path).status_code == 401
        with client(url, KEY[:-1] + "x") as api, pytest.raises(openai.AuthenticationError, match="API key"):
            api.completions.create(model="north", prompt="the")


def test_a_web_page_cannot_use_it() -> None:
    """A browser sends plain text without asking, and names that an attacker owns may lead to this machine."""
    with running(Scripted()) as url:
        text = '{"model": "north", "prompt": "the"}'
        assert (
            httpx.post(f"{url}/v1/completions", content=text, headers={"content-type": "text/plain"}).status_code == 415
        )
        assert httpx.get(f"{url}/v1/models", headers={"host": "evil.example"}).status_code == 400
        assert "access-control-allow-origin" not in httpx.options(f"{url}/v1/completions").headers
        assert httpx.post(f"{url}/v1/completions", json=[1]).status_code == 400
        json = {"content-type": "application/json"}
        assert httpx.post(f"{url}/v1/completions", content="{", headers=json).status_code == 400
        assert httpx.post(f"{url}/v1/completions", content="[" * 100_000, headers=json).status_code == 400
        assert httpx.post(f"{url}/v1/completions", content=b" " * (4 << 20) + b"1", headers=json).status_code == 413
        gone = httpx.get(f"{url}/v2/other")
        assert (gone.status_code, gone.json()["error"]["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize("stream", [True, False])
def test_when_an_application_goes_away_the_model_stops(stream: bool) -> None:
    model = Scripted(end=False, pause=0.1)
    with running(model) as url:
        body = {"model": "north", "prompt": "the", "max_tokens": 60, "stream": stream}
        with suppress(httpx.ReadTimeout), httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=0.5) as got:
            assert stream  # else there is nothing to read yet
            next(got.iter_lines())
        given = -1
        while given != model.given:
            given = model.given
            time.sleep(0.5)
        assert 0 < given < 55


def test_two_at_once_wait_for_each_other() -> None:
    model = Scripted(pause=0.01)
    with running(model) as url, client(url) as api:
        found: list[str] = []

        def ask() -> None:
            found.append(api.completions.create(model="north", prompt="the", max_tokens=6).choices[0].text)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert found == [" the red dog runs fast now"] * 3


def test_beyond_this_machine_it_needs_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_listening(host, None)
    check_listening("0.0.0.0", KEY)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigError, match="set an API key"):
            check_listening(host, None)
    with pytest.raises(ConfigError, match="at least 16"):
        check_listening("127.0.0.1", "short")
