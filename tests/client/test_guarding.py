"""A head is taught before anything leaves, tells less then, and its run goes on bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import mannwhitneyu

from flexp.attacks.decoder import STATE, Decoder
from flexp.attacks.public import known_to_all
from flexp.client import checking, guarding
from flexp.client.guarding import Guard
from flexp.client.meeting import FIRST
from flexp.client.noise import Noise, epsilon
from flexp.client.penalties import Adversary, distance_correlation
from flexp.client.random_labels import RandomLabels, epsilon_within
from flexp.config import PrivacyConfig, RunConfig
from flexp.config.loading import validate
from flexp.cost.choice import Choice
from flexp.errors import ConfigError, DataError, PrivacyError
from flexp.gaussian import DELTA, drawn, key_as_tensor, key_of
from flexp.gaussian import epsilon as gaussian
from flexp.links.messages import BackwardRequest, ForwardRequest
from flexp.links.opening import loopback
from flexp.methods import World
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.methods.parties import own_stage
from flexp.models.anatomy import Part
from flexp.models.loading import load_processor, load_stage
from flexp.planner.fleet import TaskShape
from flexp.run import defending
from flexp.run.public_texts import Reader, Texts, words
from flexp.run.runner import run
from flexp.run.settle import build_world, model_folder, settle
from tests import tiny
from tests.harness import seeded


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder for models this small."""
    monkeypatch.setattr(Decoder, "width", 32)
    monkeypatch.setattr(guarding, "FIRST", 20)
    monkeypatch.setattr(guarding, "LATER", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("guarding")
    tiny.bert_folder(place / "model", dropout=True)
    (place / "public.txt").write_text("good bad fine poor and many other words that people use\n" * 4)
    return place


def config(folder: Path, privacy: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    told = {"penalty": "nopeek", "public": str(folder / "public.txt"), "warm_up": {"steps": 3}} | (privacy or {})
    base: dict[str, Any] = {"data": {"clients": tiny.each(cut=[[2, 4]])}, "method": {"align": {"kind": "off"}}}
    if "model" in changes:
        changes["model"] = {"id": str(folder / "model"), **changes["model"]}
    return tiny.config(folder, **{"privacy": told, "train": {"rounds": 2, "steps_per_round": 2}, **base, **changes})


def test_distance_correlation_is_that_of_its_definition() -> None:
    left, right = torch.randn(7, 3, generator=seeded(0)), torch.randn(7, 5, generator=seeded(1))

    def centred(rows: Any) -> Any:
        far = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
        return far - far.mean(0) - far.mean(1)[:, None] + far.mean()

    a, b = centred(left.double().numpy()), centred(right.double().numpy())
    expected = (a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean())
    assert float(distance_correlation(left, right)) == pytest.approx(expected, rel=1e-3)
    turned = torch.linalg.qr(torch.randn(3, 3, generator=seeded(2))).Q
    assert float(distance_correlation(left, 3 * left @ turned + 1)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("told", "least", "most"), [(True, 0.8, 1.0), (False, 0.0, 0.5)])
def test_an_adversary_finds_what_is_there_and_takes_a_step_back(told: bool, least: float, most: float) -> None:
    lifted = torch.randn(8, 16, generator=seeded(0))

    def drawn(number: int) -> tuple[Any, Any]:
        e_NE = torch.randn(64, 8, generator=seeded(number))
        return (e_NE @ lifted if told else torch.randn(64, 16, generator=seeded(-number))), e_NE

    adversary, fresh = Adversary(0), Adversary(0)
    for number in range(1, 40):
        value = float(adversary.value(*drawn(number)))
    assert least <= value <= most
    fresh.load({name: tensor.clone() for name, tensor in adversary.state().items()})
    first, second = [float(adversary.value(*drawn(99), (7, number))) for number in (1, 2)]
    assert float(fresh.value(*drawn(99), (7, 1))) == first
    assert [float(adversary.value(*drawn(99), (7, number))) for number in (1, 2)] == [first, second]  # done again
    assert float(adversary.value(*drawn(99), (8, 1))) != first
    z_NH, e_NE = drawn(100)
    adversary.value(z_NH.requires_grad_(), e_NE).backward()
    assert bool(z_NH.grad.any())


def test_an_adversary_s_first_weights_disturb_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator's neither, which a resumed run, that makes the network anew, would draw from differently."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("accelerators are seeded"))
    before = torch.get_rng_state()
    adversary = Adversary(7)
    adversary.value(torch.ones(4, 16), torch.eye(4, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("tuning", "penalty"), [("full", "nopeek"), ("lora", "nopeek"), ("full", "adversary")])
def test_what_a_taught_head_sends_depends_less_on_its_tokens(folder: Path, tuning: str, penalty: str) -> None:
    world = build_world(config(folder, model={"tuning": tuning}))
    tokenizer = load_processor(model_folder(world.config), images=False)
    examples = world.federation.clients[0].train
    stage = own_stage(world, Part.client((2, 4), world.source.anatomy.blocks))

    def dependence() -> float:
        known = known_to_all(stage, 2, examples)
        return float(distance_correlation(known.sent.z_NH, known.embeddings[known.ids_N]))

    before = dependence()
    told = PrivacyConfig.model_validate(
        {"penalty": penalty, "public": str(folder / "public.txt"),
         "warm_up": {"steps": 20, "weight": 10.0, "lr": 1e-2}}
    )  # fmt: skip
    Guard(told, examples, tokenizer, 0).teach(stage, 2)
    assert dependence() < 0.8 * before


@pytest.mark.parametrize(("align", "says"), [("kl", True), ("weights", False), ("off", False)])
def test_a_run_says_that_alignment_sends_z_base(folder: Path, align: str, says: bool) -> None:
    cuts, off = tiny.each(cut=[[1, 4], [2, 4]]), {"penalty": "off"}
    world = build_world(config(folder, off, data={"clients": cuts}, method={"align": {"kind": align}}))
    assert any("z_base, the activation of depth 1" in note for note in world.federation.notes) is says


@contextmanager
def seen(method: FlexpSfl) -> Iterator[list[Any]]:
    """What reaches the server inside the ``with`` block."""
    requests, inner = [], method.server.answer

    def answer(client: str, request: Any) -> Any:
        requests.append(request)
        return inner(client, request)

    vars(method.server)["answer"] = answer
    yield requests
    del vars(method.server)["answer"]


def test_nobody_sends_z_base_unasked(folder: Path) -> None:
    """A configuration that says nothing of alignment, with cuts deeper than s_min; and so for a planned fleet."""
    said = tiny.content(folder, data={"clients": tiny.each(cut=[[1, 4], [2, 4]])})
    del said["method"]
    method = FlexpSfl(build_world(validate(said, "unasked")))
    with seen(method) as requests:
        for client in method.clients.values():
            client.step()
    forwards = [request for request in requests if isinstance(request, ForwardRequest)]
    assert len(forwards) == 3
    assert all(request.base_BTH is None and not request.inner_BTH for request in forwards)
    assert not TaskShape().aligned


@pytest.mark.parametrize("train", [True, False])
def test_nothing_leaves_where_the_bound_is_not_met(folder: Path, train: bool) -> None:
    world = build_world(config(folder, {"max_content_words": 0.0, "warm_up": {"steps": 1}}))
    method = FlexpSfl(world)
    client = method.clients["north"]
    with seen(method) as requests, pytest.raises(PrivacyError, match=r"nothing was sent\. Cut deeper \(now s = 2\)"):
        client.step() if train else client.personal(world.federation.task.collate(client.data.test[:2]))
    assert not any(isinstance(request, ForwardRequest) for request in requests)


def test_the_bound_is_looked_after_while_the_head_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step: a head that the task has made tell more is taught again, or sends nothing more."""
    told = {"max_content_words": 0.1, "warm_up": {"steps": 4, "check_every": 2}}
    ends = []
    for later in ([0.05], [0.9, 0.05], [0.9] * 9):  # what is read after the first two steps
        method, reads = FlexpSfl(build_world(config(folder, told))), iter([0.05, *later])
        monkeypatch.setattr(Guard, "_check", lambda *_, reads=reads: next(reads))
        client = method.clients["north"]
        for _ in range(2):
            client.step()
        with seen(method) as requests:
            if len(later) > 2:
                with pytest.raises(PrivacyError, match="nothing more was sent"):
                    client.step()
                assert not any(isinstance(request, ForwardRequest) for request in requests)
            else:
                client.step()
                assert next(reads, None) is None
                ends.append(next(request.hidden_BTH for request in requests if isinstance(request, ForwardRequest)))
    assert not torch.allclose(*ends)


@pytest.mark.parametrize(("penalty", "asked"), [("off", 3), ("nopeek", 9)])
def test_a_bound_that_quick_attacks_keep_is_broken_by_the_decoder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, penalty: str, asked: int
) -> None:
    """Nothing is sent; and where the quick attacks read more already, a warm-up goes on without asking the others."""
    reads = {"table": 0.3, "linear": 0.2, "decoder": 0.9}
    made: list[str] = []
    monkeypatch.setattr(checking, "content_read", lambda attack, *_: (made.append(attack.name), reads[attack.name])[1])
    told = {"penalty": penalty, "max_content_words": 0.5, "warm_up": {"steps": 3, "check_every": 1}}

    def refused(says: str) -> None:
        made.clear()
        method = FlexpSfl(build_world(config(folder, told)))
        with seen(method) as requests, pytest.raises(PrivacyError, match=says):
            method.clients["north"].step()
        assert not any(isinstance(request, ForwardRequest) for request in requests)

    refused("an attacker who has the head reads 90 % of content words")
    assert made == ["table", "linear", "decoder"] * (asked // 3)
    reads["table"] = 0.8
    refused("an attacker who has the head reads 90 % of content words")
    assert made == ["table"] * (asked // 3 - 1) + ["table", "linear", "decoder"]
    reads |= {"table": 0.3, "decoder": 0.5}
    FlexpSfl(build_world(config(folder, told))).clients["north"].step()


def test_an_attacker_does_not_learn_from_the_noise_of_what_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 50 times as much noise as activation, rows of both are independent."""
    given: list[Any] = []
    monkeypatch.setattr(guarding, "most_read", lambda *each: (given.append(each), 0.0)[1])
    told = {"penalty": "off", "noise": 50.0, "max_content_words": 0.5}
    FlexpSfl(build_world(config(folder, told))).clients["north"].step()
    known_NH, asked_NH = given[0][0].sent.z_NH, given[0][1].z_NH
    rows = min(len(known_NH), len(asked_NH))
    one, other = known_NH[:rows].flatten(), asked_NH[:rows].flatten()
    assert rows * known_NH.shape[1] > 1000
    assert abs(float(torch.nn.functional.cosine_similarity(one, other, dim=0))) < 0.1


def test_the_decoder_learns_on_while_the_head_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its last weights, in a client that was stopped between two checks as well."""
    learnt: list[tuple[int, bool]] = []
    learn = Decoder.learn
    monkeypatch.setattr(
        Decoder, "learn", lambda self, known: (learnt.append((self.steps, bool(self.state()))), learn(self, known))[1]
    )
    told = {"penalty": "off", "noise": 0.5, "max_content_words": 1.0, "warm_up": {"check_every": 1}}
    world = build_world(config(folder, told))
    whole, before, after = FlexpSfl(world), FlexpSfl(world), FlexpSfl(world)
    for _ in range(2):
        whole.clients["north"].step()
    assert learnt == [(20, False), (5, True)]
    before.clients["north"].step()
    after.load(before.state())
    after.clients["north"].step()
    assert learnt[2:] == [(20, False), (5, True)]
    expected, found = (each.state()["client-north"] for each in (whole, after))
    assert sum(name.startswith(STATE) for name in expected) == 8
    assert all(torch.equal(value, found[name]) for name, value in expected.items() if name.startswith(STATE))
    assert whole.clients["north"].model.guard.read == after.clients["north"].model.guard.read


def test_the_first_activation_is_the_taught_head_s(folder: Path) -> None:
    world = build_world(config(folder))
    method = FlexpSfl(world)
    client = method.clients["north"]
    untaught = own_stage(world, Part.client((2, 4), world.source.anatomy.blocks))
    with seen(method) as requests:
        batch = world.federation.task.collate(client.data.test[:2])
        client.personal(batch)
    sent = next(request for request in requests if isinstance(request, ForwardRequest)).hidden_BTH
    untaught.model.eval()
    hidden_BTH, plan = untaught.plan({key: value for key, value in batch.items() if key != "labels"})
    assert not torch.allclose(untaught.run(hidden_BTH, plan, 0, 2), sent)


def test_the_penalty_trains_along_with_the_task(folder: Path) -> None:
    """Its gradient is added at z: with a large weight the head ends elsewhere, the tail's first step is the same."""
    ends = []
    for weight in (0.0, 5.0):
        trainer = FlexpSfl(build_world(config(folder, {"weight": weight, "warm_up": {"steps": 1}}))).clients["north"]
        trainer.step()
        ends.append(trainer.model.personal_state())
    differs = {name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])}
    assert any(".layer.0." in name for name in differs)


@pytest.mark.parametrize(("steps", "penalty"), [(0, "nopeek"), (1, "nopeek"), (0, "adversary"), (1, "adversary")])
def test_a_resumed_run_is_an_undisturbed_one(folder: Path, steps: int, penalty: str) -> None:
    """Also where it was stopped before its head was taught."""
    world = build_world(config(folder, {"noise": 0.5, "penalty": penalty}))
    whole, before, after = FlexpSfl(world), FlexpSfl(world), FlexpSfl(world)
    for _ in range(steps):
        before.clients["north"].step()
    after.clients["north"].step()
    after.load(before.state())
    for _ in range(2):
        whole.clients["north"].step()
    for _ in range(2 - steps):
        after.clients["north"].step()
    expected, found = whole.state(), after.state()
    assert int(expected["client-north"]["taught"]) == 2
    for party, tensors in expected.items():
        for name, value in tensors.items():
            assert "seconds" in name or torch.equal(value, found[party][name]), (party, name)


def test_noise_belongs_to_the_text_and_the_key() -> None:
    z_BTH = torch.randn(2, 5, 64, generator=seeded(0))
    ids_BT = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 6, 7, 8]])
    mask_BT = ids_BT > 0
    noise = Noise(2.0, key=7, clip=3.0)
    covered = noise.cover(z_BTH, ids_BT, mask_BT) - noise.clipped(z_BTH)
    alone = noise.cover(z_BTH[:1, :3], ids_BT[:1, :3], mask_BT[:1, :3]) - noise.clipped(z_BTH[:1, :3])
    assert torch.allclose(covered[0, :3], alone[0], atol=1e-5)  # whatever else is in the batch
    assert not torch.allclose(covered[0, :2], covered[1, :2], atol=0.1)  # another text
    other = Noise(2.0, key=8, clip=3.0)
    assert not torch.allclose(other.cover(z_BTH, ids_BT, mask_BT) - other.clipped(z_BTH), covered, atol=0.1)
    assert float(covered.norm(dim=-1).mean()) == pytest.approx(6.0, rel=0.1)
    assert float(noise.clipped(z_BTH).norm(dim=-1).max()) <= 3.0 + 1e-5
    guards = [Guard(PrivacyConfig(noise=1.0), [], None, 0) for _ in range(2)]
    assert (
        len({guard.noise.key for guard in guards if guard.noise is not None}) == 2
    )  # the seed, which the server knows, does not tell it


