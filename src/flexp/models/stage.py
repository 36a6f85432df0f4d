"""A stage: a runnable slice of a model, as one party owns it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flexp.errors import ModelError
from flexp.limits import out_of_memory
from flexp.machine import device_map, device_of, free_memory
from flexp.models import execution
from flexp.models.anatomy import Anatomy, Part, dissect, prune
from flexp.models.batches import NOT_FOR_BLOCKS, USUAL, check_padding, for_blocks, longest_exact
from flexp.models.execution import Absent, ExecutionPlan, ZeroPatches
from flexp.models.fingerprint import fingerprint
from flexp.models.losses import give_loss
from flexp.models.quantized import scales
from flexp.models.stored import stored
from flexp.rng import BlockDraws, undisturbed


class Stage:
    """A Hugging Face model of which only ``part`` is really there.

    The model keeps its class, its names and its ``state_dict`` keys; blocks that are not owned are empty modules.
    A stage may be used by one thread at a time.
    """

    def __init__(self, model: Any, anatomy: Anatomy, part: Part) -> None:
        self.model = model
        self.anatomy = anatomy
        self.part = part
        self.autocast: torch.dtype | None = None  # what matrix products compute in, if not in the weights' type
        self.new: frozenset[str] = frozenset()  # names of weights that no checkpoint holds, such as a new classifier
        self.followed: frozenset[str] = frozenset()  # names of what it has copies of its own of, without training them
        self.lent = False  # whether the tensors belong to another stage as well
        self.weights: str | None = None  # which pretrained weights these are, where that is known
        self.quantization = "off"  # of the blocks' linear layers, in the words of ``model.quantization``
        self.in_file: tuple[nn.Parameter, ...] = ()  # weights that are in memory only while their block runs
        self.places: dict[int, torch.device] = {}  # of its blocks, where they are on several devices
        self._tuples: int | None = None
        self.compares = True  # every plan with a server's, where it has the ends
        self.longest = longest_exact(model.config)
        give_loss(model)
        self._server: Stage | None = None  # the model as a server has it, of no blocks, to compare with
        parameters = inspect.signature(type(model).forward).parameters
        cached = getattr(model.config.get_text_config(), "use_cache", None) is not None
        passed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.no_cache = {"use_cache": False} if "use_cache" in parameters or (cached and passed_on) else {}

    @classmethod
    def whole(cls, model: nn.Module) -> Stage:
        """All of ``model``.

        Raises:
            ModelError: the model cannot be split exactly.
        """
        anatomy = dissect(model)
        return cls(model, anatomy, Part.whole(anatomy.blocks))

    def to(self, device: torch.device) -> Stage:
        """Be on ``device`` from now on; memory that another stage has lent it is copied, where that is elsewhere.

        Raises:
            ModelError: there is not enough memory.
        """
        if device != self.model.device:
            if any(True for _ in stored(self.model)):
                raise ModelError(
                    'model.embeddings = "file" reads rows into main memory, and the model is to be on another device; '
                    'set model.device = "cpu" or model.embeddings = "memory"'
                )
            with self._moving(str(device)):
                self.model.to(device)
        return self

    def spread(self, names: str | Sequence[str] | None) -> Stage:
        """Have the blocks of a part without ends on several devices from now on, in their order and balanced, within
        their free memory where that is known (accelerate's device map); all else is where the first block is. One name,
        or none: it stays where it is.

        Raises:
            ConfigError: there is no such device here.
            ModelError: there is not enough memory.
        """
        if names is None or isinstance(names, str):
            return self
        devices = [device_of(name) for name in names]
        owned = sorted(self.part.blocks)
        chosen = device_map([self.blocks[index] for index in owned], [free_memory(device) for device in devices])
        if chosen is None:
            raise ModelError(
                f"the model's {len(owned)} shared blocks do not fit in what is free on {', '.join(map(str, devices))}; "
                "name more devices (server.device), quantise the blocks or have clients keep more of them"
            )
        with self._moving(", ".join(map(str, devices))):
            self.places = {index: devices[place] for index, place in zip(owned, chosen, strict=True)}
            for index, device in self.places.items():
                self.blocks[index].to(device)
            inside = {id(module) for module in self.blocks.modules()}
            for module in self.model.modules():
                if id(module) not in inside:
                    module._apply(lambda value: value.to(self.places[owned[0]]), recurse=False)
        return self

    def place_of(self, block: int | None) -> torch.device:
        """Where a block computes, or (``None``) all else."""
        first: torch.device = self.model.device
        return first if block is None else self.places.get(block, first)

    @contextmanager
    def _moving(self, where: str) -> Iterator[None]:
        """Whoever shares its tensors keeps them where they are; that memory runs out is one line."""
        try:
            if self.lent:
                self.model, self.lent = copy.deepcopy(self.model), False
            yield
        except (RuntimeError, MemoryError) as error:
            lacking = out_of_memory(error)
            if lacking is None:
                raise
            raise ModelError(f"the model does not fit on {where}: {lacking}") from error

    def placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch on the device of the model."""
        device = self.model.device
        return {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }

    @property
    def pretrained(self) -> dict[str, str | None]:
        """Which pretrained model it is of, as far as that is known: hashes of its configuration and of its weights."""
        return {"fingerprint": fingerprint(self.model.config), "weights": self.weights}

    @property
    def blocks(self) -> nn.ModuleList:
        """All L places of the model's blocks, owned or not."""
        blocks = self.model.get_submodule(self.anatomy.path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def autocast_name(self) -> str:
        """What matrix products compute in, in the words of ``model.autocast``."""
        return "off" if self.autocast is None else str(self.autocast).removeprefix("torch.")

    def plan(self, inputs: Mapping[str, Any]) -> tuple[Tensor, ExecutionPlan]:
        """Embed a batch: the hidden state (B, T, H) that enters block 0, and the plan of all blocks.

        Raises:
            ModelError: the model cannot be split exactly, or the batch asks for what only a whole model can give.
        """
        wanted = for_blocks(self.model, inputs, self.longest) | self.no_cache
        if self.part.ends:
            check_padding(self.model, inputs)
        wanted, inputs = self.placed(wanted), self.placed(inputs)
        with self.computing():
            hidden_BTH, plan = execution.record(self.model, self.blocks, wanted, self._tuples)
        self._tuples = plan.tuples
        if self.part.ends and self.compares:
            self._compare(hidden_BTH, plan, inputs)
        return hidden_BTH, plan

    def plan_without_inputs(
        self, hidden_BTH: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None = None
    ) -> ExecutionPlan:
        """The plan of a party that never sees the inputs: from the shape of what arrives and the attention mask.

        Raises:
            ModelError: the mask or the positions do not fit the hidden state.
        """
        batch, length = hidden_BTH.shape[:2]
        for name, value in (("attention mask", mask_BT), ("positions", positions_BT)):
            if value is not None and value.shape[-1] != length:
                raise ModelError(
                    f"the {name} has shape {tuple(value.shape)}, expected ({batch}, {length}) as the activation"
                )
        inputs: dict[str, Any] = {}
        if self.anatomy.image:
            for module in self.model.modules():
                if isinstance(module, ZeroPatches):
                    module.shape = tuple(hidden_BTH.shape)
            inputs["pixel_values"] = hidden_BTH.new_zeros(1)
        else:
            inputs["input_ids"] = torch.zeros(batch, length, dtype=torch.long, device=hidden_BTH.device)
        if mask_BT is not None:
            inputs["attention_mask"] = mask_BT
        if positions_BT is not None:
            inputs["position_ids"] = positions_BT
        # Dropout on the zeros draws random numbers, which are the client's in one process.
        with torch.no_grad(), undisturbed(hidden_BTH.device):
            return self.plan(inputs)[1]

    def _compare(self, hidden_BTH: Tensor, plan: ExecutionPlan, inputs: Mapping[str, Any]) -> None:
        """Make the plan as a server will, without any weights, and refuse the batch if it is another one.

        Some models (MPNet, DeBERTa) hand their blocks what they made of the token ids or of weights outside of the
        blocks: a server, which has neither, would compute something else. So it would with options of which it is not
        told. A plan depends on what a batch brings, so every batch is looked at.
        """
        name = type(self.model).__name__
        expected = f"(B, T, {self.anatomy.hidden})"
        if hidden_BTH.dim() != 3 or hidden_BTH.shape[-1] != self.anatomy.hidden:
            raise ModelError(
                f"{name} cannot be split: between its blocks goes {tuple(hidden_BTH.shape)}, not {expected}; "
                "use an architecture that `flexp verify --list` names"
            )
        try:
            server = self._as_server(hidden_BTH)
            other = server.plan_without_inputs(hidden_BTH, inputs.get("attention_mask"), inputs.get("position_ids"))
            problem = plan.difference(other)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if not problem:
            return
        further = [key for key in inputs if key not in USUAL | NOT_FOR_BLOCKS]
        if further:
            raise ModelError(
                f"{name}: this batch brings {', '.join(further)}, which blocks need and a server is not told "
                f"({problem}); leave it out"
            )
        raise ModelError(
            f"{name} cannot be split: its blocks need, besides the hidden state, what a server does not have, such "
            f"as token ids, a table of relative positions or something else of the block before ({problem}); use an "
            "architecture that `flexp verify --list` names"
        )

    def _as_server(self, hidden_BTH: Tensor) -> Stage:
        """The same model without blocks and ends, which costs no memory."""
        if self._server is None or next(self._server.model.parameters()).device != hidden_BTH.device:
            self._server = carve(self, Part(frozenset(), ends=False))
            # Some models ask their first parameter for its type: a server has blocks, so it has one.
            self._server.blocks[0].register_parameter("any", nn.Parameter(hidden_BTH.detach().new_zeros(0)))
        self._server.model.train(self.model.training)
        return self._server

    def run(
        self, hidden_BTH: Tensor, plan: ExecutionPlan, start: int, stop: int, draws: BlockDraws | None = None
    ) -> Tensor:
        """Run blocks [start, stop) on a hidden state (B, T, H); ``draws``: what each of them draws."""
        if self.autocast is not None and hidden_BTH.is_leaf and hidden_BTH.requires_grad:
            # A leaf's cast is kept and shared by all that read it, whose gradients would then be summed in bfloat16.
            hidden_BTH = hidden_BTH.view_as(hidden_BTH)
        with self.computing():
            return plan.replay(self.blocks, hidden_BTH, start, stop, self.places, draws)

    def finish(
        self, hidden_BTH: Tensor, inputs: Mapping[str, Any], plan: ExecutionPlan, *, headless: bool = False
    ) -> Any:
        """Final norm, head and, with labels, loss: the model's own output object, from the last hidden state.

        ``headless``: the output of the model under the head, from the final norm.
        """
        if not self.part.ends:
            raise ModelError("a stage without the ends of the model cannot compute its output")
        with self.computing():
            model = self.model.base_model if headless else self.model
            return execution.finish(model, self.blocks, hidden_BTH, self.placed(inputs) | self.no_cache, plan.tuples)

    def computing(self) -> AbstractContextManager[None]:
        """What the model computes in inside the ``with`` block: mixed precision, if :attr:`autocast` says so."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.autocast)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that this party trains, by their full names in the model."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters that are this party's own, by their full names: what it trains, and what it follows."""
        return {
            name: value for name, value in self.model.named_parameters() if value.requires_grad or name in self.followed
        }

    def follow(self, blocks: Iterable[int]) -> None:
        """Train nothing of these blocks from now on, into which somebody else's values are written; but all others of
        its own."""
        within, own = frozenset(blocks), self.own()
        self.followed = frozenset(name for name in own if self.block_of(name) in within)
        for name, value in own.items():
            value.requires_grad_(name not in self.followed)

    def take(self, other: Stage) -> None:
        """Own, from now on, the blocks of ``other``, a stage of the same model, which must not be used any more."""
        mine, theirs = self.blocks, other.blocks
        for index in other.part.blocks:
            mine[index] = theirs[index]
        self.part = Part(self.part.blocks | other.part.blocks, self.part.ends)

    def give_up(self, blocks: Iterable[int]) -> None:
        """Let go of some of its blocks."""
        self.part = Part(self.part.blocks - frozenset(blocks), self.part.ends)
        prune(self.model, self.anatomy, self.part)

    def block_of(self, name: str) -> int | None:
        """The index of the block that a parameter belongs to; ``None`` for the ends."""
        prefix = self.anatomy.path + "."
        return int(name[len(prefix) :].partition(".")[0]) if name.startswith(prefix) else None

    def within(self, name: str, start: int, stop: int) -> bool:
        """Whether a parameter belongs to one of the blocks [start, stop)."""
        block = self.block_of(name)
        return block is not None and start <= block < stop


def carve(source: Stage, part: Part) -> Stage:
    """Make another party's stage out of one that is in memory already, sharing every tensor with it.

    The new stage has modules of its own, so that it can be tuned (:mod:`flexp.models.tuning` gives it its own copy of
    what it trains); what stays frozen costs no memory.
    """
    missing = part.blocks - source.part.blocks
    if missing or (part.ends and not source.part.ends):
        raise ModelError(f"cannot carve blocks {sorted(missing)} out of a stage that does not hold them")
    shared: dict[int, Any] = {id(tensor): tensor for tensor in source.model.parameters()}
    shared |= {id(tensor): tensor for tensor in source.model.buffers()} | scales(source.model)
    for index, block in enumerate(source.blocks):
        if index not in part.blocks:  # not copied only to be taken out
            shared[id(block)] = Absent(index, block)
    model = copy.deepcopy(source.model, shared)
    prune(model, source.anatomy, part)
    if not part.ends:
        forget_ties(model)
    stage = Stage(model, source.anatomy, part)
    stage._tuples = source._tuples
    stage.lent = True
    stage.autocast = source.autocast
    stage.new = source.new
    stage.weights, stage.quantization = source.weights, source.quantization
    stage.compares = source.compares
    return stage


def forget_ties(model: nn.Module) -> None:
    """Let transformers not look for tied weights in a model whose ends are not there."""
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            vars(module)["all_tied_weights_keys"] = {}
