"""``train.class_weights``: the loss is torch's weighted one, whatever the exchanges of a step are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional as F

from flexp.client.trainer import Trainer
from flexp.config import DataConfig, OptimizerConfig, TrainConfig
from flexp.data.tasks import task_of
from flexp.data.tasks.base import Limit
from flexp.data.types import ClientData
from flexp.errors import ConfigError
from flexp.optim import Updater
from tests.data.tools import tokenizer
from tests.harness import world

WEIGHTS = torch.tensor([0.5, 3.0, 1.5])


class Rows:
    """Rows of a tiny batch, with weights of three classes."""

    model_kind = "sequence-classification"

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def class_weights(self, wanted: Any, examples: Any) -> Tensor:
        return WEIGHTS


@pytest.mark.parametrize(("micro_batch", "in_flight"), [(6, 1), (4, 1), (2, 3)])
def test_a_weighted_step_is_the_whole_models(micro_batch: int, in_flight: int) -> None:
    here = world("bert", optimizer=OptimizerConfig(name="sgd", lr=0.1, clip=None))
    model, batch = here.client("a", (2, 4)), here.batch(batch=6, length=6)
    batch["labels"] = torch.tensor([0, 1, 2, 0, 0, 1])
    examples: list[Any] = [{name: value[row] for name, value in batch.items()} for row in range(6)]
    config = TrainConfig(batch_size=6, micro_batch=micro_batch, in_flight=in_flight, class_weights="balanced")
    updater = Updater(model.stage.trainable(), OptimizerConfig(name="sgd", lr=0.1, clip=None))
    whole = here.whole.model
    whole.requires_grad_(True).zero_grad()  # tests share it
    logits = whole.train()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    expected = F.cross_entropy(logits, batch["labels"], weight=WEIGHTS)
    expected.backward()
    before = {name: value.detach().clone() for name, value in updater.parameters.items()}
    gradients = {name: value.grad.clone() for name, value in whole.named_parameters() if value.grad is not None}
    data = ClientData("a", train=examples, validation=[], test=[])
    step = Trainer(data, Rows(), model, updater, config, seed=0).step()  # type: ignore[arg-type]
    assert step.loss == pytest.approx(expected.item(), rel=1e-5)
    for name, value in updater.parameters.items():
        torch.testing.assert_close(value, before[name] - 0.1 * gradients[name], rtol=1e-4, atol=1e-6)


def made(name: str, names: list[str]) -> Any:
    config = DataConfig.model_validate({"source": "-", "task": name})
    return task_of(config)(config, tokenizer(bert=True), Limit(99), names)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = [0, 0, 0, 0, 1, 1, 3]
    examples = [{"labels": label} for label in labels]
    weights = made("classification", ["a", "b", "c", "d"]).class_weights("balanced", examples)
    expected = compute_class_weight("balanced", classes=torch.tensor([0, 1, 3]).numpy(), y=torch.tensor(labels).numpy())
    assert weights.tolist() == pytest.approx([expected[0], expected[1], 1.0, expected[2]])
    tokens = [{"labels": [0, -100, 1, 0]}, {"labels": [0]}]
    assert made("token-classification", ["B-X", "O"]).class_weights("balanced", tokens).tolist() == [
        pytest.approx(4 / (2 * 3)),
        pytest.approx(4 / 2),
    ]
    several = [{"labels": [1.0, 0.0]}, {"labels": [1.0, 1.0]}, {"labels": [0.0, 0.0]}]
    assert made("multi-label", ["a", "b"]).class_weights("balanced", several).tolist() == [0.5, 2.0]


def test_weights_by_name_and_what_is_refused() -> None:
    task = made("classification", ["a", "b"])
    assert task.class_weights({"b": 4.0}, []).tolist() == [1.0, 4.0]
    with pytest.raises(ConfigError, match="there is no class 'c'; expected some of a, b"):
        task.class_weights({"c": 4.0}, [])
    with pytest.raises(ConfigError, match=r"is for classifiers; data.task = 'regression' has no classes"):
        made("regression", []).class_weights("balanced", [])
