"""How much clients and their server say to each other in a step, beside what they would say without leaving out.

*Plain* is every activation and gradient whole, (B, T, H), in float32, padding included: what crossed before rows were
left out. It is counted from the shapes of the exchanges that really ran, and was equal to that code's own meters.

- ``sentiment``: experiment 1 as its file has it (eight clients, three cuts, alignment), each client's first steps.
- ``instructions``: a decoder of SmolLM2-135M's width with random weights (or ``--decoder``), answers a quarter of the
  tokens; trained once more with every row, which must give the same weights.
- ``frozen``: a classifier whose client trains nothing below its cut, ten epochs, with ``link.cache``;
  coded: likewise, z and ∂h in int8; h, of which one row a text crosses, as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, TypeVar

import torch
import transformers
import typer

from benchmarks.tools.command import Result, Threads, say
from benchmarks.tools.one_client import OneClient, frozen_head, one_client_world, without_dropout
from flexp.assets import resolve
from flexp.client.exchange import Piece
from flexp.client.pretrained import SplitModelForCausalLM
from flexp.config import CodecConfig, OptimizerConfig
from flexp.config.loading import load
from flexp.links.base import Link
from flexp.links.messages import BackwardRequest, ForwardRequest, KeptForwardRequest, Request
from flexp.links.wrapping import Wrapping
from flexp.methods.base import World
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.optim import Updater
from flexp.run.settle import build_world
from flexp.server import Server

R = TypeVar("R")
CODED = CodecConfig(activation="int8-row", activation_down="off", gradient="int8-row")
COLUMNS = ("what", "plain kB/step", "kB/step", "÷ plain")
EXPERIMENT = Path(__file__).parents[1] / "experiments" / "sentiment-8.toml"


class Plainly(Wrapping):
    """Counts what would cross if every activation and gradient of training were whole.

    Attributes:
        bytes: both ways.
    """

    def __init__(self, inner: Link, hidden: int) -> None:
        super().__init__(inner)
        self.bytes = 0
        self._hidden = hidden
        self._each: dict[int, tuple[int, int]] = {}  # by exchange: bytes of an activation, and how many were aligned

    def call(self, request: Request[R]) -> Future[R]:
        if isinstance(request, KeptForwardRequest) or (isinstance(request, ForwardRequest) and request.train):
            mask = request.mask_BT
            assert mask is not None  # all of these have texts
            one, aligned = 4 * mask.numel() * self._hidden, 0
            if isinstance(request, ForwardRequest):
                aligned = (request.base_BTH is not None) + len(request.inner_BTH)
            self._each[request.exchange] = one, max(0, aligned - 1)
            self.bytes += (2 + aligned) * one + mask.numel()
        elif isinstance(request, BackwardRequest):
            one, inner = self._each.pop(request.exchange)
            self.bytes += (1 + (1 + inner) * request.back) * one
        return super().call(request)


class Talking(FlexpSfl):
    """FlexP-SFL whose links are all counted twice."""

    def __init__(self, world: World) -> None:
        self.plainly: list[Plainly] = []
        super().__init__(world)

    def connect(self, name: str) -> Link:
        self.plainly.append(Plainly(super().connect(name), self.world.source.anatomy.hidden))
        return self.plainly[-1]

    def figures(self) -> tuple[float, float, int]:
        """Bytes plainly, bytes that crossed, steps."""
        crossed = [link.meter.training for link in self.plainly]
        steps = sum(trainer.steps for trainer in self.clients.values())
        return (
            sum(link.bytes for link in self.plainly),
            sum(traffic.bytes_up + traffic.bytes_down for traffic in crossed),
            steps,
        )


def sentiment(steps: int) -> tuple[float, float, int]:
    """Each client's first steps in experiment 1."""
    method = Talking(build_world(load(EXPERIMENT)))
    for _ in range(steps):
        for trainer in method.clients.values():
            trainer.step()
    return method.figures()


