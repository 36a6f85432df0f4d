from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flexp.config import DataConfig
from flexp.data.tasks import limit_of, make_task, pad_id
from flexp.data.tasks.base import Limit
from flexp.data.tasks.text import continuation, fields, fill, fit_end, pad
from flexp.data.types import PLACE
from flexp.errors import ConfigError, DataError

from .tools import tokenizer

PLAIN = tokenizer()
BERT = tokenizer(bert=True)


def task(kind: str, tok: Any = PLAIN, labels: tuple[str, ...] = (), **settings: Any) -> Any:
    config = DataConfig.model_validate({"source": "-", "task": kind, **settings})
    return make_task(config, tok, limit_of(config, None), list(labels))


def words(tok: Any, ids: list[int]) -> list[str]:
    return list(tok.convert_ids_to_tokens(ids))


def test_classification_of_texts_and_pairs_as_bert_wants_them() -> None:
    made = task("classification", BERT, ("no", "yes"), text_pair="other", text="text")
    rows = [
        {"text": "the dog runs", "other": "a cat", "label": "yes"},
        {"text": "it", "other": "is", "label": "no"},
    ]
    examples = made.encode(rows)
    assert words(BERT, examples[0]["input_ids"]) == ["[CLS]", "the", "dog", "runs", "[SEP]", "a", "cat", "[SEP]"]
    batch = made.collate(examples)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch["input_ids"][1, 5:].tolist() == [BERT.pad_token_id] * 3
    assert (made.model_kind, made.metric, made.label_names) == ("sequence-classification", "accuracy", ["no", "yes"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_dynamic_masked_and_on_the_tokenizers_side(side: str) -> None:
    tok = tokenizer(padding_side=side)
    made = task("causal-lm", tok)
    examples = made.encode([{"text": "the dog runs fast"}, {"text": "it is"}])
    batch = made.collate(examples)
    end = tok.eos_token_id
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (2, 5)  # four words and the end-of-text token
    gap, kept = (slice(0, 2), slice(2, 5)) if side == "left" else (slice(3, 5), slice(0, 3))
    assert batch["input_ids"][1, gap].tolist() == [end, end]  # no padding token: end of text stands in for it
    assert batch["attention_mask"][1, gap].tolist() == [0, 0]
    assert batch["labels"][1, gap].tolist() == [-100, -100]
    assert batch["attention_mask"][1, kept].tolist() == [1, 1, 1]
    assert batch["labels"][1, kept].tolist() == [-100, *examples[1]["input_ids"][1:]]
    assert batch["labels"][1, kept][-1] == end  # the true end of the text is learned


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), left=st.booleans())
def test_collating_keeps_every_token_and_masks_the_rest(lengths: list[int], left: bool) -> None:
    tok = tokenizer(padding_side="left" if left else "right")
    examples = [{"input_ids": [7] * n, "attention_mask": [1] * n, "labels": [7] * n} for n in lengths]
    batch = pad(examples, tok)
    assert batch["input_ids"].shape == (len(lengths), max(lengths))
    assert batch["attention_mask"].sum(-1).tolist() == lengths
    assert torch.equal(batch["labels"] == 7, batch["attention_mask"].bool())


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    assert pad_id(PLAIN) == PLAIN.eos_token_id
    assert pad_id(BERT) == BERT.pad_token_id
    with pytest.raises(DataError, match="neither a padding nor an end-of-text token"):
        pad_id(tokenizer(eos_token=None))


def test_long_texts_are_cut_and_counted_or_refused() -> None:
    row = {"text": "the dog runs fast now", "label": "yes", PLACE: "x.csv, row 3"}
    cut = task("classification", BERT, ("no", "yes"), max_length=5).encode([row])[0]
    assert words(BERT, cut["input_ids"]) == ["[CLS]", "the", "dog", "runs", "[SEP]"]
    assert cut["cut"] == 2
    with pytest.raises(
        DataError, match=r"x.csv, row 3: the text has 7 tokens, more than the 5 of data.max_length; shorten it, raise"
    ):
        task("classification", BERT, ("no", "yes"), max_length=5, long_texts="error").encode([row])
    fits = task("classification", BERT, ("no", "yes"), max_length=7, long_texts="error").encode([row])[0]
    assert "cut" not in fits


def test_causal_lm_blocks_join_the_texts() -> None:
    made = task("causal-lm", block_length=4)
    examples = made.encode([{"text": "the dog runs"}, {"text": "it is a cat now"}])
    assert [words(PLAIN, example["input_ids"]) for example in examples] == [
        ["the", "dog", "runs", "[EOS]"],
        ["it", "is", "a", "cat"],
        ["now", "[EOS]"],
    ]
    assert all(example["labels"] == [-100, *example["input_ids"][1:]] for example in examples)


