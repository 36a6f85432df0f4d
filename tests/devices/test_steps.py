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
from flexp.client.overlap import overlapped
from flexp.client.pretrained import SPLIT_MODELS
from flexp.config import AlignConfig, CodecConfig, OptimizerConfig, ServerConfig
from flexp.links.asking import ExtendReply, ExtendRequest
from flexp.links.messages import BackwardRequest, ForwardRequest
from flexp.models.anatomy import Part
from flexp.models.stage import Stage
from flexp.models.zoo import tiny_batch, tiny_model
from flexp.optim import Updater
from flexp.server import Server
from tests.devices.elsewhere import DEVICE, SECOND, elsewhere
from tests.harness import World, party

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", 0)] if torch.cuda.is_available() else []
KL = AlignConfig(kind="kl", weight=0.5)


@pytest.fixture(params=[DEVICE, *GPUS], ids=str)
def there(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with elsewhere() if request.param == DEVICE else nullcontext():
        yield request.param


@pytest.fixture
def several(there: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two devices, or one twice, for the blocks of a server."""
    monkeypatch.setattr("flexp.models.stage.device_of", torch.device)
    return [str(there), str(SECOND if there == DEVICE else there)]


def whole(name: str, kind: str) -> Stage:
    """Attention is spelled out, since torch's own is another function on each device."""
    model = tiny_model(name, task=kind, attention="eager")  # type: ignore[arg-type]
    model.requires_grad_(False)
    return Stage.whole(model)


def on(stage: Stage, place: torch.device | list[str]) -> Stage:
    """One device, or several by their names."""
    if not isinstance(place, list):
        return stage.to(place)
    assert len({*stage.spread(place).places.values()}) == len({*place})
    return stage


def trained(
    name: str,
    kind: str,
    client: torch.device,
    server: torch.device | list[str],
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
    shared = on(party(source, Part.server(1, 4), tuning), server)
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
PLACES = [(True, 2, False), (True, False, True), (False, True, False)]


@pytest.mark.parametrize(
    ("name", "kind", "options", "place"),
    [(*case, PLACES[number % len(PLACES)]) for number, case in enumerate(CASES)],
    ids=[kind for _, kind, _ in CASES],
)
def test_a_step_is_the_same_on_another_device(
    name: str,
    kind: str,
    options: dict[str, Any],
    place: tuple[bool, bool | int, bool],
    there: torch.device,
    several: list[str],
) -> None:
    client, server, batch = (several if far == 2 else there if far else CPU for far in place)
    here = trained(name, kind, CPU, CPU, **options)
    far = trained(name, kind, client, server, batch_on=batch, **options)
    assert here.keys() == far.keys()
    for key, value in here.items():
        if there == DEVICE:
            assert torch.equal(value, far[key]), key
        else:
            torch.testing.assert_close(value, far[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("together", [False, True])
def test_adapters_of_idle_clients_are_in_main_memory(
    together: bool, there: torch.device, several: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one idle client's stay on the device, beside those that compute. All train as on the CPU."""
    monkeypatch.setattr("flexp.server.state.RESIDENT", 1)
    monkeypatch.setattr("flexp.server.exchanges.waiting_thread", lambda: None)
    monkeypatch.setattr("flexp.server.together.Pace.most", lambda _, tokens, waiting, **__: waiting if together else 1)
    states = []
    for place in (CPU, several if together else there):
        source = whole("llama", "causal-lm")
        config = ServerConfig(adapters="own", joined=together)
        stage = on(party(source, Part.server(1, 2 + 2 * together), "lora"), place)
        server = Server(stage, tuning="lora", config=config, optimizer=OptimizerConfig(lr=1e-3))
        for name in "abc":
            World(source, server, "lora", "causal-lm").join(name, (1, 2 + 2 * together))
        for step in (1, 2):
            for part in range(2):
                answers: list[Any] = [
                    server.answer(name, requests(stage, 10 * step + ord(name), base=False)[part]) for name in "abc"
                ]
                while server.work() is not None:
                    pass
                assert not together or all(answer.done() for answer in answers)
        for name, far in zip("abc", (False, not together, True), strict=True):
            flat = server.own[name].state()
            kept = {value.device for key, value in flat.items() if "/" in key and key != "optimizer/steps"}
            assert kept == ({*stage.places.values()} or {place} if far else {CPU})
        server.load({key: value.cpu() for key, value in server.state().items()})
        states.append({key: value.cpu() for key, value in server.state().items() if key.startswith("own/")})
    assert states[0].keys() == states[1].keys()
    assert any("exp_avg/" in key for key in states[0])
    for key, value in states[0].items():
        if there == DEVICE:
            assert torch.equal(value, states[1][key]), key
        else:
            torch.testing.assert_close(value, states[1][key], rtol=1e-3, atol=1e-4)


def test_answers_are_written_on_another_device(there: torch.device, several: list[str]) -> None:
    """What comes over a network is in main memory, and so is what goes back."""
    found: list[list[Tensor]] = []
    for place in (CPU, there, several):
        source = whole("llama", "causal-lm")
        server = Server(on(party(source, Part.server(1, 4), "full"), place), tuning="full")
        World(source, server, "full", "causal-lm").join("a", (1, 4))
        z_BTH = requests(server.shared.stage, 1, base=False)[0].hidden_BTH
        asked = [ExtendRequest(1, 0, z_BTH[:, :6]), ExtendRequest(1, 6, z_BTH[:, 6:7], rows_B=torch.tensor([0, 2, 2]))]
        answers = [server.answer("a", request) for request in asked]
        assert all(isinstance(answer, ExtendReply) and answer.hidden_BTH.device == CPU for answer in answers)
        found.append([answer.hidden_BTH for answer in answers])  # type: ignore[union-attr]
    for far in found[1:]:
        for one, other in zip(found[0], far, strict=True):
            torch.testing.assert_close(one, other, **({"rtol": 0, "atol": 0} if there == DEVICE else {}))


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
