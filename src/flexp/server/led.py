"""What the server before says to one of a chain: gradients from it, what becomes of a step, when to keep the state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from flexp.errors import LinkError, LinkLostError
from flexp.links.declaring import Request
from flexp.links.messages import BackwardRequest, ForwardReply
from flexp.links.packing import pack, unpack
from flexp.links.passing import Behind, Keep, Lead, PassedBackward, PassedReply, Settle, Update
from flexp.optim import merged, norms
from flexp.server.alignment import aligned, pupil
from flexp.server.chain import PREVIOUS, Following
from flexp.server.checks import check_backward
from flexp.server.kept import Gathered, Pending, bytes_of
from flexp.server.session import Session, mean
from flexp.server.turns import R, Steps, Turns, handles

Q = TypeVar("Q", BackwardRequest, PassedBackward)


class Led(Turns):
    """A server that another may lead, which is what its clients see."""

    def _further(self, session: Session, request: Request[R]) -> Steps[R]:
        """What the servers further on answer; if they do not, the step is given up."""
        assert session.further is not None
        drops = session.drops
        try:
            reply: R = yield session.further.call(request)
        except LinkError:
            if session.drops == drops and getattr(request, "train", True):  # else it is not what is in flight now
                session.drop()
            raise
        self._still(session)
        return reply

    def _still(self, session: Session) -> None:
        """Refuse to go on for a client that has left, or joined anew, meanwhile. Raises LinkLostError."""
        if self._sessions.get(session.join.client) is not session:
            raise LinkLostError(f"client {session.join.client} has left, or joined anew, meanwhile")

    def _passed(self, session: Session, pending: Pending, request: Q) -> Steps[tuple[Q, PassedReply]]:
        """A backward of the exchange ``pending`` with the gradient that the servers further on have at their blocks,
        and what else they gave.

        Of a step no more goes on than it has, whatever is on its way: another gradient would take the place of one that
        is judged meanwhile.

        Raises:
            LinkLostError: more would, or the exchange was given up meanwhile.
        """
        client, step = session.join.client, request.step
        arrived = session.gathered[step].arrived if step in session.gathered else 0
        if arrived + session.passing[step] + 1 > request.exchanges:
            raise LinkLostError(f"client {client}: step {step} has its {request.exchanges} exchanges already on their "
                                "way; wait for their answers")  # fmt: skip
        names = {item.name for item in fields(PassedBackward)} - {"base_BTH"}
        session.passing[step] += 1
        assert self.chain is not None
        try:
            while (voided := self.chain.voided(client)) is not None:
                yield voided
            if session.pending.get(request.exchange) is not pending:
                raise LinkLostError(f"client {client}: exchange {request.exchange} was given up meanwhile")
            base_BTH = _pupil(session, pending, request)
            passed = PassedBackward(**{name: getattr(request, name) for name in names}, base_BTH=base_BTH)
            behind = yield from self._further(session, passed)
            if session.pending.get(request.exchange) is not pending:
                raise LinkLostError(f"client {client}: exchange {request.exchange} was given up meanwhile")
        except LinkError:
            if self.following is None:  # whoever judges the step says that it is none
                self.chain.void(client, step)
            raise
        finally:
            session.passing[step] -= 1
            session.passing += Counter()  # without those at zero
        return replace(request, grad_BTH=behind.grad_BTH), behind

    @handles.register
    def _passed_backward(self, request: PassedBackward, client: str) -> Steps[PassedReply]:
        """Blocks backward for the server before, which says later what becomes of the step."""
        following, session = self._followed(PREVIOUS), self._sessions[client]
        pending, behind = check_backward(session, request), None
        if session.further is not None:
            request, behind = yield from self._passed(session, pending, request)
        with session.random.active():
            return _pass_back(session, request, behind, following.complete)

    @handles.register
    def _lead(self, request: Lead, client: str) -> Steps[Behind]:
        """The server before has come, or has heard from the one before it which run it is."""
        following, session = self._followed(client, led=False), self._sessions[client]
        following.check(request)
        if self.chain is not None and request.run:
            yield self.chain.tell(request)
            if self._sessions.get(client) is not session:
                raise LinkLostError("the server before has gone meanwhile")
        following.led, following.run = True, request.run
        return self._report()

    @handles.register
    def _settle(self, request: Settle, client: str) -> Steps[Behind]:
        """What becomes of a client's step."""
        following = self._followed(client)
        step = following.settled(request)
        passed = replace(request, reaches=step.further)
        further = None if self.chain is None else self.chain.tell(passed)
        due: Mapping[str, Tensor] | None = None
        if request.take and not request.client:
            due = self.shared.gathered()
        elif request.take:
            scale, gradients = request.scale, step.gradients
            if scale is not None:
                gradients = {name: value * scale for name, value in gradients.items()}
            due = self.shared.collect(gradients, request.weight)
        if due is None or request.norm is not None:
            if due is not None:
                self.shared.apply(due, request.norm)
            if further is not None:
                yield further
            return self._report()
        following.due, names = due, sorted(due)
        own_N = norms([due[name] for name in names]) if names else torch.zeros(0)
        behind = Behind() if further is None else (yield further)
        told, norms_N = merged(names, own_N, behind.names, behind.norms_N)
        return replace(self._report(), names=told, norms_N=norms_N if told else None)

    @handles.register
    def _update(self, request: Update, client: str) -> Steps[Behind]:
        """The norm of the update that waits for it."""
        following = self._followed(client)
        further = None if self.chain is None else self.chain.tell(request)
        if following.due is not None:
            self.shared.apply(following.due, request.norm)
            following.due = None
        if further is not None:
            yield further
        return self._report()

    @handles.register
    def _keep_state(self, request: Keep, client: str) -> Steps[Behind]:
        following = self._followed(client)
        further = None if self.chain is None else self.chain.tell(request)
        following.save(request)
        if further is not None:
            yield further
        return self._report()

    def _leads(self, client: str) -> bool:
        """Whether it is the server before, of which a server that follows nobody has none."""
        return self.following is not None and client == PREVIOUS

    def _followed(self, client: str, *, led: bool = True) -> Following:
        """What is kept for the server before, where it is that which asks.

        Raises:
            LinkError: it is not, or has not come yet.
        """
        if self.following is None or not self._leads(client) or (led and not self.following.led):
            raise LinkError(f"client {client}: only the server before may say this, to a server that it leads")
        return self.following

    def _report(self) -> Behind:
        """What the server before is told of this one, and of those further on."""
        behind = Behind() if self.chain is None else self.chain.told
        kept = None if self.following is None else self.following.keeper
        numbers = set() if kept is None else set(kept.numbers)
        if self.chain is not None:
            numbers &= set(behind.snapshots)
        own = range(min(self.shared.stage.part.blocks), max(self.shared.stage.part.blocks) + 1)
        facts = {f"[{own.start}, {own.stop})": self.counts()} | behind.facts
        return Behind(self.blocks[1], "" if kept is None else kept.run, tuple(sorted(numbers)), facts=facts)


