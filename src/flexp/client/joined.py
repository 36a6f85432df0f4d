"""A client's membership of a server: what is agreed on joining, and the shared blocks whose weights it takes over."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from flexp.client.exchange import Steps, waiting
from flexp.client.guarding import Guard
from flexp.client.once import Standing
from flexp.client.personal import PersonalModel
from flexp.client.taking import check_shapes, fetched
from flexp.client.watching import Watch
from flexp.config import AlignConfig, Cache, CodecConfig, LoraConfig, Rows
from flexp.errors import ConfigError, LinkError, LinkLostError
from flexp.links.asking import PullRequest
from flexp.links.base import Link, ask
from flexp.links.messages import Abort, Join, Welcome
from flexp.links.opening import server_behind
from flexp.models.anatomy import check_cut
from flexp.models.batches import Pooling, ignores_padding, only_masks
from flexp.models.fingerprint import fingerprint
from flexp.models.stage import Stage
from flexp.rng import current_turn

OFF = AlignConfig(kind="off")
PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds to wait before each attempt to reach a server again: a minute in all, in which one can start anew."""

R = TypeVar("R")


class JoinedModel(PersonalModel):
    """The client's stage, joined to a server; arguments are those of :class:`flexp.client.model.SplitModel`."""

    def __init__(
        self,
        stage: Stage,
        cut: tuple[int, int],
        link: Link,
        *,
        align: AlignConfig = OFF,
        tuning: str = "full",
        lora: LoraConfig | None = None,
        accumulation: int = 1,
        expose_embeddings: bool = False,
        numbering: int | None = None,
        codec: CodecConfig | None = None,
        rows: Rows = "logits",
        cache: Cache = "off",
        reuse: float = 0.0,
        base_depth: int | None = None,
        pools: bool = False,
        gradients: bool = True,
    ) -> None:
        super().__init__(stage)
        if pools and (
            not only_masks(stage.model) or any("sinks" in name for name, _ in stage.model.named_parameters())
        ):
            raise ConfigError(
                f"privacy.pool: blocks of {type(stage.model).__name__} make of one vector something else than of the "
                "same several times, so an exported model would answer otherwise; choose one of plain attention"
            )
        self.pools = pools
        self.gradients = gradients
        self.rows = rows
        self.cache = cache
        self.reuse = reuse
        self.sent: dict[int, Tensor] = {}  # with ``reuse``: z (tokens, H) of an example as it went up last
        self.known: set[int] = set()  # examples that the server keeps …
        self.known_of: Standing | None = None  # … made by these weights
        self._examples_key = secrets.token_hex(32) if cache == "disk" else ""
        self._pooling = Pooling(stage)
        self.ignores_padding = ignores_padding(stage.model)
        self.link = link
        self.align = align
        self.tuning = tuning
        self.lora = lora
        self.last_align: float | None = None
        self.guard: Guard | None = None  # teaches the head before anything is sent, and in training
        self.watch: Watch | None = None  # looks whether the server computes what was agreed, where somebody hears it
        self._pulled = 0  # the step after which the aligned blocks were pulled last
        self._coming: tuple[int, dict[str, Tensor]] = 0, {}  # what has come of a step's pull that is not through
        self.cut: tuple[int, int] = cut
        self.steps = Steps(accumulation)
        if numbering is not None:
            self.steps.numbering = numbering
        self.codec = codec
        self._expose_embeddings = expose_embeddings
        self._pinned = base_depth
        self._join(cut)
        self.settle()
        self.take_over()

    def rejoin(self, link: Link | None = None, *, cut: tuple[int, int] | None = None) -> None:
        """Join again, after the link was lost or the server came back: over ``link``, if it is another one, of the same
        client to the same server; the old one is closed. The steps go on.

        Args:
            cut: another one from now on; the stage must be made to fit it (:mod:`flexp.client.recut`).

        Raises:
            LinkError: the server refuses this client, or that cut.
        """
        if link is not None:
            with suppress(LinkError):
                self.link.close()
            self.link = link
        self.steps.abandon()
        before = self.cut
        try:
            self._join(cut or before)
        except (LinkError, ConfigError):
            self.cut = before
            raise

    def again(self, ask: Callable[[], R], reconnect: Callable[[], Link], why: LinkLostError) -> R:
        """What ``ask`` gives over a new link, tried for a minute, after the old one broke (``why``).

        Raises:
            LinkLostError: no server can be reached.
            LinkError: it refuses, or is none that can go on: it has other weights.
        """
        before = self.trained
        for seconds in PAUSES:
            time.sleep(seconds)
            with suppress(LinkError):
                self.link.close()  # a client has one stream at a time
            try:
                self.rejoin(reconnect())
                self.check_trained(before)
                return ask()
            except LinkLostError as error:
                why = error
        raise why

    def check_trained(self, before: str) -> None:
        """Refuse to go on with other weights than those that a server had ``before`` and would not train any more."""
        if before not in ("", self.trained):
            raise LinkError(
                "the server that answers now has other weights than the one before it, so what was begun cannot go on: "
                "ask again; if several servers are named, start all with the same --state"
            )

    def abort(self) -> None:
        """Give up the forwards that wait for a backward and the step that is not complete, on the server as well.

        The gradients that such a step has left in the personal parameters are the caller's to drop.
        """
        self.steps.abandon()
        ask(self.link, Abort())

    def following(self, cut: tuple[int, int]) -> range:
        """The blocks that this client would follow with ``cut``: which the server trains, and it takes over."""
        return range(self.base_depth, cut[0]) if self.align.follow else range(0)

    def guard_with(self, guard: Guard) -> None:
        """Send nothing before ``guard`` has taught the head.

        Raises:
            ConfigError: alignment would send z_base, which nobody teaches, or take over blocks of the server's.
        """
        moved = guard.config.of_texts and self.cut[0] > self.base_depth
        if moved and (self.align.kind == "weights" or self.align.has_term or self.align.teach):
            raise ConfigError(
                f"[privacy] is about what is sent at the cut (s = {self.cut[0]}), and method.align.kind = "
                f"{self.align.kind!r} would send z_base of depth {self.base_depth}, or take over blocks that were not "
                'taught: set method.align.kind = "off"'
            )
        self.guard = guard

    def settle(self) -> None:
        """Leave the training of the aligned blocks to the server, if the alignment says so; the stage's blocks have
        come or changed."""
        self.stage.follow(self.following(self.cut))

    def take_over(self) -> None:
        """Make what the client follows the server's blocks as they are: others have taught them before it came."""
        if self.stage.followed:
            self.pull(0, 1.0)

    def go_on(self, steps: int, *, pulled: bool = True) -> None:
        """Be as after so many steps, whose state is loaded; ``pulled``: with what :meth:`after_step` does."""
        self.steps.done = steps
        self._pulled = steps if pulled else steps - 1
        self._coming = 0, {}

    def pull(self, step: int, share: float) -> None:
        """Move the copies of the aligned blocks by a ``share`` of their way to the server's, as they are after a step.

        Raises:
            LinkError: the server gives other weights than were asked for.
        """
        aligned = range(self.base_depth, self.cut[0])
        personal = {name: value for name, value in self.stage.own().items() if self.stage.block_of(name) in aligned}
        # Of its own, what it does not train is the server's. (What it trains, it need not know.)
        held = {name: value for name, value in personal.items() if share == 1.0 and name in self.stage.followed}
        if self._coming[0] != step:
            self._coming = step, {}
        came = self._coming[1]  # and stays if the link is lost in the middle
        shared: dict[str, Tensor] = {}
        with waiting(self.link, current_turn()):
            for reply in fetched(self.link, PullRequest(self.base_depth, self.cut[0], step), held | came):
                check_shapes(reply.weights, {name: value.shape for name, value in personal.items()})
                shared |= reply.weights
                came |= {name: value for name, value in reply.weights.items() if value is not held.get(name)}
        missing = sorted(personal.keys() - shared.keys())
        if missing and shared:
            raise LinkError(
                f"the server leaves out the weight {missing[0]}, which was asked for; nothing was taken over"
            )
        self._coming = 0, {}
        with torch.no_grad():
            for name, value in shared.items():
                personal[name].lerp_(value.to(personal[name]), share)

    def _join(self, cut: tuple[int, int]) -> None:
        check_cut(cut, self.stage.anatomy.blocks, nothing=True)
        if cut != self.cut:
            self.sent = {}
        self.cut = cut
        self.known = set()  # whatever a server kept, it forgets when its client is gone
        welcome = ask(
            self.link,
            Join(
                client=self.link.client,
                fingerprint=fingerprint(self.model.config),
                cut=cut,
                dtype=str(self.model.dtype),
                autocast=self.stage.autocast_name,
                quantization=self.stage.quantization,
                tuning=self.tuning,
                align=self.align,
                lora=self.lora,
                weights=self.stage.weights,
                numbering=self.steps.numbering,
                codec=self.codec,
                examples_key=self._examples_key,
            ),
        )
        self.joined_as, self.behind = self.link.client, server_behind(self.link)  # the server itself, if it is here
        anatomy = self.stage.anatomy
        check_welcome(welcome, anatomy.blocks, anatomy.hidden, self._pinned, whole=cut[0] == anatomy.blocks)
        self.base_depth = self._pinned = welcome.base_depth
        self.trained = welcome.trained
        self.max_in_flight = welcome.max_in_flight
        if cut[0] < self.base_depth:
            raise ConfigError(f"cut = {cut} starts below the server's base depth s_min = {self.base_depth}")
        what = "cut = (0, …)" if cut[0] == 0 else "alignment from a base depth of 0"
        bare = cut[0] == 0 or (self.base_depth == 0 and (self.align.teach or self.align.has_term))
        if bare and not self._expose_embeddings:
            raise ConfigError(
                f"{what} would send the bare embeddings, from which the server can read every token; keep a block "
                "below what is sent (s and s_min of at least 1), or say expose_embeddings=True"
            )