def test_noise_needs_every_bit_of_its_key() -> None:
    numbers = drawn((20_000,), 5, b"said")
    assert torch.equal(numbers, drawn((20_000,), 5, b"said"))
    assert float(numbers.std()) == pytest.approx(1.0, rel=0.03)
    others = [drawn((20_000,), 5 + (1 << bit), b"said") for bit in (1, 31, 32, 63, 64, 127)]
    others.append(drawn((20_000,), 5, b"else"))
    for other in others:
        assert abs(float(torch.dot(numbers, other))) < 1000  # seven deviations
    assert key_of(key_as_tensor((1 << 127) + 3)) == (1 << 127) + 3
    assert key_of(torch.tensor(7)) == 7  # as it was saved before


def test_padding_is_not_sent() -> None:
    ids_BT, mask_BT = torch.tensor([[3, 4, 0]]), torch.tensor([[1, 1, 0]])
    guard = Guard(PrivacyConfig(noise=1.0, clip=1.0), [], None, 0, 1)
    assert not guard.sent(ids_BT, mask_BT, torch.ones(1, 3, 8))[0, 2].any()


@pytest.mark.parametrize(
    ("ratio", "tokens", "expected"),
    [(1, 1, 934.1998245674), (3, 1, 140.1851582387), (20, 1, 9.7493174762), (200, 64, 7.4344674779),
     (20, 3 * 30, 251.1859555645)],
)  # fmt: skip
def test_epsilon_is_dp_accounting_s(ratio: float, tokens: int, expected: float) -> None:
    """What dp-accounting 0.6.0 says: ``get_epsilon_gaussian(ρ ÷ 2√(H·tokens), 1e-5)``; of three fresh releases of a
    text of 30 tokens its accountant of privacy loss distributions (251.185955582), so they compose like tokens."""
    assert epsilon(ratio, 384, tokens) == pytest.approx(expected, rel=1e-10)


