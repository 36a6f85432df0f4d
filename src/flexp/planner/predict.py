"""What a step of a client takes: peak memory, time, bytes and an energy proxy, from a model's cost and a profile."""

from __future__ import annotations

from flexp.planner.choice import Choice, Prediction
from flexp.planner.model_cost import ModelCost
from flexp.planner.profile import Profile


def predict(
    cost: ModelCost, profile: Profile, choice: Choice, server: Profile, *, base_depth: int | None = None
) -> Prediction:
    """Predict one step of a client.

    Args:
        cost: of the model, at the length of the client's largest exchange.
        profile: of the client's device.
        server: of the server; its links reach from the network to it.
        base_depth: s_min, when alignment sends z_base up as well; ``None``: nothing is aligned.

    Raises:
        ConfigError: the cut does not fit the model.
    """
    raise NotImplementedError


def memory(cost: ModelCost, choice: Choice, *, overhead_bytes: int | None = None) -> int:
    """The client's peak in bytes above the bare interpreter. It depends on no device: the same for a whole fleet."""
    raise NotImplementedError
