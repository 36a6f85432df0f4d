"""The audit reads what it must, and nothing where there is nothing."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from flexp.attacks.answers import pointed, said, trained
from flexp.attacks.base import Public, Sent
from flexp.attacks.decoder import Decoder
from flexp.attacks.gradients import inverted, words
from flexp.attacks.labels import auc, clustered, directions, with_known
from flexp.attacks.linear import Linear
from flexp.attacks.membership import membership
from flexp.attacks.prefix import Prefix
from flexp.attacks.table import Table
from flexp.attacks.tokens import ATTACKS
from flexp.attacks.transformer import Transformer
from flexp.audit import Watch, audit, watchable, watching
from flexp.audit.auditing import rouge_l
from flexp.audit.guessing import by_the_model
from flexp.audit.page import render
from flexp.audit.training import labels_told
from flexp.audit.truth import Truth
from flexp.audit.watching import Exchange, Known
from flexp.cli.main import app
from flexp.config import RunConfig
from flexp.errors import ConfigError, DataError
from flexp.methods import Method
from flexp.models.anatomy import Part
from flexp.models.stage import Stage, carve
from flexp.run.runner import resume, run
from flexp.run.settle import build_world
from flexp.run.store import CHECKPOINTS, Store
from tests import tiny
from tests.cli.test_commands import toml
from tests.harness import seeded, whole_stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("audit")
    tiny.bert_folder(place / "model", dropout=True)
    return place


@pytest.fixture(scope="module")
def public(folder: Path) -> Path:
    """A file of public texts that know nothing of the private ones."""
    place = folder / "public.txt"
    place.write_text("good bad fine poor and many other words that people use\n" * 20, encoding="utf-8")
    return place


def config(folder: Path, **changes: object) -> RunConfig:
    return tiny.config(folder, **{"train": {"rounds": 1, "steps_per_round": 2}, **changes})


def begun(folder: Path, **changes: object) -> Method:
    world = build_world(config(folder, **changes))
    return world.method(world)


def known(depth: int, name: str = "llama", texts: int = 60) -> Public:
    """A tiny model, and what its head makes of random public texts of eight tokens."""
    whole = whole_stage(name)
    ids_BT = torch.randint(2, whole.model.config.vocab_size, (texts, 8), generator=seeded(0))
    with torch.no_grad():
        hidden_BTH, plan = whole.plan({"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)})
        hidden_BTH = whole.run(hidden_BTH, plan, 0, depth)
    mask_BT = torch.ones_like(ids_BT).bool()
    return Public(whole, depth, Sent.of([hidden_BTH], [mask_BT]), ids_BT.flatten())


@pytest.mark.parametrize("kind", [Table, Linear, Decoder, Transformer])
def test_bare_embeddings_are_read_whole(kind: type) -> None:
    """At depth 0 an activation is its token's row of the table: whoever cannot read that reads nothing."""
    public, attack = known(0), kind()
    attack.steps, attack.width = 100, 128
    attack.learn(public)
    private = known(0, texts=10)
    # Networks that are trained for a hundred steps only are not yet sure of every token.
    assert (attack.guess(private.sent) == private.ids_N).float().mean() > (
        0.9 if kind in (Decoder, Transformer) else 0.99
    )


def test_prefix_search_reads_what_one_map_does_not() -> None:
    """Random blocks of a decoder: its public head makes each activation anew, whatever the depth."""
    public = known(3)
    linear, prefix = Linear(), Prefix()
    linear.learn(public)
    prefix.learn(public)
    some = Sent(public.sent.z_NH[:24], public.sent.positions_N[:24], public.sent.texts_N[:24])
    assert (prefix.guess(some) == public.ids_N[:24]).all()
    with pytest.raises(AssertionError):
        assert (linear.guess(some) == public.ids_N[:24]).all()