def test_a_run_tells_what_it_guarantees(folder: Path, tmp_path: Path) -> None:
    """Two epochs of 12 examples, none of which is longer than 16 tokens; the noise stays, the head does not."""
    told = {"penalty": "off", "noise": 20.0, "label_epsilon": 1.0}
    summary = run(
        config(
            folder,
            told,
            train={"rounds": 1, "steps_per_round": 6, "batch_size": 4},
            output={"checkpoint_every": 0},
            evaluation={"every": 9, "measure_memory": False},
        ),
        tmp_path / "run",
    )
    found = summary["epsilon"]
    hidden, tokens = summary["model"]["hidden"], int(found["tokens"])
    assert (found["run"], found["labels"], found["epochs"], found["delta"]) == (None, 1.0, 2, 1e-5)
    assert found["activation"] == epsilon(20.0, hidden) < found["text"] == epsilon(20.0, hidden, tokens)
    assert found["fresh"] == epsilon(20.0, hidden, 2 * tokens)
    assert "none for a run" in found["line"]
    assert "ε = 1 for each label" in found["line"]


@pytest.mark.parametrize("classes", [2, 5])
def test_labels_are_answered_as_randomised_response_has_it(classes: int) -> None:
    """Each of the others equally often, e^ε times more rarely than the label itself; once for an example and a key."""
    answers, epsilon_of = RandomLabels(1.0, classes, key=3), math.exp(1.0)
    ids_BT = torch.arange(4000).view(-1, 1)
    batch = {"input_ids": ids_BT, "labels": torch.ones(4000, dtype=torch.long)}
    told = answers.of(batch)
    shares = torch.bincount(told, minlength=classes) / 4000
    expected = torch.full((classes,), 1 / (epsilon_of + classes - 1))
    expected[1] *= epsilon_of
    assert torch.allclose(shares, expected, atol=0.03)
    padded = torch.cat([ids_BT, torch.zeros_like(ids_BT)], 1)[10:20]
    some = {"input_ids": padded, "attention_mask": torch.tensor([[1, 0]] * 10), "labels": batch["labels"][10:20]}
    assert torch.equal(answers.of(some), told[10:20])
    assert not torch.equal(RandomLabels(1.0, classes, key=4).of(batch), told)


