"""Text comes out whole and in order, whatever its tokens are cut into, and never what ends an answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

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


def pieces() -> PreTrainedTokenizerFast:
    """Pieces of SentencePiece, and bytes for what is none; a text's own first space is not told."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "▁漢", ","]
    inner = Tokenizer(
        models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def went_on(prompt: list[str], answer: list[str], stops: tuple[str, ...] = (), *, alone: bool = False) -> TextStream:
    tokenizer, said = pieces(), list[str]()
    stream = TextStream(tokenizer, said.append, stops, alone=alone)
    stream.put(torch.tensor([tokenizer.convert_tokens_to_ids(prompt)]))
    for token in tokenizer.convert_tokens_to_ids(answer):
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(said) == stream.text
    return stream


HAN = ["<0xE6>", "<0xBC>", "<0xA2>"]


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        (["<s>", "▁hello"], ["▁world", "▁hello"], " world hello"),
        (["▁hello"] * 20, ["▁world"], " world"),
        (["▁hello"], [",", "▁world"], ", world"),
        (["<s>"], ["▁world"], "world"),  # a text's first word
        (["▁hello", *HAN * 9], ["▁world"], " world"),
        (["▁hello", *HAN * 9], [*HAN, "▁world"], "漢 world"),
        (["▁hello", *HAN[:2]], ["▁world"], "world"),  # after a broken character nobody knows
    ],
)
def test_a_text_goes_on_from_its_prompt(prompt: list[str], answer: list[str], text: str) -> None:
    assert went_on(prompt, answer).text == text
    assert went_on(prompt, answer, alone=True).text == text.removeprefix(" ")


def test_a_space_in_front_is_part_of_a_stop() -> None:
    stream = went_on(["<s>", "▁hello"], ["▁world"], (" world",))
    assert (stream.text, stream.stopped, len(stream.ids)) == ("", True, 1)


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