@pytest.mark.parametrize("kind", [kind for kind in ATTACKS if not kind.causal])
def test_noise_tells_nothing(kind: type) -> None:
    attack, public = kind(), known(1)
    attack.steps, attack.width = 20, 64
    attack.learn(public)
    noise = Sent(torch.randn(400, public.sent.z_NH.shape[1], generator=seeded(1)), torch.zeros(400).long(),
                 torch.arange(400))  # fmt: skip
    truth = torch.randint(2, public.embeddings.shape[0], (400,), generator=seeded(2))
    assert (attack.guess(noise) == truth).float().mean() < 0.1


def test_rows_of_padding_are_no_tokens() -> None:
    sent = Sent.of([torch.arange(12.0).view(2, 3, 2)], [torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()])
    assert sent.z_NH.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert sent.positions_N.tolist() == [0, 1, 0, 1]
    assert sent.texts_N.tolist() == [0, 0, 1, 1]


def test_classes_by_the_direction_of_their_gradients() -> None:
    """(p − y) · W of a classifier with two classes has two directions; noise has none."""
    labels = torch.randint(0, 2, (60,), generator=seeded(0))
    share = torch.rand(60, 1, 1, generator=seeded(1)) + 0.1
    grads = [share * (2 * labels[:, None, None] - 1) * torch.randn(1, 1, 16, generator=seeded(2))]
    rows = directions(grads)
    assert clustered(rows, labels) == with_known(rows, labels) == auc(rows, labels) == 1.0
    noise = directions([torch.randn(60, 1, 16, generator=seeded(3))])
    assert clustered(noise, labels) < 0.75


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("tail", "scale"), [(0, 1.0), (1, 1.0), (2, 1.0), (0, 8.0), (1, 0.125)])
def test_words_of_answers_through_the_tail(name: str, tail: int, scale: float) -> None:
    """Of plain transformers' gradient every answer, however many blocks are in the tail, whatever the head multiplies
    its logits with, and in a step of several exchanges; of h what the model says."""
    whole = whole_stage(name)
    whole.model.get_output_embeddings().register_forward_hook(lambda _, __, logits_BTV: scale * logits_BTV)
    model, first = whole.model.eval(), whole.anatomy.blocks - tail
    ids = torch.randint(2, model.config.vocab_size, (3, 8), generator=seeded(0))
    labels = torch.randint(2, model.config.vocab_size, (3, 8), generator=seeded(1))
    labels[0, :4] = -100
    hidden: list[torch.Tensor] = []
    block = whole.blocks[first - 1].register_forward_hook(
        lambda _, __, out: hidden.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embedded, labels=labels, use_cache=False)
    block.remove()
    (grad_BTH,) = torch.autograd.grad(out.loss, hidden[0])
    batch = {"input_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids), "labels": labels}
    there = labels[:, 1:] != -100
    read = trained(whole, first, hidden[0], grad_BTH, batch)[:, :-1]
    assert torch.equal(read[there], labels[:, 1:][there])
    assert torch.equal(said(whole, first, hidden[0], batch), out.logits.argmax(2))
    quarter = Exchange("a", 1, batch, (1, first), hidden[0], 1, None, None, hidden[0], grad_BTH / 4, share=0.25)
    told = labels_told([quarter], cast(Known, SimpleNamespace(source=whole, method=None)), "next-token")
    assert told["answers"] == 1.0
    if tail == 0:
        assert torch.equal(pointed(whole, grad_BTH)[:, :-1][there], labels[:, 1:][there])
    noise = grad_BTH.norm() * torch.randn(grad_BTH.shape, generator=seeded(2)) / grad_BTH.numel() ** 0.5
    assert (trained(whole, first, hidden[0], noise, batch)[:, :-1] == labels[:, 1:])[there].float().mean() < 0.2


def test_labels_by_the_gradient_that_fits() -> None:
    """Two blocks in the tail hide nothing from who has it; the gradients are plain transformers' own."""
    whole = whole_stage("bert")
    model, blocks = whole.model, whole.anatomy.blocks
    batch = {
        "input_ids": torch.randint(2, model.config.vocab_size, (6, 8), generator=seeded(0)),
        "attention_mask": torch.ones(6, 8, dtype=torch.long),
        "labels": torch.randint(0, model.config.num_labels, (6,), generator=seeded(1)),
    }
    model.eval()
    inputs = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).requires_grad_()}
    out = model(**inputs, attention_mask=batch["attention_mask"], labels=batch["labels"], output_hidden_states=True)
    h_BTH = out.hidden_states[blocks - 2]
    (grad_BTH,) = torch.autograd.grad(out.loss, h_BTH)
    hidden = {**batch, "labels": torch.zeros(6, dtype=torch.long)}
    assert torch.equal(inverted(whole, blocks - 2, h_BTH, grad_BTH, hidden), batch["labels"])