def test_a_device_answers_its_labels_with_a_key_of_its_own() -> None:
    """Nobody gives it one: each draws 128 bits, and goes on with them after a restart."""
    batch = {"input_ids": torch.arange(400).view(-1, 1), "labels": torch.ones(400, dtype=torch.long)}
    first, second = (Guard(PrivacyConfig(label_epsilon=1.0), [], None, seed=0, classes=2) for _ in range(2))
    told = first.told(batch)["labels"]
    assert not torch.equal(second.told(batch)["labels"], told)
    second.load(first.state())
    assert torch.equal(second.told(batch)["labels"], told)


@pytest.mark.parametrize("classes", [2, 7])
def test_the_bound_on_labels_chooses_the_answers(folder: Path, classes: int) -> None:
    """ε of the bound, and no more: what is measured, by scipy's U test, on answers for drawn labels is the bound."""
    answers = RandomLabels(epsilon_within(0.7, classes), classes, key=5)
    labels = torch.arange(4000) % classes
    told = answers.of({"input_ids": torch.arange(4000).view(-1, 1), "labels": labels})
    yes, no = ((told == 0)[kind].numpy().astype(float) for kind in (labels == 0, labels != 0))
    assert mannwhitneyu(yes, no).statistic / (len(yes) * len(no)) == pytest.approx(0.7, abs=0.02)
    world = build_world(config(folder, {"penalty": "off", "max_label_auc": 0.6}))
    assert world.config.privacy.label_epsilon == pytest.approx(math.log(0.6 / 0.4))
    assert any("an AUC of at most 0.60" in note for note in world.federation.notes)


