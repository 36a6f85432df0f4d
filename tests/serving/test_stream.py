"""Text comes out whole and in order, whatever its tokens are cut into, and never what ends an answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexp.serving.stream import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes: a character may take four of them."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def play(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    said: list[str] = []
    stream = TextStream(Bytes(), said.append, stops)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in text.encode():
        stream.put(torch.tensor([token]))
    stream.end()
    return said, stream


@given(st.text(alphabet="ab é漢🙂\n", max_size=30))
def test_all_characters_arrive_whole(text: str) -> None:
    said, stream = play(text)
    assert "".join(said) == stream.text == text
    assert not any("\ufffd" in piece for piece in said)
    assert all(said)


@given(st.text(alphabet="abX", max_size=20), st.lists(st.text(alphabet="abX", min_size=1, max_size=3), max_size=3))
def test_nothing_of_a_stop_is_ever_said(text: str, stops: list[str]) -> None:
    said, stream = play(text, tuple(stops))
    places = [text.find(stop) for stop in stops if stop in text]
    # the stop that is complete first ends the answer, not the one that begins first
    ends = [(text.find(stop) + len(stop.encode()), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(place for end, place in ends if end == min(ends)[0])] if places else text
    assert "".join(said) == stream.text == expected
    assert stream.stopped == bool(places)


def test_what_may_become_a_stop_is_kept_back() -> None:
    said: list[str] = []
    stream = TextStream(Bytes(), said.append, ("END",))
    stream.put(torch.tensor([[0]]))
    for token in b"xEN":
        stream.put(torch.tensor([token]))
    assert "".join(said) == "x"
    stream.put(torch.tensor([ord("T")]))
    assert "".join(said) == "xENT"


@pytest.mark.parametrize("tail", [b"\xf0\x9f", b"\xe6"])
def test_half_a_character_at_the_end_is_told(tail: bytes) -> None:
    said: list[str] = []
    stream = TextStream(Bytes(), said.append)
    stream.put(torch.tensor([[0]]))
    for token in b"a" + tail:
        stream.put(torch.tensor([token]))
    assert said == ["a"]
    stream.end()
    assert "".join(said) == "a\ufffd"
