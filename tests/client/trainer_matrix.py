"""What of ``transformers.TrainingArguments`` is equal to whole training, is each half's own, or is refused.

The test of the same name tries every row; ``python -m tests.client.trainer_matrix`` writes docs/reference/trainer.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import transformers

from flexp.client.trainer_options import REFUSED

PAGE = Path(__file__).parents[2] / "docs/reference/trainer.md"


@dataclass(frozen=True)
class Case:
    """Options that one training run tries, with the values that are not the default's.

    Attributes:
        rows: of training data, in batches of four.
        also: options that say nothing by themselves, need what is not there (several processes, a tracker), or that
            other tests try.
        resumed: training stops after the first step and goes on in a new process.
    """

    about: str
    values: dict[str, Any]
    also: tuple[str, ...] = ()
    rows: int = 12
    resumed: bool = False


EQUAL = (
    Case(
        "data, logging, seeds",
        {
            **{"logging_strategy": "steps", "logging_steps": 1, "logging_first_step": True, "log_level": "error"},
            **{"logging_nan_inf_filter": True, "log_on_each_node": False, "run_name": "r", "report_to": "none"},
            **{"dataloader_drop_last": True, "dataloader_pin_memory": False, "dataloader_num_workers": 0},
            **{"remove_unused_columns": True, "data_seed": 5, "seed": 7, "use_cpu": True, "use_cache": False},
            **{"per_device_train_batch_size": 5, "per_device_eval_batch_size": 3, "max_steps": 3},
            **{"average_tokens_across_devices": False, "torch_empty_cache_steps": 1, "disable_tqdm": True},
            **{"accelerator_config": {"split_batches": True}, "include_num_input_tokens_seen": "all"},
            **{"ddp_find_unused_parameters": False, "full_determinism": True, "skip_memory_metrics": True},
        },
        also=(
            *("output_dir", "log_level_replica", "project", "trackio_space_id", "trackio_bucket_id"),
            *("trackio_static_space_id", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
            *("dataloader_multiprocessing_context", "dataloader_in_order", "save_on_each_node", "do_train", "do_eval"),
            *("do_predict", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
            *("ddp_timeout",),
        ),
        rows=22,
    ),
    Case("label smoothing", {"label_smoothing_factor": 0.1, "label_names": ["labels"]}),
    Case(
        "accumulation, with a last group of one batch",
        {"gradient_accumulation_steps": 2, "num_train_epochs": 1, "max_steps": -1},
        rows=20,
    ),
    Case(
        "checkpointing of activations (and by its older name gradient_checkpointing)",
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        also=("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    ),
    Case("NEFTune", {"neftune_noise_alpha": 5.0}),
    Case("order", {"train_sampling_strategy": "group_by_length"}, also=("length_column_name",)),
    Case(
        "evaluation",
        {
            **{"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1, "eval_on_start": True},
            **{"eval_do_concat_batches": False, "eval_accumulation_steps": 1, "include_for_metrics": ["inputs"]},
            **{"prediction_loss_only": False, "eval_use_gather_object": False},
        },
        also=("batch_eval_metrics",),
    ),
    Case("bfloat16, where model and server have autocast = 'bfloat16'", {"bf16": True}),
    Case("a batch that does not fit into memory", {"auto_find_batch_size": True}),
    Case(
        "checkpoints, of a server in this process",
        {
            **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "ignore_data_skip": True},
            **{"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "loss"},
            **{"greater_is_better": False, "restore_callback_states_from_checkpoint": True, "eval_steps": 1},
        },
        also=("resume_from_checkpoint", "save_only_model"),
        resumed=True,
    ),
)
"""Losses, scores, predictions and weights are those of the whole model, bit for bit."""

OWN = (
    Case(
        "the optimiser",
        {
            **{"learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.1},
            **{"optim": "adamw_torch", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
            **{"max_grad_norm": 0.1},
        },
        also=("lr_scheduler_kwargs",),
    ),
    Case("another one", {"optim": "sgd", "learning_rate": 0.1}),
)
"""They rule the client's half; the server's has rules of its own. Equal where both sides are told the same."""

TRIED: dict[str, Any] = {
    **dict.fromkeys(["fp16", "bf16", "bf16_full_eval", "fp16_full_eval", "tf32", "torch_compile"], True),
    **dict.fromkeys(["use_liger_kernel", "enable_jit_checkpoint", "sync_ref_model", "push_to_hub"], True),
    "optim": "adafactor",
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "fsdp": "full_shard",
    "parallelism_config": object(),
    "debug": ["underflow_overflow"],
    "local_rank": 0,
    "load_best_model_at_end": True,
}
"""With what each refusal is tried; ``local_rank`` with two GPUs, ``load_best_model_at_end`` over a network."""
WITH = {
    "torch_compile": ("torch_compile_backend", "torch_compile_mode"),
    "use_liger_kernel": ("liger_kernel_config",),
    "fsdp": ("fsdp_config",),
    "optim": ("optim_args", "optim_target_modules"),
    "sync_ref_model": ("ref_model_mixup_alpha", "ref_model_sync_steps"),
    "push_to_hub": (
        *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    ),
}
"""What says nothing without the option that is refused."""


def missing() -> set[str]:
    """Options of which the page says nothing."""
    said = {name for case in (*EQUAL, *OWN) for name in (*case.values, *case.also)}
    said |= REFUSED.keys() | {name for names in WITH.values() for name in names}
    return {field.name for field in fields(transformers.TrainingArguments)} - said


def page() -> str:
    """docs/reference/trainer.md."""
    rows = [
        *(_row(case, "equal") for case in EQUAL),
        *(_row(case, "each half's own") for case in OWN),
    ]
    refusals = [f"| {_names((option, *WITH.get(option, ())))} | {why} |" for option, (_, why) in REFUSED.items()]
    return f"""# A split model under transformers' Trainer

