"""A split client between two steps, as flat named tensors that a checkpoint or a snapshot holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexp.client.model import SplitModel
from flexp.client.trainer import Trainer
from flexp.links.base import Link
from flexp.links.coding import load_residuals, save_residuals

OWED = "residuals/"


def party_state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that :func:`load_party` needs to go on bit for bit."""
    meter = _model(trainer).link.meter.state()
    flat = {f"meter/{kind}/{key}": value for kind, part in meter.items() for key, value in part.items()}
    counts = {key: torch.tensor(value, dtype=torch.float64) for key, value in flat.items()}
    return trainer.state() | counts | save_residuals(residuals_of(_model(trainer).link), OWED)


def load_party(trainer: Trainer, state: Mapping[str, Tensor]) -> None:
    """Go on from :func:`party_state`.

    Raises:
        ModelError: the state is of another cut or another tuning.
    """
    model = _model(trainer)
    trainer.load(state)
    model.steps.done = trainer.steps
    meter = model.link.meter.state()
    for kind, part in meter.items():
        for key, zero in part.items():
            part[key] = type(zero)(state[f"meter/{kind}/{key}"])
    model.link.meter.load(meter)
    owed = {key.removeprefix(OWED): value for key, value in state.items() if key.startswith(OWED)}
    load_residuals(residuals_of(model.link), owed)


def residuals_of(link: Link) -> dict[str, Tensor]:
    """What error feedback still owes the server, where a link has such a thing."""
    return getattr(link, "residuals", {})


def _model(trainer: Trainer) -> SplitModel:
    assert isinstance(trainer.model, SplitModel)
    return trainer.model
