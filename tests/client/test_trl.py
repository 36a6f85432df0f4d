"""trl's SFTTrainer, unchanged, trains a split model on chat messages as it trains the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers

from flexp.errors import ConfigError
from flexp.links.grpc import connect, serve
from flexp.links.opening import same_server
from tests.client.trainer_tools import LR, Rows, all_trained, assert_equal, federation, losses, quiet, whole
from tests.data.tools import tokenizer
from tests.harness import copied

trl = pytest.importorskip("trl")
STEPS = 3
CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


def messages(count: int) -> datasets.Dataset:
    """Conversations of unequal lengths."""
    rows = [
        [
            {"role": "user", "content": " ".join(f"w{word}" for word in range(row % 3 + 1))},
            {"role": "assistant", "content": " ".join(f"w{row + word}" for word in range(row % 5 + 1))},
        ]
        for row in range(count)
    ]
    return datasets.Dataset.from_dict({"messages": rows})


def train(folder: Path, *, split: bool, **options: Any) -> Any:
    here = federation("llama", steps=STEPS)
    model, stage = (here.client("a", (2, 3)), None) if split else whole(here)
    settings: dict[str, Any] = {
        **{"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": LR},
        **{"lr_scheduler_type": "linear", "max_grad_norm": 0.0, "logging_steps": 1, "report_to": "none", "bf16": False},
        **{"use_cpu": True, "disable_tqdm": True, "max_length": 24, "save_strategy": "no"},
    }
    words = tokenizer()
    words.chat_template = CHAT
    made = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings | options),
        train_dataset=messages(20),
        eval_dataset=messages(5),
        processing_class=words,
    )
    quiet(made).train()
    weights = all_trained(here, model) if split else copied(stage.trainable())  # type: ignore[union-attr]
    accuracy = [entry.get("mean_token_accuracy") for entry in made.state.log_history]
    return losses(made), accuracy, made.evaluate()["eval_loss"], weights


@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 2, "save_strategy": "steps"}, {"packing": True, "label_smoothing_factor": 0.1}],
    ids=["plain", "packed"],
)
def test_supervised_fine_tuning_on_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("CI", "1")  # trl counts its users otherwise
    monkeypatch.setattr(datasets.utils.logging, "is_progress_bar_enabled", lambda: False)
    one, other = (train(tmp_path / str(split), split=split, **options) for split in (True, False))
    assert len(one[0]) == STEPS
    assert one[:3] == other[:3]
    assert_equal(one[3], other[3])


def preferences(folder: Path, model: Any, reference: Any = None, peft_config: Any = None, **options: Any) -> Any:
    """trl's DPOTrainer on answers of unequal lengths."""
    rows = [
        {
            "prompt": f"w{k}",
            "chosen": f" w{k + 1} w{k + 2}",
            "rejected": " ".join(f" w{k + j}" for j in range(k % 4 + 1)),
        }
        for k in range(12)
    ]
    settings: dict[str, Any] = {
        **{"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": LR, "max_grad_norm": 0.0},
        **{"logging_steps": 1, "report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True},
        **{"lr_scheduler_type": "linear", "save_strategy": "no"},
    }
    made = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(str(folder), **settings | options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(pad_token="[EOS]"),
        peft_config=peft_config,
    )
    return quiet(made)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "precomputed"])
def test_preferences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: bool) -> None:
    """DPO against a reference model on a server of its own, or against what the model said before it was trained."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(datasets.utils.logging, "is_progress_bar_enabled", lambda: False)
    found = []
    for split in (True, False):
        here, other = federation("llama", steps=2), federation("llama")
        model, stage = (here.client("a", (2, 3)), None) if split else whole(here)
        against = (other.client("a", (2, 3)) if split else whole(other)[0]) if reference else None
        made = preferences(tmp_path / str(split), model, against, precompute_ref_log_probs=not reference)
        made.train()
        found.append((losses(made), all_trained(here, model) if split else copied(stage.trainable())))  # type: ignore[union-attr]
    assert found[0][0] == found[1][0]
    assert len(set(found[0][0])) == 2
    assert_equal(found[0][1], found[1][1])


def test_what_was_computed_before_the_server_learnt_is_no_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trl keeps a reference's answers by a hash of the tensors that are here; nothing is preferred before training."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(datasets.utils.logging, "is_progress_bar_enabled", lambda: False)
    for factor in (1.0, 1.5):
        here = federation("llama", steps=1)
        with torch.no_grad():
            for value in here.server.shared.updater.parameters.values():
                value.mul_(factor)
        made = preferences(tmp_path, here.client("a", (2, 3)), precompute_ref_log_probs=True, max_steps=1)
        made.train()
        assert made.state.log_history[0]["rewards/margins"] == 0.0


def test_references_and_adapters_of_one_half_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(datasets.utils.logging, "is_progress_bar_enabled", lambda: False)
    here, other = federation("llama"), federation("llama")
    model, reference = here.client("a", (2, 3)), other.client("a", (2, 3))
    with pytest.raises(ConfigError, match=r"TrainingArguments\.sync_ref_model = True would move this client's half"):
        preferences(tmp_path, model, reference, sync_ref_model=True)
    for checkpointing in (True, False):
        with pytest.raises(ConfigError, match="peft around a split model would adapt this client's half alone"):
            preferences(tmp_path, model, None, peft.LoraConfig(), gradient_checkpointing=checkpointing)
    with pytest.raises(ConfigError, match="ref_model runs on the server that this Trainer trains"):
        preferences(tmp_path, here.client("b", (2, 3)), here.client("c", (2, 3))).train()
    assert here.server.shared.version == 0
    with serve(here.server) as serving:
        links = [connect(f"grpc://{serving.address}", name) for name in ("d", "e")]
        assert same_server(*links)
        assert not same_server(links[0], model.link)
        for link in links:
            link.close()


def test_what_trl_would_do_behind_the_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    with pytest.raises(ConfigError, match=r"TrainingArguments\.use_liger_kernel = True"):
        train(tmp_path, split=True, use_liger_kernel=True)


def test_generation_in_evaluation(tmp_path: Path) -> None:
    """transformers' Seq2SeqTrainer with ``predict_with_generate``."""
    here = federation("llama", steps=1)
    answers = []
    for name, model in (("split", here.client("a", (2, 3))), ("whole", whole(here)[0])):
        model.generation_config.pad_token_id = 0
        args = transformers.Seq2SeqTrainingArguments(
            str(tmp_path / name),
            **{"max_steps": 1, "learning_rate": LR, "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none"},
            **{"use_cpu": True, "disable_tqdm": True, "predict_with_generate": True, "generation_max_length": 16},
        )
        made = transformers.Seq2SeqTrainer(model=model, args=args, train_dataset=Rows(here, 8))
        quiet(made).train()
        answers.append(made.predict(Rows(here, 4)))
    assert (answers[0].predictions == answers[1].predictions).all()
    assert answers[0].metrics["test_loss"] == answers[1].metrics["test_loss"]
