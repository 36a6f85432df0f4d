"""FedPer (Arivazhagan et al., 2019, arXiv 1912.00818): the base is averaged, the last layers are personal.

Every client trains both together; the averaged part begins each round with a fresh optimiser, the personal part's
goes on. Personal are the classifier (``method.fedper.classifier``) and the trained weights of
``method.fedper.last_blocks`` last blocks; with neither it is FedAvg. The personal model is the average with the
client's own last layers. Budget: exact.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from flexp.config import Section
from flexp.errors import ConfigError
from flexp.methods.base import Axis, World
from flexp.methods.federated import Federated


class FedPer(Federated):
    """FedAvg of all but the last layers, which are personal (Arivazhagan et al., 2019).

    Raises:
        ConfigError: nothing would be personal, or nothing averaged.
    """

    name = "fedper"
    axis: ClassVar[Axis] = ("method.fedper.last_blocks", (0, 1))

    class Config(Section):
        """Which trained weights are personal."""

        classifier: bool = True  # the head
        last_blocks: Annotated[int, Field(ge=0)] = 0  # and that many of the last blocks

    settings: FedPer.Config

    def __init__(self, world: World) -> None:
        self.settings = self.own(world.config)
        blocks = world.source.anatomy.blocks
        super().__init__(world)
        wanted = self.settings.classifier or self.settings.last_blocks
        if wanted and len(self.shared) == len(self.harness.parameters):
            raise ConfigError(
                f"method {self.name}: this model has no head of its own that is trained (model.tuning = "
                f"{world.config.model.tuning!r}), so nothing is personal; set last_blocks to 1 or more"
            )
        if not self.shared:
            raise ConfigError(
                f"method {self.name}: last_blocks = {self.settings.last_blocks} of {blocks} blocks leave nothing to "
                "average; use fewer"
            )

    def is_shared(self, name: str) -> bool:
        stage = self.harness.stage
        block = stage.block_of(name)
        if block is not None:
            return block < stage.anatomy.blocks - self.settings.last_blocks
        return not (self.settings.classifier and self.harness.in_head(name))
