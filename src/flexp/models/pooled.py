"""A text classifier that is one linear layer on the pooled last hidden state of any transformers model.

This file stands by itself: a saved model has a copy of it beside its weights, so that whoever has transformers can load
it with ``AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)``. Without that word
transformers refuses, since no architecture of its own computes this.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
        return (hidden_BTH * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1)
    place_T = torch.arange(1, hidden_BTH.shape[1] + 1, device=hidden_BTH.device)
    order_T = place_T if how == "last" else place_T.flip(0)
    chosen_B = (mask_BT.to(place_T.dtype) * order_T).argmax(1)
    return hidden_BTH[torch.arange(len(hidden_BTH), device=hidden_BTH.device), chosen_B]


_ALONE = threading.RLock()


@contextmanager
def pooled_early(base: Any, early: list[Any] | None, mask_BT: Tensor | None) -> Iterator[None]:
    """Inside the ``with`` block a block of the model, and so all that follow, has the mean of a text for each token."""
    if early is None:
        yield
        return

    def mean(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_BTH = args[0] if args else kwargs["hidden_states"]
        mean_BTH = pool(hidden_BTH, mask_BT, "mean").unsqueeze(1).expand_as(hidden_BTH)
        return ((mean_BTH, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mean_BTH})

    path, block = early
    with _ALONE:  # another thread's texts would go through this one's hook
        hook = base.get_submodule(path)[block].register_forward_pre_hook(mean, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


class PooledConfig(PretrainedConfig):  # type: ignore[misc]
    """``text_config``: of the model below. ``pooling``: mean, last or cls. ``dropout``: before the classifier.
    ``early``: where its blocks are, and the one from which on a text is the mean of its tokens; ``None``: none."""

    model_type = "flexp-pooled"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        pooling: str = "mean",
        dropout: float = 0.0,
        early: list[Any] | None = None,
        **others: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config, self.pooling, self.dropout, self.early = text_config, pooling, dropout, early
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
        self.pooling, self.early = config.pooling, config.early
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
        with pooled_early(self.base_model, self.early, attention_mask):
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
