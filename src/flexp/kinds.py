"""What a model may be for: every kind of head once, with all that other rooms need to know of it.

A kind is a class of transformers with a ``problem_type``: plain transformers computes the loss, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

ModelKind = Literal[
    "causal-lm",
    "sequence-classification",
    "image-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
    "question-answering",
]
Answers = Literal["next-token", "class", "classes", "number", "tokens", "span"]

IGNORED = -100
"""A label without loss."""


LABELS = ("labels", "start_positions", "end_positions")
"""What only the loss reads of a batch."""


@dataclass(frozen=True)
class Kind:
    """One kind of head.

    Attributes:
        auto: transformers' class that loads such a model.
        answers: what it gives: the next token; one class, some classes or a number for the whole input; a class for
            each token; or where a span begins and ends.
        pipeline: transformers' pipeline for it.
        peft: peft's name for it; ``None``: it has none, and a plain PeftModel it is.
        problem: the ``problem_type`` of the configuration, where the class has several losses.
    """

    auto: str
    answers: Answers
    pipeline: str
    peft: str | None
    problem: str | None = None

    @property
    def images(self) -> bool:
        """Whether it looks at pixels."""
        return self.pipeline.startswith("image")

    @property
    def outputs(self) -> int | None:
        """How many numbers it gives (per token), where that is not the number of classes."""
        return {"number": 1, "span": 2}.get(self.answers)

    @property
    def named(self) -> bool:
        """Whether it gives classes, which have names."""
        return self.answers in ("class", "classes", "tokens")

    def weighted(self, logits: Tensor, targets: Tensor, weights_C: Tensor) -> Tensor:
        """The loss in which an example (a token) of class c counts ``weights_C[c]``; of several classes, its positive.

        It is torch's own: a mean that is weighted alike over what has one class, and ``pos_weight`` over several.
        """
        from torch.nn import functional as F

        weights_C = weights_C.to(logits)
        if self.answers == "classes":
            return F.binary_cross_entropy_with_logits(logits, targets.to(logits), pos_weight=weights_C)
        flat = logits.reshape(-1, logits.shape[-1])
        return F.cross_entropy(flat, targets.reshape(-1).to(logits.device), weights_C, ignore_index=IGNORED)

    def mass(self, batch: Mapping[str, Tensor], weights_C: Tensor) -> float:
        """What the mean of :meth:`weighted` is taken over."""
        targets = batch[self.targets[0]]
        if self.answers == "classes":
            return float(len(targets))
        return float(weights_C[targets[targets != IGNORED]].sum())

    def items(self, batch: Mapping[str, Tensor]) -> int:
        """How many items the loss of a batch with labels is a mean of: examples, or labelled tokens."""
        targets = batch[self.targets[0]]
        if self.answers == "next-token":
            targets = targets[:, 1:]  # shifted by the model
        elif self.answers in ("classes", "number", "span") or targets.is_floating_point():
            return len(targets)
        return int((targets != IGNORED).sum())

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of what only the loss reads of a batch."""
        return ("start_positions", "end_positions") if self.answers == "span" else ("labels",)

    def blank(self, examples: int, ids_BT: Tensor | None, outputs: int) -> dict[str, Tensor]:
        """Labels of the right shape and type for a batch that only costs matter of; ``outputs``: of the head."""
        import torch

        match self.answers:
            case "next-token" | "tokens":
                assert ids_BT is not None
                return {"labels": ids_BT.clone() if self.answers == "next-token" else torch.zeros_like(ids_BT)}
            case "classes":
                return {"labels": torch.zeros(examples, outputs)}
            case "number":
                return {"labels": torch.zeros(examples)}
        return {name: torch.zeros(examples, dtype=torch.long) for name in self.targets}


def take_targets(batch: dict[str, Any]) -> Any:
    """Take what only the loss reads out of a batch: the labels; or of spans their beginnings and ends, (B, 2)."""
    if "labels" in batch:
        return batch.pop("labels")
    import torch

    return torch.stack([batch.pop("start_positions"), batch.pop("end_positions")], dim=-1)


def logits_of(output: Any) -> Any:
    """What a model answered: its logits; or of spans those of beginnings and ends, (B, T, 2)."""
    if getattr(output, "start_logits", None) is None:
        return output.logits
    import torch

    return torch.stack([output.start_logits, output.end_logits], dim=-1)


KINDS: dict[str, Kind] = {
    "causal-lm": Kind("AutoModelForCausalLM", "next-token", "text-generation", "CAUSAL_LM"),
    "sequence-classification": Kind("AutoModelForSequenceClassification", "class", "text-classification", "SEQ_CLS"),
    "image-classification": Kind("AutoModelForImageClassification", "class", "image-classification", None),
    "multi-label-classification": Kind(
        "AutoModelForSequenceClassification", "classes", "text-classification", "SEQ_CLS", "multi_label_classification"
    ),
    "regression": Kind("AutoModelForSequenceClassification", "number", "text-classification", "SEQ_CLS", "regression"),
    "token-classification": Kind("AutoModelForTokenClassification", "tokens", "token-classification", "TOKEN_CLS"),
    "question-answering": Kind("AutoModelForQuestionAnswering", "span", "question-answering", "QUESTION_ANS"),
}
"""By kind; where a checkpoint fits several, the first is meant."""


def unmasked_tokens(batch: Mapping[str, Any]) -> int:
    """The tokens that a batch's alignment is a mean over; of images, whose tokens are equally many, their number."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is not None:
        return int(mask.sum())
    return int(ids.numel()) if ids is not None else len(next(iter(batch.values())))


def share_of(kind: ModelKind, inputs: Mapping[str, Any], even: float) -> tuple[float, float]:
    """A batch's share of its step's items, and its items, for loops that do not say; at least one.

    Args:
        even: the share, where nobody says how many items the step has (``num_items_in_batch``) or the labels are not
            there (they are kept back where somebody else computes the loss).
    """
    from torch import Tensor

    first: Tensor = next(value for value in inputs.values() if isinstance(value, Tensor))
    labelled = all(isinstance(inputs.get(name), Tensor) for name in KINDS[kind].targets)
    items, shifted = float(len(first)), inputs.get("shift_labels")
    if isinstance(shifted, Tensor):
        items = float(max(1, int((shifted != IGNORED).sum())))
    elif labelled:
        items = float(max(1, KINDS[kind].items(inputs)))
    total = inputs.get("num_items_in_batch")
    if total is None:
        return even, items
    whole = max(1.0, float(total))
    if labelled:
        return min(1.0, items / whole), items
    return even, min(max(1.0, whole * even), float(first.shape[:2].numel()))  # no more than it has tokens
