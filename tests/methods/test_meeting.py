"""Clients meet: the first classifier is that of everybody's sums, the last is each client's own; and goes wherever the
model goes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor

from flexp.client import meeting as meetings
from flexp.client.adding import OverLink
from flexp.client.closed_form import Discriminant, Statistics
from flexp.client.meeting import FIRST, LAST, Noise, Seat, classifier_of
from flexp.client.personal_head import personal_head
from flexp.client.ridge import STRENGTHS, Ridge, sums_of_numbers
from flexp.comparison.cells import fingerprint
from flexp.config import MeetConfig, RunConfig
from flexp.config.loading import validate
from flexp.errors import ConfigError, LinkError
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.export.saved import RunModel, open_run
from flexp.links.asking import SumRequest
from flexp.methods import split
from flexp.methods.base import method_of
from flexp.models.zoo import save_tiny
from flexp.run import runner
from flexp.run.fleet import Fleet, as_begun
from flexp.run.settle import settle, settle_client
from flexp.server.journal import Journal
from flexp.server.sums import SumTable
from tests.data.tools import jsonl, labelled, tokenizer
from tests.links.test_privacy import windows
from tests.run.test_heads import rows as head_rows
from tests.tiny import CLIENTS, checkpoint, config, content

from .tools import equal, make

POOLED = {"pooling": "mean"}
ON = {"meet": {"on": True}}


def meeting(home: Path, name: str, **settings: Any) -> Any:
    """A method on the tiny BERT that has not trained yet."""
    return make(home, name, model={"id": str(home / "model"), **POOLED, **settings.pop("model", {})}, **settings)


def classifier(method: Any, client: str) -> tuple[Tensor, Tensor]:
    weights = method.trained_weights(client)
    return weights["classifier.weight"], weights["classifier.bias"]


def plain_features(home: Path, method: Any, examples: list[Any]) -> tuple[Tensor, Tensor]:
    """Mean hidden states of transformers' own BERT."""
    base: Any = transformers.AutoModel.from_pretrained(home / "model").eval()
    batch = method.world.federation.task.collate(examples)
    labels, mask = batch.pop("labels"), batch["attention_mask"][..., None]
    with torch.no_grad():
        hidden = base(**batch).last_hidden_state
    return ((hidden * mask).sum(1) / mask.sum(1)).double(), labels


@pytest.mark.parametrize("name", ["flexp-sfl", "split-fedavg", "fedavg", "ditto", "closed-form"])
def test_all_begin_with_the_classifier_of_everybodys_examples(home: Path, name: str) -> None:
    method = meeting(home, name, model={"head": "closed-form"})
    method.meet(FIRST)
    everybody = [example for data in method.world.federation.clients for example in data.train]
    x, y = plain_features(home, method, everybody)
    found = Discriminant(Statistics.of(x, y, 2))
    head = found.head(*found.chosen(found.losses(x, y)))
    for client in CLIENTS:
        weight, bias = classifier(method, client)
        assert torch.allclose(weight.double(), head.weight, atol=1e-3 * float(head.weight.abs().max()))
        assert torch.allclose(bias.double(), head.bias, atol=1e-3 * float(head.bias.abs().max()))
    assert method.account("north").training.bytes_up > 0


def of_kind(home: Path, task: str, name: str = "flexp-sfl", **settings: Any) -> Any:
    source = jsonl(home / f"{task}.jsonl", head_rows(task))
    return make(
        home,
        name,
        model={"id": str(home / "model"), "head": "closed-form", **({} if task.startswith("token") else POOLED)},
        data={"task": task, "source": str(source), "clients": {"cut": [1, 3]}},
        **settings,
    )


@pytest.mark.parametrize("task", ["regression", "token-classification"])
def test_numbers_and_tags_have_a_closed_form_too(home: Path, task: str) -> None:
    method = of_kind(home, task)
    method.meet(FIRST)
    federation = method.world.federation
    everybody = [example for data in federation.clients for example in data.train]
    if task == "regression":
        x, y = plain_features(home, method, everybody)
        ridge = Ridge(sums_of_numbers(x, y, True))
        head = ridge.head(float(STRENGTHS[int(ridge.losses(x, y).argmin())]))
    else:
        base: Any = transformers.AutoModel.from_pretrained(home / "model").eval()
        batch = federation.task.collate(everybody)
        labels = batch.pop("labels")
        with torch.no_grad():
            x = base(**batch).last_hidden_state[labels != -100].double()
        y = labels[labels != -100]
        found = Discriminant(Statistics.of(x, y, 3))
        head = found.head(*found.chosen(found.losses(x, y)))
    for client in ("north", "south"):
        weight, bias = classifier(method, client)
        assert torch.allclose(weight.double(), head.weight, atol=1e-3 * float(head.weight.abs().max()))
        assert torch.allclose(bias.double(), head.bias, atol=1e-3 * float(head.bias.abs().max()))
    method.train_round(1, lambda _: None)
    trained = {client: classifier(method, client)[0] for client in ("north", "south")}
    choices = method.meet(LAST)
    for client, choice in choices.items():
        assert torch.equal(classifier(method, client)[0], trained[client]) == (choice == "trained")


