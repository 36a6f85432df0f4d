"""Chats as the model's own template writes them; the right tokens and the right loss come from transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from flexp.config import DataConfig
from flexp.data import load_federation
from flexp.data.tasks.chat import ChatForm
from flexp.data.tasks.instruction import Instruction
from flexp.errors import ConfigError, DataError

from .tools import jsonl, tokenizer

TURN = "<|im_start|>{{ m['role'] }}\n"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS
MARKED = (
    "{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + ASKS
)
# as Qwen3: only the last answer has its (empty) thoughts
THINKS = (
    "{% for m in messages %}" + TURN + "{% if loop.last and m['role'] == 'assistant' %}w0 w1 {% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS
)
# as DeepSeek-R1's: an answer is asked for with an opening that no written answer has
OPENS = "{% for m in messages %}" + TURN + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS.replace("\n{%", "\nw9{%")
CHAT = [
    {"role": "system", "content": "now"},
    {"role": "user", "content": "what is it ?"},
    {"role": "assistant", "content": "a red dog"},
    {"role": "user", "content": "now what ?"},
    {"role": "assistant", "content": "it sleeps"},
    {"role": "user", "content": "never answered"},
]


def words(template: str | None = PLAIN, kind: type[PreTrainedTokenizerFast] | None = None) -> Any:
    made = tokenizer()
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    if kind is not None:
        made.__class__ = kind
    made.chat_template = template
    return made


class Slow(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Says that it knows no offsets."""

    is_fast = property(lambda self: False)


def examples(folder: Path, tok: Any, chats: list[Any], **settings: Any) -> list[dict[str, Any]]:
    rows = [{"messages": chat, "client": "a"} for chat in chats]
    source = jsonl(folder / "x.jsonl", rows)
    config = DataConfig.model_validate(
        {"source": str(source), "task": "instruction", "messages": "messages", "test_fraction": 0.0, **settings}
    )
    return load_federation(config, tok, 0, None).clients[0].train


@pytest.mark.parametrize(("template", "kind"), [(PLAIN, None), (MARKED, None), (PLAIN, Slow)],
                         ids=["plain", "marked", "slow"])  # fmt: skip
def test_loss_is_on_the_assistants_turns_as_transformers_marks_them(tmp_path: Path, template: str, kind: Any) -> None:
    (example,) = examples(tmp_path, words(template, kind), [CHAT])
    right = words(MARKED).apply_chat_template(CHAT[:-1], return_dict=True, return_assistant_tokens_mask=True)
    assert example["input_ids"] == right["input_ids"] == words(PLAIN).apply_chat_template(CHAT[:-1])["input_ids"]
    marked = [bool(mine) for mine in right["assistant_masks"]]
    assert sum(marked) == 3 + 1 + 2 + 1
    assert [label != -100 for label in example["labels"]] == marked
    assert all(label in (-100, token) for label, token in zip(example["labels"], example["input_ids"], strict=True))


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(tmp_path: Path) -> None:
    tok = words(THINKS)
    made = examples(tmp_path, tok, [CHAT])
    for example, answered in zip(made, (2, 4), strict=True):  # what is trained is what will be asked
        asked = tok.apply_chat_template(CHAT[:answered], add_generation_prompt=True)["input_ids"]
        assert example["input_ids"] == tok.apply_chat_template(CHAT[: answered + 1])["input_ids"]
        assert [label == -100 for label in example["labels"]] == [
            at < len(asked) for at in range(len(example["input_ids"]))
        ]


def test_without_a_chat_template_the_tasks_own_form_is_trained_and_chatted(tmp_path: Path) -> None:
    tok = words(None)
    (example,) = examples(tmp_path, tok, [CHAT[1:5]], template="Q {prompt} A :")
    text = tok.decode(example["input_ids"])
    assert text == "Q what is it ? A : a red dog [EOS] Q now what ? A : it sleeps [EOS]"
    learnt = [token for token in example["labels"] if token != -100]
    assert tok.decode(learnt) == "a red dog [EOS] it sleeps [EOS]"
    form = ChatForm(tok, "Q {prompt} A :")
    asked = form.ids(form.text(CHAT[1:4], asks=True))
    assert example["input_ids"][: len(asked)] == asked
    assert [label != -100 for label in example["labels"]].index(True) < len(asked)
    assert example["labels"][len(asked) - 1] == -100 != example["labels"][len(asked)]


