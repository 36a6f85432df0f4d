"""What a batch may bring to a model whose blocks are in several places, looked at before every forward; and which
tokens' last hidden states its logits and its loss read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from flexp.errors import ModelError
from flexp.kinds import IGNORED, KINDS, LABELS
from flexp.models.execution import ExecutionPlan
from flexp.models.quantized import brought_by
from flexp.rng import undisturbed

if TYPE_CHECKING:
    from flexp.models.stage import Stage

NOT_FOR_BLOCKS = frozenset({*LABELS, "shift_labels", "num_items_in_batch"})
"""What a batch may hold that only the loss needs."""
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
"""Where packed rows begin, for flash attention and state spaces; others take it from the positions, as servers do."""
NEED_ALL_BLOCKS = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What may be asked of a whole model, but not of one whose blocks are in several places."""
USUAL = frozenset({"input_ids", "inputs_embeds", "pixel_values", "attention_mask", "token_type_ids", "position_ids"})
"""What most models read; of the rest of a batch a server knows nothing."""


def for_blocks(model: Any, inputs: Mapping[str, Any], longest: int | None) -> dict[str, Any]:
    """What of a batch the model reads before its head.

    Args:
        longest: of :func:`longest_exact`.

    Raises:
        ModelError: it asks for what only a whole model can give, or its mask is not one row of tokens an example.
    """
    for key in NEED_ALL_BLOCKS:
        if inputs.get(key):
            raise ModelError(f"{key}=True was asked for, but a split model has its blocks in several places")
    refuse_cache(inputs)
    unread = NOT_FOR_BLOCKS | (PACKED if only_masks(model) else frozenset())
    wanted = {key: value for key, value in inputs.items() if key not in unread}
    mask, places = wanted.get("attention_mask"), wanted.get("cache_position")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ModelError(
            f"attention_mask has {what}, and a server makes its own masks from one number a token, (B, T); give it that"
        )
    given = next((wanted[key] for key in ("input_ids", "inputs_embeds") if key in wanted), None)
    if given is not None:
        length = given.shape[1]
        if places is not None and torch.equal(places, torch.arange(length, device=places.device)):
            del wanted["cache_position"]  # what every model counts by itself
        check_length(model, length, wanted.get("position_ids"), longest)
    return wanted


def refuse_cache(inputs: Mapping[str, Any]) -> None:
    """Refuse a forward that is to keep keys and values: the next one would be given none, and answer without its past.

    Raises:
        ModelError: see above.
    """
    if inputs.get("use_cache"):
        raise ModelError(
            "use_cache=True was asked for, and a split model keeps no past here: write with model.generate, or, token "
            "by token, with SplitGenerator.new_cache()"
        )


def only_masks(model: Any) -> bool:
    """Whether the blocks know of packed rows by their attention masks alone."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    attention = all(str(kind).endswith("attention") and "linear" not in str(kind) for kind in kinds)
    masked = getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")
    return masked and attention and not getattr(model, "_is_stateful", False)


def check_length(model: Any, length: int, positions: Tensor | None, longest: int | None) -> None:
    """Refuse tokens for which this model's rotary table would depend on what other batches it has seen.

    Args:
        length: of the whole text in tokens, those of an earlier forward included.
        longest: of :func:`longest_exact`.

    Raises:
        ModelError: they are more.
    """
    if longest is None:
        return
    last = length if positions is None else max(length, int(positions.max()) + 1)
    if last > longest:
        raise ModelError(
            f"{type(model).__name__}: {last} tokens are more than the {longest} that its rotary table was made for. "
            "Beyond them it grows with the longest text so far (dynamic NTK), which a server with several clients "
            "cannot follow: shorten texts (data.max_length), or set another rope_type in config.json (yarn, linear)"
        )


def longest_exact(config: Any) -> int | None:
    """The tokens up to which the model's answer to a text depends on that text alone; ``None``: always.

    transformers' ``dynamic`` rotary tables remember the longest text since the last short one.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    grows = any("dynamic" in str(table.get("rope_type", "")) for table in tables)
    return int(text.max_position_embeddings) if grows else None


def max_positions(config: Any) -> int | None:
    """The longest input of a model in tokens, if it has one."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    pad = getattr(text, "pad_token_id", None)
    # RoBERTa and its kin count positions from behind their padding token's id on.
    return int(positions) - (pad + 1 if pad is not None and _counts_from_padding(text.__class__) else 0)


@lru_cache(maxsize=64)
def _counts_from_padding(config: Any) -> bool:
    mapping: Any = transformers.AutoModel._model_mapping
    if config not in mapping:
        return False
    found = mapping[config]
    module = inspect.getmodule(found[0] if isinstance(found, tuple) else found)
    parts = [module, *(part for part in vars(module).values() if inspect.isclass(part))]
    return any(hasattr(part, "create_position_ids_from_input_ids") for part in parts)


@lru_cache(maxsize=64)
def pools_at_padding(cls: Any) -> bool:
    """Whether a classifier finds where a text ends by the padding token's id, as decoders do, and not by the mask."""
    return "pad_token_id" in inspect.getsource(cls.forward)


def align_padding(model: Any, pad: int | None) -> None:
    """Let a classifier that looks for padding look for the tokenizer's, which batches are filled up with."""
    if pad is not None and pools_at_padding(model.__class__):
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = pad


def check_padding(model: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse a batch in which a classifier would take padding for the end of a text.

    Its answer would depend on how long the other rows are.

    Raises:
        ModelError: see above.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or not pools_at_padding(model.__class__):
        return
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    mend = "set model.config.pad_token_id = tokenizer.pad_token_id"
    if pad is None and len(ids) > 1:
        raise ModelError(f"{type(model).__name__} knows no padding token, so it cannot tell where texts end: {mend}")
    if mask is None:
        return
    places = torch.arange(ids.shape[1], device=ids.device)
    ends = torch.ones_like(ids) if pad is None else (ids != pad).long()
    if bool(((places * ends).argmax(-1) > (places * mask.long()).argmax(-1)).any()):
        raise ModelError(
            f"{type(model).__name__} looks for the padding token {pad}, but this batch is padded with another, which "
            f"it would take for text: {mend}"
        )


PER_TOKEN = ("next-token", "tokens", "span")


def ignores_padding(model: Any) -> bool:
    """Whether what stands in padding changes no bit of the other tokens: attention's masks give it no weight.

    States that run along the text may pass it on, experts compute tokens together, as many as chose them, and blocks in
    8 bits look for outliers among all tokens.
    """
    if not hasattr(model, "config"):
        return False
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
            there_BT1 = inputs["attention_mask"].to(like_BTH.device).unsqueeze(-1).bool()
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
        hidden_BTH = hidden_BTH.to(self._stage.model.device)
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
