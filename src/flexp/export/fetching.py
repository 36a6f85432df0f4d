"""Fetching the shared blocks of a personal model from a running server, one at a time and all of one version."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flexp.client.recut import fetched
from flexp.config import CodecConfig
from flexp.errors import LinkError, ModelError
from flexp.export.client_folder import ClientFolder, Taken
from flexp.links.base import Link, ask
from flexp.links.messages import Join
from flexp.models.fingerprint import fingerprint
from flexp.models.stage import Stage


class ChangedError(LinkError):
    """The shared blocks were updated in the middle."""


class Fetched:
    """Joins a server as the client that it is, without a model, and asks for blocks.

    Args:
        stage: any part of the client's model, as it is in the server's eyes.

    Raises:
        LinkError: the server refuses this client.
    """

    def __init__(self, link: Link, opened: ClientFolder, taken: Taken, stage: Stage) -> None:
        self._link, self._opened, self._taken = link, opened, taken
        config = opened.config
        self.version: int | None = None
        ask(
            link,
            Join(
                client=link.client,
                fingerprint=fingerprint(stage.model.config),
                cut=taken.cut,
                dtype=str(stage.model.dtype),
                tuning=config.model.tuning,
                align=config.method.align,
                lora=config.model.lora,
                weights=stage.weights,
                autocast=stage.autocast_name,
                numbering=int(taken.facts["numbering"]),
                codec=CodecConfig(),
            ),
        )

    def begin(self) -> None:
        """Whatever version comes next is the one that all blocks must have."""
        self.version = None

    def block(self, index: int) -> dict[str, Tensor]:
        """The trained weights of one block, by their names in the model; none, if the server trains none.

        Raises:
            ChangedError: they are of another version than the blocks before.
            LinkError: the server does not give them, or does not have what this client has trained with.
        """
        found: dict[str, Tensor] = {}
        for reply in fetched(self._link, index):
            if self.version is None:
                self.version = reply.version
            if reply.version != self.version:
                raise ChangedError(f"the shared blocks went from version {self.version} to {reply.version}")
            self._check_trained(reply.version, reply.total)
            found |= reply.weights
        return found

    def _check_trained(self, version: int, total: int) -> None:
        server, steps = self._opened.config.server, self._taken.steps
        sure = server.mean_over if server.update == "mean" else 1
        if version == 0 and total and steps >= sure:
            raise LinkError(
                f"the server's shared blocks were never updated, and this client has done {steps} steps: start the "
                "server with the run's --state"
            )


def check_names(weights: dict[str, Tensor], model: Any, index: int) -> None:
    """Refuse weights that are no parameters of the block, or of another shape.

    Raises:
        ModelError: see above.
    """
    for name, value in weights.items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in plain:
            continue
        try:
            own = model.get_parameter(plain)
        except AttributeError:
            own = None
        if own is None or own.shape != value.shape:
            raise ModelError(f"the server's block {index} does not fit this model: {name} is {tuple(value.shape)}")
