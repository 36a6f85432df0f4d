"""What L-shaped split methods have in common: one cut s, labels on the server, clients' parts averaged.

The client has the embeddings and blocks [0, s), the server the other blocks, final norm, head, **and the labels**:
clients send them with every batch. That is how these methods are defined; FlexP's own split keeps labels at home.

*Cut*: one for all, the smallest s of the clients' cuts, so that it fits every device, or as the method's ``cut`` says.
*Optimisers*: ``train.personal`` on the client's side, ``train.shared`` on the server's, each with its own schedule and
clipping; the head, where it is new, has ``train.shared.new_lr`` or, without, ``train.personal.new_lr``, since that is
the rate of a new head wherever it is. Whatever was averaged begins the next round with a fresh optimiser; what the
server alone keeps has one that lasts. *Bytes*: what crosses at the cut (:class:`SplitHarness`), and the
client's part down and up wherever it is averaged. Scoring sends activations up and logits down. *Seconds*: apart for
the two sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flexp.client.exchange import Piece
from flexp.config import RunConfig, Section
from flexp.cost.clock import Schedule
from flexp.errors import ConfigError
from flexp.kinds import LABELS, logits_of
from flexp.links.base import Meter
from flexp.links.declaring import size as message_size
from flexp.links.messages import ForwardRequest
from flexp.links.packing import sent, without_padding
from flexp.methods.base import RATIO, Account, Axis, Cuts, Holds, OnStep, State, World
from flexp.methods.federated import Client, Federated, within
from flexp.methods.harness import Harness, Weights, size
from flexp.models.anatomy import check_cut
from flexp.models.batches import ignores_padding
from flexp.models.stage import Stage
from flexp.models.tuning import embedding_names
from flexp.optim import Updater


class TwoSided(Federated):
    """Federated averaging of one side of a split, or of both.

    Attributes:
        together: whether one step of the server is one of all clients.
        copies: of its side that the server trains.
        lasting: trains what is never averaged, where it is: in the harness.

    Raises:
        ConfigError: the cut does not fit the model, or would send bare embeddings unasked.
    """

    sends: ClassVar[str] = "activations, labels, weights"
    held = Holds("start")
    timing: ClassVar[Schedule] = Schedule("split-sync")
    axis: ClassVar[Axis | None] = (RATIO, (1.0, 0.25))

    class Config(Section):
        """The one cut of an L-shaped split, the same for all clients."""

        cut: Annotated[int, Field(ge=0)] | None = None  # s; None: the smallest s of the clients

    meets = False  # the server has features and labels, and no client meets another

    harness: SplitHarness
    together = False
    copies = 1

    @classmethod
    def cuts(cls, config: RunConfig, cuts: Mapping[str, tuple[int, int]], blocks: int) -> Cuts:
        """One for all: s as the method's ``cut`` says, else the smallest of the clients', so that it fits everybody."""
        settings: TwoSided.Config = cls.own(config)
        wanted = min(start for start, _ in cuts.values()) if settings.cut is None else settings.cut
        start, _ = check_cut((wanted, None), blocks, where=f"method {cls.name}: cut")
        if start == 0 and not config.model.expose_embeddings:
            raise ConfigError(
                f"method {cls.name}: with a cut of 0 the clients would send their embeddings as they are, from which "
                "the server can read every token; use 1 or more, or set model.expose_embeddings = true if that is "
                "acceptable"
            )
        return dict.fromkeys(cuts, (start, blocks))

    def __init__(self, world: World) -> None:
        cuts = self.cuts(world.config, world.cuts, world.source.anatomy.blocks)
        self.cut = next(iter(cuts.values()))[0]
        super().__init__(world)
        own = frozenset(self.harness.parameters.keys() - self.shared)
        self.server_steps = world.total_steps * (1 if self.together else len(world.participants))
        self.lasting = self.server_updater(own, self.server_steps)
        self.updates = 0

    def make_harness(self, stage: Stage) -> SplitHarness:
        return SplitHarness(stage, self.cut)

    def is_shared(self, name: str) -> bool:
        return name in self.harness.client_side

    def own_models(self) -> dict[str, Weights]:
        return {"personal": {}, "optimizer": {}}

    def bytes_of(self, client: Client, weights: Weights) -> int:
        return size({name: value for name, value in weights.items() if name in self.harness.client_side})

    def side(self, names: frozenset[str]) -> dict[str, nn.Parameter]:
        """The parameters ``names`` of the harness, such as one side's, by name."""
        return {name: value for name, value in self.harness.parameters.items() if name in names}

    def server_updater(self, names: frozenset[str], total: int) -> Updater:
        """A new optimiser of the server's, for the parameters ``names``."""
        config, personal = self.world.config.train.shared, self.world.config.train.personal
        if config.new_lr is None:  # these methods' head is the server's; others' is the client's
            config = config.model_copy(update={"new_lr": personal.new_lr})
        return Updater(self.side(names), config, total, self.harness.stage.new)

    def split_steps(self, client: Client, server: Updater, on_step: OnStep) -> None:
        """A client's turn: each of its steps is one of ``server`` as well."""
        worker, traffic = client.workers["model"], client.meter.training
        self.harness.meter = client.meter

        def update() -> None:
            began = time.perf_counter()
            server.step()
            self.updates += 1
            traffic.server_seconds += time.perf_counter() - began

        with worker.optimiser(self.side(self.harness.client_side)), self.harness.before_update(update):
            for _ in range(self.per_round):
                on_step(worker.step())

    def account(self, client: str) -> Account:
        account = super().account(client)
        server_seconds = account.training.server_seconds  # the client's turn went on meanwhile
        return replace(
            account,
            personal_parameters=0,
            client_seconds=max(0.0, account.client_seconds - server_seconds),
            server_seconds=account.server_seconds + server_seconds,
        )

    def server_facts(self) -> dict[str, float]:
        meters = [client.meter for client in self.clients.values()]
        trained = sum(value.numel() for value in self.side(self.harness.server_side).values())
        crossing = sum(meter.training.server_seconds + meter.evaluation.server_seconds for meter in meters)
        return {
            "parameters": self.copies * self.harness.server_parameters,
            "trained_parameters": self.copies * trained,
            "updates": self.updates,
            "compute_seconds": self.server.seconds + crossing,
        }

    def state(self) -> State:
        state = super().state()
        server = {f"side/{name}": value.detach() for name, value in self.lasting.parameters.items()}
        server |= {f"side-optimizer/{name}": value for name, value in self.lasting.state().items()}
        return {**state, "server": {**state["server"], **server, "updates": torch.tensor(self.updates)}}

    def load(self, state: State) -> None:
        super().load(state)
        server = state["server"]
        self.harness.put(within(server, "side/"))
        self.lasting.load(within(server, "side-optimizer/"))
        self.updates = int(server["updates"])

    def _hold(self, client: Client) -> None:
        self.harness.meter = client.meter
        super()._hold(client)


