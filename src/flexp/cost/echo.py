"""A client without its server: an answer at once, so that the client's own work is all there is to measure."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from flexp.client.model import OFF, SPLIT_MODELS
from flexp.client.whole import WholeModel
from flexp.config import AlignConfig
from flexp.cost.probe import Probe
from flexp.links.base import Meter, finished
from flexp.links.messages import (
    BackwardReply,
    BackwardRequest,
    Done,
    ExtendReply,
    ExtendRequest,
    FetchReply,
    FetchRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    PullReply,
    PullRequest,
    Request,
    Welcome,
)
from flexp.models.stage import Stage
from flexp.models.tuning import embedding_names

R = TypeVar("R")


class EchoLink:
    """Answers at once with what it was sent, so that only the client's own work is measured.

    What it gives back is new memory each time, of the size that a server's answer has.
    """

    client = "probe"

    def __init__(self, blocks: int, hidden: int, base_depth: int) -> None:
        self.meter = Meter()
        self.residuals: dict[str, Tensor] = {}
        self._welcome = Welcome(base_depth, blocks, hidden)
        self._inner: dict[int, tuple[Any, ...]] = {}
        self.shared: dict[str, Any] = {}  # the parameters that a pull answers with, by name

    def call(self, request: Request[R]) -> Future[R]:
        return finished(lambda: cast(R, self._answer(request)))

    def close(self) -> None:
        pass

    def _answer(self, request: Request[Any]) -> Any:
        match request:
            case Join():
                return self._welcome
            case ForwardRequest():
                self._inner[request.exchange] = request.inner_BTH
                return ForwardReply(request.hidden_BTH.clone(), None if request.base_BTH is None else 0.0)
            case BackwardRequest():
                inner = tuple(value.clone() for value in self._inner.pop(request.exchange, ()))
                return BackwardReply(request.grad_BTH.clone(), inner)
            case PullRequest():
                return PullReply({name: value.detach().clone() for name, value in self.shared.items()})
            case ExtendRequest():
                return ExtendReply(request.hidden_BTH.clone())
            case FetchRequest():
                return FetchReply(0, 0)
        return Done()


class StartModel(nn.Module):
    """Embeddings and blocks [0, s) alone, of a client whose server computes the loss: z up, ∂loss/∂z down."""

    def __init__(self, stage: Stage, start: int) -> None:
        super().__init__()
        self.stage, self.start, self.model = stage, start, stage.model

    def forward(self, **batch: Any) -> Any:
        embedded_BTH, plan = self.stage.plan(batch)
        z_BTH = self.stage.run(embedded_BTH, plan, 0, self.start)
        return SimpleNamespace(loss=_Returned.apply(z_BTH))  # type: ignore[no-untyped-call]

    def after_step(self) -> None:
        pass


class _Returned(torch.autograd.Function):
    """Stands for the loss of an activation (B, T, H): its gradient is as large as what the server sends back."""

    @staticmethod
    def forward(ctx: Any, z_BTH: Tensor) -> Tensor:
        ctx.like = z_BTH.clone()  # what crossed; kept until the answer is here
        return z_BTH.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(ctx.like).add_(grad)


def without_tail(stage: Stage) -> Iterator[nn.Parameter]:
    """The parameters of a client that ends at its cut; what is behind its blocks is frozen, being the server's."""
    embeddings = embedding_names(stage)
    for name, value in stage.model.named_parameters():
        if stage.block_of(name) is None and name not in embeddings:
            value.requires_grad_(False)
        else:
            yield value


def client_model(probe: Probe, stage: Stage, link_type: type[EchoLink] = EchoLink) -> Any:
    """What the client of ``probe`` trains, of its tuned ``stage``: a whole model, or a split one on an echo."""
    if probe.cut is None:
        return WholeModel(stage)
    if not probe.tail:
        return StartModel(stage, probe.cut[0])
    start = probe.cut[0]
    base = start if probe.base_depth is None else probe.base_depth
    link = link_type(stage.anatomy.blocks, stage.anatomy.hidden, base)
    aligned = range(base, start)
    link.shared = {name: value for name, value in stage.trainable().items() if stage.block_of(name) in aligned}
    # Whatever comes every n-th step comes in these few, too.
    align = OFF if probe.align is None else AlignConfig(**{**probe.align, "every": 1})
    tuning = str(probe.model_config.get("tuning", "full"))
    return SPLIT_MODELS[probe.kind](stage, probe.cut, link, align=align, tuning=tuning, expose_embeddings=True)


def random_batch(probe: Probe, config: Any) -> dict[str, Any]:
    """A batch of random inputs and labels of the size that ``probe`` names."""
    generator = torch.Generator().manual_seed(0)
    if probe.kind == "image-classification":
        size = getattr(config, "image_size", 224)
        pixels = torch.randn(probe.examples, getattr(config, "num_channels", 3), size, size, generator=generator)
        return {"pixel_values": pixels, "labels": torch.zeros(probe.examples, dtype=torch.long)}
    shape = (probe.examples, probe.length)
    ids = torch.randint(1, config.get_text_config().vocab_size, shape, generator=generator)
    labels = torch.zeros(probe.examples, dtype=torch.long) if probe.kind == "sequence-classification" else ids
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long), "labels": labels}
