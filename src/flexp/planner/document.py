"""``plan.json``: a plan as other commands and other machines read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from flexp import __version__
from flexp.cost.choice import form
from flexp.errors import ConfigError
from flexp.files import read_json
from flexp.planner.explain import Reasons, holding
from flexp.planner.pareto import Point
from flexp.planner.plan import Plan
from flexp.planner.problem import Measures

VERSION = 1


class PlannedClient(BaseModel):
    """What a run needs of one client's plan; other keys are for people."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    cut: tuple[Annotated[int, Field(ge=0)], PositiveInt]
    micro_batch: PositiveInt
    accumulation: PositiveInt = 1
    checkpointing: bool = False
    rank: PositiveInt | None = None
    codec: str = "none"


class PlannedTask(BaseModel):
    """What a run needs of the task that was planned for."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    embeddings: Literal["memory", "file"] = "memory"


class SavedPlan(BaseModel):
    """A ``plan.json``, as far as a run needs it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Literal[1]
    model: str
    blocks: PositiveInt
    task: PlannedTask = PlannedTask()
    clients: Annotated[list[PlannedClient], Field(min_length=1)]


def document(plan: Plan, front: Sequence[Point] = ()) -> dict[str, Any]:
    """The plan as JSON's values. ``settings`` are the keys that make a run follow it (``--set KEY=VALUE``)."""
    reasons, names = Reasons(plan), [device.name for device in plan.fleet.devices]
    clients = []
    for device in plan.fleet.devices:
        option = plan.solution.options[device.name]
        expected = plan.curve.at(option.choice.cut, plan.blocks)
        clients.append(
            {
                "name": device.name,
                **_choice(option.choice),
                "holds": holding(option.choice.cut, plan.blocks),
                "memory_available_bytes": device.profile.memory_bytes,
                "deadline_s": device.deadline_s,
                "predicted": asdict(option.prediction)
                | {"accuracy_loss": option.loss, "accuracy_loss_95": [expected.low, expected.high]},
                "why_not": reasons.of(device.name),
            }
        )
    choices = [plan.choice(name) for name in names]
    return {
        "version": VERSION,
        "flexp": __version__,
        "fleet": plan.fleet.name,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "blocks": plan.blocks,
        "task": plan.fleet.task.model_dump(mode="json"),
        "weights": plan.fleet.weights.model_dump(mode="json"),
        "accuracy": plan.curve.model_dump(mode="json"),
        "totals": _totals(plan.measures),
        "server": {"memory_bytes": plan.fleet.server.memory_bytes, "slots": plan.fleet.slots},
        "clients": clients,
        "settings": {
            "data.clients.each": [
                {
                    "name": name,
                    "cut": list(choice.cut),
                    "micro_batch": choice.micro_batch,
                    "checkpointing": choice.checkpointing,
                    "codec": form(choice.codec),
                }
                for name, choice in zip(names, choices, strict=True)
            ]
        },
        "pareto": [
            {
                "rank": point.setting.rank,
                "totals": _totals(point.measures),
                "clients": [{"name": name, **_choice(point.solution.options[name].choice)} for name in names],
            }
            for point in front
        ],
    }


def read_plan(path: Path) -> SavedPlan:
    """Read a ``plan.json``.

    Raises:
        StorageError: the file is missing or no JSON.
        ConfigError: it is no plan, or one of another version.
    """
    content = read_json(path)
    try:
        return SavedPlan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "plan"
        raise ConfigError(f"{path}: {key}: {first['msg']}; expected what flexp plan --out wrote") from error


def _choice(choice: Any) -> dict[str, Any]:
    return asdict(choice) | {"cut": list(choice.cut)}


def _totals(measures: Measures) -> dict[str, Any]:
    return asdict(measures)
