"""What a server refuses, in one line each, and that a refusal leaves everything as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.client.pretrained import SplitModelForCausalLM
from flexp.config import AlignConfig, LoraConfig, ModelConfig, ServerConfig
from flexp.errors import ConfigError, LinkError, StorageError
from flexp.links.asking import FetchRequest, PullRequest
from flexp.links.messages import Abort, BackwardRequest, ForwardRequest, Leave
from flexp.models.fingerprint import weights_fingerprint
from flexp.models.loading import load_stage
from flexp.models.stage import Stage
from flexp.models.zoo import tiny_batch, tiny_model
from flexp.server import Server
from tests.harness import World, equal, seeded, shared_weights, world

HIDDEN = 32


def forward(number: int = 1, *, train: bool = True, **changes: Any) -> ForwardRequest:
    hidden_BTH = torch.randn(2, 5, HIDDEN, generator=seeded(number))
    return replace(ForwardRequest(number, hidden_BTH, train=train), **changes)


def backward(number: int = 1, **changes: Any) -> BackwardRequest:
    return replace(BackwardRequest(number, torch.randn(2, 5, HIDDEN, generator=seeded(100 + number))), **changes)


@contextmanager
def refused(here: World, *words: str) -> Iterator[None]:
    """A LinkError of one line with all ``words``; nothing changes and nothing is held because of it."""
    shared = here.server.shared
    before, held, stashed = shared_weights(here.server), dict(shared._held), dict(shared.stashed)
    with pytest.raises(LinkError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert equal(shared_weights(here.server), before)
    assert (dict(shared._held), dict(shared.stashed)) == (held, stashed)


def joined(**options: Any) -> World:
    here = world(config=ServerConfig(**options))
    here.join("a", (1, 4))
    here.join("b", (2, 3))
    return here


def allocate(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_runs_out_is_one_line_and_graphs_are_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    here, alone = joined(), joined()
    for one in (here, alone):
        one.server.answer("a", forward(1))
    session = here.server._sessions["a"]
    kept = session.kept_bytes
    assert session.pending[1].output_BTH is not None
    with monkeypatch.context() as full:
        full.setattr(Stage, "run", allocate)
        with refused(here, "client b: the server's memory ran out at a ForwardRequest", "train.micro_batch"):
            here.server.answer("b", forward(1))
    assert not here.server._sessions["b"].pending
    assert session.pending[1].output_BTH is None
    assert 0 < session.kept_bytes < kept
    got, wanted = (one.server.answer("a", backward(1)) for one in (here, alone))
    assert torch.equal(got.grad_BTH, wanted.grad_BTH)  # its blocks ran again
    assert equal(shared_weights(here.server), shared_weights(alone.server))
    assert here.server.answer("b", forward(1))


@pytest.mark.parametrize("rule", ["every", "mean"])
def test_an_update_that_is_not_finished_ends_the_server(monkeypatch: pytest.MonkeyPatch, rule: Any) -> None:
    """What the optimiser has changed by then, nobody knows: no other step goes in, and nothing of it is saved."""
    here = joined(update=rule, mean_over=1)
    here.server.answer("a", forward(1))
    here.server.answer("b", forward(1))
    monkeypatch.setattr(torch.optim.AdamW, "step", allocate)
    broken = "an update of the shared blocks was not finished .OutOfMemoryError.*start the server again"
    with pytest.raises(LinkError, match=broken):
        here.server.answer("a", backward(1))
    monkeypatch.undo()
    assert all(value.grad is None for value in here.server.shared.updater.parameters.values())
    for client in ("a", "b"):
        with pytest.raises(LinkError, match=broken):
            here.server.answer(client, backward(1))
    with pytest.raises(StorageError, match=broken):
        here.server.shared.state()


def test_the_bounds_on_what_is_in_flight_say_so() -> None:
    here = joined(max_in_flight=2, max_in_flight_total=3)
    here.server.answer("a", forward(1))
    here.server.answer("a", forward(2))
    with refused(here, "client a", "2 exchanges are in flight", "server.max_in_flight", "model.abort()"):
        here.server.answer("a", forward(3))
    here.server.answer("b", forward(1))  # what a has left lying about is a's own trouble
    here.join("c", (1, 4))
    with refused(here, "client c", "3 exchanges of all clients", "server.max_in_flight_total"):
        here.server.answer("c", forward(1))
    here.server.answer("a", forward(3, train=False))  # evaluation keeps nothing, so it is never refused
    here.server.answer("b", backward(1))
    here.server.answer("b", forward(2))
    here.server.answer("a", Abort())
    here.server.answer("a", forward(1))
    here.server.answer("b", forward(3))
    with refused(here, "client z has not joined"):
        here.server.answer("z", Abort())


def test_a_step_says_how_many_exchanges_it_has_and_unfinished_ones_are_bounded() -> None:
    here = joined(max_in_flight=2)
    here.server.answer("a", forward(1))
    here.server.answer("a", backward(1, step=1, exchanges=3))
    here.server.answer("a", forward(2))
    with refused(here, "client a: step 1 has 2 exchanges now", "expected 3"):
        here.server.answer("a", backward(2, step=1, exchanges=2))
    here.server.answer("a", backward(2, step=2, exchanges=2))
    here.server.answer("a", forward(3))
    with refused(here, "client a: 2 steps are unfinished", "model.abort()"):
        here.server.answer("a", backward(3, step=3, exchanges=2))
    here.server.answer("a", backward(3, step=2, exchanges=2))
    assert here.server.shared.version == 1


def test_a_step_may_say_of_each_exchange_that_one_more_will_come() -> None:
    """As of a loop whose groups end when it says so: 2, 3, and the third is the last."""
    here, plain = joined(), joined()
    for number, exchanges in ((1, 2), (2, 3), (3, 3)):
        assert here.server.shared.version == 0
        here.server.answer("a", forward(number))
        here.server.answer("a", backward(number, step=1, exchanges=exchanges))
        plain.server.answer("a", forward(number))
        plain.server.answer("a", backward(number, step=1, exchanges=3))
    assert here.server.shared.version == 1
    assert equal(shared_weights(here.server), shared_weights(plain.server))


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (2, 1, 4, 3), (3, 1, 2, 4), (4, 3, 2, 1)])
def test_exchanges_of_a_step_may_arrive_in_any_order(order: tuple[int, ...]) -> None:
    """Steps of exchanges {1, 2} and {3, 4}: each is one update by its own exchanges, when the last of them is there."""

    def run(arrivals: tuple[int, ...]) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
        here, seen = joined(), []
        here.server.shared.add = lambda gradients, *_, **__: seen.append(dict(gradients)) or True  # type: ignore[method-assign]
        for number in (1, 2, 3, 4):
            here.server.answer("a", forward(number))
        counts = []
        for number in arrivals:
            here.server.answer("a", backward(number, step=(number + 1) // 2, exchanges=2))
            counts.append(len(seen))
        return counts, seen

    counts, steps = run(order)
    _, expected = run((1, 2, 3, 4))
    halves = [(number + 1) // 2 for number in order]
    assert counts == [sum(halves[:k].count(step) == 2 for step in (1, 2)) for k in (1, 2, 3, 4)]
    if counts != [0, 1, 1, 2] or halves[0] == 2:
        steps.sort(key=lambda step: not equal(step, expected[0]))
    assert all(equal(left, right) for left, right in zip(steps, expected, strict=True))


def test_who_never_joined_is_unknown() -> None:
    here = joined()
    for request in (forward(), backward(), PullRequest(1, 2), FetchRequest(1)):
        with refused(here, "client z has not joined"):
            here.server.answer("z", request)
    here.server.answer("z", Leave())  # as often as one likes
    here.server.answer("a", Leave())
    with refused(here, "client a has not joined"):
        here.server.answer("a", forward())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client": "b"}, ["names another client, b"]),
        ({"fingerprint": "0" * 16}, ["another one than the server's", "same pretrained model"]),
        ({"weights": "0" * 16}, ["pretrained weights", "00)", "unknown"]),
        ({"dtype": "torch.bfloat16"}, ["torch.bfloat16", "torch.float32", "model.dtype"]),
        ({"autocast": "bfloat16"}, ["autocast = bfloat16", "the server with off", "model.autocast"]),
        ({"cut": (0, 4)}, ["cut (0, 4)", "[1, 3)"]),
        ({"cut": (1, 4)}, ["cut (1, 4)", "[1, 3)"]),
        ({"cut": (2, 2)}, ["cut (2, 2)"]),
        ({"cut": (3, 1)}, ["cut (3, 1)"]),
        ({"align": AlignConfig(kind="weights"), "tuning": "lora"}, ["same tuning", "lora", "full"]),
    ],
)
def test_joining_with_another_model_or_cut(changes: dict[str, Any], words: list[str]) -> None:
    here = world(end=3)
    with refused(here, "client a was refused", *words):
        here.join("a", (2, 3), **changes)
    with refused(here, "has not joined"):
        here.server.answer("a", forward())


def test_two_models_of_one_configuration_and_other_weights_are_told_apart(tmp_path: Path) -> None:
    """The ends, and the number of files, do not matter; every block does, and so does a file that changed."""
    one = tiny_model("llama", seed=0)
    one.save_pretrained(tmp_path / "one")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "two")
    with torch.no_grad():
        one.get_input_embeddings().weight.add_(1.0)
    one.save_pretrained(tmp_path / "ends", max_shard_size="20KB")
    assert len(list((tmp_path / "ends").glob("*.safetensors"))) > 1
    with torch.no_grad():
        one.get_parameter("model.layers.2.mlp.up_proj.weight")[-1, -1] += 1.0
    one.save_pretrained(tmp_path / "block")
    server = Server.from_pretrained(tmp_path / "one")
    for name, same in (("one", True), ("two", False), ("ends", True), ("block", False)):
        with nullcontext() if same else pytest.raises(LinkError, match="client a was refused: its pretrained weights"):
            SplitModelForCausalLM.from_pretrained(tmp_path / name, cut=(1, 3), link=server.connect("a"))
    assert weights_fingerprint("arch:llama") is None


def test_adapters_are_agreed_upon() -> None:
    server = Server.from_pretrained("arch:llama", tuning="lora", lora=LoraConfig(rank=2))
    options: dict[str, Any] = {"cut": (1, 3), "link": server.connect("a"), "tuning": "lora"}
    with pytest.raises(LinkError, match=r"LoRA settings \(.*rank=4.*rank=2.*same model\.lora"):
        SplitModelForCausalLM.from_pretrained("arch:llama", lora=LoraConfig(rank=4), **options)
    SplitModelForCausalLM.from_pretrained("arch:llama", lora=LoraConfig(rank=2), **options)


@pytest.mark.parametrize("own", ["full", "lora"])
def test_tuning_is_agreed_upon(own: str) -> None:
    """Whatever the server does with its own blocks: its clients' is the model's."""
    other = {"full": "lora", "lora": "full"}[own]
    for config in (None, ServerConfig(tuning=other)):  # type: ignore[arg-type]
        server = Server.from_pretrained("arch:llama", tuning=own, config=config)
        link = server.connect("a")
        SplitModelForCausalLM.from_pretrained("arch:llama", cut=(1, 3), link=link, tuning=own)
        said = rf"its tuning is {other}, that of this server's clients {own}; set the same model\.tuning"
        with pytest.raises(LinkError, match=said):
            SplitModelForCausalLM.from_pretrained("arch:llama", cut=(1, 3), link=link, tuning=other)


def test_the_list_is_a_list_and_what_is_over_is_not_trained() -> None:
    here = world("llama")
    here.server.only = ["a", "b"]
    with pytest.raises(LinkError, match=r"client c takes no part in this run: it has a, b \(deployment.clients\)"):
        here.client("c", (2, 4))
    model = here.client("a", (2, 4), numbering=7)
    before = shared_weights(here.server)
    here.server.sealed = True
    with pytest.raises(LinkError, match="client a: the run is over, and this server trains no more"):
        model(**here.batch())
    assert equal(shared_weights(here.server), before)
    assert model.eval()(**here.batch()).logits.isfinite().all()


def test_mixed_precision_is_agreed_upon() -> None:
    """Who says it on both sides has it on both; the activations that cross stay in float32."""
    options: dict[str, Any] = {"cut": (1, 3), "seed": 0}
    outputs = []
    for here, there in (("off", "off"), ("bfloat16", "bfloat16"), ("off", "bfloat16"), ("bfloat16", "off")):
        server = Server.from_pretrained("arch:llama", autocast=there)
        options |= {"link": server.connect("a"), "autocast": here}
        if here != there:
            with pytest.raises(LinkError, match=f"autocast = {here}, the server with {there}; set the same model.auto"):
                SplitModelForCausalLM.from_pretrained("arch:llama", **options)
            continue
        model = SplitModelForCausalLM.from_pretrained("arch:llama", **options).eval()
        batch = tiny_batch(model.stage.model)
        batch.pop("labels")
        whole = load_stage(ModelConfig.of("arch:llama", autocast=here), "causal-lm")
        with torch.no_grad(), whole.computing():
            expected = whole.model.eval()(**batch).logits
        got = model(**batch).logits.detach()
        assert torch.equal(got, expected)
        outputs.append(got.float())
    assert 1e-5 < (outputs[0] - outputs[1]).abs().max().item() < 0.1
    with pytest.raises(ConfigError, match=r"autocast = 'float16' is not allowed: expected 'off' or 'bfloat16'"):
        Server.from_pretrained("arch:llama", autocast="float16")


def test_a_refused_change_of_the_cut_leaves_the_session_as_it_was() -> None:
    here = joined()
    here.server.answer("a", forward(1))
    with refused(here, "cut (0, 9)"):
        here.join("a", (0, 9))
    here.server.answer("a", backward(1))


def test_models_of_other_weights_names_or_labels_are_the_same_model_others_are_not() -> None:
    here, other = world("bert"), world("gpt2", "sequence-classification")
    with refused(other, "another one than the server's"):
        other.join("a", (1, 4), fingerprint=here.card("a", (1, 4))["fingerprint"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_BTH": torch.zeros(2, 5, HIDDEN + 1)}, ["(2, 5, 33)", "(B, T, 32)"]),
        ({"hidden_BTH": torch.zeros(5, HIDDEN)}, ["(5, 32)", "(B, T, 32)"]),
        ({"hidden_BTH": torch.zeros(2, 5, HIDDEN, dtype=torch.float64)}, ["torch.float64", "torch.float32"]),
        ({"hidden_BTH": torch.zeros(2, 5, HIDDEN, dtype=torch.bfloat16)}, ["torch.bfloat16", "torch.float32"]),
        ({"mask_BT": torch.ones(2, 6)}, ["mask has shape (2, 6)", "(2, 5)"]),
        ({"mask_BT": torch.ones(1, 5)}, ["mask has shape (1, 5)", "(2, 5)"]),
        ({"mask_BT": torch.ones(3, 5)}, ["mask has shape (3, 5)", "(2, 5)"]),
        ({"mask_BT": torch.ones(2, 1, 5, 5)}, ["mask has shape (2, 1, 5, 5)"]),
        ({"positions_BT": torch.ones(5)}, ["positions has shape (5,)"]),
        ({"base_BTH": torch.zeros(2, 5, HIDDEN)}, ["came for alignment", "expected 0", "'off'"]),
        ({"inner_BTH": (torch.zeros(2, 5, HIDDEN),)}, ["came for alignment", "expected 0"]),
    ],
)
def test_forwards_that_do_not_fit(changes: dict[str, Any], words: list[str]) -> None:
    here = joined()
    with refused(here, "client b", *words):
        here.server.answer("b", forward(**changes))
    here.server.answer("b", forward())


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 4), (3, 4), (2, 2), (2, 1)])
def test_only_the_weights_of_ones_aligned_blocks_are_handed_out(start: int, stop: int) -> None:
    here = world()
    here.join("a", (3, 4))
    with refused(here, f"client a: the weights of blocks [{start}, {stop})", "[1, 3)"):
        here.server.answer("a", PullRequest(start, stop))
    weights = here.server.answer("a", PullRequest(2, 3)).weights
    assert {here.whole.block_of(name) for name in weights} == {2}


@pytest.mark.parametrize(
    ("align", "base", "inner", "words"),
    [
        (AlignConfig(kind="kl"), (2, 5, HIDDEN), 1, ["2 activations", "expected 1"]),
        (AlignConfig(kind="kl"), (2, 4, HIDDEN), 0, ["(2, 4, 32)", "(2, 5, 32)"]),
        (AlignConfig(kind="kl", at="every-block"), (2, 5, HIDDEN), 0, ["1 activations", "expected 2", "2 aligned"]),
        (AlignConfig(kind="kl", at="every-block"), None, 1, ["1 activations", "expected 2"]),
        (AlignConfig(kind="weights"), (2, 5, HIDDEN), 0, ["expected 0", "'weights'"]),
        (AlignConfig(kind="kl", weight=0.0), (2, 5, HIDDEN), 0, ["1 activations", "expected 0"]),
        (AlignConfig(kind="off", at="every-block", teach=True), (2, 5, HIDDEN), 1, ["2 activations", "expected 1"]),
    ],
)
def test_alignment_that_was_not_agreed(align: AlignConfig, base: Any, inner: int, words: list[str]) -> None:
    here = world()
    here.join("a", (3, 4), align=align)
    given = torch.zeros(base) if base else None
    with refused(here, "client a", *words):
        here.server.answer("a", forward(base_BTH=given, inner_BTH=(torch.zeros(2, 5, HIDDEN),) * inner))


def test_an_aligned_activation_of_another_type() -> None:
    here = world()
    here.join("a", (2, 4), align=AlignConfig(kind="mse"))
    with refused(here, "torch.float64", "torch.float32"):
        here.server.answer("a", forward(base_BTH=torch.zeros(2, 5, HIDDEN, dtype=torch.float64)))


def test_an_exchange_is_forwarded_once_and_backwarded_once() -> None:
    here = joined()
    with refused(here, "client a", "exchange 1 has no forward in flight", "none"):
        here.server.answer("a", backward(1))
    here.server.answer("a", forward(1))
    with refused(here, "exchange 1 is in flight already"):
        here.server.answer("a", forward(1))
    with refused(here, "exchange 2 has no forward in flight", "[1]"):
        here.server.answer("a", backward(2))
    here.server.answer("a", backward(1))
    with refused(here, "exchange 1 has no forward in flight"):
        here.server.answer("a", backward(1))


def test_nobody_can_answer_for_another() -> None:
    here = joined()
    here.server.answer("a", forward(1))
    with refused(here, "client b", "exchange 1 has no forward in flight", "none"):
        here.server.answer("b", backward(1))
    here.server.answer("b", forward(1, hidden_BTH=torch.ones(2, 5, HIDDEN)))
    assert not torch.equal(here.server.answer("a", backward(1)).grad_BTH, here.server.answer("b", backward(1)).grad_BTH)


def test_evaluation_keeps_nothing_for_a_backward() -> None:
    here = joined()
    here.server.answer("a", forward(1, train=False))
    assert not here.server.shared._held
    with refused(here, "exchange 1 has no forward in flight"):
        here.server.answer("a", backward(1))


def test_a_model_in_evaluation_mode_says_so_when_it_is_trained() -> None:
    here = world()
    model = here.client("a", (2, 4)).eval()
    with pytest.raises(LinkError, match=r"call model\.train"):
        model(**here.batch()).loss.backward()


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite(bad: float, memory: str) -> None:
    here = joined(memory=memory)
    here.server.answer("a", forward(1))
    here.server.answer("a", backward(1, step=1, exchanges=2))
    here.server.answer("a", forward(2))
    gradient = backward(2).grad_BTH.clone()
    gradient[0, 0, 0] = bad
    shared = here.server.shared
    before = shared_weights(here.server)
    with pytest.raises(LinkError, match=r"client a: the gradient of exchange 2 is not finite.*were not updated"):
        here.server.answer("a", backward(2, grad_BTH=gradient, step=1, exchanges=2))
    assert equal(shared_weights(here.server), before)
    assert not shared._held
    assert shared.version == 0
    # The whole step is void: the next one is as if it had never begun.
    other = joined(memory=memory)
    for server in (here.server, other.server):
        server.answer("a", forward(3))
        server.answer("a", backward(3))
    assert equal(shared_weights(here.server), shared_weights(other.server))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grad_BTH": torch.zeros(2, 4, HIDDEN)}, ["(2, 4, 32)", "(2, 5, 32)"]),
        ({"grad_BTH": torch.zeros(2, 5, HIDDEN, dtype=torch.float64)}, ["torch.float64", "torch.float32"]),
        ({"tokens": 0.0}, ["tokens = 0.0", "0 < tokens <= 1"]),
        ({"tokens": 1.5}, ["tokens = 1.5"]),
        ({"tokens": math.nan}, ["tokens = nan"]),
        ({"exchanges": 0}, ["has 0 exchanges", "at least 1"]),
        ({"weight": 0.0}, ["weight = 0.0"]),
        ({"weight": -3.0}, ["weight = -3.0"]),
        ({"weight": math.inf}, ["weight = inf"]),
    ],
)
def test_backwards_that_do_not_fit_may_be_sent_again(changes: dict[str, Any], words: list[str]) -> None:
    here = joined()
    here.server.answer("a", forward(1))
    with refused(here, "client a", *words):
        here.server.answer("a", backward(1, **changes))
    here.server.answer("a", backward(1))
    assert here.server.shared.version == 1


def test_the_client_is_told_through_its_link() -> None:
    """Refusals arrive from futures, and a split model raises them in the user's own line."""
    here = world(config=ServerConfig(max_in_flight_total=1))
    a, b = here.client("a", (2, 4)), here.client("b", (3, 4))
    waiting = a(**here.batch()).loss
    future = b.link.call(forward(99, hidden_BTH=torch.zeros(1, 2, HIDDEN)))
    assert isinstance(future.exception(), LinkError)
    with pytest.raises(LinkError, match="max_in_flight_total"):
        b(**here.batch())
    waiting.backward()
    b(**here.batch()).loss.backward()


def test_a_cut_outside_of_the_model_never_reaches_the_server() -> None:
    here = world()
    for cut in ((2, 9), (3, 3), (-1, 2)):
        with pytest.raises((ConfigError, LinkError)):
            here.client("a", cut)
    assert not here.server._sessions


def test_the_callers_modes_stay_outside() -> None:
    """Mixed precision, inference mode or a backward around an in-process call change nothing on the server."""
    plain, moded = joined(memory="recompute"), joined(memory="recompute")
    expected = plain.server.answer("a", forward(1)).hidden_BTH
    grad = plain.server.answer("a", backward(1)).grad_BTH
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moded.server.answer("a", forward(1)).hidden_BTH, expected)
    with torch.no_grad():
        assert torch.equal(moded.server.answer("a", backward(1)).grad_BTH, grad)
    assert equal(shared_weights(plain.server), shared_weights(moded.server))
    with torch.inference_mode():
        answer = moded.server.answer("a", forward(2, train=False)).hidden_BTH
    assert torch.equal(answer, plain.server.answer("a", forward(2, train=False)).hidden_BTH)
