"""One client that trains a real model on real data over a link of one's choice, for benchmarks of links.

Dropout is off and alignment too: two runs of equal seed then differ by their links alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from flexp.assets import resolve
from flexp.client.model import SplitModel
from flexp.config import CodecConfig, CodecName, RunConfig
from flexp.data.scores import evaluate
from flexp.errors import ConfigError
from flexp.links.base import Link
from flexp.methods.base import World
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.models.loading import quietly
from flexp.registry import CODECS
from flexp.run.settle import build_world

Wrap = Callable[[Link], Link]


def check_codec(name: str) -> CodecName:
    """The name, if it is a codec's.

    Raises:
        ConfigError: it is none.
    """
    if name != "off" and name not in CODECS:
        raise ConfigError(f"--codec {name}: expected off, {', '.join(CODECS)}")
    return name


def one_client_world(
    model: str,
    data: str,
    *,
    blocks: int,
    steps: int,
    batch_size: int,
    max_length: int,
    test_examples: int,
    tuning: str = "full",
    lr: float = 2e-4,
    new_lr: float = 1e-3,
    tail: int = 0,
    seed: int = 0,
) -> World:
    """A client with block 0 and the last ``tail`` of ``blocks`` blocks, and a server with those in between.

    ``data`` is a file or asset of texts with labels, all of it this client's, in batches drawn from ``seed``.
    """
    optimizer = {"lr": lr, "schedule": "linear"}
    config = RunConfig.model_validate({
        "seed": seed,
        "model": {"id": model, "tuning": tuning},
        "data": {
            "source": data,
            "max_length": max_length,
            "train_examples": steps * batch_size,
            "test_examples": test_examples,
            "clients": {"by": "iid", "count": 1, "cut": [1, blocks - tail]},
        },
        "train": {
            "rounds": 1,
            "steps_per_round": steps,
            "batch_size": batch_size,
            "personal": optimizer | {"new_lr": new_lr},
            "shared": optimizer,
        },
        "method": {"align": {"kind": "off"}},
    })  # fmt: skip
    return build_world(config)


def frozen_head(world: World, epochs: int) -> World:
    """The same client with block 0 as it came, whose z crosses once (``link.cache``), over so many epochs."""
    method = world.config.method.model_copy(
        update={"personal": world.config.method.personal.model_copy(update={"frozen_head_blocks": 1})}
    )
    link = world.config.link.model_copy(update={"cache": "memory"})
    train = world.config.train.model_copy(update={"rounds": epochs})  # so that the rate falls over all of them
    config = world.config.model_copy(update={"method": method, "link": link, "train": train})
    return World(config, world.federation, world.source, world.cuts)


class OneClient:
    """A run of its own on a world, from the pretrained weights.

    Args:
        wrap: puts something between the client and its in-process link.
    """

    def __init__(self, world: World, codec: CodecConfig, in_flight: int = 1, wrap: Wrap | None = None) -> None:
        train = world.config.train.model_copy(update={"in_flight": in_flight})
        link = world.config.link.model_copy(update={"codec": codec})
        config = world.config.model_copy(update={"train": train, "link": link})
        wrapped = wrap or (lambda inner: inner)

        class Run(FlexpSfl):
            def connect(self, name: str) -> Link:
                return wrapped(super().connect(name))

        changed = World(config, world.federation, world.source, world.cuts)
        self.method = Run(changed)
        (self.trainer,) = self.method.clients.values()

    @property
    def model(self) -> SplitModel:
        model = self.trainer.model
        assert isinstance(model, SplitModel)
        return model

    def step(self) -> float:
        """Train on the next batch; gives its loss."""
        return self.trainer.step().loss

    @contextmanager
    def over(self, link: Link) -> Iterator[None]:
        """Use another link to the same session inside the ``with`` block."""
        own, self.model.link = self.model.link, link
        try:
            yield
        finally:
            self.model.link = own

    def scores(self) -> dict[str, float]:
        """Loss and accuracy on the test examples."""
        model, world = self.model, self.method.world

        def forward(batch: Any) -> Any:
            with torch.no_grad():
                return model.eval()(**batch)

        return evaluate(forward, world.federation.task, world.federation.clients[0].test, 32, extras=False)

    def bytes(self) -> int:
        """Of tensors, both ways, in training."""
        traffic = self.model.link.meter.training
        return traffic.bytes_up + traffic.bytes_down


@contextmanager
def without_dropout(model: str, blocks: int | None = None) -> Iterator[tuple[str, int]]:
    """A copy of an encoder without dropout, with only its first ``blocks`` blocks if that is said; (folder, blocks)."""
    source = Path(resolve(model))
    config = transformers.AutoConfig.from_pretrained(source)
    changes: dict[str, Any] = {key: 0.0 for key, value in config.to_dict().items() if "drop" in key and value}
    if blocks is not None:
        changes["num_hidden_layers"] = blocks
    with TemporaryDirectory() as folder:
        with quietly():
            copy: Any = transformers.AutoModel.from_pretrained(source, **changes)
            copy.save_pretrained(folder)
        for file in source.iterdir():
            if file.is_file() and not (Path(folder) / file.name).exists() and file.suffix != ".safetensors":
                shutil.copy(file, folder)
        yield folder, int(copy.config.num_hidden_layers)
