"""What split models put into the Trainers of transformers and trl.

A Trainer asks every model whether its loss counts items; a split model answers, and lets every Trainer that is made
from now on begin with FlexP's callback (:func:`attend`). No callback is told of what a user asks of a Trainer by name,
so some methods look at the model first.
"""

from __future__ import annotations

import functools
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexp.client.callback import TrainerCallback
from flexp.client.joined import JoinedModel
from flexp.client.trainer_options import refuse
from flexp.errors import ConfigError, LinkError
from flexp.links.opening import same_server


def attend() -> None:
    """Let every Trainer that is made from now on begin with the callback, if there are Trainers at all."""
    trainer: Any = sys.modules.get("transformers.trainer")
    if trainer is None:
        return
    for name in ("trl.trainer.dpo_trainer", "trl.trainer.kto_trainer"):
        module: Any = sys.modules.get(name)
        usual = getattr(module, "hash_module", None)
        if usual is not None and not isinstance(usual, _Hash):
            module.hash_module = _Hash(usual)
    if TrainerCallback in trainer.DEFAULT_CALLBACKS:
        return
    trainer.DEFAULT_CALLBACKS.append(TrainerCallback)
    for name, instead in (("train", _train), ("save_model", _save_model), ("init_hf_repo", _publish)):
        setattr(trainer.Trainer, name, _for_split(getattr(trainer.Trainer, name), instead))


class _Hash:
    """trl's hash of a reference model, by which it finds what it computed with the same one earlier. That of a split
    model is another one each time: what its server has learnt meanwhile is not in the client's tensors."""

    def __init__(self, usual: Callable[[Any], str]) -> None:
        self.usual = usual

    def __call__(self, model: Any) -> str:
        return secrets.token_hex(32) if isinstance(model, JoinedModel) else self.usual(model)


def _for_split(usual: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """``usual``, a Trainer's method, but ``instead`` where the model is a split one."""

    @functools.wraps(usual)
    def method(trainer: Any, *args: Any, **options: Any) -> Any:
        chosen = functools.partial(instead, usual) if isinstance(trainer.model, JoinedModel) else usual
        return chosen(trainer, *args, **options)

    return method


def _train(usual: Callable[..., Any], trainer: Any, *args: Any, **options: Any) -> Any:
    """Train, where a reference model of trl's stays what it is.

    Raises:
        ConfigError: its middle is trained.
    """
    reference, known = getattr(trainer, "ref_model", None), getattr(trainer.args, "precompute_ref_log_probs", False)
    if isinstance(reference, JoinedModel) and not known and same_server(reference.link, trainer.model.link):
        raise ConfigError(
            "ref_model runs on the server that this Trainer trains, so it would change with it; give it a server of "
            "its own, or leave it out and set precompute_ref_log_probs=True"
        )
    try:
        return usual(trainer, *args, **options)
    except BaseException:
        if isinstance(trainer.model, JoinedModel):  # a loop that is over says nothing of later steps
            trainer.model.steps.loop = None
            trainer.accelerator.gradient_state._set_sync_gradients(True)
            with suppress(LinkError):
                trainer.model.abort()
        raise


def _save_model(
    usual: Callable[..., None], trainer: Any, output_dir: str | None = None, _internal_call: bool = False
) -> None:
    """The whole personal model, for transformers; a checkpoint's half (``_internal_call``) stays what it is.

    Raises:
        LinkError: the server does not give its blocks.
        ConfigError: ``from_pretrained`` did not make the model.
    """
    if _internal_call:
        usual(trainer, output_dir, _internal_call=True)
        return
    folder = Path(output_dir or trainer.args.output_dir)
    part = folder / f"flexp-{secrets.token_hex(4)}"
    trainer.model.save_pretrained(part)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    for file in part.iterdir():
        file.replace(folder / file.name)
    part.rmdir()
    words = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if words is not None:
        words.save_pretrained(folder)


def _publish(_: Callable[..., None], trainer: Any, *args: Any, **options: Any) -> None:
    """A place on the Hub is about to be made.

    Raises:
        ConfigError: always.
    """
    refuse("push_to_hub", trainer.args)