def check_welcome(welcome: Welcome, blocks: int, hidden: int, pinned: int | None, *, whole: bool = False) -> None:
    """Refuse a server whose words do not go with this client's model, or that moves s_min.

    Args:
        pinned: the s_min that was agreed on, in the configuration or on joining first: below it nothing may be asked
            for. ``None``: the server says it.
        whole: the client has all of the model, and the server may have nothing.

    Raises:
        LinkError: see above.
    """
    if (welcome.blocks, welcome.hidden) != (blocks, hidden):
        raise LinkError(
            f"the server speaks of {welcome.blocks} blocks of width {welcome.hidden}, this client's model has {blocks} "
            f"of width {hidden}; load the same pretrained model on both sides"
        )
    if welcome.max_in_flight < 1 or not welcome.base_depth < blocks + whole:
        raise LinkError(
            f"the server lets {welcome.max_in_flight} exchanges be in flight from block {welcome.base_depth} on, "
            f"expected at least one, from a block below {blocks}"
        )
    if pinned is not None and welcome.base_depth != pinned:
        raise LinkError(
            f"the server's base depth s_min is {welcome.base_depth}, and {pinned} was agreed on: what goes up to align "
            "would come out of other blocks; start the server with the same --base-depth as before and as "
            "model.base_depth says"
        )
