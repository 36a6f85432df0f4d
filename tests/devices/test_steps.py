"""A step on another device: whatever makes a tensor on the CPU by itself fails here, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.client.exchange import Piece
from flexp.client.model import SPLIT_MODELS
from flexp.client.overlap import overlapped
from flexp.config import AlignConfig, CodecConfig, OptimizerConfig, ServerConfig
from flexp.links.messages import BackwardRequest, ForwardRequest
from flexp.models.anatomy import Part
from flexp.models.stage import Stage
from flexp.models.zoo import tiny_batch, tiny_model
from flexp.optim import Updater
from flexp.server import Server
from tests.devices.elsewhere import DEVICE, elsewhere
from tests.harness import World, party

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", 0)] if torch.cuda.is_available() else []
KL = AlignConfig(kind="kl", weight=0.5)


@pytest.fixture(params=[DEVICE, *GPUS], ids=str)
def there(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with elsewhere() if request.param == DEVICE else nullcontext():
        yield request.param


def whole(name: str, kind: str) -> Stage:
    """Attention is spelled out, since torch's own is another function on each device."""
    model = tiny_model(name, task=kind, attention="eager")  # type: ignore[arg-type]
    model.requires_grad_(False)
    return Stage.whole(model)


def trained(
    name: str,
    kind: str,
    client: torch.device,
    server: torch.device,
    *,
    align: AlignConfig = KL,
    tuning: str = "full",
    codec: CodecConfig | None = None,
    batch_on: torch.device = CPU,
    in_flight: int = 1,
    **config: Any,
) -> dict[str, Tensor]:
    """All that two steps of a client have made of both sides' weights, and what the model answers then."""
    source = whole(name, kind)
    shared = party(source, Part.server(1, 4), tuning).to(server)
    made = Server(shared, tuning=tuning, config=ServerConfig(**config), optimizer=OptimizerConfig(lr=1e-3))
    stage = party(source, Part.client((2, 4), source.anatomy.blocks), tuning).to(client)
    model = SPLIT_MODELS[kind](stage, (2, 4), made.connect("a"), align=align, tuning=tuning, codec=codec).train()
    updater = Updater(stage.trainable(), OptimizerConfig(lr=1e-3))
    padding = "none" if "image" in kind else "right"
    batches = [tiny_batch(source.model, padding=padding, seed=seed) for seed in range(3)]  # type: ignore[arg-type]
    moved = [{key: value.to(batch_on) for key, value in batch.items()} for batch in batches]
    for step in range(2):
        pieces = [(Piece(n + 1, in_flight, 1 / in_flight, 1 / in_flight), moved[step + n]) for n in range(in_flight)]
        if in_flight > 1:
            assert len(list(overlapped(model, pieces, in_flight, lambda _: None))) == in_flight
        else:
            model(**moved[step]).loss.backward()
        updater.step()
    model.after_step()
    model.train(False)
    with torch.no_grad():
        output = model(**moved[0])
    found = {"loss": output.loss} | {f"client/{key}": value for key, value in stage.own().items()}
    found |= {f"server/{key}": value for key, value in made.shared.updater.parameters.items()}
    return {key: value.detach().cpu() for key, value in found.items()}


WEIGHTS = AlignConfig(kind="weights", teach=True, follow=True)
EVERY_BLOCK = AlignConfig(kind="cosine", at="every-block", combine="project", normalize=True)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "causal-lm", {"align": AlignConfig(kind="kl", teach=True), "update": "mean", "mean_over": 2}),
    ("gpt2", "causal-lm", {"tuning": "lora", "align": EVERY_BLOCK, "memory": "recompute"}),
    ("bert", "sequence-classification", {"align": WEIGHTS, "codec": CodecConfig.all("int8-row", error_feedback=True)}),
    ("bert", "token-classification", {"in_flight": 2, "update": "trimmed", "mean_over": 3}),
    ("bert", "multi-label-classification", {}),
    ("bert", "regression", {"tuning": "lora"}),
    ("bert", "question-answering", {"codec": CodecConfig.all("bf16")}),
    ("vit", "image-classification", {}),
]
PLACES = [(True, True, False), (True, False, True), (False, True, False)]


@pytest.mark.parametrize(
    ("name", "kind", "options", "place"),
    [(*case, PLACES[number % len(PLACES)]) for number, case in enumerate(CASES)],
    ids=[kind for _, kind, _ in CASES],
)
def test_a_step_is_the_same_on_another_device(
    name: str, kind: str, options: dict[str, Any], place: tuple[bool, bool, bool], there: torch.device
) -> None:
    client, server, batch = (there if far else CPU for far in place)
    here = trained(name, kind, CPU, CPU, **options)
    far = trained(name, kind, client, server, batch_on=batch, **options)
    assert here.keys() == far.keys()
    for key, value in here.items():
        if there == DEVICE:
            assert torch.equal(value, far[key]), key
        else:
            torch.testing.assert_close(value, far[key], rtol=1e-3, atol=1e-4)


def requests(stage: Stage, number: int, *, base: bool) -> tuple[ForwardRequest, BackwardRequest]:
    """What comes over a network: tensors in main memory."""
    generator = torch.Generator().manual_seed(number)
    z_BTH, base_BTH, grad_BTH = (torch.randn(3, 10, stage.anatomy.hidden, generator=generator) for _ in range(3))
    mask_BT = torch.ones(3, 10, dtype=torch.long)
    forward = ForwardRequest(number, z_BTH, mask_BT, train=True, step=number)
    return replace(forward, base_BTH=base_BTH if base else None), BackwardRequest(number, 1e-3 * grad_BTH, step=number)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("align", [AlignConfig(kind="off"), AlignConfig(kind="kl", teach=True)], ids=["off", "taught"])
def test_a_server_waits_for_its_answers_alone(name: str, align: AlignConfig) -> None:
    """Of an exchange: h, and the gradient with the norms; with a term its value. transformers asks of a mask, before
    anything is computed, whether it leaves anything out."""
    kind = {"llama": "causal-lm", "bert": "sequence-classification"}[name]
    with elsewhere() as device:
        source = whole(name, kind)
        stage = party(source, Part.server(1, 4), "full").to(DEVICE)
        server = Server(stage, tuning="full", optimizer=OptimizerConfig(lr=1e-3, clip=1.0))
        World(source, server, "full", kind).join("a", (3, 4), align=align)
        for number in (1, 2):
            forward, backward = requests(source, number, base=align.teach)
            device.reads.clear()
            reply = server.answer("a", forward)
            asked = [read for read in device.reads if not read[1].startswith("models/")]
            plans, up = len(device.reads) - len(asked), forward.hidden_BTH.nbytes
            assert plans <= (2 if align.has_term else 1), device.reads
            assert [size for *_, size in asked] == ([up, 4] if align.has_term else [up]), asked
            assert reply.hidden_BTH.device == CPU
            device.reads.clear()
            reply = server.answer("a", backward)
            asked = [read for read in device.reads if not read[1].startswith("models/")]
            norms, gradient = (size for *_, size in sorted(asked, key=lambda read: read[2]))
            assert gradient == up, asked
            assert norms <= 4 * (1 + len(server.shared.updater.parameters)), asked
            assert reply.grad_BTH.device == CPU
