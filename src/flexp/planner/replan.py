"""Planning again while clients train: who must change, who had better, and who cannot go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flexp.cost.choice import Choice
from flexp.planner.accuracy import AccuracyCurve, prior
from flexp.planner.fleet import Device, Fleet
from flexp.planner.infeasible import InfeasibleError
from flexp.planner.options import Option, fits, grid
from flexp.planner.plan import Costs, make_plan
from flexp.planner.problem import Group


@dataclass(frozen=True)
class Replan:
    """What has to be done.

    Attributes:
        choices: of those that are to change.
        lacking: who cannot train on its device any more, and why.
        gain: by what share the new plan's objective is less than what is now.
    """

    choices: Mapping[str, Choice] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    gain: float = 0.0

    def __or__(self, other: Replan) -> Replan:
        """Both; of the gains the larger."""
        return Replan({**self.choices, **other.choices}, {**self.lacking, **other.lacking}, max(self.gain, other.gain))


def replan(
    fleet: Fleet,
    costs: Costs,
    current: Mapping[str, Choice],
    *,
    gain: float,
    move: bool = True,
    curve: AccuracyCurve | None = None,
) -> Replan:
    """Compare what the clients have with the best plan for their devices as they are now.

    Who does not fit its device any more takes what the best plan has for it, whatever that gains. Others follow the
    plan only if it is better by ``gain`` (hysteresis: devices that change a little move nobody).

    Args:
        current: every client's choice.
        gain: a share of the objective.
        move: whether anybody may move; otherwise who does not fit is lacking.
    """
    curve = curve or prior()
    devices = {device.name: device for device in fleet.devices}
    now = {
        name: Option(
            choice, costs.predict(devices[name].profile, choice), curve.loss(choice, costs.blocks, costs.followed)
        )
        for name, choice in current.items()
    }
    tight = [name for name, option in now.items() if not _holds(devices[name], option)]
    if not move:
        return Replan(lacking={name: _why(devices[name], now[name]) for name in tight})
    lacking = {name: _why(devices[name], now[name]) for name in tight if not _any_fits(devices[name], fleet, costs)}
    there = tuple(device for device in fleet.devices if device.name not in lacking)
    if not there:
        return Replan(lacking=lacking)
    try:
        plan = make_plan(replace(fleet, devices=there), costs, curve)
    except InfeasibleError as error:  # of the server, or of a device with a deadline: nothing is better than what is
        return Replan(lacking=lacking | {name: str(error) for name in tight})
    groups = tuple(Group((device.name,), (now[device.name],)) for device in there)
    before = replace(plan.setting.problem, groups=groups).measure([{0: 1}] * len(groups)).objective
    better = 1.0 - plan.measures.objective / before if before else 0.0
    # Objectives cannot be compared with a choice that does not run: then those alone move that have to.
    must = [name for name in tight if name not in lacking]
    moving = must or ([device.name for device in there] if better >= gain else [])
    changed = {name: plan.choice(name) for name in moving if plan.choice(name) != current[name]}
    return Replan(changed, lacking, better if changed else 0.0)


def _holds(device: Device, option: Option) -> bool:
    """Whether the device can just go on with it; what is newly planned leaves a margin."""
    return option.prediction.memory_bytes <= device.profile.memory_bytes


def _any_fits(device: Device, fleet: Fleet, costs: Costs) -> bool:
    task = fleet.task
    ranks: Sequence[int | None] = fleet.choices.ranks or [task.rank if task.tuning == "lora" else None]
    choices = [choice for rank in ranks for choice in grid(fleet.choices, costs.blocks, task.batch_size, rank)]
    return any(fits(Option(choice, costs.predict(device.profile, choice), 0.0), device) for choice in choices)


def _why(device: Device, option: Option) -> str:
    needs, has = option.prediction.memory_bytes, device.profile.memory_bytes
    return f"needs {needs / 2**20:.0f} MiB, and {device.profile.name} has {has / 2**20:.0f}"
