"""What a step of a client takes: peak memory, time, bytes and an energy proxy, from a model's cost and a profile."""

from __future__ import annotations

from dataclasses import dataclass

from flexp.config import Rows
from flexp.cost.choice import Choice, Prediction, codec_share, form
from flexp.cost.memory import adapters_bytes, memory, resting, server_memory
from flexp.cost.model_cost import ModelCost
from flexp.cost.profile import Profile
from flexp.cost.speed import Speed
from flexp.kinds import KINDS
from flexp.models.anatomy import check_cut
from flexp.models.batches import PER_TOKEN
from flexp.models.loading import DTYPES

NUMBERED = 8 + 1
"""Bytes of an example's number, and of the flag that says whether it comes along."""


@dataclass(frozen=True)
class Terms:
    """What a client's step depends on beside its device and its choice.

    Attributes:
        base_depth: s_min, when alignment sends z_base up as well; ``None``: nothing is aligned.
        followed: the first block of its head that it does not train. (The seconds are those of a client that
            trains all of its blocks.)
        rows: ``link.rows``, of h.
        read: the share of a text's predicted tokens that have a label, of heads that answer for every token.
        frozen: so many of the first blocks are not trained.
        anew: the share of the client's steps in which its examples' z goes up and is not kept yet (``link.cache``): the
            bytes and seconds are those of the mean step. Less than 1 where it cannot be kept counts as 1.
        own: the server holds adapters of the client's own, with their optimiser's state.
    """

    base_depth: int | None = None
    followed: int | None = None
    rows: Rows = "loss"
    read: float = 1.0
    frozen: int = 0
    anew: float = 1.0
    own: bool = False


def predict(
    cost: ModelCost,
    profile: Profile,
    choice: Choice,
    server: Profile,
    terms: Terms = Terms(),
) -> Prediction:
    """Predict one step of a client.

    Args:
        cost: of the model, at the length of the client's largest exchange.
        profile: of the client's device.
        server: of the server; its links reach from the network to it.
        terms: what the run is like.

    Raises:
        ConfigError: the cut does not fit the model.
    """
    start, stop = check_cut(choice.cut, cost.blocks)
    shape = cost.cut(start, choice.micro_batch, choice.rank)
    base_depth, frozen = terms.base_depth, terms.frozen
    base = base_depth is not None and base_depth < start
    back = cost.config.train_embeddings or frozen < start  # whether a gradient comes down to the head
    keeps = terms.anew < 1 and not (back or base or cost.draws or cost.after or KINDS[cost.kind].images)
    anew = terms.anew if keeps else 1.0
    share, flags = rows_read(cost, choice, terms.rows, terms.read)
    sent = float(shape.message_bytes)
    if form(choice.codec) != "off":
        sent *= codec_share(choice.codec) * 4 / DTYPES[cost.config.dtype].itemsize
    numbers = NUMBERED * choice.micro_batch if keeps else 0
    up = choice.accumulation * round((anew + base + share) * sent + shape.mask_bytes + flags + numbers)
    down = choice.accumulation * round((back + share) * sent)
    here, there = Speed(cost, profile, choice, frozen, anew), Speed(cost, server, choice)
    client, middle = here.client(start, stop), there.server(start, stop)
    if base and base_depth is not None:
        middle += there.forward(base_depth, start)
    link = 4 * choice.accumulation * (profile.latency_s + server.latency_s)
    link += 8 * up / min(profile.uplink_bps, server.downlink_bps)
    link += 8 * down / min(profile.downlink_bps, server.uplink_bps)
    return Prediction(
        memory_bytes=memory(
            cost, choice, overhead_bytes=here.overhead_bytes, base=base, followed=terms.followed, frozen=frozen
        ),
        step_seconds=client + middle + link,
        client_seconds=client,
        server_seconds=middle,
        link_seconds=link,
        energy_joules=profile.watts * client + profile.link_watts * link,
        bytes_up=up,
        bytes_down=down,
        server_memory_bytes=server_memory(cost, choice) + (adapters_bytes(cost, choice) if terms.own else 0),
        host_bytes=resting(cost, choice, overhead_bytes=here.overhead_bytes, state=False) + 2 * shape.message_bytes,
    )


def rows_read(cost: ModelCost, choice: Choice, rows: Rows, read: float) -> tuple[float, int]:
    """The share of the rows of h that cross, and the bytes of the flags that say which; texts without padding."""
    tokens = cost.cut(choice.cut[0], choice.micro_batch, choice.rank).message_bytes // (
        DTYPES[cost.config.dtype].itemsize * cost.hidden
    )
    length = tokens // choice.micro_batch
    answers, share = KINDS[cost.kind].answers, None
    if rows == "all" or choice.cut[1] < cost.blocks:
        return 1.0, 0
    if answers not in PER_TOKEN:
        share = None if cost.pooled is None else 1 / length
    elif rows == "loss" and answers != "span":
        share = read * ((length - 1) / length if answers == "next-token" else 1.0)
    return (1.0, 0) if share is None else (share, tokens)
