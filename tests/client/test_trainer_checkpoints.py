"""A Trainer's checkpoints hold both halves: the client's as the Trainer writes it, the server's by FlexP's callback."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

import flexp
from flexp.client.callback import FILE
from flexp.errors import ConfigError, LinkError, ModelError, StorageError
from flexp.links.opening import loopback
from flexp.models.zoo import save_tiny
from tests.client.trainer_tools import Rows, all_trained, assert_equal, federation, losses, trainer, whole
from tests.harness import copied

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}


def test_resuming_equals_never_having_stopped(tmp_path: Path) -> None:
    """In a new process (a new server, a new client), and from a folder that is not the Trainer's own."""
    here = federation("bert")
    split = here.client("a", (2, 3))
    made = trainer(split, here, tmp_path / "one", **SAVING)
    made.train()
    again = federation("bert")
    resumed = again.client("a", (2, 3))
    other = trainer(resumed, again, tmp_path / "two", **SAVING)
    other.train(resume_from_checkpoint=str(tmp_path / "one/checkpoint-3"))
    assert losses(other) == losses(made)
    assert_equal(all_trained(again, resumed), all_trained(here, split))
    assert resumed.link.meter.state()["training"]["bytes_up"] == split.link.meter.state()["training"]["bytes_up"]


def test_resuming_equals_resuming_the_whole_model(tmp_path: Path) -> None:
    """And with it the last, shorter group of an epoch: five batches in groups of two."""
    settings = {**SAVING, "gradient_accumulation_steps": 2, "rows": 20}
    here = federation("llama")
    trainer(here.client("a", (2, 3)), here, tmp_path / "split", **settings).train()
    trainer(whole(here)[0], here, tmp_path / "whole", **settings).train()
    again = federation("llama")
    split, (model, stage) = again.client("a", (2, 3)), whole(again)
    both = [trainer(each, again, tmp_path / name, **settings) for each, name in ((split, "split"), (model, "whole"))]
    for each in both:
        shutil.rmtree(Path(each.args.output_dir) / "checkpoint-6")
        each.train(resume_from_checkpoint=True)
    assert losses(both[0]) == losses(both[1])
    assert_equal(all_trained(again, split), copied(stage.trainable()))