class Watched(OverLink):
    """Keeps what each gives."""

    seen: ClassVar[list[tuple[int, dict[str, Tensor]]]] = []

    def give(self, number: int, values: Any) -> Any:
        self.seen.append((number, values))
        return super().give(number, values)


def test_neither_rare_classes_nor_the_classifier_cross(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "OverLink", Watched)
    Watched.seen.clear()
    method = meeting(home, "flexp-sfl", meet={"on": True})
    clients = method.world.federation.clients
    rare = [example for data in clients for example in data.train]
    for data in clients:  # of class 1 two examples are left, of two clients
        for example in data.train:
            example["labels"] = int(example is rare[0] or example is rare[-1])
    method.meet(FIRST)
    assert method.rare == 1
    heads = [classifier(method, client) for client in CLIENTS]
    method.train_round(1, lambda _: None)
    heads += [classifier(method, client) for client in CLIENTS]
    method.meet(LAST)
    heads += [classifier(method, client) for client in CLIENTS]
    assert sum(float(values["counts"][1]) for number, values in Watched.seen if number == 0) == 2
    crossed = [values for number, values in Watched.seen if "sums" in values]
    assert len(crossed) == 6
    for values in crossed:
        assert values["counts"][1] == 0
        assert not values["sums"][1].any()
    x, y = plain_features(home, method, [e for data in clients for e in data.train])
    gram = Statistics.from_tensors({k: sum(v[k] for v in crossed[:3]) for k in crossed[0]}).gram  # type: ignore[misc]
    assert gram is not None
    torch.testing.assert_close(gram, x[y == 0].T @ x[y == 0], rtol=1e-3, atol=1e-3)
    sent = set().union(*(windows(value) for _, values in Watched.seen for value in values.values()))
    for weight, _ in heads:
        assert windows(weight)
        assert not windows(weight) & sent


def test_noise_is_as_large_as_an_example(home: Path) -> None:
    hidden = Noise(MeetConfig(noise=0.5, clip=2.0), 1)
    lengths = hidden.clipped(torch.tensor([[3.0, 4.0], [0.6, 0.8]])).norm(dim=1)
    assert torch.allclose(lengths, torch.tensor([2.0, 1.0]))
    blank = {name: torch.zeros(20_000) for name in ("counts", "sums", "square", "gram")}
    for name, one in (("counts", 1.0), ("sums", 2.0), ("square", 4.0), ("gram", 4.0)):
        assert float(hidden(blank)[name].std()) == pytest.approx(0.5 * one, rel=0.05)
    assert Noise(MeetConfig(), 1)(blank) is blank
    noisy = {"on": True, "noise": 0.05, "clip": 6.0}
    method = meeting(home, "flexp-sfl", meet=noisy)
    method.meet(FIRST)
    method.meet(LAST)
    assert all(bool(torch.isfinite(value).all()) for client in CLIENTS for value in classifier(method, client))
    with pytest.raises(ConfigError, match="set that, too"):
        config(home, method={"meet": {"on": True, "noise": 1.0}})
    numbers = {"task": "regression", "source": str(jsonl(home / "numbers.jsonl", head_rows("regression")))}
    with pytest.raises(ConfigError, match="numbers that are learned have no bound"):
        settle(config(home, method={"meet": noisy}, data={**numbers, "clients": {"cut": [1, 3]}}))


def test_alone_each_has_its_own_sums(home: Path) -> None:
    method = meeting(home, "local", model={"head": "closed-form"})
    method.meet(FIRST)
    x, y = plain_features(home, method, method.world.federation.clients[0].train)
    found = Discriminant(Statistics.of(x, y, 2))
    weight, _ = classifier(method, "north")
    expected = found.head(*found.chosen(found.losses(x, y))).weight
    assert torch.allclose(weight.double(), expected, atol=1e-3 * float(expected.abs().max()))
    assert method.account("north").training.bytes_up == 0


