"""Which tokens' last hidden states a model's logits and its loss read, and whether padding can be left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexp.kinds import IGNORED, KINDS
from flexp.models.batches import only_masks, pools_at_padding
from flexp.models.execution import ExecutionPlan, undisturbed
from flexp.models.quantized import brought_by
from flexp.models.stage import Stage

PER_TOKEN = ("next-token", "tokens", "span")


def ignores_padding(model: Any) -> bool:
    """Whether what stands in padding changes no bit of the other tokens: attention's masks give it no weight.

    States that run along the text may pass it on, experts compute tokens together, as many as chose them, and blocks in
    8 bits look for outliers among all tokens.
    """
    config = model.config.get_text_config().to_dict()
    experts = any("expert" in key and isinstance(value, int) and value > 1 for key, value in config.items())
    return only_masks(model) and not experts and brought_by(model.config) in ("off", "nf4")


def labelled(kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
    """The tokens, (B, T), whose logits the loss reads; ``None``: it is not known, or may be all."""
    answers, labels, shifted = KINDS[kind].answers, inputs.get("labels"), inputs.get("shift_labels")
    if inputs.get("logits_to_keep"):
        return None
    if answers == "next-token" and isinstance(shifted, Tensor):
        return shifted != IGNORED
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    if answers == "tokens":
        return labels != IGNORED
    if answers == "next-token":
        last = torch.zeros_like(labels[:, :1], dtype=torch.bool)
        return torch.cat([labels[:, 1:] != IGNORED, last], dim=1)
    return None


class Pooling:
    """Finds the one token of each text that a classifier's head reads, if it reads one.

    What a class seems to do is tried once: with no numbers (NaN) in all other places its logits must be numbers.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._rule: str | None = None
        self._tried = False
        self._reads_padding: bool | None = None

    def rows(self, inputs: Mapping[str, Any], plan: ExecutionPlan, shape: tuple[int, ...]) -> Tensor | None:
        """Flags (B, T) of those tokens; ``None``: it reads several of a text.

        Args:
            shape: (B, T, H).
        """
        if not self._tried and shape[1] > 1:
            self._tried = True
            guess = pooled(self._stage.model)
            rows_BT = None if guess is None else chosen(guess, self._stage.model, inputs, shape)
            if rows_BT is not None and self._reads_only(rows_BT, inputs, plan, shape):
                self._rule = guess
        return None if self._rule is None else chosen(self._rule, self._stage.model, inputs, shape)

    def reads_padding(self, inputs: Mapping[str, Any], plan: ExecutionPlan, like_BTH: Tensor) -> bool:
        """Whether a head that reads several tokens reads padding as well; tried with the first batch that has any."""
        if self._reads_padding is None:
            there_BT1 = inputs["attention_mask"].unsqueeze(-1).bool()
            one, other = (
                self._logits(torch.where(there_BT1, like_BTH.detach(), value), inputs, plan) for value in (0.0, 3.0)
            )
            self._reads_padding = not torch.equal(one, other)
        return self._reads_padding

    def _reads_only(
        self, rows_BT: Tensor, inputs: Mapping[str, Any], plan: ExecutionPlan, shape: tuple[int, ...]
    ) -> bool:
        hidden_BTH = torch.full(shape, float("nan"), dtype=self._stage.model.dtype, device=rows_BT.device)
        hidden_BTH[rows_BT] = 0.0
        return bool(torch.isfinite(self._logits(hidden_BTH, inputs, plan)).all())

    def _logits(self, hidden_BTH: Tensor, inputs: Mapping[str, Any], plan: ExecutionPlan) -> Tensor:
        unlabelled = {key: value for key, value in inputs.items() if "label" not in key}
        with torch.no_grad(), undisturbed(hidden_BTH.device):
            logits: Tensor = self._stage.finish(hidden_BTH, unlabelled, plan).logits
        return logits


def pooled(model: Any) -> str | None:
    """Which token of a text a classifier's head seems to read: ``first``; by the mask ``leading`` or ``last``; or
    ``end``, the last that is not the padding token; ``None``: several."""
    own = getattr(model, "pooling", None) or getattr(model.config, "pooling", None)
    if own is not None:
        return {"cls": "leading", "last": "last"}.get(own)
    if getattr(model.config, "classifier_pooling", "cls") != "cls":
        return None
    return "end" if pools_at_padding(model.__class__) else "first"


def chosen(rule: str, model: Any, inputs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Flags (B, T) of the tokens that a rule of :func:`pooled` names; ``None``: it cannot be told of this batch."""
    batch, length = shape[:2]
    ids, mask_BT = inputs.get("input_ids"), inputs.get("attention_mask")
    given = next(value for value in (ids, mask_BT, inputs.get("pixel_values")) if isinstance(value, Tensor))
    place_T = torch.arange(1, length + 1, device=given.device)
    if rule == "first":
        place_B = torch.zeros(batch, dtype=torch.long, device=given.device)
    elif rule == "end":
        pad = model.config.get_text_config().pad_token_id
        if not isinstance(ids, Tensor):
            return None
        there_BT = torch.ones_like(ids) if pad is None else (ids != pad).long()
        place_B = (there_BT * place_T).argmax(1)
    else:
        there_BT = torch.ones(batch, length, dtype=torch.long, device=given.device) if mask_BT is None else mask_BT
        place_B = (there_BT.long() * (place_T if rule == "last" else place_T.flip(0))).argmax(1)
    return place_T - 1 == place_B.unsqueeze(1)