@pytest.mark.parametrize(
    ("changes", "sends", "note"),
    [
        ({}, False, "kept by sending no gradients, which is expected to cost 5 points"),
        ({"privacy": {"max_label_auc": 0.95}}, True, "an AUC of at most 0.95"),  # little is answered wrongly
        ({"privacy": {"max_label_auc": 0.6, "gradients": True}}, True, "an AUC of at most 0.60"),
        ({"data": {"clients": tiny.each(cut=[[1, 3], [2, None]])}}, True, "client south has no blocks in its tail"),
        ({"method": {"align": {"kind": "weights"}}}, True, "leaves the head as it is, so nothing is aligned"),
    ],
)
def test_the_bound_on_labels_sends_no_gradients_where_that_costs_less(
    folder: Path, changes: dict[str, Any], sends: bool, note: str
) -> None:
    told = {
        "privacy": {"max_label_auc": 0.6},
        "data": {"clients": tiny.each(cut=[[1, 3], [2, 3]])},
        "method": {"align": {"kind": "off"}},
        **changes,
    }
    found = settle(tiny.config(folder, **told))
    privacy = found.config.privacy
    assert privacy.gradients is sends
    assert (privacy.label_epsilon is None) is not sends
    assert note in " ".join(found.federation.notes)
    again = settle(validate(found.config.resolved(), "again"))  # as whoever goes on reads it
    assert again.config.privacy == privacy


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """Public texts tell less the deeper the cut, pooled, and with noise; what was taught and attacked, in order."""
    monkeypatch.setenv("FLEXP_HOME", str(tmp_path))
    taught: list[tuple[Any, ...]] = []

    def teach(self: Guard, stage: Any, depth: int) -> None:
        own = self.config
        taught.append((own.penalty, own.pool, own.noise, depth, {tuple(each["input_ids"]) for each in self._examples}))
        least = {"off": 0.4 if own.pool else 0.6, "nopeek": 0.02}[own.penalty] / (1 + 4 * own.noise)
        self.attacked = 50
        self.read = {1: 0.9, 2: 0.7, 3: 0.03}[depth] + least

    monkeypatch.setattr(Guard, "teach", teach)
    return taught


