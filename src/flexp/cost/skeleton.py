"""A model without weights: what can be known of it from its configuration, on the meta device.

Its parameters become *fake* tensors, which have a shape, a type and a device but no content: the model's own code runs
on them, picks the kernels of a CPU, and nothing is computed or allocated. Where a model's code looks into its tensors
(a mixture of experts counts who was chosen), real ones with random content take their place, of one block of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flexp.config import ModelConfig
from flexp.errors import ModelError
from flexp.kinds import KINDS
from flexp.models.anatomy import Part, dissect, refuse_by_design
from flexp.models.execution import Absent
from flexp.models.heads import AUTO, set_head
from flexp.models.loading import AUTOCAST, DTYPES, load_config, quietly
from flexp.models.pooling import put_pooling
from flexp.models.stage import Stage
from flexp.models.tuning import tune

LIKE = ("idx", "index", "layer_id", "layer_number")
"""What a block's attribute is called that only says where it stands."""


def bare_model(model: ModelConfig, kind: str, *, labels: int) -> Any:
    """The model of a configuration on the meta device, its dropout as there.

    Raises:
        ModelError: there is no such model, it is not of that kind, or it cannot be split.
    """
    config = load_config(model.id)
    refuse_by_design(f"{model.id} ({config.model_type})", config)
    if kind not in AUTO:
        raise ModelError(f"kind {kind!r} is not known: expected one of {', '.join(AUTO)}")
    if KINDS[kind].answers != "next-token":
        config.num_labels = labels
        config.problem_type = "single_label_classification"
    set_head(config, kind)
    if getattr(config.get_text_config(), "pad_token_id", 0) is None:
        config.get_text_config().pad_token_id = 0
    config.output_hidden_states = config.output_attentions = False
    mapping = AUTO[kind]._model_mapping
    if type(config) not in mapping:
        raise ModelError(f"{model.id}: a {config.model_type} model cannot be used for {kind}; choose another --kind")
    found = mapping[type(config)]
    cls = found[0] if isinstance(found, tuple) else found
    with quietly(), torch.device("meta"):
        attention = model.attention if cls._supports_sdpa else "eager"
        made = cls._from_config(config, dtype=DTYPES[model.dtype], attn_implementation=attention)
        put_pooling(made, model.pooling, kind, model.id)
    dissect(made)
    return made


def kinds(model: Any) -> list[int]:
    """For each block the first block that is like it: equal parameters and equal settings, wherever it stands."""
    blocks = model.get_submodule(dissect(model).path)
    first: dict[Any, int] = {}
    return [first.setdefault(_signature(block), index) for index, block in enumerate(blocks)]


def _signature(block: nn.Module) -> Any:
    shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in block.named_parameters())
    settings = tuple(
        (path, type(module).__name__, key, value)
        for path, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, str | int | float | bool | None) and not any(like in key for like in LIKE)
    )
    return shapes, settings


class Skeleton:
    """A tuned stage of the whole model that can run without weights, and the batch for it.

    Args:
        bare: of :func:`bare_model`; it is used up.
        chosen: the blocks that will run; with ``real`` tensors only these are made.
        config: how it is tuned.
        still: nothing of it is trained.
    """

    def __init__(
        self,
        bare: Any,
        chosen: list[int],
        config: ModelConfig,
        *,
        real: bool = False,
        still: bool = False,
    ) -> None:
        self.real = real
        self.mode: AbstractContextManager[Any] = nullcontext() if real else FakeTensorMode()
        anatomy = dissect(bare)
        _replace(bare, lambda value: torch.zeros((), dtype=value.dtype).expand(value.shape))
        bare.requires_grad_(False)
        if real:
            blocks = bare.get_submodule(anatomy.path)
            for index in set(range(anatomy.blocks)) - set(chosen):
                blocks[index] = Absent(index, blocks[index])
        self.stage = Stage(bare, anatomy, Part.whole(anatomy.blocks) if not real else Part(frozenset(chosen), True))
        self.stage.compares = False  # a plan cannot be compared without content; loading the real model does it
        self.stage.autocast = AUTOCAST[config.autocast]
        tune(
            self.stage, config.model_copy(update={"blocks": "memory"}), "frozen" if still else None
        )  # there is no file
        with self.mode, torch.no_grad():
            _replace(bare, _filled if real else lambda value: torch.empty(value.shape, dtype=value.dtype))
        bare.train()

    def batch(self, kind: str, examples: int, length: int) -> dict[str, Tensor]:
        """Inputs and labels; must be made inside :attr:`mode`.

        Texts are padded, as those of real batches mostly are: then models hand their blocks a mask, which costs memory.
        """
        config = self.stage.model.config
        head = KINDS[kind]
        if head.images:
            size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
            height, width = (size, size) if isinstance(size, int) else size
            pixels = torch.zeros(examples, channels, height, width)
            return {"pixel_values": pixels, **head.blank(examples, None, config.num_labels)}
        ids = torch.ones(examples, length, dtype=torch.long)
        mask = torch.ones(examples, length, dtype=torch.long)
        if self.real:  # without content nobody can see that there is no padding
            mask[:, -1] = 0
        return {"input_ids": ids, "attention_mask": mask, **head.blank(examples, ids, config.num_labels)}


def _filled(value: Tensor) -> Tensor:
    return torch.rand(value.shape).mul_(0.04).sub_(0.02).to(value.dtype) if value.is_floating_point() else value.clone()


def _replace(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put other tensors in the place of all parameters and buffers; what was tied stays tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is None:
                continue
            if id(value) not in made:
                made[id(value)] = (nn.Parameter(make(value), requires_grad=value.requires_grad), value)
            module._parameters[name] = made[id(value)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                made.setdefault(id(buffer), (make(buffer), buffer))
                module._buffers[name] = made[id(buffer)][0]
