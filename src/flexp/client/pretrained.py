"""Split models by what they are for, made from a pretrained model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from flexp.assets import resolve
from flexp.client.generation import SplitGenerator
from flexp.client.joined import OFF
from flexp.client.model import SplitModel
from flexp.client.personal import Source
from flexp.config import AlignConfig, CodecConfig, ModelConfig, Rows
from flexp.data.columns import remarks
from flexp.errors import ConfigError
from flexp.links.base import Link
from flexp.links.opening import kept as connected
from flexp.models.anatomy import Part, block_count, check_cut
from flexp.models.heads import trained_classes
from flexp.models.loading import load_config, load_stage
from flexp.models.tuning import tune

log = logging.getLogger("flexp")


class Pretrained(SplitModel):
    """A split model whose part of a pretrained model is loaded, and nothing else of it."""

    plan_cut: ClassVar[Callable[..., tuple[int, int]] | None] = None
    """What ``cut="auto"`` asks, as :func:`flexp.planner.model.own_cut` is called; ``flexp`` sets it."""

    @classmethod
    def from_pretrained(
        cls,
        model: ModelConfig | str | Path,
        *,
        cut: tuple[int, int | None] | Literal["auto"],
        link: Link | str,
        labels: Sequence[str] | None = None,
        align: AlignConfig = OFF,
        accumulation: int = 1,
        codec: CodecConfig | None = None,
        rows: Rows = "logits",
        largest: tuple[int, int] = (8, 128),
        seed: int = 0,
        **settings: Any,
    ) -> Self:
        """Load only this client's part of a pretrained model and join the server.

        Args:
            labels: the names of a classifier's classes. Those that the checkpoint's own head knows keep its weights;
                what begins anew is logged. ``None``: the checkpoint's classes.
            cut: ``"auto"`` plans for the memory that this process may use, as ``data.clients.cut`` does, and logs what
                it chose.
            link: may be a URL with the client's name.
            largest: the examples and tokens of the largest batch that will come, for which ``"auto"`` leaves room.
            settings: keys of ``[model]`` beside the name, such as ``tuning="lora"`` or ``gradient_checkpointing=True``.
                Those that activations depend on (``dtype``, ``autocast``) must be the server's.

        Example:
            >>> model = flexp.SplitModelForSequenceClassification.from_pretrained(
            ...     "path/to/model", cut=(2, 5), link=server.connect("clinic-a"), labels=["benign", "malignant"]
            ... )

        Raises:
            ModelError: the model cannot be loaded or split.
            ConfigError: the cut does not fit, no cut fits this process's memory, or bare embeddings would go up.
            LinkError: the server refuses this client.
        """
        wanted = ModelConfig.of(model, **settings)
        wanted = wanted.at(resolve(wanted.id))
        config = load_config(wanted.id)
        blocks = block_count(wanted.id, config)
        if cut == "auto":
            if cls.plan_cut is None:
                raise ConfigError('cut = "auto" is planned for flexp.SplitModelFor…; take the class from there')
            cut = cls.plan_cut(wanted, cls.kind, largest, labels=len(labels or ("", "")), align=align)
        whole_cut = check_cut(cut, blocks)
        stage = load_stage(wanted, cls.kind, Part.client(whole_cut, blocks), labels=labels, seed=seed)
        for remark in remarks(trained_classes(config, cls.kind, wanted.pooling), labels or ()):
            log.warning(remark)
        tune(stage, wanted, seed=seed)
        with connected(link) as chosen:
            made = cls(
                stage,
                whole_cut,
                chosen,
                align=align,
                tuning=wanted.tuning,
                lora=wanted.lora,
                accumulation=accumulation,
                expose_embeddings=wanted.expose_embeddings,
                codec=codec,
                rows=rows,
                base_depth=wanted.base_depth,
            )
        made.source = Source(wanted, labels, seed)
        return made


class SplitModelForCausalLM(Pretrained):
    """A causal language model whose middle runs on a server."""

    kind = "causal-lm"

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """transformers' ``generate``, as :class:`flexp.client.generation.SplitGenerator` has it."""
        return SplitGenerator(self).generate(*inputs, **options)

    def prepare_inputs_for_generation(self, *inputs: Any, **options: Any) -> Any:
        """As of the model inside; peft asks before it can be refused."""
        return self.model.prepare_inputs_for_generation(*inputs, **options)


class SplitModelForSequenceClassification(Pretrained):
    """A text classifier whose middle runs on a server."""

    kind = "sequence-classification"


class SplitModelForImageClassification(Pretrained):
    """An image classifier whose middle runs on a server."""

    kind = "image-classification"


class SplitModelForMultiLabelClassification(Pretrained):
    """A text classifier with any number of labels for a text; ``labels`` of a batch are floats, (B, labels)."""

    kind = "multi-label-classification"


class SplitModelForRegression(Pretrained):
    """A model that gives a number for a text; ``labels`` of a batch are floats, (B,)."""

    kind = "regression"


class SplitModelForTokenClassification(Pretrained):
    """A classifier of every token."""

    kind = "token-classification"


class SplitModelForQuestionAnswering(Pretrained):
    """A model that finds where an answer begins and ends in a text."""

    kind = "question-answering"

    def forward(  # its signature says what the labels are
        self, *inputs: Any, start_positions: Tensor | None = None, end_positions: Tensor | None = None, **others: Any
    ) -> Any:
        """See :meth:`SplitModel.forward`."""
        return super().forward(*inputs, start_positions=start_positions, end_positions=end_positions, **others)


SPLIT_MODELS: dict[str, type[Pretrained]] = {cls.kind: cls for cls in Pretrained.__subclasses__()}
