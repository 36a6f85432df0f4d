"""Measuring the network between a device and a server over a real link of FlexP."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexp.config import AlignConfig
from flexp.cost.model_cost import ModelCost
from flexp.errors import LinkError
from flexp.kinds import KINDS
from flexp.links.asking import PullRequest
from flexp.links.base import Link, ask
from flexp.links.declaring import size
from flexp.links.messages import ForwardRequest, Join
from flexp.models.loading import DTYPES

LEAST = 2**16
"""Bytes that a download must have for its time to tell a rate."""
FASTEST = 1e12
"""Bits a second, where a message takes no time that could be told from the latency."""


@dataclass(frozen=True)
class Network:
    """Bits a second up and down, and the seconds of a message one way. ``symmetric``: up and down were not told apart,
    and are taken to be equal."""

    uplink_bps: float
    downlink_bps: float
    latency_s: float
    symmetric: bool


def measure_link(
    link: Link,
    cost: ModelCost,
    *,
    examples: int = 8,
    repeats: int = 5,
    tuning: str = "full",
    now: Callable[[], float] = time.perf_counter,
) -> Network:
    """Join as a client that leaves the server its last block alone, and time messages without training anything.

    A small activation goes there and back for the latency; the shared weights of one block come down for the downlink;
    a large activation goes there and back, and what the downlink does not explain is the uplink's. What the server
    computed is taken off; every time is the shortest of ``repeats``.

    Raises:
        LinkError: the server refuses: it has another model, or does not hold the last block.
    """
    cut = (cost.blocks - 1, cost.blocks)
    welcome = ask(
        link,
        Join(
            client=link.client,
            fingerprint=cost.fingerprint,
            cut=cut,
            dtype=str(DTYPES[cost.config.dtype]),
            autocast=cost.config.autocast,
            quantization=cost.config.quantization,
            tuning=tuning,
            align=AlignConfig(kind="off"),
        ),
    )
    tokens = cost.at(examples, still=True).message_bytes // (
        DTYPES[cost.config.dtype].itemsize * cost.hidden * examples
    )

    def echo(batch: int, length: int) -> tuple[float, int]:
        hidden_BTH = torch.randn(batch, length, cost.hidden).to(DTYPES[cost.config.dtype])
        best = float("inf")
        for number in range(repeats):
            before, began = link.meter.evaluation.server_seconds, now()
            ask(link, ForwardRequest(exchange=number + 1, hidden_BTH=hidden_BTH))
            taken = now() - began
            best = min(best, taken - (link.meter.evaluation.server_seconds - before))
        return max(0.0, best), hidden_BTH.numel() * hidden_BTH.element_size()

    # An image model takes as many tokens as its images have, and no fewer.
    small, small_bytes = echo(1, tokens if KINDS[cost.kind].images else 1)
    both, large_bytes = echo(examples, tokens)
    round_trip = 8 * (large_bytes - small_bytes) / max(both - small, 1e-9)  # bits each way, over both ways' seconds
    latency = max(0.0, small - 2 * 8 * small_bytes / (2 * round_trip)) / 2
    down = _download(link, welcome.base_depth, cut[0], latency, repeats, now)
    if down is None:
        rate = min(FASTEST, 2 * round_trip)
        return Network(rate, rate, latency, symmetric=True)
    # 1 / round trip = 1 / up + 1 / down, in seconds for each bit
    rest = 1 / round_trip - 1 / down
    if rest <= 0:
        return Network(min(FASTEST, 2 * round_trip), min(FASTEST, 2 * round_trip), latency, symmetric=True)
    return Network(min(FASTEST, 1 / rest), min(FASTEST, down), latency, symmetric=False)


def _download(
    link: Link, base_depth: int, start: int, latency: float, repeats: int, now: Callable[[], float]
) -> float | None:
    """Bits a second at which shared weights come down; ``None`` if there are none to speak of."""
    if base_depth >= start:
        return None
    best = float("inf")
    for _ in range(repeats):
        began = now()
        try:
            reply = ask(link, PullRequest(base_depth, base_depth + 1))
        except LinkError:
            return None
        best = min(best, now() - began)
        if size(reply) < LEAST:
            return None
    return 8 * size(reply) / max(best - 2 * latency, 1e-9)
