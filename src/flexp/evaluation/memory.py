"""The peak memory of a client, measured in a process of its own and never guessed.

The process loads what a client of one cut owns, trains it for a few steps on random inputs of the size of its largest
batch, with a link that answers at once, and reads the highest resident memory that the kernel saw: above what Python
and its libraries take before any model is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from flexp.errors import FlexpError


@dataclass(frozen=True)
class Probe:
    """What to measure. ``cut`` = ``None`` is a client that holds the whole model.

    ``examples`` and ``length`` are those of the largest exchange (images: ``length`` is not used), ``tuning`` and the
    like as in the run. ``align`` is the run's alignment (``None``: off) and ``base_depth`` its s_min (``None``: s):
    with alignment a client also keeps what it sends from there, and holds the weights that it pulls.
    """

    model: str
    kind: str
    cut: tuple[int, int] | None
    examples: int
    length: int
    labels: list[str] | None
    model_config: dict[str, Any]
    optimizer: dict[str, Any]
    steps: int = 3
    align: dict[str, Any] | None = None
    base_depth: int | None = None


@dataclass(frozen=True)
class Measured:
    """In bytes above the interpreter's own: ``loaded`` at the highest while loading and reading every weight once,
    ``peak`` at the highest in all."""

    loaded: int
    peak: int


def measure(probe: Probe, timeout: float = 600.0) -> Measured:
    """Run ``probe`` in a process of its own.

    Raises:
        FlexpError: the process failed; the message holds its last line.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    # One arena, and large blocks given back at once: otherwise the allocator's habits are measured as well.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flexp.evaluation.memory", json.dumps(asdict(probe))],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FlexpError(f"measuring the client's memory took more than {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise FlexpError(f"measuring the client's memory failed: {lines[-1]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


class EchoLink:
    """Answers at once with what it was sent, so that only the client's own work is measured.

    What it gives back is new memory each time, of the size that a server's answer has.
    """

    client = "probe"

    def __init__(self, blocks: int, hidden: int, base_depth: int) -> None:
        from flexp.links.base import Meter
        from flexp.links.messages import Welcome

        self.meter = Meter()
        self._welcome = Welcome(base_depth, blocks, hidden)
        self._inner: dict[int, tuple[Any, ...]] = {}
        self.shared: dict[str, Any] = {}  # the parameters that a pull answers with, by name

    def join(self, request: Any) -> Any:
        return self._welcome

    def forward(self, request: Any) -> Future[Any]:
        from flexp.links.messages import ForwardReply

        self._inner[request.exchange] = request.inner_BTH
        return _done(ForwardReply(request.hidden_BTH.clone(), None if request.base_BTH is None else 0.0))

    def backward(self, request: Any) -> Future[Any]:
        from flexp.links.messages import BackwardReply

        inner = tuple(value.clone() for value in self._inner.pop(request.exchange, ()))
        return _done(BackwardReply(request.grad_BTH.clone(), inner))

    def pull(self, request: Any) -> Future[Any]:
        from flexp.links.messages import PullReply

        return _done(PullReply({name: value.detach().clone() for name, value in self.shared.items()}))

    def abort(self, request: Any) -> None:
        pass

    def close(self) -> None:
        pass


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _run(probe: Probe) -> Measured:
    """In the process of its own: load, train, read the kernel's figures."""
    import torch

    from flexp.config import ModelConfig, OptimizerConfig
    from flexp.models.loading import load_stage
    from flexp.models.parts import Part
    from flexp.models.tuning import tune
    from flexp.optim import Updater

    torch.set_num_threads(1)
    config = ModelConfig(**probe.model_config)
    _warm_up()
    before = _resident("VmRSS")
    _reset_peak()
    part = None
    if probe.cut is not None:
        from flexp.models.loading import load_config

        blocks = int(load_config(probe.model).get_text_config().num_hidden_layers)
        part = Part.client(probe.cut, blocks)
    stage = load_stage(
        probe.model,
        probe.kind,  # type: ignore[arg-type]
        part,
        labels=probe.labels,
        dtype=config.dtype,
        attention=config.attention,
        autocast=config.autocast,
        pad_token_id=0,
    )
    tune(
        stage,
        config.tuning,
        lora=config.lora,
        embeddings=config.train_embeddings,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    for value in stage.model.parameters():  # weights are mapped from their file: read them once, so that they count
        value.detach().sum()
    loaded = _resident("VmHWM") - before
    model = client_model(probe, stage)
    updater = Updater(stage.trainable(), OptimizerConfig(**probe.optimizer))
    batch = random_batch(probe, stage.model.config)
    model.train(True)
    for _ in range(probe.steps):
        model(**batch).loss.backward()
        updater.step()
        model.after_step()
    return Measured(loaded=max(0, loaded), peak=max(0, _resident("VmHWM") - before))


def client_model(probe: Probe, stage: Any) -> Any:
    """What the client of ``probe`` trains, of its tuned ``stage``: a whole model, or a split one on an echo."""
    from flexp.client.model import OFF, SPLIT_MODELS
    from flexp.client.whole import WholeModel
    from flexp.config import AlignConfig

    if probe.cut is None:
        return WholeModel(stage)
    start = probe.cut[0]
    base = start if probe.base_depth is None else probe.base_depth
    link = EchoLink(stage.anatomy.blocks, stage.anatomy.hidden, base)
    aligned = range(base, start)
    link.shared = {name: value for name, value in stage.trainable().items() if stage.block_of(name) in aligned}
    align = OFF if probe.align is None else AlignConfig(**probe.align)
    tuning = str(probe.model_config.get("tuning", "full"))
    return SPLIT_MODELS[probe.kind](stage, probe.cut, link, align=align, tuning=tuning, expose_embeddings=True)


def random_batch(probe: Probe, config: Any) -> dict[str, Any]:
    """A batch of random inputs and labels of the size that ``probe`` names."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if probe.kind == "image-classification":
        size = getattr(config, "image_size", 224)
        pixels = torch.randn(probe.examples, getattr(config, "num_channels", 3), size, size, generator=generator)
        return {"pixel_values": pixels, "labels": torch.zeros(probe.examples, dtype=torch.long)}
    shape = (probe.examples, probe.length)
    ids = torch.randint(1, config.get_text_config().vocab_size, shape, generator=generator)
    labels = torch.zeros(probe.examples, dtype=torch.long) if probe.kind == "sequence-classification" else ids
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long), "labels": labels}


def _warm_up() -> None:
    """Let torch allocate what it needs once whatever the model is."""
    import torch

    weight = torch.randn(64, 64, requires_grad=True)
    torch.autograd.backward((torch.randn(64, 64) @ weight).sum())
    torch.optim.AdamW([weight], fused=True).step()


def _resident(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise FlexpError("the kernel does not tell this process's memory: /proc/self/status is needed")


def _reset_peak() -> None:
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