def test_words_by_the_gradient_that_fits() -> None:
    """Of plain transformers' gradient behind one block of a language model far more than chance, which is 1 in 97."""
    whole = whole_stage("gpt2")
    model = whole.model.eval()
    ids = torch.randint(2, model.config.vocab_size, (3, 8), generator=seeded(0))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embedded, labels=ids, output_hidden_states=True)
    (grad_BTH,) = torch.autograd.grad(out.loss, out.hidden_states[1])
    hidden = {"input_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids), "labels": ids}
    assert (words(whole, 1, grad_BTH, hidden, 25) == ids).float().mean() > 0.1
    noise = torch.randn(grad_BTH.shape, generator=seeded(1))
    assert (words(whole, 1, noise, hidden, 5) == ids).float().mean() < 0.1


@pytest.mark.parametrize(
    ("said", "read", "expected"),
    [  # of Lin (2004): the candidates of its example, β = 1
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("police killed the gunman", "the gunman kill police", 2 / 4),
        ("a b c", "a b c d e", 2 * (3 / 3) * (3 / 5) / (3 / 3 + 3 / 5)),
        ("a b", "c d", 0.0),
    ],
)
def test_rouge_is_that_of_its_definition(said: str, read: str, expected: float) -> None:
    ids = {word: number for number, word in enumerate({*said.split(), *read.split()})}
    assert rouge_l([ids[w] for w in said.split()], [ids[w] for w in read.split()]) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_who_was_trained_on(name: str) -> None:
    """Blocks that learnt texts by heart, with plain transformers and torch, tell them from others."""
    whole = whole_stage(name)
    model = copy.deepcopy(whole.model)
    texts = torch.randint(2, model.config.vocab_size, (32, 10), generator=seeded(3))
    members, others = texts[:16].tolist(), texts[16:].tolist()
    middle = Part(frozenset({1, 2}), ends=False)

    def told() -> float:
        return membership(whole, carve(Stage.whole(model), middle), members, others, words=name == "llama")

    assert told() == 0.5
    labels = texts[:16] if name == "llama" else torch.arange(16) % 2
    inside = [value for key, value in model.named_parameters() if "layer.1." in key or "layers.1." in key]
    optimiser = torch.optim.Adam([value.requires_grad_() for value in inside], lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        model(input_ids=texts[:16], labels=labels).loss.backward()
        optimiser.step()
    assert told() > (0.9 if name == "llama" else 0.6)  # of what has no public head less is seen


def test_a_run_as_the_server_sees_it(folder: Path, public: Path) -> None:
    found = audit(begun(folder), public=public)
    places = [("z", 1), ("z", 2), ("z", 3), ("z_base", 1)]
    assert {(one.attack, one.of, one.depth) for one in found.readings} == {
        (attack, of, depth) for attack in ("table", "linear") for of, depth in places
    }
    assert found.texts == 2 * 3 * 4  # steps, clients, examples of a step
    assert found.content > 0.7 > found.blind["content"]
    assert all(set(one.by_step) == {1, 2} for one in found.readings)
    attacks = {"clusters", "known", "inverted", "features", "features_known", "majority"}
    assert attacks <= set(found.labels) <= attacks | {"auc", "features_auc"}
    assert found.by_gradients
    assert "worst" not in found.as_json()
    page = render(found)
    assert found.members is not None
    assert 0.5 <= found.members <= 1
    assert f"{found.members:.2f}" in page
    assert found.worst[0][0] in page
    assert "never that nothing leaks" in page
    assert found.blind["labelled"] > found.blind["tokens"]
    told = f"{100 * found.blind['labelled_content']:.1f}\N{NO-BREAK SPACE}%"
    assert told in page.partition("labels alone, some texts known")[2][:200]


def test_a_run_says_what_the_server_can_read_and_is_otherwise_the_same(folder: Path, public: Path) -> None:
    runs = {}
    for name, asked in (("plain", False), ("audited", True)):
        told = config(
            folder,
            data={"clients": tiny.each(cut=[[1, 4]])},
            privacy={"audit": asked, "public": str(public)},
            train={"rounds": 2, "steps_per_round": 1},
            output={"html": asked},
        )
        out = folder / name
        runs[name] = run(told, out), Store(out / CHECKPOINTS).load(2)
    (before, state), (after, same) = runs["plain"], runs["audited"]
    assert before["server_reads"] == "not audited"
    assert "% of content words" in after["server_reads"]
    assert after["server_reads"] in (folder / "audited/report.html").read_text()
    for party, tensors in state.items():
        for name, value in tensors.items():
            assert "seconds" in name or torch.equal(value, same[party][name]), (party, name)
    shutil.rmtree(folder / "audited" / CHECKPOINTS / "checkpoint-00000002")
    assert resume(folder / "audited")["server_reads"] == after["server_reads"]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (
            "fedavg",
            "sends no activations (clients of 'fedavg' send weights); over a network weights are averaged in masked "
            "sums, which the server adds and cannot read",
        ),
        ("local", "sends no activations (clients of 'local' send nothing)"),
        ("splitfed-v2", "not audited (clients of 'splitfed-v2' send activations, labels, weights)"),
    ],
)
def test_a_run_whose_clients_send_no_activations_says_so_and_goes_on(folder: Path, method: str, says: str) -> None:
    """So that one configuration may be compared over methods."""
    told = config(folder, method={"name": method}, privacy={"audit": True}, train={"rounds": 1, "steps_per_round": 1},
                  data={"clients": tiny.each(cut=[[1, 4]])})  # fmt: skip
    assert run(told, folder / method)["server_reads"] == says
    with pytest.raises(ConfigError, match="the audit reads activations"):
        audit(begun(folder, method={"name": method}))


