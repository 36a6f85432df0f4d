"""A whole tiny federation in one process, and what its tests compare it with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flexp.client.joined import OFF
from flexp.client.model import SplitModel
from flexp.client.pretrained import SPLIT_MODELS
from flexp.config import AlignConfig, CodecConfig, LoraConfig, ModelConfig, OptimizerConfig, ServerConfig
from flexp.links.base import Link
from flexp.links.declaring import Request
from flexp.links.messages import Join, Welcome
from flexp.links.wrapping import Wrapping
from flexp.models.anatomy import Part
from flexp.models.fingerprint import fingerprint
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_batch, tiny_model
from flexp.server import Server

R = TypeVar("R")
LORA = LoraConfig(rank=2, alpha=4.0)
SGD = OptimizerConfig(name="sgd", lr=1e-3, momentum=0.9, weight_decay=0.01, clip=None)
ADAMW = OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.1, clip=None)
KINDS = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "sequence-classification", "vit": "image-classification"}


@lru_cache
def whole_stage(name: str, kind: str | None = None, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """All of a tiny model, frozen; every party's stage is carved out of it."""
    model = tiny_model(name, task=kind or KINDS[name], dropout=dropout, dtype=dtype)  # type: ignore[arg-type]
    model.requires_grad_(False)
    return Stage.whole(model)


def party(whole: Stage, part: Part, tuning: str, lora: LoraConfig = LORA) -> Stage:
    """A party's stage, tuned; under LoRA the adapters' B is drawn, not zero, so that every gradient counts."""
    stage = carve(whole, part)
    tune(stage, ModelConfig(id="any", lora=lora), tuning)  # type: ignore[arg-type]
    with torch.no_grad():
        for index, (name, value) in enumerate(sorted(stage.trainable().items())):
            if "lora_B" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=seeded(index)))
    return stage


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disturb(parameters: Mapping[str, nn.Parameter], seed: int = 7, spread: float = 0.05) -> None:
    """Move weights off their pretrained values, as training would: teacher and student then differ."""
    generator = seeded(seed)
    with torch.no_grad():
        for _, value in sorted(parameters.items()):
            value.add_((spread * torch.randn(value.shape, generator=generator)).to(value.dtype))


@dataclass
class World:
    """A server and the makers of its clients."""

    whole: Stage
    server: Server
    tuning: str
    kind: str

    def client(
        self,
        name: str,
        cut: tuple[int, int],
        align: AlignConfig = OFF,
        *,
        link: Link | None = None,
        tuning: str | None = None,
        accumulation: int = 1,
        expose_embeddings: bool = False,
        codec: CodecConfig | None = None,
        numbering: int | None = None,
        base_depth: int | None = None,
    ) -> SplitModel:
        tuning = tuning or self.tuning
        stage = party(self.whole, Part.client(cut, self.whole.anatomy.blocks), tuning)
        cls = SPLIT_MODELS[self.kind]
        link = link or self.server.connect(name)
        options = {"accumulation": accumulation, "expose_embeddings": expose_embeddings, "codec": codec}
        options |= {"numbering": numbering, "base_depth": base_depth}
        model = cls(stage, cut, link, align=align, tuning=tuning, **options)  # type: ignore[arg-type]
        return model.train()

    def join(self, name: str, cut: tuple[int, int], /, **changes: Any) -> Welcome:
        return self.server.answer(name, Join(**(self.card(name, cut) | changes)))

    def card(self, name: str, cut: tuple[int, int]) -> dict[str, Any]:
        """What an honest client says of itself."""
        model = self.whole.model
        return {
            "client": name,
            "fingerprint": fingerprint(model.config),
            "cut": cut,
            "dtype": str(model.dtype),
            "tuning": self.tuning,
            "align": OFF,
        }

    def batch(self, seed: int = 0, *, padding: str = "none", batch: int = 3, length: int = 10) -> dict[str, Tensor]:
        padding = "none" if self.kind == "image-classification" else padding
        return tiny_batch(self.whole.model, padding=padding, batch=batch, length=length, seed=seed)  # type: ignore[arg-type]


def world(
    name: str = "llama",
    kind: str | None = None,
    *,
    tuning: str = "full",
    base_depth: int = 1,
    end: int = 4,
    config: ServerConfig | None = None,
    optimizer: OptimizerConfig = ADAMW,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> World:
    whole = whole_stage(name, kind, dropout=dropout, dtype=dtype)
    stage = party(whole, Part.server(base_depth, end), tuning)
    server = Server(stage, tuning=tuning, config=config, optimizer=optimizer, **options)
    return World(whole, server, tuning, kind or KINDS[name])


def plain_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's own optimiser, set up by hand."""
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """The same names, and the same values bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


def shared_weights(server: Server) -> dict[str, Tensor]:
    return copied(server.shared.updater.parameters)


class RecordingLink(Wrapping):
    """Hands everything on and keeps what crossed, as (direction, message)."""

    def __init__(self, inner: Link) -> None:
        super().__init__(inner)
        self.messages: list[tuple[str, Any]] = []

    def call(self, request: Request[R]) -> Future[R]:
        reply = self.inner.call(request)
        self.messages += [("up", request), ("down", reply.result())]
        return reply

    def sent(self, kind: type[Any]) -> Iterator[Any]:
        return (message for _, message in self.messages if isinstance(message, kind))
