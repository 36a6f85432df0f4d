"""``model.pooling``: another head in the place of a text classifier's own, one linear layer on a pooled hidden state.

The model keeps its class, its names and its blocks; what its checkpoint has between the last block's norm and the
logits is taken out. A closed-form head (:mod:`flexp.client.heads`) wants this: of what a pooler makes, class means say
little.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn

from flexp.errors import ModelError
from flexp.kinds import KINDS
from flexp.models.pooled import PooledConfig, PooledForSequenceClassification, width_of, without_pooler

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


def saved_as(model: Any) -> Any:
    """The same model as transformers is to save it, sharing its tensors: with another head, as a class whose code is
    saved with it."""
    if not issubclass(type(model), _Pooling):
        return model
    with torch.device("meta"):
        config = PooledConfig(model.config.to_dict(), model.pooling, model.dropout.p)
        config.num_labels, config.problem_type = model.config.num_labels, model.config.problem_type
        config.id2label, config.label2id = model.config.id2label, model.config.label2id
        config.dtype = model.dtype
        made: Any = PooledForSequenceClassification(config)
    made.base, made.classifier = model.base_model, model.classifier
    return made.eval()


class _Pooling:
    """Marks a class that :func:`put_pooling` made."""


@lru_cache
def _pooling(cls: Any) -> Any:
    names = {"forward": PooledForSequenceClassification.forward, "__module__": cls.__module__}
    return type(cls.__name__, (_Pooling, cls), {**names, "__qualname__": cls.__qualname__})


def _dropout(config: Any) -> float:
    """What the model's own classifier has, or else its hidden states."""
    rates = [getattr(config, key, None) for key in _DROPOUTS]
    return next((float(rate) for rate in rates if rate is not None), 0.0)