def test_what_is_seen_is_what_crosses_after_the_codec(folder: Path, public: Path) -> None:
    plain = audit(begun(folder), public=public)
    coded = audit(begun(folder, link={"codec": {"activation": "int4"}}), public=public)
    told = [[one.tokens for one in found.readings if one.of == "z"] for found in (plain, coded)]
    assert told[0] != told[1]


def test_a_step_of_several_exchanges_is_a_mean_over_them(folder: Path) -> None:
    method = begun(folder, train={"rounds": 1, "steps_per_round": 2, "batch_size": 4, "micro_batch": 1})
    watch = Watch.of(method)  # type: ignore[arg-type]
    with watching(method, watch):  # type: ignore[arg-type]
        method.train_round(1, lambda _: None)
    assert {one.share for one in watch.exchanges} == {0.25}


def test_an_unknown_attack_is_told_before_anything_is_trained(folder: Path) -> None:
    method = begun(folder)
    with pytest.raises(ConfigError, match="--attack tabel: not made on what is sent here; choose of table, linear"):
        audit(method, only=["tabel"])
    assert method.server.shared.version == 0  # type: ignore[attr-defined]


def test_watching_changes_no_weight(folder: Path) -> None:
    ends = []
    for watched in (False, True):
        world = build_world(config(folder))
        method = world.method(world)
        watch = Watch.of(method)  # type: ignore[arg-type]
        if watched:
            with watching(method, watch):  # type: ignore[arg-type]
                method.train_round(1, lambda _: None)
        else:
            method.train_round(1, lambda step: None)
        ends.append(method.state())
    counted = ("seconds", "compute_seconds", "meter/training/server_seconds", "meter/training/waited_seconds")
    for party, tensors in ends[0].items():
        for name, value in tensors.items():
            assert name in counted or torch.equal(value, ends[1][party][name]), (party, name)