Written by `python -m tests.client.trainer_matrix`. `tests/client/test_trainer_matrix.py` tries every row with
transformers {transformers.__version__}, a causal language model and a text classifier, and fails where this page is
stale.

*Equal*: losses, scores, predictions and weights are, bit for bit, those of the whole model under the same Trainer,
where the server's optimiser is told the same (`Server(optimizer=…)`, `[train.shared]`) and there is no dropout. *Each
half's own*: the option rules this client's half, and the server's half follows the server's own rule, as with every
client of a server. So `max_grad_norm` clips the client's half by its own norm, and `weight_decay` spares biases and
norms on the client's side alone. 0 on both sides is equal to whole training. `total_flos` and `grad_norm` count this
half.

| what | options that were tried | and with them, without a value of their own | causal LM | classifier |
|---|---|---|---|---|
{chr(10).join(rows)}

Seq2SeqTrainer's `predict_with_generate` (with `generation_max_length`) gives what the whole model writes. trl's
`SFTTrainer` (extra `trl`) trains a causal language model on `messages`, with packing or without, as it trains the whole
one. So does its `DPOTrainer`, with `precompute_ref_log_probs=True`, or with a split `ref_model` on a server of its own
(one that this training changes is refused). Without either it loads a whole reference model here. A loss on the load
of experts (`router_aux_loss_coef` of a mixture) needs all blocks: the first batch is refused unless it is 0.

## Refused

With one line, when the Trainer is made and once more when training begins; nothing has been trained then.

| option | the line says that it |
|---|---|
{chr(10).join(refusals)}
| `model_init`, `hyperparameter_search` | would begin anew with this client's half alone; give the Trainer a model |

## What is saved

A checkpoint's `model.safetensors` holds this client's half. Beside it the callback writes `flexp-server.safetensors`,
the half of a server in this process with its optimiser. Resuming and
`load_best_model_at_end` restore it, unless other clients have trained the server since. Over a network the server's
half stays where it is: training goes on, but nothing can be resumed from such a checkpoint.

`trainer.save_model(DIR)` and `model.save_pretrained(DIR)` write the whole personal model for transformers, with the
middle from the server, which must allow it (`Server.from_pretrained(…, allow_export=True)`, `flexp server
--allow-export`); `model.save_pretrained(DIR, adapter=True)` the LoRA adapter alone, for peft.
"""


def _row(case: Case, verdict: str) -> str:
    return f"| {case.about} | {_names(tuple(case.values))} | {_names(case.also)} | {verdict} | {verdict} |"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
