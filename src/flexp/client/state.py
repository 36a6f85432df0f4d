"""A split client between two steps, as flat named tensors that a checkpoint or a snapshot holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flexp.client.model import SplitModel
from flexp.client.trainer import Trainer
from flexp.links.base import Link
from flexp.links.coding import load_residuals, save_residuals
from flexp.links.messages import PullRequest

OWED = "residuals/"


def party_state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that :func:`load_party` needs to go on bit for bit."""
    link = _model(trainer).link
    return trainer.state() | link.meter.tensors() | save_residuals(residuals_of(link), OWED)


def load_party(trainer: Trainer, state: Mapping[str, Tensor]) -> None:
    """Go on from :func:`party_state`.

    Raises:
        ModelError: the state is of another cut or another tuning.
    """
    model = _model(trainer)
    trainer.load(state)
    model.steps.done = trainer.steps
    model.link.meter.load_tensors(state)
    owed = {key.removeprefix(OWED): value for key, value in state.items() if key.startswith(OWED)}
    load_residuals(residuals_of(model.link), owed)


def move_party(trainer: Trainer, state: Mapping[str, Tensor]) -> list[str]:
    """Go on from :func:`party_state` of another cut.

    What the client has in both cuts stays as it was, with its optimiser's state. Blocks that are new to it start from
    the server's current shared ones, without any; what it has no more is left out (its snapshot still has it).

    Returns:
        The names of the parameters that are new to the client.

    Raises:
        LinkError: the server does not give its weights.
    """
    model = _model(trainer)
    own = model.stage.trainable()
    new = [name for name, value in own.items() if getattr(state.get(f"personal/{name}"), "shape", None) != value.shape]
    merged = {key: value for key, value in state.items() if not key.startswith(("personal/", "optimizer/"))}
    merged |= {f"personal/{name}": state.get(f"personal/{name}", value.detach()) for name, value in own.items()}
    start = model.base_depth
    if new and model.cut[0] > start:
        shared = model.link.pull(PullRequest(start, model.cut[0])).result().weights
        merged |= {f"personal/{name}": shared[name] for name in new if name in shared}
    for key, value in state.items():
        name = key.removeprefix("optimizer/").partition("/")[2]
        if key.startswith("optimizer/") and (not name or (name in own and name not in new)):
            merged[key] = value
    load_party(trainer, merged)
    return new


def residuals_of(link: Link) -> dict[str, Tensor]:
    """What error feedback still owes the server, where a link has such a thing."""
    return getattr(link, "residuals", {})


def _model(trainer: Trainer) -> SplitModel:
    assert isinstance(trainer.model, SplitModel)
    return trainer.model
