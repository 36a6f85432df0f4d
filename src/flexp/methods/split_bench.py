"""Both sides of an L-shaped split on one set of modules: the client's up to a cut s, the server's from there on.

What crosses at the cut is not a message of a link: labels have no place in those. It is computed where it stands, with
the graph of either side ending there, and counted: up the activation (B, T, H), the mask and, in training, the labels;
down its gradient, or in evaluation the logits. Dropout on both sides is drawn from the client's stream, so that two
sides compute what the whole model does, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flexp.client.exchange import Piece
from flexp.errors import ConfigError
from flexp.links.base import Meter
from flexp.links.messages import ForwardRequest
from flexp.links.messages import size as message_size
from flexp.methods.workbench import Bench
from flexp.models.stage import Stage
from flexp.models.tuning import embedding_names


class SplitBench(Bench):
    """A whole model whose blocks [s, L), final norm, head and loss are the server's.

    Attributes:
        client_side: the trained parameters of embeddings and blocks [0, s), by name.
        server_side: all others.
        server_parameters: how many numbers the server's side has, trained or not (a tied head not counted).
        meter: of the client whose turn it is.

    Raises:
        ConfigError: the head is tied to embeddings that are trained: it would be on both sides.
    """

    def __init__(self, stage: Stage, cut: int) -> None:
        super().__init__(stage)
        self.cut = cut
        first = embedding_names(stage)

        def is_clients(name: str) -> bool:
            block = stage.block_of(name)
            return name in first if block is None else block < cut

        self.client_side = frozenset(filter(is_clients, self.parameters))
        everything = stage.model.named_parameters()
        self.server_parameters = sum(value.numel() for name, value in everything if not is_clients(name))
        self.server_side = frozenset(self.parameters.keys() - self.client_side)
        self.meter = Meter()
        self._began = 0.0
        self._refuse_tied_head()

    def __call__(self, **batch: Any) -> Any:
        stage, last = self.stage, self.stage.anatomy.blocks
        train = stage.model.training and torch.is_grad_enabled()
        embedded_BTH, plan = stage.plan(batch)
        z_BTH = stage.run(embedded_BTH, plan, 0, self.cut)
        if train and not z_BTH.requires_grad:
            z_BTH = z_BTH.detach().requires_grad_()  # the server sends a gradient all the same
        arrived_BTH = _Crossing.apply(self, z_BTH)  # type: ignore[no-untyped-call]
        traffic, labels = self.meter.of(train), batch.get("labels")
        sent = ForwardRequest(0, z_BTH.detach(), batch.get("attention_mask"), batch.get("position_ids"))
        traffic.bytes_up += message_size(sent) + (_bytes(labels) if labels is not None else 0)
        traffic.exchanges += 1
        output = stage.finish(stage.run(arrived_BTH, plan, self.cut, last), batch, plan)
        if not train:
            traffic.bytes_down += _bytes(output.logits)
            traffic.server_seconds += time.perf_counter() - self._began
        return output

    @contextmanager
    def part_of_step(self, piece: Piece) -> Iterator[None]:
        try:
            with super().part_of_step(piece):
                yield
        except BaseException:
            for parameter in self.parameters.values():  # the client drops its own only
                parameter.grad = None
            raise

    def arrive(self) -> None:
        """From here on it is the server that computes."""
        self._began = time.perf_counter()

    def give_back(self, grad_BTH: Tensor) -> None:
        """The server is done, and sends the gradient at the cut."""
        self.meter.training.bytes_down += _bytes(grad_BTH)
        self.meter.training.server_seconds += time.perf_counter() - self._began

    def _refuse_tied_head(self) -> None:
        find = getattr(self.stage.model, "get_output_embeddings", None)
        head = find() if find is not None else None
        weight = getattr(head, "weight", None)
        if weight is not None and any(self.parameters[name] is weight for name in self.client_side):
            raise ConfigError(
                "model.train_embeddings = true: this model's head is tied to its embeddings, which an L-shaped split "
                "(splitfed, splitlora) has on the client and the head on the server; leave it false"
            )


class _Crossing(torch.autograd.Function):
    """The cut: the same tensor on the other side, (B, T, H)."""

    @staticmethod
    def forward(ctx: Any, bench: SplitBench, z_BTH: Tensor) -> Tensor:
        ctx.bench = bench
        bench.arrive()
        return z_BTH.clone()

    @staticmethod
    def backward(ctx: Any, grad_BTH: Tensor) -> tuple[None, Tensor]:
        ctx.bench.give_back(grad_BTH)
        return None, grad_BTH


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
