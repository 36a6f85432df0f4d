"""A text classifier that is one linear layer on the pooled last hidden state of any transformers model.

This file stands by itself: a saved model has a copy of it beside its weights, so that whoever has transformers can load
it with ``AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)``. Without that word
transformers refuses, since no architecture of its own computes this.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput


def pool(hidden_BTH: Tensor, mask_BT: Tensor | None, how: str) -> Tensor:
    """One vector (B, H) of each text: the ``mean`` of its tokens, its ``last``, or its first (``cls``); no padding."""
    if mask_BT is None:
        mask_BT = torch.ones(hidden_BTH.shape[:2], device=hidden_BTH.device)
    if how == "mean":
        weight_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTH.dtype)
        return (hidden_BTH * weight_BT1).sum(1) / weight_BT1.sum(1)
    place_T = torch.arange(1, hidden_BTH.shape[1] + 1, device=hidden_BTH.device)
    order_T = place_T if how == "last" else place_T.flip(0)
    chosen_B = (mask_BT.to(place_T.dtype) * order_T).argmax(1)
    return hidden_BTH[torch.arange(len(hidden_BTH), device=hidden_BTH.device), chosen_B]


class PooledConfig(PretrainedConfig):  # type: ignore[misc]
    """``text_config``: of the model below. ``pooling``: mean, last or cls. ``dropout``: before the classifier."""

    model_type = "flexp-pooled"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(self, text_config: Any = None, pooling: str = "mean", dropout: float = 0.0, **others: Any) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config, self.pooling, self.dropout = text_config, pooling, dropout
        super().__init__(**others)


class PooledForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """See above."""

    config_class = PooledConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: PooledConfig) -> None:
        super().__init__(config)
        self.base = without_pooler(AutoModel.from_config(config.text_config))
        self.pooling = config.pooling
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(width_of(config.text_config), config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, C) and, with labels, the loss of ``config.problem_type``."""
        hidden_BTH = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **others)[0]
        logits_BC = self.classifier(self.dropout(pool(hidden_BTH, attention_mask, self.pooling)))
        loss = None if labels is None else ForSequenceClassificationLoss(labels, logits_BC, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC)


def width_of(text_config: Any) -> int:
    """Of what a model gives back, which OPT-350m projects."""
    return int(getattr(text_config, "word_embed_proj_dim", None) or text_config.hidden_size)


def without_pooler(base: Any) -> Any:
    """The model without a pooler of its own, which would be trained for nothing."""
    if getattr(base, "pooler", None) is not None:
        base.pooler = None
    return base
