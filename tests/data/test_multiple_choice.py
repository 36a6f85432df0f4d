from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexp.config import DataConfig
from flexp.data.scores import evaluate
from flexp.data.tasks import limit_of, make_task
from flexp.data.types import PLACE
from flexp.errors import ConfigError, DataError

from .tools import tokenizer

TOK = tokenizer()
SIZE = len(TOK)
ROWS = [
    {"prompt": "what is it ?", "choices": ["dog", "red cat", "bird"], "label": "B"},
    {"prompt": "what runs ?", "choices": ["cat", "dog"], "label": 0},
]


def task(tok: Any = TOK, **settings: Any) -> Any:
    config = DataConfig.model_validate({"source": "-", "task": "multiple-choice", **settings})
    return make_task(config, tok, limit_of(config, None), [])


def token(word: str) -> int:
    return int(TOK.convert_tokens_to_ids(word))


class Fake:
    """The logits after a token are looked up by that token alone: a bigram model."""

    def __init__(self, table: dict[tuple[str, str], float]) -> None:
        self.weights = torch.zeros(SIZE, SIZE)
        for (before, after), value in table.items():
            self.weights[token(before), token(after)] = value

    def __call__(self, batch: dict[str, torch.Tensor]) -> Any:
        assert "labels" not in batch
        return SimpleNamespace(logits=self.weights[batch["input_ids"]])


def test_only_the_letter_has_loss() -> None:
    example = task().encode(ROWS)[0]
    words = TOK.convert_ids_to_tokens(example["input_ids"])
    assert " ".join(words) == "what is it ? A . dog B . red cat C . bird Answer : B"
    assert example["labels"] == [-100] * (len(words) - 1) + [token("B")]
    assert (example["answer"], example["options"]) == (1, ["dog", "red cat", "bird"])
    assert example["question"] == "what is it ?\nAnswer:"


def test_letter_and_cloze_scores_by_hand() -> None:
    # Letters follow ":"; "D" is likeliest but no choice, C beats B, and of two choices A beats B.
    after_colon = {(":", "D"): 9.0, (":", "C"): 2.0, (":", "B"): 1.0, (":", "A"): 1.5, (":", "red"): 3.0}
    model = Fake({**after_colon, ("red", "cat"): 4.0})
    made = task()
    examples = made.encode(ROWS)
    scores = evaluate(model, made, examples, batch_size=2)
    total = math.exp(9) + math.exp(2) + math.exp(1) + math.exp(1.5) + math.exp(3) + (SIZE - 5)
    losses = [math.log(total) - 1.0, math.log(total) - 1.5]
    assert scores["accuracy"] == 0.5
    assert scores["majority"] == 0.5
    assert scores["n"] == 2
    assert scores["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    # Cloze: "red cat" per token is (log p(red|:) + log p(cat|red)) / 2, far above "dog" and "bird";
    # "cat" and "dog" after ":" are equally likely: the first wins, which is right.
    assert scores["cloze_accuracy"] == 1.0
    assert "cloze_accuracy" not in evaluate(model, made, examples, batch_size=2, extras=False)


def test_cloze_is_normalised_by_length() -> None:
    row = {"prompt": "what is it ?", "choices": ["red cat", "dog"], "label": "A"}
    made = task()
    # log p(dog|:) - log p(red|:) = -0.5, and cat after red is certain: summed, both beat neither by much
    model = Fake({(":", "red"): 5.0, (":", "dog"): 5.5, ("red", "cat"): 20.0})
    normaliser = math.log(math.exp(5.0) + math.exp(5.5) + SIZE - 2)
    red_cat = (5.0 - normaliser + 20.0 - math.log(math.exp(20.0) + SIZE - 1)) / 2
    dog = 5.5 - normaliser
    assert red_cat > dog > 5.0 - normaliser
    assert evaluate(model, made, made.encode([row]), 1)["cloze_accuracy"] == 1.0


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_batches_order_or_padding_side(side: str) -> None:
    made = task(tokenizer(padding_side=side))
    examples = made.encode(ROWS * 3)
    model = Fake({(":", "C"): 2.0, (":", "B"): 1.0, (":", "A"): 1.5})
    one = evaluate(model, made, examples, 1)
    assert evaluate(model, made, examples[::-1], 1) == one
    assert evaluate(model, made, examples, 4) == pytest.approx(one)


def test_a_long_question_is_cut_in_front_of_the_answer() -> None:
    example = task(max_length=4).encode(ROWS)[0]
    assert TOK.convert_ids_to_tokens(example["input_ids"]) == ["bird", "Answer", ":", "B"]
    assert example["cut"] == 13


def test_a_column_per_choice_with_gaps_at_the_end() -> None:
    made = task(choices=["A", "B", "C"])
    row = {"prompt": "what ?", "A": "dog", "B": "cat", "C": None, "label": "1"}
    assert made.encode([row])[0]["options"] == ["dog", "cat"]
    with pytest.raises(DataError, match="gives 2 choices and 1 empty ones"):
        made.encode([{**row, "B": " ", "C": "bird"}])


@pytest.mark.parametrize("label", ["C", 2, -1, "dog", 1.5])
def test_answers_that_are_no_choice_are_refused(label: Any) -> None:
    row = {"prompt": "what ?", "choices": ["dog", "cat"], "label": label, PLACE: "x.jsonl, line 4"}
    with pytest.raises(DataError, match=r"x.jsonl, line 4: the answer .* is none of the 2 choices; .* from A to B"):
        task().encode([row])


def test_bad_choices_letters_and_templates() -> None:
    with pytest.raises(DataError, match="holds a str, but a list of choices was expected"):
        task().encode([{"prompt": "what ?", "choices": "dog", "label": 0}])
    with pytest.raises(DataError, match="no 5 different tokens for the letters A to E"):
        task().encode([{"prompt": "what ?", "choices": ["dog"] * 5, "label": 0}])
    with pytest.raises(ConfigError, match=r"must have the field \{choices\}"):
        task(template="{prompt}")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["A", "2", "B"], "by letters (A …) in some rows and by numbers (2 …)"),
        (["1", "2"], "the first choice, number 0, is never right"),
        (["0", "1"], None),
        (["A", "B"], None),
    ],
)
def test_answers_that_may_count_from_one_are_told(labels: list[str], said: str | None) -> None:
    made = task()
    made.encode([{"prompt": "what ?", "choices": ["dog", "cat", "bird"], "label": label} for label in labels * 20])
    found = made.doubts()
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
