"""``plan.json``: a plan as other commands and other machines read it, and in words: what each device will hold, and why
its cut is not deeper or shallower."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from flexp import __version__
from flexp.cost.choice import form
from flexp.errors import ConfigError
from flexp.files import read_json
from flexp.planner.options import Option, fits_memory, in_time
from flexp.planner.pareto import Point
from flexp.planner.plan import Plan
from flexp.planner.problem import Measures
from flexp.report.formats import seconds as duration
from flexp.report.formats import size as shown

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
    blocks: Literal["memory", "file"] = "memory"


class PlannedPrivacy(BaseModel):
    """The bound that was planned for, and the defence of texts that keeps it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    pool: bool = False
    penalty: str = "off"
    noise: float = 0.0
    max_content_words: float | None = None


class SavedPlan(BaseModel):
    """A ``plan.json``, as far as a run needs it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Literal[1]
    model: str
    blocks: PositiveInt
    task: PlannedTask = PlannedTask()
    privacy: PlannedPrivacy | None = None
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


def holding(cut: tuple[int, int], blocks: int) -> str:
    """What a client keeps, such as ``embeddings, blocks 0–2, block 5, head (4 of 6 blocks)``."""
    start, stop = cut
    parts = ["embeddings", *_blocks(0, start), *_blocks(stop, blocks), "head"]
    return f"{', '.join(parts)} ({start + blocks - stop} of {blocks} blocks)"


def _blocks(first: int, stop: int) -> list[str]:
    if first >= stop:
        return []
    return [f"block {first}" if stop - first == 1 else f"blocks {first}–{stop - 1}"]


def personal(option: Option, blocks: int) -> int:
    """Blocks that the client keeps for itself."""
    start, stop = option.choice.cut
    return start + blocks - stop


class Reasons:
    """Looks at what else a client could do; alike for clients of a kind that take the same option."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._counts = [dict(own) for own in plan.counts()]
        self._known: dict[tuple[int, int], dict[str, str]] = {}
        self._place = {name: index for index, kind in enumerate(plan.setting.kinds) for name in kind.names}

    def of(self, client: str) -> dict[str, str]:
        """``deeper`` and ``shallower``: why not."""
        group, option = self._place[client], self.plan.solution.options[client]
        key = (group, id(option))
        if key not in self._known:
            self._known[key] = {
                "deeper": self._why(group, option, deeper=True),
                "shallower": self._why(group, option, deeper=False),
            }
        return self._known[key]

    def _why(self, group: int, own: Option, deeper: bool) -> str:
        blocks = self.plan.blocks
        kind, depth = self.plan.setting.kinds[group], personal(own, blocks)
        device = kind.devices[0]
        there = [option for option in kind.options if (personal(option, blocks) - depth > 0) == deeper]
        there = [option for option in there if personal(option, blocks) != depth]
        if not there:
            if deeper:
                return "the server keeps one block at least" if depth == blocks - 1 else "nothing deeper may be chosen"
            return (
                "nothing shallower may be chosen: the embeddings stay on the device"
                if own.choice.cut[0] <= 1
                else ("nothing shallower may be chosen")
            )
        nearest = min(abs(personal(option, blocks) - depth) for option in there)
        there = [option for option in there if abs(personal(option, blocks) - depth) == nearest]
        what = f"{nearest} block{'s' if nearest > 1 else ''} {'more' if deeper else 'fewer'}"
        fitting = [option for option in there if fits_memory(option, device)]
        if not fitting:
            least = min(option.prediction.memory_bytes for option in there)
            return (
                f"{what} would need {shown(least)} and {100 * device.margin:.0f} % to spare, of its "
                f"{shown(device.profile.memory_bytes)}"
            )
        timely = [option for option in fitting if in_time(option, device)]
        if not timely:
            least_s = min(option.prediction.step_seconds for option in fitting)
            return f"{what} would take {duration(least_s)}, later than its deadline of {duration(device.deadline_s)}"
        return f"{what} would {self._compared(group, own, timely)}"

    def _compared(self, group: int, own: Option, others: Iterable[Option]) -> str:
        """What the best of ``others`` would change if one client took it."""
        before = self.plan.measures
        tried = [(option, *self._swapped(group, own, option)) for option in others]
        allowed = [(option, after) for option, after, allowed in tried if allowed]
        if not allowed:
            return "ask more of the server than it has"
        option, after = min(allowed, key=lambda item: item[1].objective)
        price = self.plan.setting.problem.coefficients()
        worse = {
            name: price[name] * (after.named()[name] - before.named()[name])
            for name in price
            if after.named()[name] > before.named()[name] and price[name]
        }
        if not worse:
            return "be worth the same"
        words = {
            "round": f"make the round {duration(after.round_seconds)} instead of {duration(before.round_seconds)}",
            "time": (
                f"take {duration(option.prediction.step_seconds)} a step instead of "
                f"{duration(own.prediction.step_seconds)}"
            ),
            "energy": (
                f"take {option.prediction.energy_joules:.3g} J a step instead of {own.prediction.energy_joules:.3g} J"
            ),
            "bytes": f"move {shown(option.bytes)} a step instead of {shown(own.bytes)}",
            "accuracy": f"cost {100 * (option.loss - own.loss):.1f} more points of accuracy ({self.plan.curve.source})",
        }
        named = sorted(worse, key=lambda name: -worse[name])[:2]
        if worse[named[-1]] < 0.1 * worse[named[0]]:
            named = named[:1]
        return " and ".join(words[name] for name in named)

    def _swapped(self, group: int, own: Option, other: Option) -> tuple[Measures, bool]:
        problem = self.plan.setting.problem
        groups = list(problem.groups)
        options = groups[group].options
        groups[group] = replace(groups[group], options=(*options, other))
        wider = replace(problem, groups=tuple(groups))
        counts = [dict(item) for item in self._counts]
        index = next(i for i, option in enumerate(options) if option is own)
        counts[group][index] -= 1
        counts[group][len(options)] = 1
        return wider.measure(counts), wider.allows(counts)
