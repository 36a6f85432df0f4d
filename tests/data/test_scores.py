from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexp.config import DataConfig
from flexp.data.scores import evaluate
from flexp.data.tasks.base import Limit
from flexp.data.tasks.causal_lm import CausalLM
from flexp.data.tasks.classification import Classification
from flexp.data.tasks.instruction import Instruction
from flexp.errors import DataError

TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=0, pad_token_type_id=0, padding_side="right")
CONFIG = DataConfig(source="-")
CLASSIFY = Classification(CONFIG, TOKENIZER, Limit(99), ["no", "yes", "perhaps"])
MODEL_TEXT = CausalLM(CONFIG, TOKENIZER, Limit(99))


def classified(length: int, label: int) -> dict[str, Any]:
    return {"input_ids": [1 + label] * length, "attention_mask": [1] * length, "labels": label}


def text(*ids: int) -> dict[str, Any]:
    return {"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]}


def says_yes(batch: dict[str, torch.Tensor]) -> Any:
    assert not torch.is_grad_enabled()
    assert set(batch) == {"input_ids", "attention_mask"}
    return SimpleNamespace(logits=torch.tensor([[0.0, math.log(2.0), 0.0]]).repeat(len(batch["input_ids"]), 1))


def test_accuracy_loss_and_majority_by_hand() -> None:
    examples = [classified(3, 1), classified(5, 0), classified(2, 1), classified(4, 2)]
    scores = evaluate(says_yes, CLASSIFY, examples, 3)
    assert scores == {
        "loss": pytest.approx((2 * math.log(2.0) + 2 * math.log(4.0)) / 4),
        "n": 4,
        "accuracy": 0.5,
        "majority": 0.5,
        "macro_f1": pytest.approx(2 / 9),
        "auc": 0.5,
        "f1_by_class": {"no": 0.0, "yes": pytest.approx(2 / 3), "perhaps": 0.0},
        "confusion": [[0, 1, 0], [0, 2, 0], [0, 1, 0]],
    }


def test_perplexity_counts_tokens_not_texts() -> None:
    def forward(batch: dict[str, torch.Tensor]) -> Any:
        # after token t: t + 1 has probability 1/2, the other seven share the rest
        logits = torch.zeros(*batch["input_ids"].shape, 8)
        logits.scatter_(2, ((batch["input_ids"] + 1) % 8).unsqueeze(-1), math.log(7.0))
        return SimpleNamespace(logits=logits)

    scores = evaluate(forward, MODEL_TEXT, [text(1, 2, 3, 4, 5), text(6, 1)], 2)
    loss = (4 * math.log(2.0) + math.log(14.0)) / 5
    assert scores == {
        "loss": pytest.approx(loss, rel=1e-6),
        "n": 2,
        "perplexity": pytest.approx(math.exp(loss), rel=1e-6),
        "tokens": 5,
    }


def test_scores_equal_the_losses_of_a_hugging_face_model_whatever_the_order_and_the_batches() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    rng = random.Random(0)
    examples = [text(*(rng.randrange(32) for _ in range(rng.randrange(2, 20)))) for _ in range(13)]

    def forward(batch: dict[str, torch.Tensor]) -> Any:
        return model(**batch)

    scores = evaluate(forward, MODEL_TEXT, examples, 4)
    total = tokens = 0.0
    with torch.no_grad():
        for example in examples:
            one = {key: torch.tensor([value]) for key, value in example.items()}
            total += float(model(**one).loss) * (len(example["input_ids"]) - 1)
            tokens += len(example["input_ids"]) - 1
    assert scores["loss"] == pytest.approx(total / tokens, rel=1e-5)
    for _ in range(3):
        rng.shuffle(examples)
        assert evaluate(forward, MODEL_TEXT, examples, 4) == scores  # bit for bit
    assert evaluate(forward, MODEL_TEXT, examples, 1) == pytest.approx(scores, rel=1e-5)


def test_batches_go_from_long_to_short() -> None:
    lengths = []

    def forward(batch: dict[str, torch.Tensor]) -> Any:
        lengths.append(batch["input_ids"].shape[1])
        return says_yes(batch)

    evaluate(forward, CLASSIFY, [classified(n, 0) for n in (2, 9, 4, 1, 5, 7)], 2)
    assert lengths == [9, 5, 2]


def test_half_precision_logits_are_scored_in_single() -> None:
    def forward(batch: dict[str, torch.Tensor]) -> Any:
        return SimpleNamespace(logits=torch.full((len(batch["input_ids"]), 3), 300.0, dtype=torch.bfloat16))

    assert evaluate(forward, CLASSIFY, [classified(2, 0)], 1)["loss"] == pytest.approx(math.log(3.0))


def test_broken_models_and_empty_lists() -> None:
    def forward(batch: dict[str, torch.Tensor]) -> Any:
        return SimpleNamespace(logits=torch.full((*batch["input_ids"].shape, 8), math.nan))

    nothing = {"loss": None, "perplexity": None}
    assert evaluate(forward, MODEL_TEXT, [text(1, 2)], 1) == {**nothing, "n": 1, "tokens": 1, "not_finite": 1}
    with pytest.raises(DataError, match="no examples to score"):
        evaluate(forward, MODEL_TEXT, [], 1)


def test_exact_match_is_what_greedy_decoding_writes() -> None:
    made = Instruction(CONFIG, TOKENIZER, Limit(99))

    def forward(batch: dict[str, torch.Tensor]) -> Any:  # after token t comes t + 1
        return SimpleNamespace(logits=torch.nn.functional.one_hot((batch["input_ids"] + 1) % 8, 8).float())

    rows = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 5, 6, 7]]
    examples = [{"input_ids": ids, "attention_mask": [1] * 4, "labels": [-100, -100, *ids[2:]]} for ids in rows]
    scores = evaluate(forward, made, examples, 2)
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
