"""Between transformers' Trainer and a split model: where a step ends, the server's half of a checkpoint, refusals.

Nobody has to add the callback (:mod:`flexp.client.trainers`). To other models' Trainers it does nothing.
"""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path
from typing import Any

import transformers
from accelerate.state import GradientState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_callback import ExportableState

from flexp.client.exchange import Loop
from flexp.client.joined import JoinedModel
from flexp.client.trainer_options import refuse_options
from flexp.errors import ConfigError, StorageError
from flexp.files import replacing
from flexp.links.coding import load_residuals, save_residuals
from flexp.links.opening import server_behind

FILE = "flexp-server.safetensors"
SERVER, OWED = "server/", "residuals/"
ELSEWHERE = (
    "a Trainer's checkpoint has this client's half alone, for the server's is over a network and went on; train anew, "
    "without resume_from_checkpoint, or use flexp client, which goes on where its server is"
)
log = logging.getLogger("flexp.client")


class TrainerCallback(transformers.TrainerCallback, ExportableState):  # type: ignore[misc]
    """Lets a ``transformers.Trainer`` train a split model as it trains a whole one; it is there by itself.

    - Options that would make the result another one are refused, before the first step
      (:mod:`flexp.client.trainer_options`).
    - The server's step ends where the Trainer's does, however many exchanges that takes.
    - With every checkpoint goes the server's half, ``flexp-server.safetensors``: of a server in this process. Resuming
      and ``load_best_model_at_end`` restore it. A server over a network keeps its own; resuming is refused then.
    """

    def __init__(self) -> None:
        self.mark = 0  # of the checkpoint that is being written, in both of its halves
        self.folder = ""
        self._model: JoinedModel | None = None
        self._done = 0  # steps of the model before the Trainer's step that is under way
        self._said = False  # that checkpoints have one half

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint: which server's half belongs to it, and where it was put."""
        self.mark = secrets.randbits(62)
        return {"args": {}, "attributes": {"mark": self.mark, "folder": self.folder}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The Trainer is made."""
        if isinstance(model, JoinedModel):
            self._model = model
            refuse_options(args, model)
            return
        for module in model.modules():
            if isinstance(module, JoinedModel):
                module.refuse_adapters()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Training begins, perhaps from a checkpoint, perhaps with a smaller batch after it ran out of memory."""
        if not isinstance(model, JoinedModel):
            return
        if self._model is not None and self._model is not model:
            raise ConfigError(
                "model_init (and hyperparameter_search) would begin anew with this client's half alone, while the "
                "server's stays trained; give the Trainer a model, and make a new server and client for every run"
            )
        refuse_options(args, model)
        model.abort()
        told, group = model.steps.accumulation, args.gradient_accumulation_steps
        if told not in (1, group):
            raise ConfigError(
                f"the model was told accumulation = {told}, the Trainer gradient_accumulation_steps = {group}; leave "
                "accumulation out, it is taken from the Trainer"
            )
        if state.global_step:
            restore(model, self._place(args, state, model))
        model.steps.loop = Loop(_ends_step, group)
        self.folder = str(Path(args.output_dir).absolute())

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The first batch of a step comes next."""
        if isinstance(model, JoinedModel):
            self._done = model.steps.done

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The optimiser has stepped."""
        if isinstance(model, JoinedModel) and model.steps.done > self._done + 1:
            raise ConfigError(
                f"the loss ran the model {model.steps.done - self._done} times after the step's last batch, and the "
                "server took each for a step; run it once a batch, or use a loop of your own with part_of_step"
            )

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """A checkpoint of the client's half was written."""
        if not isinstance(model, JoinedModel):
            return
        place = _checkpoint(args.output_dir, state.global_step)
        if server_behind(model.link) is not None:
            keep(model, place / FILE, self.mark)
        elif not self._said:
            self._said = True
            log.warning(
                "%s and all that follow hold this client's half alone: the server's is on the server, so nothing can "
                "be resumed from them",
                place,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Training is over, and the best checkpoint's client's half loaded, if that was asked for."""
        if not isinstance(model, JoinedModel):
            return
        model.steps.loop = None
        if args.load_best_model_at_end and state.best_model_checkpoint:
            restore(model, Path(state.best_model_checkpoint) / FILE, only_weights=True)

    def _place(self, args: Any, state: Any, model: JoinedModel) -> Path:
        """The server's half that belongs to the client's half that the Trainer has just loaded."""
        if server_behind(model.link) is None:
            raise ConfigError(ELSEWHERE)
        entry = state.stateful_callbacks.get(type(self).__name__) or []
        said = [one["attributes"] for one in (entry if isinstance(entry, list) else [entry])]
        folders = [args.output_dir, *(one["folder"] for one in said)]
        tried = [_checkpoint(folder, state.global_step) / FILE for folder in folders]
        for place in tried:
            if place.is_file() and _facts(place)["mark"] in [one["mark"] for one in said]:
                return place
        raise StorageError(
            f"the checkpoint of step {state.global_step} has no server's half: expected {tried[0]}, written with the "
            "client's half; resume from a checkpoint in output_dir, or train anew without resume_from_checkpoint"
        )


def keep(model: JoinedModel, place: Path, mark: int) -> None:
    """Write the half of a server in this process, and what of the client the Trainer does not know.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    server, me = server_behind(model.link), model.link.client
    assert server is not None
    tensors = {SERVER + name: value for name, value in server.state(unfinished=True).items()}
    tensors |= model.link.meter.tensors() | save_residuals(model.link.residuals, OWED)
    others = {name: steps for name, steps in server.trained().items() if name != me}
    facts = {"mark": mark, "client": me, "steps": model.steps.done, "others": others}
    with replacing(place) as part:
        copies = {name: value.detach().contiguous() for name, value in tensors.items()}
        save_file(copies, part, metadata={"flexp": json.dumps(facts)})


def restore(model: JoinedModel, place: Path, *, only_weights: bool = False) -> None:
    """Bring the server back to what :func:`keep` wrote.

    Args:
        only_weights: not its optimiser, as a Trainer loads its best model.

    Raises:
        ConfigError: the server is not in this process, or others' training would be undone.
        StorageError: the file is missing, damaged, or of another server or cut.
    """
    server = server_behind(model.link)
    if server is None:
        raise ConfigError(ELSEWHERE)
    facts, me = _facts(place), model.link.client
    known = {name: list(steps) for name, steps in facts["others"].items()}
    lost = [name for name, steps in server.trained().items() if name != me and steps[1] and known.get(name) != steps]
    if lost:
        raise ConfigError(
            f"going back to {place.parent.name} would undo what {', '.join(sorted(lost))} has trained on the server "
            "since; train one after the other with servers of their own, or without load_best_model_at_end"
        )
    if not only_weights and not (place.parent / "optimizer.pt").is_file():
        raise StorageError(
            f"{place.parent} has no optimizer.pt (save_only_model?), so training cannot go on from it; resume from a "
            "whole checkpoint"
        )
    with safe_open(place, framework="pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    server.load(
        {name.removeprefix(SERVER): value for name, value in tensors.items() if name.startswith(SERVER)},
        only_weights=only_weights,
    )
    if only_weights:
        return
    model.go_on(int(facts["steps"]))
    model.link.meter.load_tensors(tensors)
    owed = {name.removeprefix(OWED): value for name, value in tensors.items() if name.startswith(OWED)}
    load_residuals(model.link.residuals, owed)


def _facts(place: Path) -> dict[str, Any]:
    try:
        with safe_open(place, framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["flexp"])
            return facts
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{place}, the server's half of a checkpoint, cannot be read ({error}); resume from another checkpoint"
        ) from error


def _checkpoint(folder: str, step: int) -> Path:
    return Path(folder).absolute() / f"checkpoint-{step}"


def _ends_step() -> bool:
    """Whether the Trainer's optimiser steps after the exchange that comes next."""
    return bool(GradientState().sync_gradients)
