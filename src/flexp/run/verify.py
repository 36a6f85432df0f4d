"""``flexp verify``: that split training is the whole model's training, bit for bit.

The whole model (plain transformers, ``loss.backward()`` and a torch optimiser) and the split one are trained side by
side, from equal weights and on equal batches, with one client and without alignment (λ = 0). Dropout is set to zero,
since two parties cannot draw one party's random numbers, and gradients are not clipped: the global norm of a split
model is known to nobody, so each party clips its own part by design. Batches are random tokens or pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from flexp.assets.store import resolve
from flexp.client.model import SplitModel
from flexp.client.pretrained import SPLIT_MODELS
from flexp.config import ModelConfig, OptimizerConfig, ServerConfig
from flexp.errors import ConfigError, FlexpError, ModelError
from flexp.kinds import KINDS, ModelKind, logits_of
from flexp.links.base import Link
from flexp.links.opening import connected, loopback
from flexp.models.anatomy import Part, check_cut, refuse_by_design
from flexp.models.heads import AUTO
from flexp.models.loading import load_config, load_stage, quietly
from flexp.models.stage import Stage
from flexp.models.tuning import tune
from flexp.models.zoo import ARCHITECTURES, Padding, tiny_batch
from flexp.optim import Updater
from flexp.server.server import Server
from flexp.server.shared import SharedBlocks

ARCH = "arch:"
LINKS: dict[str, Callable[[Server, str], AbstractContextManager[Link]]] = {
    "in-process": lambda server, client: connected(server.connect(client)),
    "grpc": loopback,
}
"""How the client reaches the server, by name."""

OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.01, clip=None)


@dataclass(frozen=True)
class Setup:
    """What is compared.

    Attributes:
        model: by a folder, a Hugging Face id, ``asset:NAME`` or ``arch:NAME``, and how it is computed and tuned; its
            ``base_depth``, s_min, is where the server's blocks begin, s where it is not said.
        task: what the model is for; ``None``: what its checkpoint says.
        cut: (s, e); ``None``: one block at each end stays with the client.
        memory: whether the server keeps its activations or computes them again.
        batch: examples of a step. length: tokens of an example.
    """

    model: ModelConfig
    task: ModelKind | None = None
    cut: tuple[int, int | None] | None = None
    padding: Padding = "none"
    steps: int = 3
    link: str = "in-process"
    memory: Literal["keep", "recompute"] = "keep"
    batch: int = 3
    length: int = 10
    seed: int = 0

    @classmethod
    def of(cls, model: str, *, tuning: str = "full", **settings: Any) -> Setup:
        """With keys of the table ``[model]`` and of this class; with full tuning, all of the model is trained.

        Raises:
            ConfigError: there is no such key, or it cannot have that value.
        """
        own = {field.name: settings.pop(field.name) for field in fields(cls) if field.name in settings}
        config = ModelConfig.of(model, tuning=tuning, train_embeddings=tuning == "full", **settings)
        return cls(config, **own)

    def as_json(self) -> dict[str, Any]:
        """All of it, flat; ``model`` is its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, **self.model.model_dump(exclude={"id"}), "model": self.model.id}


@dataclass(frozen=True)
class Outcome:
    """The largest absolute differences between whole and split, over all steps; infinite where one side has none.

    ``setup`` is what was really compared, with every default filled in. ``tensors`` were trained. ``error`` says why
    nothing was compared.
    """

    setup: Setup
    blocks: int = 0
    tensors: int = 0
    logits: float = math.inf
    gradients: float = math.inf
    losses: float = math.inf
    weights: float = math.inf
    error: str | None = None

    @property
    def exact(self) -> bool:
        """Whether there is no difference at all."""
        return self.error is None and not any((self.logits, self.gradients, self.losses, self.weights))

    def as_json(self) -> dict[str, Any]:
        """All of it, JSON-ready; an infinite difference is ``null``."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "setup"}
        finite = {key: None if value == math.inf else value for key, value in values.items()}
        return {**self.setup.as_json(), **finite, "exact": self.exact}


class _Witness(SharedBlocks):
    """Shared blocks that remember what the last step's gradient was."""

    seen: Mapping[str, Tensor] = {}

    def add(self, gradients: Mapping[str, Tensor], *args: Any, **options: Any) -> bool:
        self.seen = gradients
        return super().add(gradients, *args, **options)


