"""The table ``[train]``: the clients' loop, and an optimiser for each side."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flexp.config.section import PAIR, Beta, Fraction, PositiveInt, Rate, Section


class OptimizerConfig(Section):
    """An optimiser with its schedule; the personal and the shared parts have one each."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Rate = 1e-4
    new_lr: Rate | None = None  # of weights that no checkpoint holds, such as a new classifier; None: lr
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: Annotated[tuple[Beta, Beta], PAIR] = (0.9, 0.999)
    momentum: Fraction = 0.0  # sgd
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Rate | None = 1.0  # the largest global norm of a step's gradient


class EarlyStopping(Section):
    """When to stop before the last round: scores on validation data that get no better."""

    patience: PositiveInt | None = None  # scored rounds in a row without a better one; None: never
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0  # by how much a better score must be better


class TrainConfig(Section):
    """The client's loop. A round is one turn of every client; FlexP-SFL itself knows no rounds."""

    rounds: PositiveInt = 5
    steps_per_round: PositiveInt = 10  # optimiser steps of a client in its turn
    batch_size: PositiveInt = 8  # examples of a step
    micro_batch: PositiveInt | None = None  # examples of one exchange; None: the batch divided by in_flight
    in_flight: PositiveInt = 1  # exchanges of a step that are under way at once: the next one's head does not wait
    order: Literal["round-robin", "random"] = "round-robin"
    turn: Literal["round", "step"] = "step"  # clients take turns after every step, or after a whole round
    # classifiers: what an example of a class counts in the loss; "balanced": all classes of a client's own count alike
    class_weights: Literal["balanced"] | dict[str, Rate] | None = None
    early_stopping: EarlyStopping = EarlyStopping()  # needs data.validation_fraction
    personal: OptimizerConfig = OptimizerConfig()
    shared: OptimizerConfig = OptimizerConfig()

    @property
    def total_steps(self) -> int:
        """Optimiser steps of one client in the whole run."""
        return self.rounds * self.steps_per_round
