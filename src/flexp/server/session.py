"""One client's side of the server: what is computed for its exchanges, and what becomes of its steps.

A step that comes again, after its answer was lost or after the client went back to a snapshot, gets the answers that
it got the first time and is never applied twice (:class:`flexp.server.clients.Progress`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexp.config import AlignConfig
from flexp.errors import BadValuesError
from flexp.links.asking import PullReply
from flexp.links.messages import BackwardReply, BackwardRequest, ForwardReply, ForwardRequest
from flexp.links.packing import Places, on, pack, unpack
from flexp.links.passing import Behind, PassedBackward, PassedReply, Settle
from flexp.models.execution import ExecutionPlan
from flexp.optim import laid_out, merged, norms, total
from flexp.rng import BlockDraws, RandomStream
from flexp.server.alignment import aligned, combine, taught, teachers
from flexp.server.examples import Examples
from flexp.server.generations import Generations
from flexp.server.joining import Member, Pass
from flexp.server.kept import Gathered, InFlight, Pending, bytes_of, counted, size_kept

if TYPE_CHECKING:
    from flexp.server.chain import Chain


@dataclass(kw_only=True)
class Session(InFlight):
    """What the server knows of one client. ``random`` is active while it computes, and seeded anew for every block."""

    random: RandomStream
    seed: int
    generations: Generations = field(default_factory=Generations)
    graph_rate: float = 0.0  # bytes of the last graph for each number that came: what has no room is not made at all
    thread: int | None = None  # that waits for its answers, if it is in this process
    examples: Examples = field(default_factory=Examples)
    cut: tuple[int, int] = (0, 0)  # the client's; ``join`` has what of it is here
    chain: Chain | None = None  # the servers further on, if there are any
    led: bool = False  # by the server before: the first has what the client sent, and compares it
    settled: Future[Behind] | None = None  # what they say of the last step
    pulled: tuple[Any, PullReply] | None = None  # what a pull in portions is of, and all of it
    drew: bool = False  # whether a block has drawn random numbers, where requests may be joined

    @property
    def align(self) -> AlignConfig:
        return self.join.align

    @property
    def coded(self) -> str:
        """The codec in which weights go down to it."""
        return "off" if self.join.codec is None else self.join.codec.weights

    @property
    def aligned_further(self) -> bool:
        """Whether some of its aligned blocks are further on."""
        return self.cut[0] > self.join.cut[0]

    def forward(self, request: ForwardRequest, sent: Places | None = None) -> ForwardReply:
        """Run blocks [s, e); keep what the backward will need, with the weights that it belongs to.

        What came is looked at where it came; then it goes to the blocks' device, and nothing waits for that before the
        answer is copied back.

        Args:
            request: with whole activations.
            sent: the tokens of them that crossed.
        """
        reads = sent if request.rows_BT is None else Places.of(request.rows_BT)
        down = reads if self.further is None else sent
        stage, origin = self.shared.stage, request.hidden_BTH.device
        request = on(request, stage.model.device)
        start, stop = self.join.cut
        plan = stage.plan_without_inputs(request.hidden_BTH, request.mask_BT, request.positions_BT)
        stage.model.train(request.train)
        if not request.train:
            with torch.no_grad():
                reply = ForwardReply(pack(stage.run(request.hidden_BTH, plan, start, stop), down).to(origin))
            self._count(request)
            return reply

        size = size_kept(request)
        expected = round(self.graph_rate * request.hidden_BTH.numel())
        keep_graph = self.config.memory == "keep" and self.has_room(size + expected, graph=True)
        z_BTH = request.hidden_BTH.detach().requires_grad_()
        # With gradients in any case: torch takes other kernels without (for an attention mask that is trained, say),
        # and h would not be, bit for bit, what the backward computes again.
        version = self.version_now()
        values: Tensor | None = None
        align_BTH: list[Tensor] = []
        teachers_BTH: list[Tensor] = []
        with self.shared.installed(version):
            with torch.enable_grad(), counted(stage.model, keep=keep_graph) as graph:
                h_BTH = self.run(request.exchange, z_BTH, plan, start, stop)
            if request.base_BTH is not None and self.align.has_term:
                teachers_BTH = teachers(self.align, stage, request, start)
        if teachers_BTH and not (self.led or self.aligned_further):
            (values, align_BTH), teachers_BTH = aligned(self.align, teachers_BTH, request), []
        if self.led:
            request = replace(request, base_BTH=None)
        size += bytes_of(*align_BTH)
        if keep_graph:
            self.graph_rate = graph.bytes / request.hidden_BTH.numel()
        if keep_graph and self.has_room(size + graph.bytes, graph=True):
            size += graph.bytes
        else:
            keep_graph, z_BTH = False, request.hidden_BTH.detach()
        self.pending[request.exchange] = Pending(
            request,
            self.shared.hold(version),
            z_BTH,
            h_BTH if keep_graph else None,
            align_BTH,
            size,
            sent=sent,
            reads=reads,
        )
        answer = pack(h_BTH.detach(), down).to(origin)  # before the term, for which nothing need be waited for then
        align = None if values is None else mean(values.tolist())
        return ForwardReply(answer, align, teachers=tuple(pack(value, sent).to(origin) for value in teachers_BTH))

    def backward(self, request: BackwardRequest, behind: PassedReply | None = None) -> BackwardReply:
        """The gradient at z, from the very weights of the forward; then train the shared blocks.

        Args:
            behind: what the servers further on gave for it; ``request`` has their gradient.
        """
        pending, trained, task_BTH, _ = self.gradients(request, behind)
        return self.settle(pending, request, task_BTH, trained, behind)

    def to_teach(self, pending: Pending, request: BackwardRequest | PassedBackward) -> ForwardRequest:
        """The forward with what the blocks that are taught run on, if any are."""
        base_BTH = pending.request.base_BTH if self.align.teach else None
        if isinstance(request, PassedBackward) and request.base_BTH is not None:
            base_BTH = unpack(request.base_BTH.to(pending.input_BTH.device), pending.sent).requires_grad_()
        return replace(pending.request, base_BTH=base_BTH)

    def gradients(
        self, request: BackwardRequest | PassedBackward, behind: PassedReply | None
    ) -> tuple[Pending, dict[str, Tensor], Tensor, Tensor | None]:
        """Of an exchange in flight: the gradients of what is trained, in the order of its names, that at z, and that at
        what came to be taught."""
        pending = self.pending.pop(request.exchange)
        self.progress.held(pending.since)
        own: dict[str, Tensor] = {}
        given, base_BTH = self.to_teach(pending, request), None
        try:
            parameters = self.shared.parameters_of(pending.version)
            with self.shared.installed(pending.version):
                z_BTH, h_BTH = self._graph(pending)
                grad_BTH = request.grad_BTH.to(h_BTH.device, non_blocking=True)
                reached = [name for name in parameters if self.shared.stage.within(name, *self.join.cut)]
                gradients = torch.autograd.grad(
                    h_BTH,
                    [z_BTH, *(parameters[name] for name in reached)],
                    unpack(grad_BTH, pending.reads if self.further is None else pending.sent),
                    allow_unused=True,
                )
                task_BTH = gradients[0]
                if given.base_BTH is not None:
                    run = partial(self.run, request.exchange)
                    there = behind.base_BTH if behind is not None and self.aligned_further else None
                    goal_BTH = task_BTH if there is None else unpack(there, pending.sent)
                    own, base_BTH = taught(self.shared.stage, run, given, self.join.cut[0], parameters, goal_BTH)
        finally:
            self.shared.release(pending.version)
        trained = {name: value for name, value in zip(reached, gradients[1:], strict=True) if value is not None}
        trained = {name: laid_out(value, parameters[name]) for name, value in sorted((trained | own).items())}
        return pending, trained, task_BTH, base_BTH

    def version_now(self) -> int:
        """The version of the weights that a forward runs with."""
        return self.shared.version_for(one.version for one in self.pending.values())

    def member(self, request: ForwardRequest, version: int) -> Member:
        """This client's part of a pass of several clients' exchanges, with the weights of a version."""
        stage, cut = self.shared.stage, self.join.cut
        self.shared.come()
        weights = self.shared.parameters_of(version)
        own = {name: value for name, value in weights.items() if stage.within(name, *cut)}
        return Member(request.hidden_BTH, request.mask_BT, request.positions_BT, cut, own)

    def joined_forward(
        self, request: ForwardRequest, sent: Places | None, h_BTH: Tensor, version: int, joint: Pass, share: int
    ) -> ForwardReply:
        """The answer to a forward that ran in a pass; kept, if it trains, until its backward.

        Args:
            request: on the blocks' device.
            share: bytes of the pass's graph that are this client's.
        """
        reads = sent if request.rows_BT is None else Places.of(request.rows_BT)
        self._count(request)
        if request.train:
            self.pending[request.exchange] = Pending(
                request,
                self.shared.hold(version),
                request.hidden_BTH.detach(),
                None,
                [],
                size_kept(request) + share,
                sent=sent,
                reads=reads,
                joint=joint,
            )
        return ForwardReply(pack(h_BTH.detach(), reads))

    def _count(self, request: ForwardRequest) -> None:
        """A step of which nothing but forwards comes is done with the first of them: the blocks take nothing of it."""
        if not request.train:
            self.progress.apply(request.step)

    def settle(
        self,
        pending: Pending,
        request: BackwardRequest,
        task_BTH: Tensor,
        trained: dict[str, Tensor],
        behind: PassedReply | None = None,
    ) -> BackwardReply:
        """Judge an exchange's gradients; when its step is complete, train the shared blocks with them."""
        norms_N = norms([*trained.values(), task_BTH])  # one look at every gradient, and one wait for all of them
        if behind is not None:
            _, own_N = merged([*trained], norms_N[:-1], behind.names, behind.norms_N)
            norms_N = torch.cat([own_N, norms_N[-1:]])
        reply = self._reply(pending, request, task_BTH, request.grad_BTH.device)
        self._refuse_nan(request, total(norms_N))
        step = self.gathered.setdefault(request.step, Gathered())
        if step.take(trained, request):
            del self.gathered[request.step]
            norm = None if len(norms_N) == 1 else total(norms_N[:-1])
            if step.arrived > 1:  # of several exchanges it is another one
                names, all_N = step.norms(behind)
                norm = total(all_N) if names else None
            self._complete(request.step, step, norm)
        return reply

    def _complete(self, number: int, step: Gathered, norm: float | None) -> None:
        """A whole step, with its norm if anything has a gradient: the shared blocks take it, if they have not yet."""
        client, shared, chain, scale = self.join.client, self.shared, self.chain, None
        take, gradients = not self.progress.applied(number), step.gradients
        if take:
            scale = None if norm is None else self._judged(number, norm)
            if scale is not None:
                norm, gradients = None, {name: value * scale for name, value in gradients.items()}
            take = shared.wanted(client, gradients)
        if chain is None:
            if take:
                shared.add(gradients, step.weight, norm, client=client)
        else:
            known = (norm or 0.0) if scale is None and shared.one_by_one else None
            reaches = self.further is not None
            self.settled = chain.tell(Settle(client, number, take, reaches, step.weight, scale, known))
            if take:
                shared.add(gradients, step.weight, known, self._whole)
        self.progress.apply(number)

    def _whole(self, gradients: Mapping[str, Tensor]) -> float:
        assert self.chain is not None
        assert self.settled is not None
        norm, self.settled = self.chain.norm(self.settled, gradients)
        return norm

    def _reply(
        self, pending: Pending, request: BackwardRequest, task_BTH: Tensor, origin: torch.device
    ) -> BackwardReply:
        """What goes down to the client, in the memory that its gradient came from."""
        if not request.back:
            return BackwardReply()
        # Micro-batches share one step. Each has a mean over its own tokens, so it counts by its share of the step's.
        scaled = [value * (self.align.weight * request.tokens) for value in pending.align_BTH]
        if not scaled:
            return BackwardReply(pack(task_BTH, pending.sent).to(origin))
        *inner, at_cut = scaled
        return BackwardReply(
            pack(combine(task_BTH, at_cut, self.align.combine), pending.sent).to(origin),
            tuple(pack(value.to(task_BTH.dtype), pending.sent).to(origin) for value in inner),
        )

    def _graph(self, pending: Pending) -> tuple[Tensor, Tensor]:
        if pending.output_BTH is not None:
            return pending.input_BTH, pending.output_BTH
        request, stage = pending.request, self.shared.stage
        plan = stage.plan_without_inputs(request.hidden_BTH, request.mask_BT, request.positions_BT)
        stage.model.train(True)
        z_BTH = pending.input_BTH.requires_grad_()
        return z_BTH, self.run(request.exchange, z_BTH, plan, *self.join.cut)

    def run(self, exchange: int, hidden_BTH: Tensor, plan: ExecutionPlan, start: int, stop: int) -> Tensor:
        """Run blocks [start, stop), training."""
        draws = BlockDraws(self.seed, exchange, watched=self.config.joined)
        hidden_BTH = self.shared.stage.run(hidden_BTH, plan, start, stop, draws)
        self.drew |= self.config.joined and draws.drew
        return hidden_BTH

    def _refuse_nan(self, request: BackwardRequest, norm: float) -> None:
        if not math.isfinite(norm):  # as it is only where they all are
            self._void(request.step)  # the rest of the step, gathered already or still to come
            raise BadValuesError(
                f"client {self.join.client}: the gradient of exchange {request.exchange} is not finite, so the shared "
                "blocks were not updated; lower train.personal.lr or train.shared.lr, or use float32"
            )

    def _judged(self, step: int, norm: float) -> float | None:
        try:
            return self.shared.bounds.judge(self.join.client, step, norm)
        except BadValuesError:
            self._void(step)
            raise

    def _void(self, step: int) -> None:
        self.drop()
        if self.chain is not None:
            self.chain.void(self.join.client, step)


def mean(values: list[float]) -> float:
    """Of an alignment's terms."""
    return sum(values) / len(values)