def verify(setup: Setup) -> Outcome:
    """Train the whole and the split model side by side and compare them.

    Raises:
        ModelError: the model cannot be loaded or split; the message names what to use instead.
        ConfigError: the cut does not fit the model, or there is no such link.
    """
    name = str(resolve(setup.model.id))
    _refuse(name)
    kind = setup.task or kind_of(name)

    def load(part: Part | None) -> Stage:
        return load_stage(setup.model.at(name), kind, part, pad_token_id=0, dropout=0.0, seed=setup.seed)

    whole = load(None)
    blocks = whole.anatomy.blocks
    setup, cut, base = _filled(setup, kind, blocks, whole.model.config._attn_implementation)
    return compare(setup, whole, load(Part.client(cut, blocks)), load(Part.server(base, cut[1])))


def compare(setup: Setup, whole: Stage, client: Stage, server_stage: Stage) -> Outcome:
    """:func:`verify` for stages in memory, not tuned yet; they are changed, so ``whole`` shares no tensor with others.

    Raises:
        ConfigError: the cut does not fit the model.
    """
    setup, cut, _ = _filled(setup, setup.task, whole.anatomy.blocks, setup.model.attention)
    config = setup.model
    if config.tuning == "full":
        whole.model.requires_grad_(True)
    else:  # peft's adapters with the split model's weights, which depend on their names alone
        tune(whole, config.model_copy(update={"gradient_checkpointing": False}), seed=setup.seed)
    for stage in (server_stage, client):
        tune(stage, config, seed=setup.seed)
    server = Server(server_stage, tuning=config.tuning, config=ServerConfig(memory=setup.memory), optimizer=OPTIMIZER)
    server.shared = witness = _Witness(server_stage, server.config, OPTIMIZER)
    with LINKS[setup.link](server, "verify") as link, quietly():
        split = SPLIT_MODELS[cast(str, setup.task)](client, cut, link, tuning=config.tuning, expose_embeddings=True)
        return _train_both(setup, whole.model, split, witness)


