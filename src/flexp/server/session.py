"""One client's side of the server: its cut, its exchanges in flight, and its step so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flexp.config import AlignConfig, ServerConfig
from flexp.errors import BadValuesError
from flexp.links.messages import BackwardReply, BackwardRequest, ForwardReply, ForwardRequest, Join
from flexp.rng import RandomStream, drawing_from
from flexp.server.alignment import alignment, combine
from flexp.server.bounds import Bounds
from flexp.server.generations import Generations
from flexp.server.progress import Progress
from flexp.server.shared import SharedBlocks


@dataclass
class Pending:
    """A forward whose backward has not come yet.

    ``output_BTH`` holds the graph; with memory = "recompute" it is ``None`` and the input, the mask and the state of
    the random generator are kept instead.
    """

    request: ForwardRequest
    version: int
    input_BTH: Tensor
    output_BTH: Tensor | None
    generator: Tensor
    align_BTH: list[Tensor]


@dataclass
class Gathered:
    """A client's step of which some exchanges have arrived: the sum of their gradients, and of their items."""

    exchanges: int
    arrived: int = 0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def take(self, gradients: dict[str, Tensor], weight: float) -> bool:
        """Add an exchange's gradients; gives whether the step is complete."""
        for name, value in gradients.items():
            self.gradients[name] = self.gradients[name] + value if name in self.gradients else value
        self.weight += weight
        self.arrived += 1
        return self.arrived == self.exchanges