def test_prompts_and_answers_are_trained_as_they_are_chatted(tmp_path: Path) -> None:
    """By the model's own chat template, if it has one; or by ``data.template``, then in ``flexp chat`` as well."""
    tok, row = words(), {"prompt": "what is it ?", "answer": "a red dog", "client": "a"}
    data = {"source": str(jsonl(tmp_path / "x.jsonl", [row])), "task": "instruction", "test_fraction": 0.0}
    config = DataConfig.model_validate(data)
    (client,) = load_federation(config, tok, 0, None).clients
    assert client.train == examples(tmp_path, tok, [CHAT[1:3]])
    (asked,) = [client.train[0]["input_ids"][: client.train[0]["labels"].index(tok.convert_tokens_to_ids("a"))]]
    assert asked == tok.apply_chat_template(CHAT[1:2], add_generation_prompt=True)["input_ids"]
    own = config.model_copy(update={"template": "Q {prompt} A :"})
    assert (Instruction.chat_template(config, True), Instruction.chat_template(own, True)) == (None, "Q {prompt} A :")


def test_a_long_chat_loses_its_beginning_and_keeps_its_last_answer(tmp_path: Path) -> None:
    (whole,), (short,) = examples(tmp_path, words(), [CHAT]), examples(tmp_path, words(), [CHAT], max_length=9)
    assert short["input_ids"] == whole["input_ids"][-9:]
    assert short["labels"] == whole["labels"][-9:]
    assert short["cut"] == len(whole["input_ids"]) - 9


def test_other_forms_of_a_chat_are_the_same_chat(tmp_path: Path) -> None:
    (right,) = examples(tmp_path, words(), [CHAT[1:3]])
    shares = [{"from": "human", "value": "what is it ?"}, {"from": "gpt", "value": "a red dog"}]
    columns = {"role": ["user", "assistant"], "content": ["what is it ?", "a red dog"]}
    for chat in (shares, columns):
        assert examples(tmp_path, words(), [chat]) == [right]


@pytest.mark.parametrize(
    ("chat", "template", "message"),
    [
        ("hello", PLAIN, "x.jsonl, line 1: the column 'messages' holds no chat; expected a list of messages"),
        ([{"role": "user", "content": None}], PLAIN, "line 1: message 1 of 'messages' has no text"),
        (CHAT[:2], PLAIN, "line 1: the chat has no answer of the assistant"),
        (CHAT, OPENS, "line 1: the model's chat template begins an answer in another way than it asks for one"),
        (CHAT, "{{ raise_exception('no system') }}", r"line 1: the model's chat template refuses .* \(no system\)"),
        ([{"role": "tool", "content": "x"}, *CHAT[1:3]], None, "line 1: a chat has messages of system, user, assist"),
    ],
)
def test_what_is_no_chat_is_refused(tmp_path: Path, chat: Any, template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples(tmp_path, words(template), [chat])


@pytest.mark.parametrize("template", ["{system} {prompt}", "Q :"])
def test_a_template_for_chats_has_one_field(tmp_path: Path, template: str) -> None:
    for tok in (words(), words(None)):
        with pytest.raises(ConfigError, match=r"needs one field, \{prompt\}, for chats"):
            examples(tmp_path, tok, [CHAT], template=template)


def test_a_message_of_the_system_is_never_left_out(tmp_path: Path) -> None:
    """In a template it stands before the next question; where none comes, nobody would read it."""
    system, user, answer = CHAT[:3]
    form = ChatForm(words(None), "Q {prompt} A :")
    for chat in ([system], [system, answer], [user, answer, system], [user, system], [user, system, answer]):
        with pytest.raises(DataError, match="comes after the user's last one, and has no place there"):
            form.text(chat, asks=True)
    with pytest.raises(DataError, match="line 1: a message of the system comes after the user's last one"):
        examples(tmp_path, words(None), [[user, system, answer]])
    (example,) = examples(tmp_path, words(None), [[system, answer, user, answer]], template="Q {prompt} A :")
    assert words(None).decode(example["input_ids"]).count("now") == 1
    assert ChatForm(words()).text([user, system], asks=True).count("now") == 1
