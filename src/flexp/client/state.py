"""A split client between two steps, as flat named tensors that a checkpoint or a snapshot holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexp.client.model import SplitModel
from flexp.client.trainer import Trainer
from flexp.links.coding import load_residuals, save_residuals

OWED = "residuals/"


def party_state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that :func:`load_party` needs to go on bit for bit."""
    model = _model(trainer)
    cut = {"cut": torch.tensor(model.cut)}
    return trainer.state() | cut | model.link.meter.tensors() | save_residuals(model.link.residuals, OWED)


def cut_in(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The cut that a client had when its state was taken; ``None``: an older version of FlexP took it."""
    if "cut" not in state:
        return None
    start, stop = map(int, state["cut"])
    return start, stop


def load_party(trainer: Trainer, state: Mapping[str, Tensor]) -> None:
    """Go on from :func:`party_state`.

    Raises:
        ModelError: the state is of another cut or another tuning.
    """
    model = _model(trainer)
    trainer.load(state)
    model.go_on(trainer.steps)
    model.link.meter.load_tensors(state)
    owed = {key.removeprefix(OWED): value for key, value in state.items() if key.startswith(OWED)}
    load_residuals(model.link.residuals, owed)


def _model(trainer: Trainer) -> SplitModel:
    assert isinstance(trainer.model, SplitModel)
    return trainer.model