AUTO = {"clients": {"cut": "auto"}}
NOISY = [f"with privacy.pool = true and privacy.noise = {noise}" for noise in ("0.5", "1")]


def unnamed(folder: Path, **privacy: Any) -> RunConfig:
    """No defence but in ``privacy``; cuts are planned, and texts may be pooled."""
    own = {"public": str(folder / "public.txt"), **privacy}
    model = {"id": str(folder / "model"), "pooling": "mean"}
    return tiny.config(folder, privacy=own, data=AUTO, model=model, method={"align": {"kind": "off"}})


def test_the_planner_cuts_where_the_bound_is_kept(folder: Path, told: list[tuple[Any, ...]]) -> None:
    """Planned on public texts, deeper than memory alone would have it; found once, and kept. What is named stays."""
    named = {"max_content_words": 0.1, "noise": 0.0, "pool": False}
    clients = build_world(config(folder)).federation.clients
    private = {tuple(each["input_ids"]) for client in clients for each in client.train}
    for _ in range(2):
        assert {start for start, _ in build_world(config(folder, named, data=AUTO)).cuts.values()} == {3}
        assert [(each[:3], each[3]) for each in told] == [(("nopeek", False, 0.0), depth) for depth in (3, 2)]
    assert not any(private & each[4] for each in told)
    frozen = {"personal": {"frozen_head_blocks": 2}, "align": {"kind": "off"}}
    told.clear()
    assert {start for start, _ in build_world(config(folder, named, data=AUTO, method=frozen)).cuts.values()} == {3}
    assert {each[3] for each in told} == {3}  # nothing is taught in two blocks that are not trained
    with pytest.raises(
        PrivacyError, match=r"kept by no cut .* 5 % at s = 3 with privacy.penalty = .*; a bound of 0.05"
    ):
        build_world(config(folder, {**named, "max_content_words": 0.01}, data=AUTO))


@pytest.mark.parametrize(
    ("bound", "chosen", "start"),
    [
        (0.95, (False, 0.0), 3),  # a cut alone
        (0.5, (True, 0.0), 3),
        (0.15, (True, 1.0), 3),
    ],
)
def test_the_planner_chooses_the_cheapest_defence(
    folder: Path, told: list[tuple[Any, ...]], bound: float, chosen: tuple[bool, float], start: int
) -> None:
    """It is written out, and the plan says what the others tell."""
    world = build_world(unnamed(folder, max_content_words=bound))
    own = world.config.privacy
    assert (own.pool, own.noise, own.penalty) == (*chosen, "off")
    assert {cut[0] for cut in world.cuts.values()} == {start}
    assert world.plan is not None
    assert world.plan["task"]["pools"] is own.pool
    rows = world.plan["privacy"]["tried"]
    assert [row["with"] for row in rows if row["chosen"]] == [words(own)]
    assert [row["with"] for row in rows][:4] == ["without a defence", "with privacy.pool = true", *NOISY]
    assert all(row["s"] > start or row["content"] > bound for row in rows if row["price"] < defending.price(own))
    note = f"is kept {words(own)}, s of at least {start}"
    assert any(note in each for each in world.federation.notes)


def test_a_refusal_says_what_would_keep_the_bound(folder: Path, told: list[tuple[Any, ...]]) -> None:
    """What is named excludes it; or there is nothing but another bound."""
    says = r"kept by no cut .* 23 % at s = 3 with privacy.noise = 0.5; 11 % at s = 3 with privacy.pool = true and "
    with pytest.raises(PrivacyError, match=says + r"privacy.noise = 1 would be: leave out privacy.pool and "):
        build_world(unnamed(folder, max_content_words=0.12, pool=False, penalty="off", noise=0.5))
    with pytest.raises(PrivacyError, match=r"a bound of 0.05 would be kept with privacy.penalty = .nopeek."):
        build_world(unnamed(folder, max_content_words=0.01))
    assert {each[0] for each in told} == {"off", "nopeek"}