class SplitHarness(Harness):
    """Both sides of an L-shaped split on one set of modules: the client's up to a cut s, the server's from there on.

    What crosses at the cut is not a message of a link: labels have no place in those. It is computed where it stands,
    with the graph of either side ending there, and counted: up the activation (B, T, H), the mask and, in training, the
    labels; down its gradient, or in evaluation the logits. Dropout on both sides is drawn from the client's stream, so
    that two sides compute what the whole model does, bit for bit.

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
        self._began, self._share = 0.0, 1.0  # of the tokens under way, those that are no padding
        self._ignores_padding = ignores_padding(stage.model)
        self._refuse_tied_head()

    def __call__(self, **batch: Any) -> Any:
        stage, last = self.stage, self.stage.anatomy.blocks
        train = stage.model.training and torch.is_grad_enabled()
        embedded_BTH, plan = stage.plan(batch)
        z_BTH = stage.run(embedded_BTH, plan, 0, self.cut)
        if train and not z_BTH.requires_grad:
            z_BTH = z_BTH.detach().requires_grad_()  # the server sends a gradient all the same
        arrived_BTH = _Crossing.apply(self, z_BTH)  # type: ignore[no-untyped-call]
        traffic, labels = self.meter.of(train), [batch[name] for name in LABELS if name in batch]
        kept = without_padding(batch.get("attention_mask")) if self._ignores_padding else None
        self._share = 1.0 if kept is None else len(kept) / z_BTH.shape[:2].numel()
        whole = ForwardRequest(0, z_BTH.detach(), batch.get("attention_mask"), batch.get("position_ids"))
        traffic.bytes_up += message_size(sent(whole, kept)) + sum(map(_bytes, labels))
        traffic.exchanges += 1
        output = stage.finish(stage.run(arrived_BTH, plan, self.cut, last), batch, plan)
        if not train:
            traffic.bytes_down += _bytes(logits_of(output))
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
        self.meter.training.bytes_down += round(_bytes(grad_BTH) * self._share)
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
    def forward(ctx: Any, harness: SplitHarness, z_BTH: Tensor) -> Tensor:
        ctx.harness = harness
        harness.arrive()
        return z_BTH.clone()

    @staticmethod
    def backward(ctx: Any, grad_BTH: Tensor) -> tuple[None, Tensor]:
        ctx.harness.give_back(grad_BTH)
        return None, grad_BTH


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
