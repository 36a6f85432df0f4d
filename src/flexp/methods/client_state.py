"""A federated client between its turns, as tensors that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flexp.methods.federated import Client


def exact(value: float) -> Tensor:
    """A number that comes back as it was."""
    return torch.tensor(value, dtype=torch.float64)


def client_state(client: Client) -> dict[str, Tensor]:
    """Everything that :func:`load_client` needs, as flat named tensors."""
    flat = {"version": torch.tensor(client.version), "adapted": torch.tensor(client.adapted)}
    flat |= {"seconds": exact(client.seconds), "adapted_seconds": exact(client.adapted_seconds)}
    for group, tensors in client.kept.items():
        flat |= {f"kept/{group}/{name}": value for name, value in tensors.items()}
    for model, worker in client.workers.items():
        flat |= {f"worker/{model}/{name}": value for name, value in worker.state().items()}
    return flat | client.meter.tensors()


def load_client(client: Client, state: Mapping[str, Tensor]) -> None:
    """Go on from :func:`client_state`."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    client.version, client.adapted = int(state["version"]), int(state["adapted"])
    client.seconds, client.adapted_seconds = float(state["seconds"]), float(state["adapted_seconds"])
    for group in client.kept:
        client.kept[group] = {name: value.clone() for name, value in part(f"kept/{group}/").items()}
    for model, worker in client.workers.items():
        worker.load(part(f"worker/{model}/"))
    client.meter.load_tensors(state)
