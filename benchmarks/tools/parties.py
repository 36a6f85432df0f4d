"""Small servers, clients and models for benches: parties of one model, made for one batch."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from flexp.client.model import SplitModel
from flexp.client.pretrained import SPLIT_MODELS
from flexp.config import CodecConfig, ModelConfig, OptimizerConfig, ServerConfig
from flexp.cost.echo import random_batch
from flexp.cost.probe import Probe
from flexp.links.base import Link
from flexp.models.anatomy import Part, check_cut
from flexp.models.loading import AUTO, ModelKind, load_config, load_stage, quietly
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.optim import Updater
from flexp.server import Server

Step = Callable[[], None]


def at_once(work: Callable[[int, threading.Barrier, threading.Event], None], count: int, seconds: float) -> float:
    """Let ``work(number, ready, stop)`` run in ``count`` threads until ``stop`` is set, so many seconds after all are
    ``ready``; the seconds that have passed when the last has ended."""
    ready, stop = threading.Barrier(count + 1), threading.Event()
    threads = [threading.Thread(target=work, args=(number, ready, stop)) for number in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Parties:
    """Parties that share a pretrained model, with one cut and one batch.

    Attributes:
        source: the whole model, frozen; every party is carved out of it.
        tuning: of every party: full, lora or frozen.
        model: what else is said of the model.
    """

    source: Stage
    kind: str
    cut: tuple[int, int]
    batch: dict[str, torch.Tensor]
    tuning: Any
    model: ModelConfig
    optimizer: OptimizerConfig

    def whole(self) -> Stage:
        """The whole model, tuned."""
        return self._tuned(Part.whole(self.source.anatomy.blocks))

    def client_stage(self, cut: tuple[int, int] | None = None) -> Stage:
        """A client's part, tuned."""
        return self._tuned(Part.client(cut or self.cut, self.source.anatomy.blocks))

    def server(self, config: ServerConfig | None = None) -> Server:
        """A server of the blocks between, on the devices that ``config`` names."""
        stage = self._tuned(Part.server(*self.cut), None if config is None else config.device)
        return Server(stage, tuning=self.tuning, optimizer=self.optimizer, config=config)

    def client(self, link: Link, cut: tuple[int, int] | None = None, codec: CodecConfig | None = None) -> SplitModel:
        """A client, joined over ``link``, in training mode."""
        kind, stage, own = SPLIT_MODELS[self.kind], self.client_stage(cut), cut or self.cut
        return kind(stage, own, link, tuning=self.tuning, codec=codec, expose_embeddings=True).train()

    def split_step(
        self,
        reach: Callable[[Server], Link] = lambda server: server.connect("bench"),
        config: ServerConfig | None = None,
    ) -> Step:
        """One training step of a client and a server of its own; ``reach`` makes the link between them."""
        client = self.client(reach(self.server(config)))
        return self.step(client.stage, client)

    def step(self, stage: Stage, forward: Callable[..., Any], optimizer: OptimizerConfig | None = None) -> Step:
        """One training step (forward, backward, update) of what ``stage`` trains; ``forward`` gives the loss."""
        updater = Updater(stage.trainable(), optimizer or self.optimizer)

        def step() -> None:
            forward(**self.batch).loss.backward()
            updater.step()

        return step

    def _tuned(self, part: Part, devices: Any = None) -> Stage:
        stage = carve(self.source, part).spread(devices)
        tune(stage, self.model, self.tuning)
        return stage


def parties(
    model: str,
    kind: str = "sequence-classification",
    cut: str | None = None,
    *,
    examples: int,
    length: int,
    tuning: str = "full",
    optimizer: OptimizerConfig | None = None,
    **settings: Any,
) -> Parties:
    """Load ``model`` and draw a batch of ``examples`` × ``length`` tokens; ``settings`` are keys of ``[model]``."""
    config = ModelConfig.of(model, **settings | ({} if tuning == "frozen" else {"tuning": tuning}))
    source = load_stage(config, cast(ModelKind, kind), labels=labels_of(kind), pad_token_id=0)
    where = cut_of(cut, source.anatomy.blocks)
    batch = random_batch(probe(config, kind, where, examples, length), source.model.config)
    return Parties(source, kind, where, batch, tuning, config, optimizer or OptimizerConfig())


def probe(model: ModelConfig, kind: str, cut: tuple[int, int] | None, examples: int, length: int) -> Probe:
    """What to measure of a client in a process of its own; ``cut`` = ``None``: of one that holds the whole model."""
    return Probe(
        model.id, kind, cut, examples, length, labels_of(kind),
        model.model_dump(mode="json"), OptimizerConfig().model_dump(mode="json"),
    )  # fmt: skip


def labels_of(kind: str) -> list[str] | None:
    """Two classes, where the model is a classifier."""
    return None if kind == "causal-lm" else ["a", "b"]


def cut_of(text: str | None, blocks: int, default: tuple[int, int | None] = (1, None)) -> tuple[int, int]:
    """The cut that an option says.

    Raises:
        ConfigError: it is none, or does not fit the model.
    """
    from flexp.cli.verify import parse_cut

    return check_cut(default if text is None else parse_cut(text), blocks)


def blocks_of(model: str) -> int:
    """How many blocks a model has, by its configuration."""
    return int(load_config(model).get_text_config().num_hidden_layers)


@contextmanager
def random_model(kind: str, config: Any) -> Iterator[str]:
    """A folder with a model of random weights, inside the ``with`` block."""
    with tempfile.TemporaryDirectory(prefix="flexp-bench-") as folder:
        torch.manual_seed(0)
        model = AUTO[kind].from_config(config, attn_implementation="sdpa")
        with quietly():
            model.save_pretrained(folder)
        del model
        yield str(Path(folder))
