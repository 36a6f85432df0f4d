"""The network of the image benchmark: its size, its determinism, and what methods find in it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.small_cnn import small_cnn
from flexp.config import ModelConfig
from flexp.models.parts import Part
from flexp.models.stage import carve
from flexp.models.tuning import tune


def test_it_has_the_benchmarks_size() -> None:
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