@pytest.mark.parametrize(("tuning", "reuse"), [("frozen", 0.0), ("full", 0.3)])
def test_what_crosses_once_is_seen_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tuning: str, reuse: float
) -> None:
    """As the server's own blocks see it, over three epochs."""
    from flexp.server.session import Session

    computed: list[torch.Tensor] = []
    inner = Session.forward

    def forward(self: Session, request: Any, *others: Any) -> Any:
        computed.append(request.hidden_BTH)
        return inner(self, request, *others)

    monkeypatch.setattr(Session, "forward", forward)
    method = watchable(begun(
        folder,
        link={"cache": "memory", "reuse": reuse},
        method={"align": {"kind": "off"}, "personal": {"frozen_head_blocks": 1 if tuning == "frozen" else 0}},
        train={"rounds": 1, "steps_per_round": 9},
        data={"clients": tiny.each(cut=[[1, 4]])},
    ))  # fmt: skip
    watch = Watch.of(method)
    with watching(method, watch):
        method.train_round(1, lambda _: None)
    assert watch.failed is None
    assert [len(exchange.z_BTH) for exchange in watch.exchanges] == [4] * 27
    assert all(torch.equal(one.z_BTH, z_BTH) for one, z_BTH in zip(watch.exchanges, computed, strict=True))
    once = sum(client.model.link.meter.training.bytes_up for client in method.clients.values())  # type: ignore
    assert once < sum(8 * one.z_BTH.numel() for one in watch.exchanges)  # z is not all of it


def exchanges(z: list[torch.Tensor], ids: list[torch.Tensor]) -> list[Exchange]:
    return [
        Exchange("north", step, {"input_ids": ids_BT}, (1, 4), z_BTH, 1, None)
        for step, (z_BTH, ids_BT) in enumerate(zip(z, ids, strict=True), 1)
    ]


