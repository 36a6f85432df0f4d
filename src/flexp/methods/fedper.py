"""FedPer (Arivazhagan et al., 2019, arXiv 1912.00818): the base is averaged, the last layers are personal.

Every client trains both together; the averaged part begins each round with a fresh optimiser, the personal part's
goes on. Personal are the classifier (``method.fedper.classifier``) and the trained weights of
``method.fedper.last_blocks`` last blocks; with neither it is FedAvg. The personal model is the average with the
client's own last layers. Budget: exact.
"""

from __future__ import annotations

from flexp.config import FedPerConfig
from flexp.errors import ConfigError
from flexp.methods.base import World
from flexp.methods.federated import Federated


class FedPer(Federated):
    """FedAvg of all but the last layers.

    Raises:
        ConfigError: nothing would be personal, or nothing averaged.
    """

    def __init__(self, world: World) -> None:
        self.part = self.settings(world)
        name, blocks = world.config.method.name, world.source.anatomy.blocks
        super().__init__(world)
        wanted = self.part.classifier or self.part.last_blocks
        if wanted and len(self.shared) == len(self.bench.parameters):
            raise ConfigError(
                f"method {name}: this model has no head of its own that is trained (model.tuning = "
                f"{world.config.model.tuning!r}), so nothing is personal; set last_blocks to 1 or more"
            )
        if not self.shared:
            raise ConfigError(
                f"method {name}: last_blocks = {self.part.last_blocks} of {blocks} blocks leave nothing to average; "
                "use fewer"
            )

    def settings(self, world: World) -> FedPerConfig:
        """The table of the configuration that says what is personal."""
        return world.config.method.fedper

    def is_shared(self, name: str) -> bool:
        stage = self.bench.stage
        block = stage.block_of(name)
        if block is not None:
            return block < stage.anatomy.blocks - self.part.last_blocks
        return not (self.part.classifier and not name.startswith(stage.model.base_model_prefix + "."))
