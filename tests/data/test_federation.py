from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from flexp.config import DataConfig
from flexp.data import Federation, load_federation
from flexp.errors import ConfigError, DataError, FlexpError

from .tools import jsonl, labelled, tokenizer

TOK = tokenizer()


def load(path: Path, seed: int = 0, max_positions: int | None = None, **settings: Any) -> Federation:
    config = DataConfig.model_validate({"source": str(path), **settings})
    return load_federation(config, TOK, seed, max_positions)


def ids(examples: list[dict[str, Any]]) -> set[tuple[int, ...]]:
    return {tuple(example["input_ids"]) for example in examples}


def test_natural_clients_with_disjoint_splits(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", labelled(80))
    made = load(path, validation_fraction=0.25)
    assert [(c.name, len(c.train), len(c.validation), len(c.test)) for c in made.clients] == [
        ("north", 21, 7, 12),
        ("south", 21, 7, 12),
    ]
    for client in made.clients:
        parts = [ids(client.train), ids(client.validation), ids(client.test)]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 40
    assert made.test == made.clients[0].test + made.clients[1].test
    assert made.notes == []


def test_equal_seeds_give_equal_data_and_few_shot_keeps_the_test_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", labelled(80))
    one = load(path, train_examples=8)
    assert load(path, train_examples=8).clients == one.clients
    assert load(path, seed=1, train_examples=8).clients != one.clients
    config = DataConfig(source=str(path), train_examples=8, seed=0)  # the section's own seed goes first
    assert load_federation(config, TOK, 5, None).clients == one.clients
    assert load(path, train_examples=16).test == load(path).test == one.test
    assert Counter(example["labels"] for example in one.clients[0].train) == {0: 4, 1: 4}


def test_the_label_space_is_the_union_over_all_clients_and_is_sorted(tmp_path: Path) -> None:
    rows = labelled(40, labels=("10", "9")) + [{**row, "client": "west", "label": "2"} for row in labelled(20)]
    made = load(jsonl(tmp_path / "x.jsonl", rows))
    assert made.task.label_names == ["2", "9", "10"]
    assert {example["labels"] for example in made.clients[2].train} == {0}
    as_numbers = [{**row, "label": int(row["label"])} for row in rows]
    assert load(jsonl(tmp_path / "y.jsonl", as_numbers)).clients == made.clients


def test_class_label_names_are_kept_in_their_order(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["low", "high", "absent"])}
    )
    rows = {"text": [f"the w{k}" for k in range(20)], "label": [0, 1] * 10}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    made = load(tmp_path / "x.parquet", clients={"by": "iid", "count": 2})
    assert made.task.label_names == ["low", "high", "absent"]


def test_opposite_skews_reach_the_test_data_too(tmp_path: Path) -> None:
    made = load(jsonl(tmp_path / "x.jsonl", labelled(160)), test_fraction=0.2, clients={"by": "skew", "skew": 0.75})
    assert [client.name for client in made.clients] == ["north-a", "north-b", "south-a", "south-b"]
    for client, share in zip(made.clients, [0.25, 0.75] * 2, strict=True):
        assert sum(e["labels"] for e in client.train) / len(client.train) == share
        assert sum(e["labels"] for e in client.test) / len(client.test) == share
    everything = [tuple(e["input_ids"]) for c in made.clients for e in (*c.train, *c.test)]
    assert len(everything) == len(set(everything)) == 160


def test_a_folder_with_a_file_for_each_client(tmp_path: Path) -> None:
    rows = labelled(60)
    jsonl(tmp_path / "b.jsonl", rows[:30])
    jsonl(tmp_path / "a.jsonl", rows[30:])
    assert [client.name for client in load(tmp_path, clients={"by": "file"}).clients] == ["a", "b"]
    assert [c.name for c in load(tmp_path, clients={"by": "file", "names": ["b"]}).clients] == ["b"]