def _train_both(setup: Setup, reference: Any, split: SplitModel, witness: _Witness) -> Outcome:
    if hasattr(reference.config, "use_cache"):
        reference.config.use_cache = False  # GPT-J, for one, rounds otherwise with a cache of keys and values
    whole = {name: value for name, value in reference.named_parameters() if value.requires_grad}
    plain = torch.optim.AdamW(
        whole.values(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay, fused=True
    )
    personal = Updater(split.stage.trainable(), OPTIMIZER)

    def both_sides(client: Mapping[str, Tensor | None], server: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        start, stop = split.cut  # below s, the server's blocks are not this client's
        used = {name: value for name, value in server.items() if start <= (witness.stage.block_of(name) or 0) < stop}
        return {**client, **used}

    logits = gradients = losses = 0.0
    reference.train()
    split.train()
    for step in range(setup.steps):
        batch = tiny_batch(
            reference, padding=setup.padding, batch=setup.batch, length=setup.length, seed=setup.seed + step
        )
        try:
            with split.stage.computing():
                expected = reference(**split.stage.placed(batch))
        except Exception as error:
            raise ModelError(
                f"{setup.model.id}: plain transformers' whole model fails on such a batch ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); try another --length, --padding or checkpoint"
            ) from error
        got = split(**batch)
        logits = max(logits, difference(*(_of_tokens(logits_of(output), batch) for output in (expected, got))))
        losses = max(losses, difference(expected.loss, got.loss))
        expected.loss.backward()
        got.loss.backward()
        client_gradients = {name: value.grad for name, value in personal.parameters.items()}
        gradients = max(
            gradients,
            largest({name: value.grad for name, value in whole.items()}, both_sides(client_gradients, witness.seen)),
        )
        plain.step()
        plain.zero_grad()
        personal.step()
    weights = largest(whole, both_sides(personal.parameters, witness.updater.parameters))
    return Outcome(setup, split.stage.anatomy.blocks, len(whole), logits, gradients, losses, weights)


def _of_tokens(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Without those of padding, which a split model does not send: nobody reads them."""
    mask_BT = batch.get("attention_mask")
    per_token = mask_BT is not None and logits.dim() == 3 and logits.shape[:2] == mask_BT.shape
    return logits[mask_BT.bool().to(logits.device)] if per_token and mask_BT is not None else logits


def difference(expected: Tensor | None, got: Tensor | None) -> float:
    """The largest absolute difference of two tensors; infinite when only one is there, or when it is not a number."""
    if expected is None and got is None:
        return 0.0
    if expected is None or got is None or expected.shape != got.shape:
        return math.inf
    value = float((expected.detach().double() - got.detach().double()).abs().max())
    return math.inf if math.isnan(value) else value


def largest(expected: Mapping[str, Tensor | None], got: Mapping[str, Tensor | None]) -> float:
    """The largest :func:`difference` of tensors by name; one side's missing names count as missing tensors."""
    return max((difference(expected.get(name), got.get(name)) for name in expected.keys() | got.keys()), default=0.0)


def verify_all(setup: Setup, say: Callable[[str], None] = lambda _: None) -> Iterable[Outcome]:
    """:func:`verify` for every architecture of the zoo that can be split, with ``setup``'s other settings.

    Args:
        say: told which architecture's turn it is.
    """
    for name, spec in ARCHITECTURES.items():
        if spec.refused:
            continue
        say(name)
        padding: Padding = "none" if spec.task in KINDS and KINDS[spec.task].images else setup.padding
        one = replace(setup, model=setup.model.at(ARCH + name), task=cast(ModelKind, spec.task), padding=padding)
        try:
            yield verify(one)
        except FlexpError as error:
            yield Outcome(one, error=str(error))


def kind_of(name: str) -> ModelKind:
    """What a model is for, as its checkpoint says; a bare encoder becomes a classifier.

    Raises:
        ModelError: there is no such model, or none of its uses can be split.
    """
    if name.startswith(ARCH):
        return cast(ModelKind, ARCHITECTURES[name.removeprefix(ARCH)].task)
    config = load_config(name)
    refuse_by_design(f"{name} ({config.model_type})", config)
    saved = (config.architectures or [""])[0]
    offered = {kind: str(auto._model_mapping.get(type(config), None)) for kind, auto in AUTO.items()}
    for kind, cls in offered.items():
        if saved and saved in cls:
            alike = [other for other, head in KINDS.items() if head.auto == KINDS[kind].auto]
            return cast(ModelKind, next((k for k in alike if KINDS[k].problem == config.problem_type), kind))
    for kind in ("sequence-classification", "image-classification", "causal-lm"):
        if offered[kind] != "None":
            return cast(ModelKind, kind)
    raise ModelError(f"{name}: a {config.model_type} model is none of: {', '.join(AUTO)}; choose another model")


def _refuse(name: str) -> None:
    if not name.startswith(ARCH):
        return
    spec = ARCHITECTURES.get(name.removeprefix(ARCH))
    if spec is None:
        raise ModelError(f"there is no {name}; expected arch: and one of {', '.join(ARCHITECTURES)}")
    if spec.refused:
        raise ModelError(f"{name} cannot be split: {spec.reason}; use one that `flexp verify --list` shows as exact")


def _filled(setup: Setup, kind: ModelKind | None, blocks: int, attention: str) -> tuple[Setup, tuple[int, int], int]:
    """``setup`` with its defaults spelled out and checked against the model; its cut and its base depth."""
    if setup.link not in LINKS:
        raise ConfigError(f"there is no link {setup.link!r}; expected one of: {', '.join(LINKS)}")
    start = min(1, blocks - 1)
    cut = check_cut(setup.cut or (start, max(start + 1, blocks - 1)), blocks, where="--cut")
    base = cut[0] if setup.model.base_depth is None else setup.model.base_depth
    if not 0 <= base <= cut[0]:
        raise ConfigError(f"--base-depth = {base} does not fit the cut {cut}: expected 0 <= s_min <= {cut[0]}")
    model = setup.model.model_copy(update={"base_depth": base, "attention": attention})
    return replace(setup, model=model, task=kind, cut=cut), cut, base