def test_without_a_gram_matrix_sums_are_small(home: Path) -> None:
    bytes_of = []
    for gram in (True, False):
        method = meeting(home, "fedavg", model={"head": "closed-form"})
        method.world.config.method.__dict__["meet"] = method.world.config.method.meet.model_copy(update={"gram": gram})
        method.meet(FIRST)
        bytes_of.append(method.account("north").training.bytes_up)
    assert bytes_of[0] - bytes_of[1] == 4 * 32 * 33 // 2 + 8 * 5 * 12  # one triangle, and the losses of five shrinkages


@pytest.mark.parametrize("name", ["flexp-sfl", "fedavg"])
def test_at_the_end_each_has_its_own_on_the_same_features(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(common: Any, own: Any, x: Tensor, y: Tensor, *_: Any, **__: Any) -> Any:
        return personal_head(common, own, x, y), "closed-form"

    monkeypatch.setattr(meetings, "choose", closed)
    method = meeting(home, name)
    method.world.config.method.__dict__["meet"] = method.world.config.method.meet.model_copy(update={"on": True})
    before = {client: method.trained_weights(client) for client in CLIENTS}
    method.meet(LAST)
    after = {client: method.trained_weights(client) for client in CLIENTS}
    for client in CLIENTS:
        assert not torch.equal(after[client]["classifier.weight"], before[client]["classifier.weight"])
        others = {key: value for key, value in after[client].items() if not key.startswith("classifier.")}
        assert equal(others, {key: before[client][key] for key in others})


@pytest.mark.parametrize("name", ["flexp-sfl", "fedavg", "split-fedavg", "closed-form"])
def test_resumed_equals_undisturbed_and_goes_where_the_model_goes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = config(
        home,
        method={"name": name, **ON},
        model={"id": str(home / "model"), **POOLED},
        train={"rounds": 2, "steps_per_round": 2, "batch_size": 4},
    )
    runner.run(run, tmp_path / "whole")
    kind = method_of(run)
    round_of = kind.train_round

    def stopped(self: Any, number: int, on_step: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        round_of(self, number, on_step)

    monkeypatch.setattr(kind, "train_round", stopped)
    with pytest.raises(KeyboardInterrupt):
        runner.run(run, tmp_path / "out")  # the first meeting and a round
    monkeypatch.undo()
    runner.resume(tmp_path / "out")
    there, here = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "out")
    for party, state in there.items():
        kept = {key for key in state if "seconds" not in key and not key.startswith("meter/")}
        assert equal({key: state[key] for key in kept}, {key: here[party][key] for key in kept}), party

    saved = open_run(tmp_path / "out")
    batch = saved.world.federation.task.collate(saved.client("south").test[:4])
    del batch["labels"]
    expected = saved.method.personal("south")(batch).logits
    export(RunModel(saved, "south"), tmp_path / "exported")
    with torch.no_grad():
        assert torch.equal(open_trained(tmp_path / "exported").generator(**batch).logits, expected)


def said(home: Path, **tables: Any) -> list[str]:
    return settle(config(home, **tables)).federation.notes


def test_what_is_asked_for_and_left_out_is_said(home: Path, tmp_path: Path) -> None:
    (line,) = [note for note in said(home, method={"name": "pretrained", **ON}) if "meet" in note]
    assert "pretrained knows no meeting" in line
    save_tiny("gpt2", tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    settings: dict[str, Any] = {"data": {"task": "causal-lm"}, "method": ON}
    (line,) = [note for note in said(tmp_path, **settings) if "meet" in note]
    assert "the task causal-lm has no closed form" in line
    summary = runner.run(config(tmp_path, **settings), tmp_path / "with")  # and the method is what it was
    without: RunConfig = config(tmp_path, data={"task": "causal-lm"})
    assert summary["scores"] == runner.run(without, tmp_path / "without")["scores"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"labels": ("no", "yes")},
        {"train": {"rounds": 1}},  # 2 steps of 4 for 12 examples
        {"data": {"clients": {"names": ["north"]}}},
        {"train": {"early_stopping": {"patience": 1}}, "data": {"validation_fraction": 0.2}},
        {"privacy": {"label_epsilon": 1.0}},
        {"server": {"noise": 1.0, "guard": {"clip": 1.0}}},
        {"method": {"name": "centralized"}},
        {"arch": "llama"},  # its classifier has no bias
    ],
    ids=[
        "meet",
        "two classes",
        "not seen once",
        "alone",
        "early stopping",
        "privacy",
        "noise",
        "no meeting",
        "no bias",
    ],
)
def test_unasked_clients_meet_where_a_classifier_of_many_begins_as_drawn(
    home: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    labels, arch = change.pop("labels", ("bad", "fair", "good")), change.pop("arch", "")
    if arch:
        save_tiny(arch, tmp_path / "model", task="sequence-classification")
        tokenizer().save_pretrained(tmp_path / "model")
    settings = content(tmp_path if arch else home, **change)
    settings["data"]["source"] = str(jsonl(tmp_path / "rows.jsonl", labelled(90, CLIENTS, labels)))
    found = settle(validate(settings, "auto"))
    on = not change and not arch and len(labels) > 2
    assert found.config.method.meet.on is on
    assert bool([note for note in found.federation.notes if "clients meet: " in note]) is on


def test_what_began_without_a_meeting_goes_on_without(home: Path, tmp_path: Path) -> None:
    asked = config(home)
    assert asked.method.meet.on == as_begun(asked, tmp_path).method.meet.on == "auto"
    for begun in ({}, {"method": {"meet": {"on": False}}}, {"method": {"meet": {"on": True}}}):
        (tmp_path / "config.json").write_text(json.dumps(begun), encoding="utf-8")
        assert as_begun(asked, tmp_path).method.meet.on is ("True" in str(begun))
    said = config(home, method={"meet": {"on": False}})
    assert fingerprint(said) != fingerprint(asked)  # a cell that was asked not to meet is none that was not asked
    source = jsonl(tmp_path / "three.jsonl", labelled(90, CLIENTS, ("bad", "fair", "good")))
    run, folder = config(home, data={"source": str(source)}, method={"meet": {"on": False}}), tmp_path / "run"
    runner.run(run, folder)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del content["method"]["meet"]["on"]  # as before there was a choice
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    runner.resume(folder, rounds=4)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["method"]["meet"]["on"] is False


def test_who_cannot_mask_sums_is_told_before_anything_starts(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(ConfigError, match=r"masks of their sums need the library cryptography: pip install"):
        Fleet(settle(config(home, method=ON)), tmp_path / "fleet")
    with pytest.raises(ConfigError, match="masks of their sums"):
        settle_client(config(home, method=ON), "north", None)
    assert not (tmp_path / "fleet").exists()


def test_a_classifier_without_a_bias_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", task="sequence-classification")
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r'set model\.pooling = "mean"'):
        runner.run(config(tmp_path, method=ON), tmp_path / "out")
    assert classifier_of(make_linear())[0] == "1"


def make_linear() -> Any:
    model: Any = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model.config = type("Config", (), {"num_labels": 2})
    return model


def test_waiting_for_the_others_is_not_computing() -> None:
    nothing: Any = None
    seat = Seat([], nothing, nothing, nothing, nothing, 0)

    def rounds() -> Any:
        total = yield {"x": torch.ones(1)}
        return total["x"]

    timed = seat._timed(rounds())
    next(timed)
    time.sleep(0.3)
    with pytest.raises(StopIteration) as end:
        timed.send({"x": torch.ones(1) * 3})
    assert end.value.value == 3
    assert seat.seconds < 0.2


def given(number: int, value: int, length: int = 1) -> SumRequest:
    return SumRequest(number, torch.full((length,), value), f"said with {value}")


def test_a_server_sums_for_those_it_knows_and_answers_again(tmp_path: Path) -> None:
    table = SumTable()
    with pytest.raises(LinkError, match=r"set method\.name, method\.meet\.on"):
        table.give("a", given(0, 1))
    table.open(["a", "b"], journal=Journal(tmp_path, "run", print))
    first = table.give("a", given(0, 1))
    assert not first.done()
    with pytest.raises(LinkError, match="other shapes"):
        table.give("b", given(0, 1, length=2))
    with pytest.raises(LinkError, match="this run has 8"):
        table.give("a", given(8, 1))
    table.give("a", given(0, 2))  # sent again over a new link: what came first is forgotten
    reply = table.give("b", given(0, 3)).result()
    assert reply.notes == {"a": "said with 2", "b": "said with 3"}
    assert reply.values_N is not None
    assert reply.values_N == 5
    again = SumTable()
    again.open(["a", "b"], journal=Journal(tmp_path, "run", print))
    assert again.give("a", given(0, 99)).result() == reply