def test_a_separate_test_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", labelled(40))
    jsonl(tmp_path / "test.jsonl", labelled(10))
    made = load(tmp_path, test_source=f"{tmp_path}#test", test_examples=4)
    assert [(len(client.train), len(client.test)) for client in made.clients] == [(20, 4), (20, 4)]


def test_image_folders_by_client(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    for client in ("a", "b"):
        for label, colour in (("cat", 0), ("dog", 255)):
            (tmp_path / client / label).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (4, 4), colour).save(tmp_path / client / label / f"{number}.png")
    config = DataConfig.model_validate(
        {"source": str(tmp_path), "task": "image-classification", "test_fraction": 0.5, "clients": {"by": "file"}}
    )
    made = load_federation(config, ViTImageProcessorPil(size={"height": 4, "width": 4}), 0, None)
    assert [(client.name, len(client.train), len(client.test)) for client in made.clients] == [("a", 4, 4), ("b", 4, 4)]
    assert all((e["pixel_values"].mean() > 0) == bool(e["labels"]) for e in made.test)


def test_images_named_in_a_table_are_found_beside_it(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    for number in range(8):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    (tmp_path / "x.csv").write_text("image,label\n" + "".join(f"{k}.png,{k % 2}\n" for k in range(8)))
    config = DataConfig.model_validate(
        {"source": str(tmp_path / "x.csv"), "task": "image-classification", "clients": {"by": "iid", "count": 2}}
    )
    made = load_federation(config, ViTImageProcessorPil(size={"height": 4, "width": 4}), 0, None)
    assert sum(len(client.train) + len(client.test) for client in made.clients) == 8


def test_cut_texts_and_small_clients_are_reported(tmp_path: Path) -> None:
    rows = labelled(40)
    rows[0]["text"] += " fast" * 9
    path = jsonl(tmp_path / "x.jsonl", rows)
    made = load(path, max_positions=6, train_examples=96)
    assert made.notes == [
        "north: has 14 examples to train on instead of the 96 asked for",
        "north: 1 of 20 texts were cut at 6 tokens",
        "south: has 14 examples to train on instead of the 96 asked for",
        "data.max_length = 128 is more than the model's 6 positions, which are used",
    ]
    with pytest.raises(DataError, match=r"x.jsonl, line 1: the text has 14 tokens, more than the 6 of the model's pos"):
        load(path, max_positions=6, long_texts="error")


def test_blocks_are_counted_as_examples_and_texts_stay_in_order(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(f"the w{k}\n" for k in range(30)))
    (tmp_path / "two.txt").write_text("".join(f"a w{k}\n" for k in range(30)))
    made = load(tmp_path, task="causal-lm", block_length=6, clients={"by": "file"})
    assert [(client.name, len(client.train), len(client.test)) for client in made.clients] == [
        ("one", 11, 5),
        ("two", 11, 5),
    ]
    words = [w for e in made.clients[0].train for w in TOK.convert_ids_to_tokens(e["input_ids"])]
    numbers = [int(word[1:]) for word in words if word.startswith("w")]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"text": None}, {}, r"x.jsonl, line 4: the column 'text' is empty; fill it in or remove the row"),
        ({"text": " "}, {}, r"x.jsonl, line 4: the column 'text' is empty"),
        ({"label": None}, {}, r"x.jsonl, line 4: the column 'label' is empty"),
        ({"client": None}, {}, r"x.jsonl, line 4: the column 'client' is empty"),
        ({}, {"text": "txet"}, r"no column 'txet' \(data.text\); .* 'text', 'label', 'client'; did you mean 'text'\?"),
        ({}, {"label": "zzz"}, r"no column 'zzz' \(data.label\); .*; set data.label to one of them"),
        ({}, {"clients": {"column": "clinet"}}, r"no column 'clinet' \(data.clients.column\).* did you mean 'client'"),
        ({}, {"template": "{text} {titel}"}, r"no column 'titel' \(data.template\)"),
        ({}, {"task": "instruction"}, r"no column 'prompt' \(data.prompt\)"),
        ({}, {"task": "multiple-choice", "prompt": "text"}, r"no column 'choices' \(data.choices\)"),
        ({}, {"label": "client", "clients": {"names": ["north"]}}, r"have one label only \(north\) in column 'client'"),
        ({"client": "lonely"}, {}, r"client 'lonely' has 1 examples: 1 to train, 0 to validate, 0 to test"),
        ({}, {"task": "causal-lm", "clients": {"by": "skew"}}, r'"skew" divides by labels, but the task has none'),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_line(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    rows = labelled(12)
    rows[3] |= change
    with pytest.raises(FlexpError, match=message) as raised:
        load(jsonl(tmp_path / "x.jsonl", rows), **settings)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, DataError | ConfigError)


