"""Prompts, generation and answers of a personal model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors

from flexp.errors import ConfigError, DataError, ModelError
from flexp.models.zoo import tiny_model
from flexp.serving.writer import ONE, GenerationConfig, Writer
from tests.data.tools import tokenizer

from .tools import Scripted, writer


def test_an_answer_its_counts_and_why_it_ends() -> None:
    model, said = Scripted(), []
    subject = writer(model)
    ids = subject.ids_of("the blue cat")
    full = subject.write(ids, say=said.append)
    assert (full.text, full.prompt_tokens, full.tokens, full.reason) == (" the red dog runs fast now", 3, 7, "stop")
    assert "".join(said) == full.text
    assert len(said) == 6
    cut = subject.write(ids, GenerationConfig(max_new_tokens=2))
    assert (cut.text, cut.tokens, cut.reason) == (" the red", 2, "length")
    stopped = subject.write(ids, GenerationConfig(stop=(" runs", "zzz")))
    assert (stopped.text, stopped.tokens, stopped.reason) == (" the red dog", 4, "stop")
    assert model.prompts == [ids] * 3


def test_it_ends_when_nobody_listens_any_more() -> None:
    model = Scripted()
    found = writer(model).write([5], cancelled=lambda: model.given >= 3)
    assert (found.text, found.reason) == (" the red dog", "length")


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
    fixed = ("attention_mask", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "logits_processor")
    assert {key: value for key, value in model.calls[0].items() if key not in fixed} == {**ONE, **expected}
    assert model.calls[0]["eos_token_id"] == [1]


def real(**settings: Any) -> Writer:
    """A tiny model whose ``generation_config.json`` says so; it writes words of its tokenizer."""
    model, words = tiny_model("llama"), tokenizer()
    odd = [0, 1, *range(len(words), model.config.vocab_size)]
    model.generation_config = transformers.GenerationConfig(eos_token_id=1, suppress_tokens=odd, **settings)
    return Writer("north", words, model, 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.2},
        {"num_return_sequences": 2, "num_beams": 2},
        {"temperature": 0.0, "do_sample": True},
        {"stop_strings": ["[nothing]"]},
    ],
)
def test_an_answer_is_one_text_whatever_the_models_own_settings_are(settings: dict[str, Any]) -> None:
    plain, subject = real(), real(**settings)
    ids = subject.ids_of("the red dog")
    for generation in (GenerationConfig(8, seed=1), GenerationConfig(8, temperature=0.0)):
        assert subject.write(ids, generation).text == plain.write(ids, generation).text != ""


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_diverged_writes_nothing(value: float, temperature: float) -> None:
    subject, said = real(), []
    subject._model.lm_head.weight.data.fill_(value)
    with pytest.raises(ModelError, match="answers with numbers that are not finite, so it writes nothing"):
        subject.write([5, 6], GenerationConfig(8, temperature=temperature), said.append)
    assert said == []


def test_a_model_that_samples_draws_one_answer() -> None:
    wanted = GenerationConfig(8, seed=1)
    plain = real(do_sample=True).write([5, 6], wanted)
    for more in ({"num_return_sequences": 2}, {"num_beams": 3}):
        assert real(do_sample=True, **more).write([5, 6], wanted).text == plain.text != ""  # type: ignore[arg-type]


def test_the_models_own_stops_end_an_answer() -> None:
    ids, wanted = [5, 6], GenerationConfig(8)
    words = real().write(ids, wanted).text.split()
    stop = next(word for word in words[1:] if word != words[0])
    for said in (stop, [stop, "[nothing]"]):
        found = real(stop_strings=said).write(ids, wanted)
        assert (found.text.split(), found.reason) == (words[: words.index(stop)], "stop")


@pytest.mark.parametrize(
    "settings", [{"penalty_alpha": 0.6, "top_k": 4}, {"token_healing": True}, {"do_sample": True, "temperature": -1.0}]
)
def test_settings_that_transformers_refuses_are_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot write with these settings .* generation_config\.json") as told:
        real(**settings).write([5, 6], GenerationConfig(4))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "generation", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 0}, {"seed": 10**20}]
)
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


@pytest.mark.parametrize("closes", [False, True])
def test_only_what_the_tokenizer_closed_a_prompt_with_is_left_off(closes: bool) -> None:
    """Whoever writes a chat out by hand ends a turn with a token that also ends answers."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["[TURN]"]})
    turn = words.convert_tokens_to_ids("[TURN]")
    if closes:
        words.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [EOS]", special_tokens=[("[EOS]", 1)]
        )
    model = tiny_model("llama")
    model.generation_config = transformers.GenerationConfig(eos_token_id=[turn, 1])
    subject = Writer("north", words, model, 64)
    the, dog = words("the dog", add_special_tokens=False)["input_ids"]
    assert words("the dog")["input_ids"] == [the, dog, 1][: 2 + closes]
    for text, ids in (
        ("the dog", [the, dog]),
        ("the dog[TURN]", [the, dog, turn]),
        ("the dog[EOS]", [the, dog, 1]),
        ("the dog[TURN][EOS]", [the, dog, turn, 1]),
    ):
        assert subject.ids_of(text) == ids


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


def test_a_template_with_two_fields_is_no_form_of_a_chat() -> None:
    """The tokenizer's own is none either: the model was never asked in it."""
    subject = writer(Scripted(), prompt="about {context} Q : {prompt} Answer :")
    with pytest.raises(ConfigError, match=r"'about .*' needs one field, \{prompt\}, for chats"):
        subject.ids_of_chat([{"role": "user", "content": "the dog"}])


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
