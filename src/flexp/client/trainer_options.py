"""What a ``transformers.TrainingArguments`` may ask for that a split model cannot give exactly, and why.

What is not here is either equal to whole training or each party's own matter; docs/reference/trainer.md has the list,
which a test makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from flexp.client.joined import JoinedModel
from flexp.errors import ConfigError
from flexp.links.opening import server_behind

OPTIMISERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Those that a server has as well."""
ONE_PROCESS = "divides a model over processes, and a client is one; leave it out"


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))


def _local(model: JoinedModel) -> bool:
    return server_behind(model.link) is not None


REFUSED: dict[str, tuple[Callable[[Any, JoinedModel], bool], str]] = {
    "fp16": (
        lambda args, _: args.fp16,
        "scales the loss by a factor that the server does not know; use bf16 with autocast = 'bfloat16' on both sides",
    ),
    "bf16": (
        lambda args, model: args.bf16 and model.stage.autocast is not torch.bfloat16,
        "leaves the server's blocks in another precision; load model and server with autocast='bfloat16'",
    ),
    "bf16_full_eval": (
        lambda args, _: args.bf16_full_eval,
        "turns this client's half alone into bfloat16; load model and server with dtype='bfloat16'",
    ),
    "fp16_full_eval": (
        lambda args, _: args.fp16_full_eval,
        "turns this client's half alone into float16; load model and server with dtype='bfloat16'",
    ),
    "tf32": (
        lambda args, _: args.tf32,
        "changes this process's matrix products alone; set torch.backends on every machine, and leave tf32 out",
    ),
    "torch_compile": (lambda args, _: args.torch_compile, "cannot compile across the link; leave it out"),
    "use_liger_kernel": (
        lambda args, _: args.use_liger_kernel,
        "replaces this client's blocks alone; leave it out",
    ),
    "optim": (
        lambda args, _: _name(args.optim) not in OPTIMISERS,
        f"is no optimiser that the server has for its blocks; use one of {', '.join(OPTIMISERS)}, or pass "
        "optimizers=(…) for the client's half alone",
    ),
    "activation_checkpointing_kwargs": (
        lambda args, _: bool((args.activation_checkpointing_kwargs or {}).get("use_reentrant")),
        "has use_reentrant, which hides from the link what was computed; leave it out",
    ),
    "deepspeed": (lambda args, _: bool(args.deepspeed), ONE_PROCESS),
    "fsdp": (lambda args, _: bool(args.fsdp), ONE_PROCESS),
    "parallelism_config": (lambda args, _: args.parallelism_config is not None, ONE_PROCESS),
    "debug": (
        lambda args, _: "underflow_overflow" in map(_name, args.debug),
        "watches blocks that are elsewhere; leave it out: a gradient that is not finite ends training by itself",
    ),
    "local_rank": (
        lambda args, _: args.world_size > 1 or args.n_gpu > 1,
        "has several processes or GPUs, which would be several clients under one name; use one "
        "(CUDA_VISIBLE_DEVICES=0)",
    ),
    "enable_jit_checkpoint": (
        lambda args, _: args.enable_jit_checkpoint,
        "writes checkpoints without the server's half; use save_steps",
    ),
    "load_best_model_at_end": (
        lambda args, model: args.load_best_model_at_end and not _local(model),
        "would set back this client's half alone, for the server's is over a network; leave it out",
    ),
    "sync_ref_model": (
        lambda args, _: getattr(args, "sync_ref_model", False),
        "would move this client's half of trl's reference model alone; leave it out",
    ),
    "push_to_hub": (
        lambda args, _: args.push_to_hub,
        "publishes this client's half with each checkpoint; leave it out, and push what trainer.save_model(DIR) wrote",
    ),
}
"""Option → whether it is in the way, and the rest of the line."""


def refuse_options(args: Any, model: JoinedModel) -> None:
    """Refuse what a split model cannot give.

    Raises:
        ConfigError: one line: the option, why, and what to do.
    """
    for option, (in_the_way, _) in REFUSED.items():
        if in_the_way(args, model):
            refuse(option, args)


def refuse(option: str, args: Any) -> NoReturn:
    """Refuse one option. Raises ConfigError."""
    raise ConfigError(f"TrainingArguments.{option} = {_name(getattr(args, option, True))} {REFUSED[option][1]}")