def test_noise_of_several_epochs_averages_out_and_known_texts_undo_a_secret_map() -> None:
    """What a server reads that keeps what came, and one that knows some of the texts."""
    public = known(0, texts=200)
    ids_BT = torch.randint(2, public.embeddings.shape[0], (40, 8), generator=seeded(5))
    bare_BTH = public.stage.plan({"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)})[0].detach()
    noise = 4 * bare_BTH.std() * torch.randn(12, *bare_BTH.shape, generator=seeded(6))
    none = torch.tensor([-1])
    epochs = Truth.of(exchanges([*(bare_BTH + noise)], [ids_BT] * 12), "z", none, none)
    once = epochs.averaged()
    assert once is not None
    assert once.averaged() is None
    assert torch.allclose(once.sent.z_NH, (bare_BTH + noise).mean(0).flatten(0, 1), atol=1e-5)
    assert torch.equal(once.ids_N, ids_BT.flatten())
    attack = Linear()
    attack.learn(public)
    shares = [float((attack.guess(each.sent) == each.ids_N).float().mean()) for each in (epochs, once)]
    assert shares[1] > 0.8 > 0.5 > shares[0]

    turned_BTH = bare_BTH @ torch.linalg.qr(torch.randn(2 * bare_BTH.shape[2:], generator=seeded(7))).Q
    truth = Truth.of(exchanges([turned_BTH], [ids_BT]), "z", none, none)
    some_N = truth.known()
    assert truth.texts == 40
    assert int(some_N.sum()) == 10 * 8
    rest, shares = truth.only(~some_N), []
    some = truth.only(some_N)
    for learnt in (public, replace(public, sent=some.sent, ids_N=some.ids_N)):
        attack = Linear()
        attack.learn(learnt)
        shares.append(float((attack.guess(rest.sent) == rest.ids_N).float().mean()))
    assert shares[1] > 0.8 > 0.2 > shares[0]


def test_a_taught_run_meets_who_teaches_alike_and_who_knows_some_texts(folder: Path, public: Path) -> None:
    told = {"penalty": "nopeek", "noise": 0.3, "public": str(public), "warm_up": {"steps": 2}}
    found = audit(
        begun(
            folder, privacy=told, method={"align": {"kind": "off"}}, data={"clients": tiny.each(cut=[[2, 4]])},
            train={"rounds": 1, "steps_per_round": 5},
        ),
        public=public,
    )  # fmt: skip
    heads = ("pretrained", "taught", "known")
    assert {(one.head, one.of) for one in found.readings} == {
        (head, of) for head in heads for of in ("z", "z averaged")
    }
    assert "some texts known" in " ".join(one.name for one in found.readings)


def test_the_line_says_the_worst_step_and_what_was_not_attacked(folder: Path, public: Path) -> None:
    found = audit(begun(folder), public=public)
    assert replace(found, labels={}).line.endswith("; labels were not attacked")
    first = replace(found.readings[0], content=0.2, by_step={1: 0.5, 2: 0.1})
    line = replace(found, readings=[first], labels={"known": 0.9, "clusters": 0.6}).line
    assert line.startswith("20 % of content words")
    assert "in the worst step 50 %" in line
    assert line.endswith("90 % of labels (two of each known)")


def test_an_audit_that_fails_ends_no_run(folder: Path, public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it fails while it watches or while it attacks."""
    told = {"audit": True, "public": str(public)}
    for place, name in (("flexp.run.audited", "attacked"), (Watch.__module__, "arrived")):
        with monkeypatch.context() as broken:
            broken.setattr(sys.modules[place], name, lambda *_, **__: 1 / 0)
            out = folder / f"broken-{name}"
            summary = run(config(folder, privacy=told, train={"rounds": 2, "steps_per_round": 1}), out)
        assert summary["server_reads"] == "not audited (failed: division by zero)"
        assert summary["finished"]
    with pytest.raises(DataError, match=r"absent.txt: cannot be read"):  # at once, not after a round
        run(config(folder, privacy={"audit": True, "public": str(folder / "absent.txt")}), folder / "absent")


def test_the_command(folder: Path, public: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    where = ["audit", str(toml(folder)), "--set", "train.steps_per_round=1", "--set", "train.rounds=1"]
    ran = CliRunner().invoke(app, [*where, "--public", str(public), "--json", "--out", str(page)])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.output)
    assert found["schema"] == 1
    assert found["public"] == "public.txt"
    shown = page.read_text(encoding="utf-8")
    assert all(title in shown for title in ("What is read, step by step", "What is read, by cut and attack"))


def test_what_the_public_model_says_next_is_what_it_says_of_the_text_alone() -> None:
    """The blind guess of a language model: nothing of what crossed is looked at, and a first token is not known."""
    whole = whole_stage("llama")
    ids_BT = torch.randint(2, whole.model.config.vocab_size, (3, 8), generator=seeded(0))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 6:] = 0
    with torch.no_grad():
        next_BT = whole.model.eval()(input_ids=ids_BT, attention_mask=mask_BT).logits.argmax(2)
        ids_BT[1, 1:4] = next_BT[1, :3]  # so that something is right
        next_BT = whole.model(input_ids=ids_BT, attention_mask=mask_BT).logits.argmax(2)
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": ids_BT}
    seen = Exchange("north", 1, batch, (1, 2), torch.full((3, 8, 4), torch.nan), 1, None)
    dull = ids_BT[2].unique()
    found = by_the_model([seen], whole, torch.tensor([-1]), dull)
    there_BT = mask_BT.bool()
    right_BT = torch.cat([torch.zeros(3, 1).bool(), next_BT[:, :-1] == ids_BT[:, 1:]], 1)
    assert found["foretold"] == pytest.approx(float(right_BT[there_BT].float().mean()))
    assert found["foretold"] > 0
    content_BT = there_BT & ~torch.isin(ids_BT, dull)
    assert found["foretold_content"] == pytest.approx(float(right_BT[content_BT].float().mean()))


def test_carved_heads_are_enough(folder: Path) -> None:
    """An attacker needs the ends and the first blocks alone."""
    whole = whole_stage("llama")
    head = carve(whole, Part(frozenset({0}), ends=True))
    ids_BT = torch.randint(2, whole.model.config.vocab_size, (2, 8), generator=seeded(0))
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    made = []
    for stage in (whole, head):
        hidden_BTH, plan = stage.plan(inputs)
        made.append(stage.run(hidden_BTH, plan, 0, 1))
    assert torch.equal(*made)