def test_a_client_without_a_whole_block_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "dog", "client": "north"}] * 2)
    config = DataConfig(source=str(path), task="causal-lm", block_length=9)
    with pytest.raises(DataError, match="client 'north' is empty: its texts give 0 blocks to train and 0 to test"):
        load_federation(config, tokenizer(eos_token=None), 0, None)


def test_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "label": 0.5 * k} for k, row in enumerate(labelled(12))]
    with pytest.raises(DataError, match=r"x.jsonl, line 2: the label '0.5' in column 'label' is not a class"):
        load(jsonl(tmp_path / "x.jsonl", rows))


def test_bad_rows_outside_a_few_shot_subset_are_still_found(tmp_path: Path) -> None:
    rows = labelled(80)
    rows[70]["text"] = ""
    rows[71]["text"] = ""
    with pytest.raises(DataError, match=r"x.jsonl, line 71: the column 'text' is empty \(and 1 more rows\)"):
        load(jsonl(tmp_path / "x.jsonl", rows), train_examples=2, test_examples=2)


def test_clients_and_labels_that_differ_on_paper_stay_apart(tmp_path: Path) -> None:
    rows = [
        f"{client},the w{k} dog runs {client},{label}"
        for client in ("007", "7")
        for label in ("01", "1")
        for k in range(4)
    ]
    (tmp_path / "x.csv").write_text("client,text,label\n" + "\n".join(rows) + "\n")
    made = load(tmp_path / "x.csv", clients={"by": "column", "column": "client"})
    assert sorted(client.name for client in made.clients) == ["007", "7"]
    assert made.task.label_names == ["01", "1"]
    (tmp_path / "y.csv").write_text("client,text,label\n" + "".join(f"a,the w{k},{k / 4}\n" for k in range(8)))
    with pytest.raises(DataError, match=r"the label '0.25' in column 'label' is not a class"):
        load(tmp_path / "y.csv", clients={"by": "column", "column": "client"})


def test_photographs_stand_upright_and_deep_images_keep_their_range(tmp_path: Path) -> None:
    """As ``datasets.Image`` decodes them; 16 bits are 8 bits' brightness, not cut off at 255."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
    upright = np.zeros((4, 4, 3), np.uint8)
    upright[:2] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for number in range(4):
        Image.fromarray(upright[::-1, ::-1]).save(tmp_path / "cat" / f"{number}.png", exif=exif)
        Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "dog" / f"{number}.png")  # 128 · 257
    truth = np.asarray(datasets.Image().decode_example({"path": str(tmp_path / "cat/0.png"), "bytes": None}))
    assert np.array_equal(truth, upright)
    config = DataConfig.model_validate(
        {
            "source": str(tmp_path),
            "task": "image-classification",
            "test_fraction": 0.5,
            "clients": {"by": "iid", "count": 1},
        }
    )
    plain = ViTImageProcessorPil(size={"height": 4, "width": 4}, do_normalize=False, do_rescale=False)
    (client,) = load_federation(config, plain, 0, None).clients
    for example in client.train + client.test:
        expected = upright if example["labels"] == 0 else np.full((4, 4, 3), 128)
        assert np.array_equal(example["pixel_values"].numpy(), expected.transpose(2, 0, 1))
