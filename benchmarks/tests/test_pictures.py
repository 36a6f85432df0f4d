"""The benchmark's clients, drawn as it draws them, and its network: size, determinism, what methods find in it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.tools import pictures as module
from benchmarks.tools.pictures import divide, federation, read_pictures, small_cnn
from flexp.config import ModelConfig
from flexp.errors import DataError
from flexp.models.anatomy import Part
from flexp.models.stage import carve
from flexp.models.tuning import tune

from .tools import picture_folder

MNIST = (6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958)
"""How often each digit is in all of MNIST."""

PUBLISHED = {
    0: {0: 140, 1: 890, 4: 1, 5: 319, 7: 29, 8: 1067, 9: 184},
    5: {1: 38, 3: 1, 4: 39, 8: 25, 9: 6086},
    11: {2: 159, 3: 3055, 5: 558},
    19: {0: 310, 1: 1, 2: 1, 3: 1, 4: 5789, 9: 1},
}
"""Some of the clients of MNIST in a file that PFLlib published: client → label → pictures. All twenty were compared."""


def kinds(labels: np.ndarray, rows: np.ndarray) -> dict[int, int]:
    found, counts = np.unique(labels[rows], return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def test_dirichlet_clients_are_the_published_ones() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), MNIST))
    made = divide(labels, 20, "dirichlet")
    assert {client: kinds(labels, np.concatenate(made[client])) for client in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("rule", ["dirichlet", "pathological"])
def test_every_picture_has_one_owner_and_a_quarter_is_for_testing(rule: str) -> None:
    labels = np.arange(7000) % 10
    made = divide(labels, 20, rule)
    everything = np.concatenate([rows for part in made for rows in part])
    assert sorted(everything.tolist()) == list(range(7000))
    for train, test in made:
        assert len(train) == int(0.75 * (len(train) + len(test)))
    again, other = divide(labels, 20, rule), divide(labels, 20, rule, seed=2)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(made, again, strict=True))
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(made, other, strict=True))


def test_pathological_clients_have_two_labels_and_uneven_amounts() -> None:
    labels = np.arange(7000) % 10
    made = [kinds(labels, np.concatenate(part)) for part in divide(labels, 20, "pathological")]
    assert [sorted(client) for client in made[:8]] == [[0, 1]] * 4 + [[2, 3]] * 4
    for label in range(10):
        amounts = [client[label] for client in made if label in client]
        assert len(amounts) == 4
        assert all(17 <= amount < 175 for amount in amounts[:-1])  # from a tenth of 175 to 175, the last has the rest
        assert sum(amounts) == 700


def test_dirichlet_stops_giving_to_who_has_an_equal_share() -> None:
    labels = np.arange(7000) % 10
    made = [kinds(labels, np.concatenate(part)) for part in divide(labels, 20, "dirichlet")]
    full = 0
    for client in made[:-1]:  # the very last client also gets the row that rounding leaves over
        before = sum(client.values()) - client[max(client)]  # labels come in order
        assert before < 350
        full += sum(client.values()) >= 350
    assert full > 5


def test_pictures_are_read_joined_and_scaled(tmp_path: Path) -> None:
    pictures = read_pictures(str(picture_folder(tmp_path / "small")))
    assert pictures.name == "small"
    assert pictures.pixels.shape == (200, 28, 28)
    assert pictures.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    made = federation(pictures, divide(pictures.labels, 4, "dirichlet"))
    example = made.clients[0].train[0]
    assert example["pixel_values"].shape == (1, 28, 28)
    lows, highs = zip(*(e["pixel_values"].aminmax() for c in made.clients for e in c.train), strict=True)
    assert min(lows) == -1.0
    assert max(highs) == pytest.approx(250 / 127.5 - 1)
    assert len(made.test) == sum(len(client.test) for client in made.clients) > 40


def test_what_is_not_there_or_not_whole_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        read_pictures(str(tmp_path))
    folder = picture_folder(tmp_path / "cut")
    place = folder / "t10k-images-idx3-ubyte"
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(DataError, match="no file of 3-dimensional bytes"):
        read_pictures(str(folder))


def test_an_asset_of_pictures_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.arange(784, dtype=np.uint8).reshape(28, 28)
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    table = {"image": [{"bytes": content.getvalue(), "path": None}] * 2, "label": ["7", "0"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "table.parquet")
    monkeypatch.setattr(module, "resolve", lambda reference: tmp_path / "table.parquet")
    pictures = read_pictures("asset:digits")
    assert (pictures.name, pictures.labels.tolist()) == ("asset:digits", [7, 0])
    assert np.array_equal(pictures.pixels[1], picture)


def test_the_network_has_the_benchmarks_size() -> None:
    sizes = [sum(value.numel() for value in small_cnn(0, **kind).model.parameters()) for kind in ({}, {"classes": 62})]
    # 32·(25 + 1) + 64·(32·25 + 1) + 512·(1,024 + 1), and 513 a class
    assert sizes == [832 + 51_264 + 524_800 + 10 * 513, 832 + 51_264 + 524_800 + 62 * 513] == [582_026, 608_702]
    colour = small_cnn(0, channels=3, side=32).model
    assert colour.base.blocks[2][1].in_features == 1600


def test_its_weights_follow_from_the_seed_and_leave_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (small_cnn(seed).model.state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_it_computes_what_the_layers_say() -> None:
    model = small_cnn(0).model
    pixels, labels = torch.randn(4, 1, 28, 28), torch.tensor([1, 2, 3, 4])
    first, second, dense = model.base.blocks
    hidden = F.max_pool2d(F.relu(first[0](pixels)), 2)  # ReLU and pooling in the order in which they are published
    hidden = F.max_pool2d(F.relu(second[0](hidden)), 2)
    logits = model.classifier(F.relu(dense[1](hidden.flatten(1))))
    output = model(pixel_values=pixels, labels=labels)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels))


def test_a_client_gets_its_own_copy_of_all_of_it() -> None:
    source = small_cnn(0)
    own = carve(source, Part.whole(3))
    tune(own, ModelConfig(id="any"))
    trained = own.trainable()
    assert len(trained) == len(list(source.model.parameters())) == 8
    assert [own.block_of(name) for name in trained] == [0, 0, 1, 1, 2, 2, None, None]
    with torch.no_grad():
        trained["classifier.weight"].zero_()
    assert source.model.classifier.weight.abs().sum() > 0
