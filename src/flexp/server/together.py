"""Which of the requests in line are answered together (``server.joined``), and how."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexp.links.messages import BackwardReply, BackwardRequest, ForwardReply, ForwardRequest
from flexp.links.packing import Places, on, unpack
from flexp.models.stage import Stage
from flexp.server.joining import Pass, fits
from flexp.server.kept import Sessions, bytes_of
from flexp.server.line import Waiting
from flexp.server.pace import Pace, curve_of
from flexp.server.session import Session

log = logging.getLogger("flexp.server")


@dataclass(frozen=True)
class Kind:
    """What requests that are answered together have in common; ``size``: of their tokens, as a power of two."""

    name: str
    train: bool
    positions: bool
    size: int


@dataclass(frozen=True)
class Ready:
    """A forward that was looked at: its request with whole activations, and the tokens of them that crossed."""

    session: Session
    request: ForwardRequest
    sent: Places | None


class Together:
    """Chooses who goes together, and runs them.

    Attributes:
        draws: whether training forwards draw random numbers, so that each client must go alone; ``None``: not known.
    """

    def __init__(self, stage: Stage, sessions: Sessions) -> None:
        self._stage, self._sessions = stage, sessions
        self.pace = Pace()
        self.draws: bool | None = None

    def measure(self, session: Session) -> None:
        """Before the first client trains, measure on a block of it what a pass of several is to be expected to take."""
        if not self.pace.curve:
            start, weights = session.join.cut[0], session.shared.parameters_of(session.shared.version)
            own = {name: value for name, value in weights.items() if self._stage.within(name, start, start + 1)}
            with session.random.active():
                self.pace.curve = curve_of(self._stage, start, own)

    def drew(self, drew: bool) -> None:
        """A client's training forward, alone, drew random numbers, or did not."""
        if drew and not self.draws:
            log.warning("server.joined has no effect on training: the blocks draw dropout, for each client its own")
        self.draws = drew

    def choose(self, firsts: Sequence[Waiting]) -> tuple[list[Waiting], float | None]:
        """Of each client's first request, those that are next; or how many seconds they wait for each other."""
        now, waits, in_flight = time.monotonic(), list[float](), self._sessions.in_flight
        for place, one in enumerate(firsts):
            if not self._may_run(one, in_flight):
                continue
            joint = self._joint(one)
            if joint is not None and joint.h_BTH:
                here = [other for other in firsts if self._joint(other) is joint]
                if len(here) == self._alive(joint):
                    return here, None
                if now < joint.until:
                    waits.append(joint.until - now)
                    continue
            return [one, *self._along(one, firsts[place + 1 :], now, in_flight + 1)], None
        return [], min(waits, default=None)

    def _along(self, one: Waiting, others: Sequence[Waiting], now: float, in_flight: int) -> list[Waiting]:
        """Who of the others goes with one, with which so many forwards are in flight."""
        kind, shapes = self._kind(one), [self._shape(one)]
        if kind is None:
            return []
        found: list[Waiting] = []
        for other in others:
            joint = self._joint(other)
            room = self._may_run(other, in_flight + len(found))
            if self._kind(other) != kind or not room or not self._fits([*shapes, self._shape(other)]):
                continue
            if joint is not None and joint.h_BTH and now < joint.until:
                continue  # it waits for others that have a graph with it
            found.append(other)
            shapes.append(self._shape(other))
        if kind.name == "backward":
            return found
        return found[: self.pace.most(self.tokens(one), len(shapes), train=kind.train) - 1]

    def tokens(self, one: Waiting) -> int:
        """B·T."""
        batch, length = self._shape(one)
        return batch * length

    def members(self, group: Sequence[Waiting]) -> int:
        """Of the pass that they make, or that their forwards were in."""
        joint = self._joint(group[0])
        return len(group) if joint is None else len(joint.exchanges)

    def forward(self, ready: Sequence[Ready]) -> list[ForwardReply]:
        """Answers, from one pass."""
        stage, train = self._stage, ready[0].request.train
        stage.model.train(train)
        placed = [on(one.request, stage.model.device) for one in ready]
        versions = [one.session.version_now() if train else one.session.shared.version for one in ready]
        members = [
            one.session.member(request, version) for one, request, version in zip(ready, placed, versions, strict=True)
        ]
        grad = train and ready[0].session.config.memory == "keep" and self._has_room(ready)
        exchanges = [(one.session.join.client, one.request.exchange) for one in ready]
        joint = Pass(stage, members, grad=grad, exchanges=exchanges)
        outputs, share = joint.h_BTH, joint.bytes // len(ready)
        most = share + max(bytes_of(request.hidden_BTH) for request in placed)
        held = sum(session.kept_bytes for session in self._sessions.values())
        room = held + joint.bytes <= ready[0].session.config.max_kept_bytes
        if not (grad and room and all(one.session.has_room(most, graph=True) for one in ready)):
            joint.free()
            share = 0
        found = [
            one.session.joined_forward(request, one.sent, h_BTH, version, joint, share)
            for one, request, h_BTH, version in zip(ready, placed, outputs, versions, strict=True)
        ]
        origins = [one.request.hidden_BTH.device for one in ready]
        return [
            replace(reply, hidden_BTH=reply.hidden_BTH.to(origin)) for reply, origin in zip(found, origins, strict=True)
        ]

    def backward(self, ready: Sequence[tuple[Session, BackwardRequest]]) -> list[Any]:
        """Answers, or why there is none, from one pass backward: the graph of the forward's if all are here that were
        in it, else of one that is run again."""
        pendings = [session.pending[request.exchange] for session, request in ready]
        joint = pendings[0].joint
        assert joint is not None
        device = self._stage.model.device
        grads = [
            unpack(request.grad_BTH.to(device, non_blocking=True), pending.reads)
            for (_, request), pending in zip(ready, pendings, strict=True)
        ]
        whole = all(pending.joint is joint for pending in pendings) and len(ready) == self._alive(joint)
        if whole and joint.h_BTH:
            places = {where: number for number, where in enumerate(joint.exchanges)}
            order = [places[session.join.client, request.exchange] for session, request in ready]
            all_grads = [torch.zeros_like(h_BTH) for h_BTH in joint.h_BTH]
            for place, grad_BTH in zip(order, grads, strict=True):
                all_grads[place] = grad_BTH
            try:
                found = joint.gradients(all_grads)
            except Exception:
                joint.free()  # before each is computed alone
                raise
            found = [found[place] for place in order]
        else:
            for pending in pendings:  # its graph would stay for whoever comes later, who is computed anew
                if pending.joint is not None:
                    pending.joint.free()
            self._stage.model.train(True)
            members = [
                session.member(pending.request, pending.version)
                for (session, _), pending in zip(ready, pendings, strict=True)
            ]
            found = Pass(self._stage, members, grad=True).gradients(grads)
        taken = [session.take(request.exchange) for session, request in ready]
        answers: list[BackwardReply | Exception] = []
        for (session, request), pending, (task_BTH, trained) in zip(ready, taken, found, strict=True):
            try:
                answers.append(session.settle(pending, request, task_BTH, trained))
            except Exception as error:  # of one client, which is told
                answers.append(error)
        return answers

    def _fits(self, shapes: Sequence[tuple[int, int]]) -> bool:
        """Whether they fit each other, and their graph, as far as clients' were counted, fits in memory."""
        tokens = sum(batch for batch, _ in shapes) * max(length for _, length in shapes)
        rate = max(session.graph_rate for session in self._sessions.values())
        most = next(iter(self._sessions.values())).config.max_kept_bytes
        return fits(shapes) and rate * tokens * self._stage.anatomy.hidden <= most

    def _has_room(self, ready: Sequence[Ready]) -> bool:
        """Whether their graph, as far as clients' were counted, may be kept: else none is made."""
        rate = max(session.graph_rate for session in self._sessions.values())
        length = max(one.request.hidden_BTH.shape[1] for one in ready)
        sizes = [round(rate * one.request.hidden_BTH[:, :1].numel() * length) for one in ready]
        held = sum(session.kept_bytes for session in self._sessions.values())
        fits = held + sum(sizes) <= ready[0].session.config.max_kept_bytes
        return fits and all(one.session.has_room(size, graph=True) for one, size in zip(ready, sizes, strict=True))

    def _alive(self, joint: Pass) -> int:
        """How many of a pass still have their backward before them."""
        return sum(
            client in self._sessions
            and exchange in self._sessions[client].pending
            and self._sessions[client].pending[exchange].joint is joint
            for client, exchange in joint.exchanges
        )

    def _may_run(self, one: Waiting, in_flight: int) -> bool:
        """Whether there is room for it, after so many forwards of all clients in flight."""
        trains = not isinstance(one.request, BackwardRequest) and one.request.train  # type: ignore[attr-defined]
        return not trains or one.session.may_begin(in_flight)

    def _joint(self, one: Waiting) -> Pass | None:
        if not isinstance(one.request, BackwardRequest):
            return None
        pending = one.session.pending.get(one.request.exchange)
        return None if pending is None else pending.joint

    def _shape(self, one: Waiting) -> tuple[int, int]:
        request = one.request
        if isinstance(request, BackwardRequest):
            pending = one.session.pending.get(request.exchange)
            found = request.grad_BTH if pending is None else pending.input_BTH
        else:
            found = request.hidden_BTH if request.mask_BT is None else request.mask_BT  # type: ignore[attr-defined]
        return (found.shape[0], found.shape[1]) if found.dim() > 1 else (1, 1)

    def _kind(self, one: Waiting) -> Kind | None:
        """``None``: it goes alone."""
        request = one.request
        if isinstance(request, BackwardRequest):
            pending = one.session.pending.get(request.exchange)
            if pending is None or pending.joint is None:
                return None
            has = pending.request.positions_BT is not None
            return Kind("backward", True, has, self.tokens(one).bit_length())
        if not isinstance(request, ForwardRequest) or request.base_BTH is not None:
            return None
        if request.train and self.draws is not False:
            return None
        return Kind("forward", request.train, request.positions_BT is not None, self.tokens(one).bit_length())