def texts_of(folder: Path) -> Texts:
    place, task = folder / "model", TaskShape(length=16)
    processor = load_processor(str(place), images=False)
    return Texts(task.model(str(place)), task.kind, 4, processor, longest=16, labels=["0", "1"])


def test_what_was_read_is_taken_for_the_same_content_alone(tmp_path: Path, told: list[tuple[Any, ...]]) -> None:
    """Texts, embeddings and configuration, wherever they stand; half of a small file is the attacker's."""
    tiny.bert_folder(tmp_path / "model")
    public, weights, said = tmp_path / "public.txt", tmp_path / "model/model.safetensors", list[str]()
    lines = [f"w1 w2 w3 w4 w5 w6 w7 w{number}" for number in (10, 11, 12, 13)]
    public.write_text("\n".join(lines))
    bound = PrivacyConfig(max_content_words=0.5)

    def read(privacy: PrivacyConfig = bound) -> int:
        Reader(str(public), texts_of(tmp_path), said.append).read(privacy, 3)
        return len(told)

    assert (read(), read(), len(told[0][4])) == (1, 1, 2)
    (line,) = said
    assert re.fullmatch(r"63 % of content words are read at s = 3 without a defence \(found in \d+ s\)", line)
    public.write_text("\n".join([*lines[:-1], "w20 w21 w22 w23 w24 w25"]))
    assert (read(), read()) == (2, 2)
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    save_file({**tensors, name: tensors[name] + 1}, weights, {"format": "pt"})
    assert (read(), read()) == (3, 3)
    content = tmp_path / "model/config.json"
    content.write_text(content.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-5'))
    assert (read(), read()) == (4, 4)


@pytest.mark.parametrize(
    ("count", "says"), [(1, "and it has one"), (4, r"50 content words .* and they have [1-9]\d?;")]
)
def test_too_few_public_texts_plan_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, says: str
) -> None:
    monkeypatch.setenv("FLEXP_HOME", str(tmp_path))
    (tmp_path / "few.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9\n" * count)
    with pytest.raises(DataError, match=f"few.txt: .*{says}"):
        Reader(str(tmp_path / "few.txt"), texts_of(folder)).read(PrivacyConfig(max_content_words=0.5), 3)