def test_the_best_model_at_the_end_is_the_whole_models(tmp_path: Path) -> None:
    """The metric is made up, so that the best checkpoint is not the last one."""
    settings = {
        **SAVING,
        **{"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": "made_up"},
    }
    here = federation("llama")
    split, (model, stage) = here.client("a", (2, 3)), whole(here)
    both = [trainer(each, here, tmp_path / str(number), **settings) for number, each in enumerate((split, model))]
    for each in both:
        each.compute_metrics = lambda _, made=each: {"made_up": -abs(made.state.global_step - 2)}
        each.train()
        assert each.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_equal(all_trained(here, split), copied(stage.trainable()))
    assert both[0].evaluate()["eval_loss"] == both[1].evaluate()["eval_loss"]


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    here = federation("bert")
    trainer(here.client("a", (2, 3)), here, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    place = tmp_path / "checkpoint-1"

    def resume(model: Any, where: Any = here) -> None:
        trainer(model, where, tmp_path, max_steps=2).train(resume_from_checkpoint=str(place))

    again = federation("bert")
    with pytest.raises(ModelError, match=r"has the blocks \[0, 1, 3\], this client's are \[0, 2, 3\]"):
        resume(again.client("a", (1, 2)), again)
    other = here.client("b", (2, 3))
    other(**here.batch()).loss.backward()
    with pytest.raises(ConfigError, match="would undo what b has trained on the server since"):
        resume(here.client("a", (2, 3)))
    (place / "optimizer.pt").unlink()
    again = federation("bert")
    with pytest.raises(StorageError, match="has no optimizer"):
        resume(again.client("a", (2, 3)), again)
    (place / FILE).write_bytes(b"damaged")
    with pytest.raises(StorageError, match="cannot be read"):
        resume(again.client("a", (2, 3)), again)
    (place / FILE).unlink()
    with pytest.raises(StorageError, match="the checkpoint of step 1 has no server's half"):
        resume(again.client("a", (2, 3)), again)


def test_over_a_network_the_servers_half_is_not_taken_for_granted(tmp_path: Path, caplog: Any) -> None:
    here = federation("bert")
    with loopback(here.server, "a") as link:
        model = here.client("a", (2, 3), link=link)
        made = trainer(model, here, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        made.train()
        assert "checkpoint-1 and all that follow hold this client's half alone" in caplog.text
        assert caplog.text.count("this client's half") == 1
        with pytest.raises(ConfigError, match="the server's is over a network and went on"):
            trainer(model, here, tmp_path, max_steps=3).train(resume_from_checkpoint=True)
        with pytest.raises(ConfigError, match="load_best_model_at_end = True would set back this client's half alone"):
            trainer(model, here, tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    assert here.server.shared.version == 2  # nothing was trained by those


def test_the_callback_is_there_by_itself_and_leaves_whole_models_alone(tmp_path: Path) -> None:
    here = federation("bert")
    made = trainer(here.client("a", (2, 3)), here, tmp_path, max_steps=1, save_strategy="steps")
    assert [type(each) for each in made.callback_handler.callbacks].count(flexp.TrainerCallback) == 1
    made.add_callback(flexp.TrainerCallback)  # once more does no harm
    made.train()
    assert (tmp_path / "checkpoint-1" / FILE).is_file()
    model = whole(here)[0]
    trainer(model, here, tmp_path / "whole", max_steps=1, save_strategy="steps").train()
    assert not (tmp_path / "whole/checkpoint-1" / FILE).exists()
    trainer(here.client("a", (2, 3)), here, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_a_model_that_is_made_anew_is_refused(tmp_path: Path) -> None:
    here = federation("bert")
    made = transformers.Trainer(
        model_init=lambda: here.client("a", (2, 3)),
        args=transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=trainer(here.client("b", (2, 3)), here, tmp_path).train_dataset,
    )
    with pytest.raises(ConfigError, match="model_init"):
        made.train()
    assert here.server.shared.version == 0


def test_save_model_writes_what_transformers_loads(tmp_path: Path) -> None:
    """Into the Trainer's own folder too, where checkpoints and an earlier half are."""
    here, folder = federation("bert"), save_tiny("bert", tmp_path / "model")
    server = flexp.Server.from_pretrained(folder, "sequence-classification", allow_export=True)
    split = flexp.SplitModelForSequenceClassification.from_pretrained(folder, cut=(2, 3), link=server.connect("a"))
    made = trainer(split, here, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    made.train()
    (tmp_path / "out/model.safetensors").write_bytes(b"of an earlier version")
    answers = made.predict(Rows(here, 5)).predictions
    made.save_model()
    made.save_model()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    expected = trainer(plain, here, tmp_path / "plain").predict(Rows(here, 5)).predictions
    assert (answers == expected).all()
    assert (tmp_path / "out/checkpoint-2" / FILE).is_file()
    assert not list(tmp_path.glob("out/flexp-*"))
    kept = flexp.Server.from_pretrained(folder, "sequence-classification")
    split = flexp.SplitModelForSequenceClassification.from_pretrained(folder, cut=(2, 3), link=kept.connect("a"))
    with pytest.raises(LinkError, match="gives no shared blocks away"):
        trainer(split, here, tmp_path / "none").save_model()
    assert not list((tmp_path / "none").iterdir())


def test_nothing_is_made_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = federation("bert")

    def made(*_: Any, **__: Any) -> None:
        raise AssertionError("a repository was asked for")

    monkeypatch.setattr(transformers.trainer, "hf_api", made)
    with pytest.raises(ConfigError, match="push_to_hub = True publishes this client's half"):
        trainer(here.client("a", (2, 3)), here, tmp_path, push_to_hub=True)
    with pytest.raises(ConfigError, match="push_to_hub"):
        trainer(here.client("b", (2, 3)), here, tmp_path).push_to_hub()
    with pytest.raises(AssertionError):  # a whole model's is
        trainer(whole(here)[0], here, tmp_path, push_to_hub=True)
