"""A client without its server: an answer at once, so that the client's own work is all there is to measure.

``python -m flexp.cost.echo PROBE`` is the process that :mod:`flexp.cost.probe` starts to measure a client's memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict
from importlib import import_module
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from flexp.client.exchange import Piece
from flexp.client.joined import OFF
from flexp.client.model import SplitModel
from flexp.client.personal import WholeModel
from flexp.client.pretrained import SPLIT_MODELS
from flexp.config import AlignConfig, ModelConfig, OptimizerConfig
from flexp.cost.probe import Measured, Probe
from flexp.errors import FlexpError
from flexp.kinds import KINDS
from flexp.links.asking import ExtendReply, ExtendRequest, FetchReply, FetchRequest, PullReply, PullRequest
from flexp.links.base import Meter, finished
from flexp.links.declaring import Request
from flexp.links.messages import (
    BackwardReply,
    BackwardRequest,
    Done,
    ForwardReply,
    ForwardRequest,
    Join,
    KeptForwardRequest,
    Welcome,
)
from flexp.machine import device_of, gpu_of
from flexp.models.anatomy import Part, block_count
from flexp.models.loading import load_config, load_stage
from flexp.models.stage import Stage
from flexp.models.stored import stored
from flexp.models.tuning import embedding_names, tune
from flexp.optim import Updater

R = TypeVar("R")


class EchoLink:
    """Answers at once with what it was sent, so that only the client's own work is measured.

    What it gives back is new memory each time, of the size that a server's answer has.
    """

    client = "probe"

    def __init__(self, blocks: int, hidden: int, base_depth: int) -> None:
        self.meter = Meter()
        self.residuals: dict[str, Tensor] = {}
        self._welcome = Welcome(base_depth, blocks, hidden)
        self._sent: dict[int, ForwardRequest | KeptForwardRequest] = {}
        self.shared: dict[str, Any] = {}  # the parameters that a pull answers with, by name

    def call(self, request: Request[R]) -> Future[R]:
        return finished(lambda: cast(R, self._answer(request)))

    def close(self) -> None:
        pass

    def _answer(self, request: Request[Any]) -> Any:
        match request:
            case Join():
                return self._welcome
            case ForwardRequest():
                self._sent[request.exchange] = request
                return ForwardReply(_rows(request), None if request.base_BTH is None else 0.0)
            case KeptForwardRequest():
                self._sent[request.exchange] = request
                read = request.mask_BT if request.rows_BT is None else request.rows_BT
                return ForwardReply(torch.zeros(1, int(read.sum()), self._welcome.hidden), kept=True)
            case BackwardRequest():
                sent = self._sent.pop(request.exchange)
                if isinstance(sent, KeptForwardRequest):
                    return BackwardReply()
                inner = tuple(value.clone() for value in sent.inner_BTH)
                return BackwardReply(sent.hidden_BTH.clone() if request.back else None, inner)
            case PullRequest():
                copies = {name: value.detach().clone() for name, value in self.shared.items()}
                return PullReply(len(copies), weights=copies)
            case ExtendRequest():
                return ExtendReply(request.hidden_BTH.clone())
            case FetchRequest():
                return FetchReply(0, 0)
        return Done()


def _rows(request: ForwardRequest) -> Tensor:
    """As many rows as were asked for."""
    if request.rows_BT is None:
        return request.hidden_BTH.clone()
    return request.hidden_BTH.flatten(0, 1)[: int(request.rows_BT.sum())].unsqueeze(0).clone()


class StartModel(nn.Module):
    """Embeddings and blocks [0, s) alone, of a client whose server computes the loss: z up, ∂loss/∂z down."""

    def __init__(self, stage: Stage, start: int) -> None:
        super().__init__()
        self.stage, self.start, self.model = stage, start, stage.model

    def forward(self, **batch: Any) -> Any:
        embedded_BTH, plan = self.stage.plan(batch)
        z_BTH = self.stage.run(embedded_BTH, plan, 0, self.start)
        return SimpleNamespace(loss=_Returned.apply(z_BTH))  # type: ignore[no-untyped-call]

    def after_step(self) -> None:
        pass


class _Returned(torch.autograd.Function):
    """Stands for the loss of an activation (B, T, H): its gradient is as large as what the server sends back."""

    @staticmethod
    def forward(ctx: Any, z_BTH: Tensor) -> Tensor:
        ctx.like = z_BTH.clone()  # what crossed; kept until the answer is here
        return z_BTH.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(ctx.like).add_(grad)


def without_tail(stage: Stage) -> Iterator[nn.Parameter]:
    """The parameters of a client that ends at its cut; what is behind its blocks is frozen, being the server's."""
    embeddings = embedding_names(stage)
    for name, value in stage.model.named_parameters():
        if stage.block_of(name) is None and name not in embeddings:
            value.requires_grad_(False)
        else:
            yield value