def test_a_plan_s_own_cuts_are_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A deeper one may tell more than the shallowest that keeps the bound: then cuts begin beyond it."""
    monkeypatch.setenv("FLEXP_HOME", str(tmp_path))
    reads = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.8, 5: 0.4}
    monkeypatch.setattr(Reader, "read", lambda self, privacy, depth: reads[depth])
    monkeypatch.setattr(Reader, "_load", lambda self: load_stage(self.texts.model, self.texts.kind))
    asked: list[int] = []

    def plan(own: PrivacyConfig, least: int) -> Any:
        asked.append(least)
        options = {str(s): SimpleNamespace(choice=Choice((s, 6), 1)) for s in {least, max(least, 4)}}
        return SimpleNamespace(solution=SimpleNamespace(options=options), measures=SimpleNamespace(loss=0.0))

    told = PrivacyConfig(max_content_words=0.5, pool=False, noise=0.0, penalty="off", public=str(folder / "public.txt"))
    texts = replace(texts_of(folder), blocks=6)
    found = defending.defended(told, texts, plan)
    assert (asked, found.chosen.depth, found.read) == ([1, 5], 5, {5: 0.4})
    assert "s of at least 5: of public texts' content words are read, as planned, 40 % at s = 5" in found.line
    with pytest.raises(ConfigError, match="planned for s of 1 to 5, and 6 or more is asked for"):
        defending.defended(told, texts, plan, 6)


def test_gradients_tell_only_the_answers_of_labels(folder: Path) -> None:
    """A client whose labels were answered sends, bit for bit, what one with the answers for labels would send."""
    told = {"penalty": "off", "label_epsilon": 0.5}
    aligned = {"align": {"kind": "kl"}, "meet": {"on": True}}
    guarded = FlexpSfl(build_world(config(folder, told, method=aligned)))
    plain = FlexpSfl(build_world(config(folder, {"penalty": "off"}, method=aligned)))
    wrong = 0
    for name, client in guarded.clients.items():
        guard, task = client.model.guard, client.task  # type: ignore[attr-defined]
        train = plain.clients[name].data.train
        for place, example in enumerate(train):
            answer = int(guard.told(task.collate([example]))["labels"])
            wrong += answer != example["labels"]
            train[place] = {**example, "labels": answer}
    assert wrong > 3
    sent = []
    for method in (guarded, plain):
        with seen(method) as requests:
            method.meet(FIRST)
            method.clients["north"].step()
            method.clients["north"].step()
        sent.append([request.grad_BTH for request in requests if isinstance(request, BackwardRequest)])
    assert len(sent[0]) == len(sent[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*sent, strict=True))
    state = guarded.state()["client-north"]
    assert key_of(state["label_key"]) == guarded.clients["north"].model.guard.labels.key  # type: ignore[attr-defined]


@pytest.mark.parametrize(("ratio", "tokens"), [(20.0, 1), (60.0, 12)])
def test_epsilon_is_that_of_two_gaussians(ratio: float, tokens: int) -> None:
    """The hockey-stick divergence at it, integrated by hand, is δ; σ = ρ·C/√H, and 2C a token apart."""
    far = 2 * math.sqrt(tokens) / (ratio / math.sqrt(384))
    x = np.linspace(-12, 12 + far, 200_001)
    p, q = (np.exp(-((x - at) ** 2) / 2) / math.sqrt(2 * math.pi) for at in (far, 0.0))
    excess = np.maximum(p - math.exp(epsilon(ratio, 384, tokens)) * q, 0.0)
    assert float(np.trapezoid(excess, x)) == pytest.approx(DELTA, rel=1e-2)


def test_a_run_says_what_shared_blocks_tell_of_a_client(folder: Path) -> None:
    """As it begins, and of what was done: two steps of each client, here in one update of six."""
    noise = {"noise": 8.0, "update": "mean", "mean_over": 6, "guard": {"clip": 1.0}}
    told = config(folder, {"penalty": "off"}, server=noise, train={"rounds": 1, "steps_per_round": 2})
    notes = build_world(told).federation.notes
    assert any(f"no more than ε = {gaussian(2 * math.sqrt(2) / 8):.3g} (δ = 1e-05)" in note for note in notes)
    summary = run(told, folder / "noise")
    assert summary["epsilon"]["shared"] == pytest.approx(gaussian(2 * 2 / 8))
    assert "towards others who see the shared blocks" in summary["epsilon"]["line"]
    with pytest.raises(ConfigError, match="share a server's blocks alone"):
        config(folder, {"penalty": "off"}, server=noise, method={"name": "fedavg"})


class OverGrpc(FlexpSfl):
    """Its clients reach the server through a port of this machine."""

    name = "over-grpc"

    def connect(self, name: str) -> Any:
        self.ways = [*getattr(self, "ways", []), loopback(self.server, name)]
        return self.ways[-1].__enter__()


def test_over_grpc_it_is_the_same(folder: Path) -> None:
    def trained(kind: type[FlexpSfl], world: World) -> dict[str, torch.Tensor]:
        method = kind(world)
        for _ in range(2):
            method.clients["north"].step()
        found = method.trained_weights("north")
        for way in getattr(method, "ways", []):
            way.__exit__(None, None, None)
        return found

    train = {"rounds": 1, "steps_per_round": 2, "micro_batch": 2, "in_flight": 2}
    world = build_world(config(folder, {"noise": 0.5}, train=train))
    assert any("no guarantee" in note for note in world.federation.notes)
    near, far = trained(FlexpSfl, world), trained(OverGrpc, world)
    assert all(torch.equal(near[name], far[name]) for name in near)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": {"align": {"kind": "kl"}}, "model": {"base_depth": 1}}, "z_base of depth 1"),
        ({"method": {"align": {"kind": "weights"}}, "model": {"base_depth": 1}}, 'kind = "off"'),
        ({"method": {"name": "fedavg"}}, "heads stay on their clients"),
        ({"method": {"personal": {"frozen_head_blocks": 2}, "align": {"kind": "off"}}}, "nothing below the cut"),
        ({"recut": {"on": True}}, "choose one"),
        ({"train": {"class_weights": "balanced"}, "privacy": {"label_epsilon": 1.0}}, "class_weights counts"),
        ({"data": {"task": "causal-lm"}, "privacy": {"label_epsilon": 1.0}}, "one class of an example"),
        ({"data": {"task": "causal-lm"}, "privacy": {"max_label_auc": 0.6}}, "one class of an example"),
        ({"privacy": {"label_epsilon": 1.0, "max_label_auc": 0.6}}, r"AUC of 0.73.* lower it to 0.405"),
    ],
)  # fmt: skip
def test_what_cannot_be_guarded_is_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    def step() -> None:
        FlexpSfl(build_world(config(folder, **changes))).clients["north"].step()

    with pytest.raises(ConfigError, match=says):
        step()
