"""Prompts, generation and answers of a personal model."""

from __future__ import annotations

from typing import Any

import pytest

from flexp.errors import ConfigError, DataError
from flexp.serving.writer import GenerationConfig

from .tools import Scripted, writer


def test_an_answer_its_counts_and_why_it_ends() -> None:
    model, said = Scripted(), []
    subject = writer(model)
    ids = subject.ids_of("the blue cat")
    full = subject.write(ids, say=said.append)
    assert (full.text, full.prompt_tokens, full.tokens, full.reason) == ("the red dog runs fast now", 3, 7, "stop")
    assert "".join(said) == full.text
    assert len(said) == 6
    cut = subject.write(ids, GenerationConfig(max_new_tokens=2))
    assert (cut.text, cut.tokens, cut.reason) == ("the red", 2, "length")
    stopped = subject.write(ids, GenerationConfig(stop=(" runs", "zzz")))
    assert (stopped.text, stopped.tokens, stopped.reason) == ("the red dog", 4, "stop")
    assert model.prompts == [ids] * 3


def test_it_ends_when_nobody_listens_any_more() -> None:
    model = Scripted()
    found = writer(model).write([5], cancelled=lambda: model.given >= 3)
    assert (found.text, found.reason) == ("the red dog", "length")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_k": 5}, {"do_sample": True, "temperature": 0.7, "top_k": 5}),
        ({"top_p": 0.5}, {"do_sample": True, "top_p": 0.5}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"temperature": 0.0, "top_p": 0.5}, {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
    ],
)
def test_wishes_are_options_of_generate(generation: dict[str, Any], expected: dict[str, Any]) -> None:
    model = Scripted()
    writer(model).write([5], GenerationConfig(**generation))
    fixed = ("attention_mask", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id")
    assert {key: value for key, value in model.calls[0].items() if key not in fixed} == expected
    assert model.calls[0]["eos_token_id"] == [1]


@pytest.mark.parametrize("generation", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 0}])
def test_wishes_that_make_no_sense(generation: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        writer(Scripted()).write([5], GenerationConfig(**generation))


def test_prompts_that_do_not_fit() -> None:
    model = Scripted()
    subject = writer(model)
    with pytest.raises(DataError, match="the prompt has 64 tokens, expected 1 to 63"):
        subject.write([5] * 64)
    with pytest.raises(DataError, match="tokens that do not exist"):
        subject.write([5, 10_000])
    with pytest.raises(DataError, match="the prompt is empty"):
        subject.ids_of("")
    subject.write([5] * 60)
    assert model.calls[-1]["max_new_tokens"] == 4  # what there is room for


def test_chats() -> None:
    model = Scripted()
    subject = writer(model)
    ids = subject.ids_of_chat([{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "runs"}])
    assert model.tokenizer.decode(ids).split()[-2:] == ["Answer", ":"]
    with pytest.raises(DataError, match="one of the roles"):
        subject.ids_of_chat([{"role": "robot", "content": "the"}])
    with pytest.raises(DataError, match=r"refuses these messages \(the user begins\)"):
        subject.ids_of_chat([{"role": "assistant", "content": "the"}])
    with pytest.raises(ConfigError, match="has no chat template"):
        writer(Scripted(), chats=False).ids_of_chat([{"role": "user", "content": "the"}])


def test_a_model_tuned_to_follow_instructions_chats_with_their_template() -> None:
    model = Scripted()
    subject = writer(model, chats=False, prompt="Q : {prompt} Answer :")
    said = [
        {"role": "system", "content": "now"},
        {"role": "user", "content": "the {dog}"},
        {"role": "assistant", "content": "runs"},
        {"role": "user", "content": "fast"},
    ]
    text = model.tokenizer.decode(subject.ids_of_chat(said))
    assert text.split() == [
        "Q",
        ":",
        "now",
        "the",
        "[UNK]",
        "dog",
        "[UNK]",
        "Answer",
        ":",
        "runs",
        "[EOS]",
        "Q",
        ":",
        "fast",
        "Answer",
        ":",
    ]


def test_the_same_seed_gives_the_same_answer() -> None:
    import torch

    model = Scripted()
    drawn: list[float] = []
    model.fails = lambda number: drawn.append(float(torch.rand(())))
    subject = writer(model)
    outer = torch.get_rng_state()
    for seed in (1, 1, 2):
        subject.write([5], GenerationConfig(max_new_tokens=1, seed=seed))
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), outer)
