"""``model.pooling``: another head in the place of a text classifier's own, one linear layer on a pooled hidden state.

The model keeps its class, its names and its blocks; what its checkpoint has between the last block's norm and the
logits is taken out. A closed-form head (:mod:`flexp.client.heads`) wants this: of what a pooler makes, class means say
little.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from flexp.errors import ModelError
from flexp.kinds import KINDS
from flexp.models.batches import NOT_FOR_BLOCKS
from flexp.models.execution import ExecutionPlan
from flexp.models.pooled import PooledConfig, PooledForSequenceClassification, pool, width_of, without_pooler

if TYPE_CHECKING:
    from flexp.models.stage import Stage

CLASSIFIER = "classifier"
"""What the new layer is called in the model."""

_DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "resid_pdrop", "hidden_dropout")

# In FlexP itself a saved model needs no code from its folder.
transformers.AutoConfig.register(PooledConfig.model_type, PooledConfig, exist_ok=True)
transformers.AutoModelForSequenceClassification.register(PooledConfig, PooledForSequenceClassification, exist_ok=True)
# And whoever saves one saves its code as well.
PooledConfig.register_for_auto_class("AutoConfig")
PooledForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")


def put_pooling(model: Any, how: str, kind: str, name: str) -> list[str]:
    """Give ``model`` the head, in place.

    Args:
        how: ``mean``, ``last`` or ``cls``; ``checkpoint`` leaves the model as it is.
        name: of the model, for people.

    Returns:
        The names of the new weights, which are not drawn yet; none, if the model has just this head already.

    Raises:
        ModelError: the model is no text classifier.
    """
    if getattr(model, "early", None) is not None:
        raise ModelError(f"{name}: was trained with privacy.pool, and is for use as it is; train from what it came of")
    if how == "checkpoint" or getattr(model, "pooling", None) == how:
        return []
    if KINDS[kind].pipeline != "text-classification":
        raise ModelError(
            f'{name}: model.pooling = "{how}" is for classifiers of texts, and this is {kind}: leave it at "checkpoint"'
        )
    base, text = without_pooler(model.base_model), model.config.get_text_config()
    for child in [child for child, module in model.named_children() if module is not base]:
        delattr(model, child)
    model.pooling = how
    model.dropout = nn.Dropout(_dropout(model.config))
    model.classifier = nn.Linear(width_of(text), int(model.config.num_labels), dtype=model.dtype, device=model.device)
    model.classifier.requires_grad_(False)
    model.train(model.training)
    model.__class__ = _pooling(type(model))  # type: ignore[arg-type]
    return [f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"]


def pooled_texts(
    stage: Stage, z_BTH: Tensor, inputs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any], ExecutionPlan]:
    """One vector of each text, the mean of its tokens, in their place: (B, 1, H); the batch that this is, labels
    included, and the plan of blocks that go on with it."""
    z_B1H = pool(z_BTH, inputs.get("attention_mask"), "mean").unsqueeze(1)
    there_B1 = torch.ones(z_B1H.shape[:2], dtype=torch.long, device=z_B1H.device)
    short = {key: value for key, value in inputs.items() if key in NOT_FOR_BLOCKS}
    short |= {"input_ids": torch.zeros_like(there_B1), "attention_mask": there_B1}
    return z_B1H, short, stage.plan_without_inputs(z_B1H.detach(), there_B1)


def pool_before(model: Any, path: str, block: int) -> None:
    """Let ``block`` of a whole model with a head of :func:`put_pooling`, whose blocks are at ``path``, and all that
    follow go on with the mean of a text's tokens in the place of each: to rounding what :func:`pooled_texts` gives."""
    model.early = [path.removeprefix(f"{model.base_model_prefix}."), block]


def saved_as(model: Any) -> Any:
    """The same model as transformers is to save it, sharing its tensors: with another head, as a class whose code is
    saved with it."""
    if not issubclass(type(model), _Pooling):
        return model
    with torch.device("meta"):
        config = PooledConfig(model.config.to_dict(), model.pooling, model.dropout.p, model.early)
        config.num_labels, config.problem_type = model.config.num_labels, model.config.problem_type
        config.id2label, config.label2id = model.config.id2label, model.config.label2id
        config.dtype = model.dtype
        made: Any = PooledForSequenceClassification(config)
    made.base, made.classifier = model.base_model, model.classifier
    return made.eval()


class _Pooling:
    """Marks a class that :func:`put_pooling` made."""

    early: list[Any] | None = None


@lru_cache
def _pooling(cls: Any) -> Any:
    names = {"forward": PooledForSequenceClassification.forward, "__module__": cls.__module__}
    return type(cls.__name__, (_Pooling, cls), {**names, "__qualname__": cls.__qualname__})


def _dropout(config: Any) -> float:
    """What the model's own classifier has, or else its hidden states."""
    rates = [getattr(config, key, None) for key in _DROPOUTS]
    return next((float(rate) for rate in rates if rate is not None), 0.0)