def compared(session: Session, exchange: int, reply: ForwardReply, behind: tuple[Tensor, ...]) -> ForwardReply:
    """The answer to a forward whose aligned blocks are here and further on, with z' of those ``behind`` as well.

    Raises:
        LinkLostError: the exchange was given up meanwhile.
    """
    every = (*(reply.teachers if session.align.at == "every-block" else ()), *behind)
    if session.led:
        return replace(reply, teachers=every)
    pending = session.pending.get(exchange)
    if pending is None:
        raise LinkLostError(f"client {session.join.client}: exchange {exchange} was given up meanwhile")
    values, pending.align_BTH = aligned(session.align, [unpack(one, pending.sent) for one in every], pending.request)
    pending.bytes += bytes_of(*pending.align_BTH)
    return replace(reply, align=mean(values.tolist()), teachers=())


def _pass_back(
    session: Session, request: PassedBackward, behind: PassedReply | None, complete: dict[tuple[str, int], Gathered]
) -> PassedReply:
    """The gradient at what came from another server, which judges the step: what it has gathered is then among
    those that are ``complete``."""
    origin = request.grad_BTH.device
    pending, trained, task_BTH, base_BTH = session.gradients(request, behind)
    norms_N = norms([*trained.values(), task_BTH])
    own, own_N = (tuple(trained), norms_N[:-1]) if behind is None else merged(
        [*trained], norms_N[:-1], behind.names, behind.norms_N
    )  # fmt: skip
    step = session.gathered.setdefault(request.step, Gathered())
    step.further |= behind is not None
    if step.take(trained, request):
        client = session.join.client
        complete.pop((client, request.step), None)
        complete[client, request.step] = session.gathered.pop(request.step)
        for old in [key for key in complete if key[0] == client][: -session.config.max_in_flight]:
            del complete[old]  # of steps that were given up, which nobody settles
    every, every_N = step.norms(behind) if step.arrived > 1 else ((), own_N[:0])
    grad_BTH = pack(task_BTH, pending.sent).to(origin)
    base_BTH = None if base_BTH is None else pack(base_BTH, pending.sent).to(origin)
    return PassedReply(grad_BTH, base_BTH, own, own_N if own else None, every, every_N if every else None)


def _pupil(session: Session, pending: Pending, request: BackwardRequest | PassedBackward) -> Tensor | None:
    """What of an exchange's blocks that are taught goes on to those further on; ``None``: none are there."""
    given = session.to_teach(pending, request)
    if given.base_BTH is None or not session.aligned_further:
        return None
    with session.random.active(), session.shared.installed(pending.version):
        made_BTH = pupil(session.shared.stage, partial(session.run, request.exchange), given, session.join.cut[0])
    return pack(made_BTH.detach(), pending.sent).to(request.grad_BTH.device)