@dataclass
class Session:
    """What the server knows of one client. ``random`` is active while it computes."""

    join: Join
    shared: SharedBlocks
    config: ServerConfig
    random: RandomStream
    progress: Progress
    pending: dict[int, Pending] = field(default_factory=dict)
    gathered: dict[int, Gathered] = field(default_factory=dict)
    boundary: Tensor | None = None  # the random generator's state when the step under way began
    bounds: Bounds = field(default_factory=Bounds)
    generations: Generations = field(default_factory=Generations)

    @property
    def align(self) -> AlignConfig:
        return self.join.align

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return bool(self.pending or self.gathered)

    def forward(self, request: ForwardRequest) -> ForwardReply:
        """Run blocks [s, e); keep what the backward will need, with the weights that it belongs to."""
        stage = self.shared.stage
        start, stop = self.join.cut
        plan = stage.plan_without_inputs(request.hidden_BTH, request.mask_BT, request.positions_BT)
        stage.model.train(request.train)
        if not request.train:
            with torch.no_grad():
                return ForwardReply(stage.run(request.hidden_BTH, plan, start, stop))

        if not self.busy:
            self.boundary = self.random.state
        keep_graph = self.config.memory == "keep"
        z_BTH = request.hidden_BTH.detach().requires_grad_(keep_graph)
        generator = self.random.state
        with torch.set_grad_enabled(keep_graph):
            h_BTH = stage.run(z_BTH, plan, start, stop)
        value, align_BTH = self._align(request)
        self.pending[request.exchange] = Pending(
            request, self.shared.hold(), z_BTH, h_BTH if keep_graph else None, generator, align_BTH
        )
        return ForwardReply(h_BTH.detach(), value)

    def backward(self, request: BackwardRequest) -> BackwardReply:
        """The gradient at z, from the very weights of the forward; then train the shared blocks."""
        pending = self.pending.pop(request.exchange)
        try:
            parameters = self.shared.parameters_of(pending.version)
            with self.shared.installed(pending.version):
                z_BTH, h_BTH = self._graph(pending)
                reached = [name for name in parameters if self._within(name, *self.join.cut)]
                gradients = torch.autograd.grad(
                    h_BTH,
                    [z_BTH, *(parameters[name] for name in reached)],
                    request.grad_BTH,
                    allow_unused=True,
                )
                task_BTH = gradients[0]
                taught = self._teach(pending.request, parameters, task_BTH)
        finally:
            self.shared.release(pending.version)
        trained = {name: value for name, value in zip(reached, gradients[1:], strict=True) if value is not None}
        trained |= taught
        self._refuse_nan(request.exchange, task_BTH, trained)
        step = self.gathered.setdefault(request.step, Gathered(request.exchanges))
        if step.take(trained, request.weight):
            del self.gathered[request.step]
            if not self.progress.applied(request.step):
                self.shared.add(self._judged(request.step, step.gradients), step.weight)
                self.progress.apply(request.step)

        # Micro-batches share one step. Each has a mean over its own tokens, so it counts by its share of the step's.
        scaled = [value * (self.align.weight * request.tokens) for value in pending.align_BTH]
        if not scaled:
            return BackwardReply(task_BTH)
        *inner, at_cut = scaled
        return BackwardReply(
            combine(task_BTH, at_cut, self.align.combine), tuple(value.to(task_BTH.dtype) for value in inner)
        )

    def drop(self) -> None:
        """Forget what is in flight, and every unfinished step: whoever tries one again draws the same dropout."""
        if self.boundary is not None and self.busy:
            self.random.state = self.boundary
        self.progress.give_up(self.progress.unapplied())
        for pending in self.pending.values():
            self.shared.release(pending.version)
        self.pending.clear()
        self.gathered.clear()

    def _graph(self, pending: Pending) -> tuple[Tensor, Tensor]:
        if pending.output_BTH is not None:
            return pending.input_BTH, pending.output_BTH
        request, stage = pending.request, self.shared.stage
        plan = stage.plan_without_inputs(request.hidden_BTH, request.mask_BT, request.positions_BT)
        stage.model.train(True)
        z_BTH = pending.input_BTH.requires_grad_()
        with drawing_from(pending.generator, self.random.device):
            return z_BTH, stage.run(z_BTH, plan, *self.join.cut)

    def _align(self, request: ForwardRequest) -> tuple[float | None, list[Tensor]]:
        """The mean alignment term over the aligned boundaries, and the gradients at them, the cut last.

        The shared blocks [s_min, s) run on z_base without gradients and without dropout: they are the teacher.
        """
        if request.base_BTH is None or not self.align.has_term:
            return None, []
        stage, first = self.shared.stage, min(self.shared.stage.part.blocks)
        plan = stage.plan_without_inputs(request.base_BTH, request.mask_BT, request.positions_BT)
        students = [*request.inner_BTH, request.hidden_BTH]
        every = len(request.inner_BTH) > 0
        values: list[float] = []
        grads: list[Tensor] = []
        stage.model.train(False)
        with torch.no_grad():
            teacher_BTH = request.base_BTH
            for index in range(first, self.join.cut[0]):
                teacher_BTH = stage.run(teacher_BTH, plan, index, index + 1)
                if every or index == self.join.cut[0] - 1:
                    value, grad = alignment(self.align, teacher_BTH, students[len(values)], request.mask_BT)
                    values.append(value)
                    grads.append(grad)
        count = len(values)
        return sum(values) / count, [grad / count for grad in grads]

    def _teach(
        self, request: ForwardRequest, parameters: Mapping[str, nn.Parameter], task_BTH: Tensor
    ) -> dict[str, Tensor]:
        """Gradients of the shared blocks [s_min, s), of which the client trains copies of its own, on its data.

        The server's z' = server[s_min, s)(z_base) goes nowhere, so it has no gradient; ∂task/∂z at the client's z,
        which is here, stands for it. Where the copies are equal it is exact. Without, shared blocks would learn only
        from clients that cut below them.
        """
        if request.base_BTH is None or not self.align.teach:
            return {}
        stage, first = self.shared.stage, min(self.shared.stage.part.blocks)
        names = [name for name in parameters if self._within(name, first, self.join.cut[0])]
        if not names:
            return {}  # they are frozen
        plan = stage.plan_without_inputs(request.base_BTH, request.mask_BT, request.positions_BT)
        stage.model.train(True)
        own_BTH = stage.run(request.base_BTH, plan, first, self.join.cut[0])
        gradients = torch.autograd.grad(own_BTH, [parameters[name] for name in names], task_BTH, allow_unused=True)
        return {name: value for name, value in zip(names, gradients, strict=True) if value is not None}

    def _within(self, name: str, start: int, stop: int) -> bool:
        block = self.shared.stage.block_of(name)
        return block is not None and start <= block < stop

    def _refuse_nan(self, exchange: int, task_BTH: Tensor, trained: dict[str, Tensor]) -> None:
        # One norm over all of them reads every gradient once; it is finite only if they all are.
        if not torch.isfinite(torch.nn.utils.get_total_norm([task_BTH, *trained.values()])):
            self.drop()  # the rest of the step, gathered already or still to come, is void as well
            raise BadValuesError(
                f"client {self.join.client}: the gradient of exchange {exchange} is not finite, so the shared blocks "
                "were not updated; lower train.personal.lr or train.shared.lr, or use float32"
            )

    def _judged(self, step: int, gradients: dict[str, Tensor]) -> Mapping[str, Tensor]:
        try:
            return self.bounds.judge(self.join.client, step, gradients)
        except BadValuesError:
            self.drop()
            raise