def instructions(steps: int, decoder: str | None = None) -> tuple[float, float, int]:
    """Steps of a decoder on random prompts with answers.

    Raises:
        RuntimeError: weights differ from those that every row gives.
    """
    with TemporaryDirectory() as made:
        folder = Path(made) if decoder is None else Path(resolve(decoder))
        if decoder is None:
            transformers.LlamaForCausalLM(transformers.LlamaConfig(
                vocab_size=512, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
                num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=512,
            )).save_pretrained(folder)  # fmt: skip
        *few, weights = _instructed(folder, steps, "loss")
        *_, others = _instructed(folder, steps, "all")
    if not all(torch.equal(one, other) for one, other in zip(weights, others, strict=True)):
        raise RuntimeError("instructions: rows of the loss alone gave other weights than every row")
    plain, crossed = few
    return plain, crossed, steps


def _instructed(folder: Path, steps: int, rows: Literal["loss", "all"]) -> tuple[float, float, list[torch.Tensor]]:
    """Bytes plainly, bytes that crossed, and what was trained on both sides."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # adapters are drawn
    shape = transformers.AutoConfig.from_pretrained(folder)
    words, depth = min(512, shape.vocab_size), shape.num_hidden_layers
    server = Server.from_pretrained(folder, "causal-lm", tuning="lora")
    link = Plainly(server.connect("one"), shape.hidden_size)
    model = SplitModelForCausalLM.from_pretrained(folder, cut=(1, depth), link=link, tuning="lora", rows=rows)
    updater = Updater(model.stage.trainable(), OptimizerConfig())
    for _ in range(steps):
        lengths_B1 = torch.randint(96, 129, (8, 1), generator=generator)
        place_T = torch.arange(int(lengths_B1.max()))
        mask_BT = (place_T < lengths_B1).long()
        ids_BT = torch.randint(5, words, mask_BT.shape, generator=generator) * mask_BT
        answer_BT = (place_T >= 3 * lengths_B1 // 4) & mask_BT.bool()
        labels_BT = torch.where(answer_BT, ids_BT, -100)
        with model.part_of_step(Piece()):
            torch.autograd.backward(model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss)
        updater.step()
    server.flush()
    traffic = link.meter.training
    trained = [*model.stage.trainable().values(), *server.shared.updater.parameters.values()]
    return link.bytes, traffic.bytes_up + traffic.bytes_down, [one.detach().clone() for one in trained]


def frozen(epochs: int, codec: CodecConfig) -> tuple[float, float, int, float]:
    """Epochs of a classifier whose head is frozen; the last figure is its loss on test data."""
    with without_dropout("asset:minilm-l6") as (folder, blocks):
        world = one_client_world(
            folder, "asset:sentiment", blocks=blocks, steps=12, batch_size=8, max_length=32, test_examples=256
        )
        run = OneClient(frozen_head(world, epochs), codec, wrap=lambda link: Plainly(link, 384))
        for _ in range(12 * epochs):
            run.step()
        link: Any = run.model.link
        return link.bytes, run.bytes(), 12 * epochs, run.scores()["loss"]


def measure(
    steps: Annotated[int, typer.Option(min=1, help="Of each client in experiment 1, and on instructions.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="With a frozen head.")] = 10,
    decoder: Annotated[str | None, typer.Option(help="A folder or asset of one for instructions.")] = None,
    threads: Threads = 1,
) -> Result:
    """Bytes of a step beside whole activations: experiment 1, instructions, a frozen head, and that coded."""
    torch.set_num_threads(threads)
    cases: dict[str, Callable[[], tuple[float, ...]]] = {
        "experiment 1": lambda: sentiment(steps),
        "instructions": lambda: instructions(steps, decoder),
        "frozen head": lambda: frozen(epochs, CodecConfig()),
        "frozen head, int8": lambda: frozen(epochs, CODED),
    }
    found: dict[str, Any] = {}
    for name, case in cases.items():
        plain, crossed, count, *loss = case()
        found[name] = {"plain": plain / count, "bytes": crossed / count, "ratio": crossed / plain, "loss": loss}
        say(f"{name}: {found[name]}")
    rows = [
        (name, f"{one['plain'] / 1e3:.1f}", f"{one['bytes'] / 1e3:.1f}", f"{one['ratio']:.3f}")
        for name, one in found.items()
    ]
    return Result({"cases": found}, rows, COLUMNS)
