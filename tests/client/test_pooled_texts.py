"""``privacy.pool``: of each text one vector goes up, and the blocks after the cut go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flexp.attacks.base import Public, Sent
from flexp.attacks.pursuit import Pursuit
from flexp.attacks.words import Words
from flexp.config import RunConfig
from flexp.data.types import Batch
from flexp.errors import ConfigError, ModelError, PrivacyError
from flexp.export.base import write_base
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.export.saved import look_into
from flexp.export.trained import OWN
from flexp.files import read_json
from flexp.links.messages import ForwardRequest
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.models.loading import load_stage
from flexp.run.audited import AUDIT
from flexp.run.runner import run
from flexp.run.settle import build_world
from tests import tiny

from .test_guarding import seen

S, BLOCKS = 2, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pooled")
    tiny.bert_folder(place / "model")
    (place / "public.txt").write_text("good bad fine poor and many other words that people use\n" * 4)
    return place


def config(folder: Path, privacy: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    told = {"pool": True, "public": str(folder / "public.txt")} | (privacy or {})
    base: dict[str, Any] = {"data": {"clients": tiny.each(cut=[[S, BLOCKS]])}, "model": {"pooling": "mean"},
                            "train": {"rounds": 2, "steps_per_round": 2}}  # fmt: skip
    base |= changes
    base["model"] = {"id": str(folder / "model"), **base["model"]}
    return tiny.config(folder, privacy=told, **base)


def whole(bert: Any, batch: Batch, classifier: Any) -> torch.Tensor:
    """The logits, by plain transformers and a mean between two of its layers."""
    mask_BT = batch["attention_mask"]
    z_BTH = bert(input_ids=batch["input_ids"], attention_mask=mask_BT, output_hidden_states=True).hidden_states[S]
    weight_BT1 = mask_BT.unsqueeze(-1).float()
    hidden_B1H = ((z_BTH * weight_BT1).sum(1) / weight_BT1.sum(1)).unsqueeze(1)
    for layer in bert.encoder.layer[S:]:
        hidden_B1H = layer(hidden_B1H)
    logits_BC: torch.Tensor = classifier(hidden_B1H[:, 0])
    return logits_BC


def test_loss_and_gradients_are_those_of_a_model_with_a_mean_between_its_blocks(folder: Path) -> None:
    method = FlexpSfl(build_world(config(folder)))
    trainer = next(iter(method.clients.values()))
    batch = next(iter(trainer.pieces()))[1]
    batch["attention_mask"][0, 5:] = 0  # texts of several lengths
    batch["attention_mask"][1, 6:] = 0
    bert = transformers.BertModel.from_pretrained(folder / "model").eval()
    theirs = trainer.model.stage.model.classifier
    classifier = torch.nn.Linear(theirs.in_features, theirs.out_features)
    classifier.load_state_dict(theirs.state_dict())
    expected = whole(bert, batch, classifier)
    loss = torch.nn.functional.cross_entropy(expected, batch["labels"])
    loss.backward()
    with seen(method) as requests:
        output = trainer.model.train()(**batch)
        output.loss.backward()
    assert torch.allclose(output.logits, expected, atol=1e-6)
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(theirs.weight.grad, classifier.weight.grad, atol=1e-6)
    for index in range(S):
        name = "attention.self.query.weight"
        mine = trainer.model.stage.blocks[index].get_parameter(name).grad
        assert torch.allclose(mine, bert.encoder.layer[index].get_parameter(name).grad, atol=1e-7)
    (forward,) = [request for request in requests if isinstance(request, ForwardRequest)]
    assert forward.hidden_BTH.shape == (len(batch["labels"]), 1, bert.config.hidden_size)
    assert forward.mask_BT is not None
    assert forward.mask_BT.shape == (len(batch["labels"]), 1)


def test_all_that_crosses_is_one_vector_of_each_text(folder: Path) -> None:
    method = FlexpSfl(build_world(config(folder)))
    with seen(method) as requests:
        method.train_round(1, lambda _: None)
        name = next(iter(method.clients))
        trainer = method.clients[name]
        method.personal(name)(trainer.task.collate(trainer.data.test[:3]))
    forwards = [request for request in requests if isinstance(request, ForwardRequest)]
    assert {request.train for request in forwards} == {True, False}
    assert {request.hidden_BTH.shape[1] for request in forwards} == {1}


def test_an_audit_reads_words_and_a_bound_is_checked(folder: Path) -> None:
    told = {"noise": 0.5, "max_content_words": 0.99, "audit": True}
    run(config(folder, told), folder / "audited")
    readings = read_json(folder / "audited" / AUDIT)["readings"]
    assert {reading["attack"] for reading in readings} == {"table", "linear", "words", "pursuit"}
    assert {reading["head"] for reading in readings} >= {"pretrained", "taught"}
    hard = {"noise": 50.0, "max_content_words": 0.0}  # of a vocabulary this small something is always guessed
    with pytest.raises(PrivacyError, match=r"privacy\.max_content_words"):
        run(config(folder, hard), folder / "hard")


def test_an_exported_model_answers_alike_in_plain_transformers(folder: Path) -> None:
    out, saved = folder / "whole", folder / "run"
    run(config(folder), saved)
    model = open_trained(saved, "north")
    export(model, out)
    batch = model.task.collate(model.sets[OWN][:5])
    expected = model.forward({key: value for key, value in batch.items() if key != "labels"}).logits
    model.close()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True).eval()
    found = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(found, expected, atol=1e-5)
    plain.early = None
    other = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert not torch.allclose(other, expected, atol=1e-3), "the mean between its blocks makes no difference"
    with pytest.raises(ModelError, match=r"was trained with privacy\.pool"):
        load_stage(config(folder).model.at(str(out)), "sequence-classification")
    with pytest.raises(ConfigError, match="leave out --base"):
        write_base(look_into(saved), folder / "base")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"pooling": "checkpoint"}}, r'set model\.pooling = "mean"'),
        ({"privacy": {"penalty": "nopeek"}}, r"privacy\.pool and privacy\.penalty"),
        ({"recut": {"on": True}}, r"\[privacy\] is for one cut"),
    ],
)
def test_what_does_not_go_with_it_is_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    told = changes.pop("privacy", None)
    with pytest.raises(ConfigError, match=says):
        config(folder, told, **changes)


@pytest.mark.parametrize(("noise", "least", "most"), [(0.0, 0.95, 1.0), (3.0, 0.0, 0.5)])
def test_tokens_that_add_up_to_a_mean_are_found(noise: float, least: float, most: float) -> None:
    """However often a word stands in a text; noise on the mean hides them."""
    generator = torch.Generator().manual_seed(0)
    table_VH = torch.randn(60, 32, generator=generator)
    texts_UT = torch.randint(60, (200, 6), generator=generator)
    apart = Sent.of([table_VH[texts_UT]], [torch.ones(texts_UT.shape, dtype=torch.bool)])

    def cover(means_UH: torch.Tensor) -> torch.Tensor:
        return means_UH + noise * torch.randn(means_UH.shape, generator=generator)

    sent, ids_N = apart.as_one(cover), texts_UT.flatten()
    attack = Pursuit()
    attack.learn(Public(None, 1, sent, ids_N, apart))  # type: ignore[arg-type]
    assert least <= float((attack.read(sent, ids_N) == ids_N).float().mean()) <= most


def test_words_are_read_out_of_a_mean_that_tells_them_in_any_order() -> None:
    """Every word has a direction of its own, so a mean tells its text's words, and no places."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randperm(40, generator=generator)[:5] for _ in range(400)]
    tokens_TH = torch.eye(40)

    def sent(some: list[torch.Tensor]) -> tuple[Sent, torch.Tensor]:
        there = torch.ones(len(some), 5, dtype=torch.bool)
        return Sent.of([tokens_TH[torch.stack(some)]], [there]), torch.cat(some)

    public, ids_N = sent(texts[:350])
    private, truth_N = sent(texts[350:])
    one = private.as_one()
    assert torch.allclose(one.z_NH[:5], tokens_TH[texts[350]].mean(0).expand(5, -1))
    attack = Words()
    attack.learn(Public(None, 1, public.as_one(), ids_N))  # type: ignore[arg-type]
    read_N = attack.read(one, truth_N)
    assert float((read_N == truth_N).float().mean()) > 0.99
    guess_N = attack.guess(one)
    assert float((guess_N == truth_N).float().mean()) < 0.5
    for text in range(50):
        assert sorted(read_N[5 * text : 5 * text + 5].tolist()) == sorted(guess_N[5 * text : 5 * text + 5].tolist())
