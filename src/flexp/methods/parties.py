"""What methods have in common when they make their clients."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flexp.assets import resolve
from flexp.client.guarding import Guard
from flexp.client.meeting import FIRST, Seat, together
from flexp.client.model import SplitModel
from flexp.client.personal_head import Choice
from flexp.client.pretrained import SPLIT_MODELS
from flexp.client.trainer import Trainable, Trainer
from flexp.config import ClientConfig, CodecConfig, RunConfig
from flexp.data.types import ClientData, Task
from flexp.errors import ConfigError
from flexp.kinds import ModelKind
from flexp.links.base import Link
from flexp.links.sums import Adder
from flexp.machine import device_of
from flexp.methods.base import World
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.optim import Updater
from flexp.rng import derived_seed


def own_stage(world: World, part: Part, ranks: Mapping[int, int] | None = None) -> Stage:
    """A client's stage: shares what is frozen with everybody, has its own copy of what it trains.

    Args:
        ranks: of the adapters in some blocks (:func:`flexp.models.tuning.tune`).
    """
    stage = carve(world.source, part)
    tune_own(stage, world.config, ranks)
    return stage


def server_stage(world: World, part: Part) -> Stage:
    """The shared blocks, tuned; carved out of the source, where they are not quantised in a way of their own."""
    config, kind = world.config, world.federation.task.model_kind
    own = config.model.quantized(config.server.quantization)
    if own == config.model:
        stage = carve(world.source, part).to(device_of(config.model.on(config.server.device).device))
    else:
        stage = load_stage(own.on(config.server.device).at(resolve(own.id)), kind, part, seed=config.seed)
    stage.spread(config.server.device)
    tune(stage, config.model, config.server.tuning or config.model.tuning, seed=config.seed)
    return stage


def tune_own(stage: Stage, config: RunConfig, ranks: Mapping[int, int] | None = None) -> None:
    """Make a client's stage ready for training, as the configuration says."""
    tune(stage, config.model, seed=config.seed, ranks=ranks, frozen=config.frozen(stage.part.start))


def split_model(
    config: RunConfig,
    stage: Stage,
    cut: tuple[int, int],
    link: Link,
    kind: ModelKind,
    *,
    codec: CodecConfig | None,
    numbering: int | None = None,
) -> SplitModel:
    """A client's split model of FlexP-SFL, joined over ``link``.

    Raises:
        LinkError: the server refuses.
    """
    return SPLIT_MODELS[kind](
        stage,
        cut,
        link,
        align=config.method.align,
        tuning=config.model.tuning,
        lora=config.model.lora,
        expose_embeddings=config.model.expose_embeddings,
        numbering=numbering,
        codec=codec,
        rows=config.link.rows,
        cache=config.link.cache,
        reuse=config.link.reuse,
        base_depth=config.model.base_depth,
        pools=config.privacy.pool,
        gradients=config.privacy.gradients,
    )


def make_trainer(world: World, name: str, model: Trainable, stage: Stage) -> Trainer:
    """The loop of one client; data, batches, steps and optimiser are the same for every method."""
    data = next(data for data in world.federation.clients if data.name == name)
    key = derived_seed(client_seed(world.config.seed, name), "noise")  # nobody is there to keep it from
    return own_trainer(world.config, data, world.federation.task, model, stage, key)


def own_trainer(
    config: RunConfig, data: ClientData, task: Task, model: Trainable, stage: Stage, key: int | None = None
) -> Trainer:
    """The same for a client that has nobody else's data. ``key``: of its noise; ``None``: a secret one."""
    if not (config.privacy.gradients or stage.trainable()):
        raise ConfigError(
            f"client {data.name}: privacy.gradients = false leaves nothing to train, since its tail has no blocks; cut "
            "it at an earlier e"
        )
    updater = Updater(stage.trainable(), config.train.personal, config.train.total_steps, stage.new)
    seed = client_seed(config.seed, data.name)
    if config.privacy.on and isinstance(model, SplitModel):
        guard = Guard(config.privacy, data.train, task.processor, seed, key, len(task.label_names or ()))
        model.guard_with(guard)
    return Trainer(data, task, model, updater, config.train, seed=seed)


def renew(trainer: Trainer, config: RunConfig) -> None:
    """A fresh optimiser, whose schedule goes on: what the old one remembers is of weights that are gone."""
    model: Any = trainer.model
    trainer.updater = Updater(
        trainer.updater.parameters, config.train.personal, config.train.total_steps, model.stage.new
    )
    trainer.updater.steps = trainer.steps


def seat_of(trainer: Trainer, config: RunConfig) -> Seat:
    """A client at meetings, where its model is split or all its own."""
    model: Any = trainer.model
    meter = model.link.meter if isinstance(model, SplitModel) else None
    seed = client_seed(config.seed, trainer.name)
    seat = Seat(trainer.data.train, trainer.task, model.stage.model, trainer.personal, config, seed, meter)
    seat.told = model.guard.told if isinstance(model, SplitModel) and model.guard is not None else None
    return seat


def meet_at(
    seats: Mapping[str, Seat], adders: Mapping[str, Adder], trainers: Mapping[str, Trainer], meeting: int
) -> dict[str, Choice]:
    """Let clients with loops of their own meet, and give each the classifier that comes of it."""
    choices: dict[str, Choice] = dict.fromkeys(seats, "closed-form")
    if meeting == FIRST:
        weights = together({name: seat.first() for name, seat in seats.items()}, adders, meeting)
    else:
        found = together({name: seat.last() for name, seat in seats.items()}, adders, meeting)
        weights = {name: own for name, (own, _) in found.items()}
        choices |= {name: choice for name, (_, choice) in found.items()}
    for name, trainer in trainers.items():
        parameters: Any = trainer.updater.parameters
        with torch.no_grad():
            for key, value in weights[name].items():
                parameters[key].copy_(value)
        trainer.seconds += seats[name].seconds
    return choices


def own_config(config: RunConfig, own: ClientConfig) -> RunConfig:
    """The configuration with the exchange's size, the checkpointing and the codec that a client has."""
    train, model, link = config.train, config.model, config.link
    if own.micro_batch is not None:
        train = train.model_copy(update={"micro_batch": min(own.micro_batch, train.batch_size)})
    if own.checkpointing is not None:
        model = model.model_copy(update={"gradient_checkpointing": own.checkpointing})
    if own.codec is not None:
        name = own.codec
        both = {"activation": name, "gradient": name, "aligned": name, "activation_down": None, "gradient_down": None}
        link = link.model_copy(update={"codec": link.codec.model_copy(update=both)})
    return config.model_copy(update={"train": train, "model": model, "link": link})


def own_world(world: World, client: str) -> World:
    """The world as ``client`` sees it: with its own configuration (:func:`own_config`)."""
    names = [data.name for data in world.federation.clients]
    own = world.config.data.clients.every(names)[client]
    return replace(world, config=own_config(world.config, own))


def with_model(world: World, **changes: Any) -> World:
    """The same world with other settings in the table ``model``."""
    model = world.config.model.model_copy(update=changes)
    return replace(world, config=world.config.model_copy(update={"model": model}))


def client_seed(seed: int, name: str) -> int:
    """A client's own seed, which does not depend on who else takes part."""
    return (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**31