def client_model(probe: Probe, stage: Stage, link_type: type[EchoLink] = EchoLink) -> Any:
    """What the client of ``probe`` trains, of its tuned ``stage``: a whole model, or a split one on an echo."""
    if probe.cut is None:
        return WholeModel(stage)
    if not probe.tail:
        return StartModel(stage, probe.cut[0])
    start = probe.cut[0]
    base = start if probe.base_depth is None else probe.base_depth
    link = link_type(stage.anatomy.blocks, stage.anatomy.hidden, base)
    aligned = range(base, start)
    link.shared = {name: value for name, value in stage.trainable().items() if stage.block_of(name) in aligned}
    # Whatever comes every n-th step comes in these few, too.
    align = OFF if probe.align is None else AlignConfig(**{**probe.align, "every": 1})
    tuning = str(probe.model_config.get("tuning", "full"))
    options: dict[str, Any] = {"align": align, "tuning": tuning, "expose_embeddings": True, "rows": probe.rows}
    options |= {"cache": probe.cache, "pools": probe.pools, "gradients": probe.gradients}
    return SPLIT_MODELS[probe.kind](stage, probe.cut, link, **options)


def random_batch(probe: Probe, config: Any) -> dict[str, Any]:
    """A batch of random inputs and labels of the size that ``probe`` names."""
    generator = torch.Generator().manual_seed(0)
    head = KINDS[probe.kind]
    if head.images:
        size = getattr(config, "image_size", 224)
        pixels = torch.randn(probe.examples, getattr(config, "num_channels", 3), size, size, generator=generator)
        return {"pixel_values": pixels, **head.blank(probe.examples, None, config.num_labels)}
    shape = (probe.examples, probe.length)
    ids = torch.randint(1, getattr(config.get_text_config(), "vocab_size", 100), shape, generator=generator)
    labels = head.blank(probe.examples, ids, config.num_labels)
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long), **labels}


def _run(probe: Probe) -> Measured:
    """In the process of its own: load, train, read the kernel's figures."""
    torch.set_num_threads(1)
    config = ModelConfig(**probe.model_config)
    warm_up()
    peak = highest(device_of(config.device))
    part = None
    if probe.cut is not None:
        blocks = block_count(probe.model, load_config(probe.model))
        part = Part.client(probe.cut if probe.tail else (probe.cut[0], blocks), blocks)
    stage = load_stage(config.at(probe.model), cast(Any, probe.kind), part, labels=probe.labels, pad_token_id=0)
    tune(stage, config, ranks=dict(probe.ranks), frozen=probe.frozen)
    own = stage.model.parameters() if probe.tail else without_tail(stage)
    in_file = {id(value) for value in (*stored(stage.model), *stage.in_file)}
    for value in own:  # weights are mapped from their file: read them once, so that they count
        if id(value) not in in_file:
            value.detach().amax()  # a sum of packed numbers would make a copy of eight times their size
    loaded = peak()
    extra: list[Any] = [
        [value.detach().clone() for value in stage.trainable().values()] for _ in range(probe.extra_weights)
    ]
    model = client_model(probe, stage)
    updater = Updater(stage.trainable(), OptimizerConfig(**probe.optimizer))
    batch = random_batch(probe, stage.model.config)
    model.train(True)
    numbered = Piece(examples=tuple(range(probe.examples)))
    for step in range(probe.steps):
        with model.part_of_step(numbered) if isinstance(model, SplitModel) else nullcontext():
            model(**batch).loss.backward()
        updater.step()
        model.after_step()
        if step == 0:  # the first step makes the optimiser's state; the others have theirs by then as well
            state = updater.state().values()
            extra += [[value.clone() for value in state] for _ in range(probe.extra_optimizers)]
    return Measured(loaded, peak())


def highest(device: torch.device) -> Callable[[], int]:
    """What tells the most bytes that were in use since now, above what is now: the kernel's figure for this process, or
    on a GPU its allocator's."""
    gpu = gpu_of(device)
    if hasattr(gpu, "reset_peak_memory_stats"):
        before = gpu.memory_allocated(device)
        gpu.reset_peak_memory_stats(device)
        return lambda: int(gpu.max_memory_allocated(device)) - before
    before = resident("VmRSS")
    reset_peak()
    return lambda: max(0, resident("VmHWM") - before)


def warm_up() -> None:
    """Let torch allocate what it needs once whatever the model is, and transformers import what every model does."""
    for name in ("generation.utils", "masking_utils", "modeling_layers"):
        import_module(f"transformers.{name}")
    weight = torch.randn(64, 64, requires_grad=True)
    torch.autograd.backward((torch.randn(64, 64) @ weight).sum())
    torch.optim.AdamW([weight], fused=True).step()


def resident(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise FlexpError("the kernel does not tell this process's memory: /proc/self/status is needed")


def reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write("5")
    except OSError:  # then the peak of importing counts as well, if it was higher
        pass


def _main(arguments: Mapping[str, Any]) -> None:
    cut = arguments["cut"]
    probe = Probe(**{**arguments, "cut": tuple(cut) if cut is not None else None})
    print(json.dumps(asdict(_run(probe))))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