def test_instruction_has_loss_on_the_answer_only() -> None:
    made = task("instruction", template="Q : {prompt}\nAnswer:")
    example = made.encode([{"prompt": "what is it ?", "answer": " a red dog "}])[0]
    ids, labels = example["input_ids"], example["labels"]
    assert words(PLAIN, ids) == ["Q", ":", "what", "is", "it", "?", "Answer", ":", "a", "red", "dog", "[EOS]"]
    assert words(PLAIN, [label for label in labels if label != -100]) == ["a", "red", "dog", "[EOS]"]
    assert labels[:8] == [-100] * 8


def test_an_example_without_a_token_to_learn_is_refused() -> None:
    row = {"prompt": "what is it ?", "answer": "a dog", PLACE: "x.csv, row 3"}
    with pytest.raises(DataError, match=r"x.csv, row 3: no token of the answer is left to predict; raise data.max_len"):
        task("instruction", template="{prompt}", max_length=1).encode([row])
    question = {"prompt": "what is it ?", "choices": ["red", "blue"], "label": 0, PLACE: "x.csv, row 4"}
    with pytest.raises(DataError, match=r"x.csv, row 4: no token of the answer is left to predict"):
        task("multiple-choice", max_length=1).encode([question])


def test_a_long_prompt_loses_its_beginning_not_the_answer() -> None:
    made = task("instruction", template="{prompt}", max_length=5)
    example = made.encode([{"prompt": "what is it ? now", "answer": "a dog"}])[0]
    assert words(PLAIN, example["input_ids"]) == ["?", "now", "a", "dog", "[EOS]"]
    assert example["cut"] == 3


@settings(max_examples=60)
@given(prompt=st.integers(0, 12), answer=st.integers(1, 12), limit=st.integers(2, 15), bos=st.booleans())
def test_fitting_keeps_the_answer_and_the_opening_token(prompt: int, answer: int, limit: int, bos: bool) -> None:
    tok = tokenizer(bos_token="Q") if bos else PLAIN
    opening = [tok.bos_token_id] if bos else []
    ids = opening + [100 + k for k in range(prompt)] + [200 + k for k in range(answer)]
    start = len(opening) + prompt
    short, begin, cut = fit_end(tok, ids, start, Limit(limit), "x")
    assert len(short) == min(len(ids), limit)
    assert cut == len(ids) - len(short)
    assert short[:1] == ids[:1] or not bos
    assert begin >= min(start, 1)
    kept = short[begin:]
    assert kept == ids[start : start + len(kept)]
    assert len(kept) == min(answer, limit - begin)
    front = short[len(opening) : begin]
    assert front == ids[start - len(front) : start]


def test_continuation_puts_the_border_where_the_answer_begins() -> None:
    ids, start = continuation(BERT, "it is", "a dog")
    assert words(BERT, ids) == ["[CLS]", "it", "is", "a", "dog"]
    assert start == 3
    assert continuation(PLAIN, "", "a dog")[1] == 0


def test_images_become_pixels() -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    made = task("image-classification", ViTImageProcessorPil(size={"height": 8, "width": 8}), ("cat", "dog"))
    import io

    buffer = io.BytesIO()
    Image.new("L", (5, 6), 255).save(buffer, format="PNG")
    examples = made.encode([{"image": {"bytes": buffer.getvalue(), "path": None}, "label": "dog"}] * 2)
    batch = made.collate(examples)
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"].unique().tolist() == [1.0]
    assert batch["labels"].tolist() == [1, 1]
    with pytest.raises(DataError, match=r"x.csv, row 1: there is no image nowhere.png"):
        made.encode([{"image": "nowhere.png", "label": "dog", PLACE: "x.csv, row 1"}])
    with pytest.raises(DataError, match=r"x.csv, row 1: the image cannot be read"):
        made.encode([{"image": {"bytes": b"no", "path": None}, "label": "dog", PLACE: "x.csv, row 1"}])


def test_templates_name_columns_and_nothing_else() -> None:
    assert fields("{a} {{x}} {b} {a}") == ["a", "b"]
    assert fill("{a} {{x}} {b}", {"a": "{b}", "b": "2"}) == "{b} {x} 2"
    for wrong in ("{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{}"):
        with pytest.raises(ConfigError, match="must be a plain column name"):
            fields(wrong)
    with pytest.raises(ConfigError, match=r"data.template: .* write \{column\}"):
        fields("{a")


def test_blocks_longer_than_the_model_are_refused() -> None:
    config = DataConfig(source="-", task="causal-lm", block_length=512)
    with pytest.raises(ConfigError, match=r"data.block_length = 512 is more than the model's 128 positions"):
        limit_of(config, 128)
