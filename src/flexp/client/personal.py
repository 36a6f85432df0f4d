"""What a client owns of a model: its state, and what training loops of others ask of it.

Tied parameters are one tensor in a saved state, written once: safetensors refuses two names for one tensor, and the
Trainer saves the state of whatever is no PreTrainedModel as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from flexp.client.exchange import Piece
from flexp.config import ModelConfig
from flexp.errors import ConfigError, ModelError
from flexp.kinds import ModelKind
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage
from flexp.models.stage import Stage


@dataclass(frozen=True)
class Source:
    """Where a model was loaded from, and how; so any part of it can be loaded again."""

    model: ModelConfig
    labels: Sequence[str] | None
    seed: int

    def load(self, kind: ModelKind, part: Part) -> Stage:
        """A part, without any training."""
        return load_stage(self.model, kind, part, labels=self.labels, seed=self.seed)


class PersonalModel(nn.Module):
    """The client's stage as a module. ``model`` is the Hugging Face model, of which blocks are missing.

    A split model is no ``PreTrainedModel``. What a training loop of transformers or trl looks at decides what it
    computes (the class's name for label smoothing, the signature for columns that it drops, ``loss_type`` for what it
    counts), so every answer is that of the model inside.

    Attributes:
        source: where it is from; ``None``: it was not loaded, but carved out of another model.
    """

    write: ClassVar[Callable[..., None] | None] = None
    """What ``save_pretrained`` asks, as :func:`flexp.export.live.save` is called; ``flexp`` sets it."""

    source: Source | None = None

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.model: Any = stage.model
        self.training = self.model.training  # from_pretrained leaves it in evaluation
        # It looks as if it were written with the parameters of the model's own forward.
        self.forward: Any = functools.partial(type(self).forward, self)
        self.forward.__signature__ = inspect.signature(self.model.forward)  # type: ignore[attr-defined]
        save_ties_once(self)
        self.register_load_state_dict_pre_hook(_refuse_other_blocks)  # type: ignore[no-untyped-call]

    @property
    def config(self) -> Any:
        """The Hugging Face configuration of the whole model."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """How the model writes, if it does."""
        return getattr(self.model, "generation_config", None)

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss divides by ``num_items_in_batch``."""
        declared = getattr(self.model, "accepts_loss_kwargs", None)
        if declared is not None:
            return bool(declared)
        parameters = inspect.signature(self.model.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def dtype(self) -> torch.dtype:
        """Of the client's weights."""
        found: torch.dtype = self.model.dtype
        return found

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the client's own blocks are computed again in the backward."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    @property
    def loss_type(self) -> str | None:
        """The name of the model's loss, by which its items are counted."""
        return getattr(self.model, "loss_type", None)

    @property
    def main_input_name(self) -> str:
        """Which input holds the tokens or pixels."""
        return str(self.model.main_input_name)

    @property
    def model_tags(self) -> list[str] | None:
        """Words for a model card."""
        return getattr(self.model, "model_tags", None)

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """More words for a model card."""
        self.model.add_model_tags(tags)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings, which are the client's."""
        found: nn.Module = self.model.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head, which is the client's."""
        found: nn.Module | None = self.model.get_output_embeddings()
        return found

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the client's part alone."""
        return int(self.model.num_parameters(only_trainable, exclude_embeddings))

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations of the client's own blocks."""
        self.model.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """:meth:`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Compute the client's own blocks again in the backward; the server's ``memory`` is its own matter."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        enable = enable or self.model.gradient_checkpointing_enable  # the older name
        enable({"use_reentrant": False} | dict(activation_checkpointing_kwargs or {}), **options)

    def refuse_adapters(self) -> NoReturn:
        """Somebody has wrapped the model with peft. Raises ConfigError, always."""
        raise ConfigError(
            "peft around a split model would adapt this client's half alone; load model and server with tuning='lora', "
            "and leave peft_config out"
        )

    enable_input_require_grads = refuse_adapters  # which trl asks of what it has wrapped

    def save_pretrained(self, folder: str | Path, *, adapter: bool = False) -> None:
        """Write the personal model into a new folder that transformers loads; the server gives the middle, where it
        may (``allow_export``). No step may be under way.

        Args:
            adapter: of a model that is tuned with LoRA: the adapter alone, which peft loads over the pretrained model.

        Raises:
            ConfigError: the folder is taken, ``from_pretrained`` did not make the model, or it has no adapter.
            LinkError: the server does not give its blocks, or others train them all the time.
            StorageError: the disk is full or cannot be written; nothing is left in the folder.
        """
        if self.write is None:
            raise ConfigError("save_pretrained is there for flexp.SplitModelFor…; take the class from there")
        self.write(self, Path(folder), adapter=adapter)

    @property
    def device(self) -> torch.device:
        """Where the personal parameters are."""
        device: torch.device = self.model.device
        return device

    def personal_state(self) -> dict[str, Tensor]:
        """All that is this client's own, by name: what it trains, and what it follows. It never leaves the client."""
        return {name: value.detach() for name, value in self.stage.own().items()}

    def load_personal_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`personal_state`.

        Raises:
            ModelError: the state is of another cut or another tuning.
        """
        own = self.stage.own()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[0]
            raise ModelError(f"the saved personal state does not fit this cut and tuning: {odd} is on one side only")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def _get_name(self) -> str:
        return type(self.model).__name__


class WholeModel:
    """A whole model behind the interface of a split one, for clients that hold all of it; nothing crosses any link."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.last_align: float | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        first: Tensor = next(iter(self.stage.model.parameters()))
        return first.device

    def __call__(self, **batch: Any) -> Any:
        with self.stage.computing():
            return self.stage.model(**self.stage.placed(batch), **self.stage.no_cache)

    def train(self, mode: bool = True) -> WholeModel:
        self.stage.model.train(mode)
        return self

    @contextmanager
    def part_of_step(self, piece: Piece) -> Iterator[None]:
        yield

    def after_step(self) -> None:
        pass

    def personal_state(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.stage.trainable().items()}

    def load_personal_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.stage.trainable().items():
                parameter.copy_(state[name])


def answering(model: Any) -> Callable[[Mapping[str, Tensor]], Any]:
    """A model's answers, for evaluation: outputs with ``logits``, without gradients."""

    def forward(batch: Mapping[str, Tensor]) -> Any:
        model.train(False)
        with torch.no_grad():
            return model(**batch)

    return forward


def save_ties_once(module: nn.Module) -> None:
    """Let ``module.state_dict()`` name every tied parameter once, and ``load_state_dict`` understand that."""
    module.register_state_dict_post_hook(_drop)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_fill)  # type: ignore[no-untyped-call]


def _aliases(module: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, each with the name that is kept."""
    first = {id(value): name for name, value in module.named_parameters()}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(value)] for name, value in named if first[id(value)] != name}


def _drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for alias in _aliases(module):
        state.pop(prefix + alias, None)


def _refuse_other_blocks(model: PersonalModel, state: dict[str, Any], *_: Any) -> None:
    """Whoever loads without being strict (a Trainer) would go on with some blocks as they were pretrained."""
    blocks = [model.stage.block_of(name.removeprefix("model.")) for name in state]
    there = {block for block in blocks if block is not None}
    if there and there != model.stage.part.blocks:
        raise ModelError(
            f"the saved state has the blocks {sorted(there)}, this client's are {sorted(model.stage.part.blocks)}; use "
            "the cut that it was saved with"
        )


def _fill(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for alias, name in _aliases(module).items():
        if prefix + name in state:
            state.setdefault(prefix + alias, state[prefix + name])
