"""What a device had better choose now, while it trains: one policy for deployments and simulations, without I/O.

Two rules:

- *Memory is short*: what a device has does not fit any more. Then it changes at once, whatever that gains.
- *Something else is better*: the objective would be less by ``recut.gain`` (hysteresis: small changes move nobody).

A client of a deployment sees its own device alone. :class:`DevicePolicy` decides for it between two of its steps, and
waits for nobody: predictions are corrected by what was measured, and a gain must be there ``recut.patience`` times in a
row, ``recut.pause`` steps after the last move, with as many steps left to profit from it. A simulation knows all
devices; :func:`decide_for_all` plans for all of them before a round. Both give :class:`Decision`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flexp.config import RecutConfig
from flexp.cost.choice import Choice, Prediction
from flexp.planner.accuracy import AccuracyCurve, prior
from flexp.planner.fleet import MARGIN, Device, Fleet, Weights
from flexp.planner.infeasible import InfeasibleError
from flexp.planner.options import Option, fits, grid
from flexp.planner.plan import Costs, make_plan
from flexp.planner.problem import Group, Problem, scales

HOLD = 0.05
"""Of measured memory: a choice is given up when it would leave less than this; a new one must leave :data:`MARGIN`."""


@dataclass(frozen=True)
class Decision:
    """What a device is to take instead of what it has.

    Attributes:
        why: the rule.
        gain: by what share the objective is less (0 if memory is short).
        fits: whether ``choice`` fits; the smallest is worth a try even if it does not.
    """

    choice: Choice
    why: Literal["memory", "gain"]
    gain: float = 0.0
    fits: bool = True


@dataclass(frozen=True)
class Stop:
    """Nothing fits the device: it trains no more until something does; ``lacks`` says what, in words."""

    lacks: str


@dataclass(frozen=True)
class Situation:
    """What a device has now: bytes for training, and its seconds ÷ those predicted, of computing here, on the server,
    and on the link."""

    memory_bytes: int
    client: float = 1.0
    server: float = 1.0
    link: float = 1.0

    def correct(self, found: Prediction) -> Prediction:
        """The prediction, for the situation."""
        client, server, link = (
            found.client_seconds * self.client,
            found.server_seconds * self.server,
            found.link_seconds * self.link,
        )
        return replace(
            found, client_seconds=client, server_seconds=server, link_seconds=link, step_seconds=client + server + link
        )


class DevicePolicy:
    """Decides for one device that looks at itself.

    Args:
        options: all that could be chosen, with what was predicted for the device.
        current: what it has, one of the options' choices.
    """

    def __init__(
        self, options: Sequence[Option], current: Choice, rules: RecutConfig, weights: Weights | None = None
    ) -> None:
        self.options, self.current, self.rules = list(options), current, rules
        self.weights = weights or Weights()
        self._moved_at: int | None = None
        self._better = 0

    def look(self, now: Situation, step: int, left: int) -> Decision | None:
        """What to do in a situation, ``left`` steps before the end; ``None``: nothing."""
        options = [replace(option, prediction=now.correct(option.prediction)) for option in self.options]
        mine = next(option for option in options if option.choice == self.current)
        fitting = [option for option in options if _leaves(option, now.memory_bytes, MARGIN)]
        if not _leaves(mine, now.memory_bytes, HOLD):
            return self._shed(mine, fitting, options)
        value, best = self._best([*fitting, *([] if mine in fitting else [mine])], mine)
        gain = 1.0 - value[best] / value[mine.choice] if value[mine.choice] else 0.0
        self._better = self._better + 1 if best != self.current and gain >= self.rules.gain else 0
        early = self._moved_at is not None and step - self._moved_at < self.rules.pause
        if self._better < self.rules.patience or early or left < self.rules.pause:
            return None
        return Decision(best, "gain", gain)

    def short(self, memory_bytes: int) -> bool:
        """Whether what the device has would not fit into so much any more."""
        return not any(option.choice == self.current and _leaves(option, memory_bytes, HOLD) for option in self.options)

    def less(self, there: int | None = None) -> Decision | None:
        """What to do when memory has run out, whatever was measured; ``None``: there is nothing smaller.

        Args:
            there: it was the server's; so many bytes for training the device has.
        """
        mine = next(option for option in self.options if option.choice == self.current)
        if there is not None:
            held = mine.prediction.server_memory_bytes
            smaller = [option for option in self.options if option.prediction.server_memory_bytes < held]
            fitting = [option for option in smaller if _leaves(option, there, MARGIN)]
            found = self._shed(mine, fitting, [mine])
            if found is not None:  # nor does it come back to what the server had no memory for
                self.options = [mine, *smaller]
            return found
        found = self.look(Situation(int(mine.prediction.memory_bytes / (1.0 + HOLD))), 0, 0)
        return found if found is not None and found.choice != self.current else None

    def moved(self, choice: Choice, step: int) -> None:
        """The client has it now."""
        self.current, self._moved_at, self._better = choice, step, 0

    def refused(self, choice: Choice) -> None:
        """The server does not take this cut: look no more at it."""
        self.options = [option for option in self.options if option.choice.cut != choice.cut]
        self._better = 0

    def _shed(self, mine: Option, fitting: list[Option], options: list[Option]) -> Decision | None:
        """First a smaller micro-batch with the same cut, else the best cut that fits, else the smallest of all."""
        same = [option for option in fitting if option.choice.cut == mine.choice.cut]
        if same or fitting:
            _, best = self._best(same or fitting, mine)
            return Decision(best, "memory")
        least = min(options, key=lambda option: option.prediction.memory_bytes)
        return None if least.choice == mine.choice else Decision(least.choice, "memory", fits=False)

    def _best(self, options: list[Option], mine: Option) -> tuple[dict[Choice, float], Choice]:
        """The objective of every option, and the best one's choice."""
        group = Group(("this device",), tuple(options))
        problem = Problem(
            (group,), 2**62, (0,) * (max(o.choice.cut[1] for o in options) + 1), self.weights, scales([group])
        )
        values = {option.choice: problem.measure([{index: 1}]).objective for index, option in enumerate(options)}
        return values, min(values, key=lambda choice: (values[choice], choice != mine.choice))


def decide_for_all(
    fleet: Fleet,
    costs: Costs,
    current: Mapping[str, Choice],
    *,
    gain: float,
    move: bool = True,
    curve: AccuracyCurve | None = None,
) -> dict[str, Decision | Stop]:
    """Compare what all clients have with the best plan for their devices as they are now.

    Who does not fit its device any more takes what the best plan has for it; then nobody else moves, since objectives
    cannot be compared with a choice that does not run. Otherwise all follow the plan if it is better by ``gain``.

    Args:
        current: every client's choice.
        gain: a share of the objective.
        move: whether anybody may move; otherwise who does not fit stops.

    Returns:
        The decisions of those that are to do something.
    """
    curve = curve or prior()
    devices = {device.name: device for device in fleet.devices}
    now = {
        name: Option(
            choice, costs.predict(devices[name].profile, choice), curve.loss(choice, costs.blocks, costs.followed)
        )
        for name, choice in current.items()
    }
    short = [name for name, option in now.items() if not _leaves(option, devices[name].profile.memory_bytes, 0.0)]
    stopping = [name for name in short if not move or not _any_fits(devices[name], fleet, costs)]
    found: dict[str, Decision | Stop] = {name: Stop(_lacks(devices[name], now[name])) for name in stopping}
    there = tuple(device for device in fleet.devices if device.name not in stopping)
    if not move or not there:
        return found
    must = [name for name in short if name not in stopping]
    try:
        plan = make_plan(replace(fleet, devices=there), costs, curve)
    except InfeasibleError as error:  # of the server, or of a device with a deadline: nothing is better than what is
        return found | {name: Stop(str(error)) for name in must}
    changes = {device.name: plan.choice(device.name) for device in there}
    changes = {name: choice for name, choice in changes.items() if choice != current[name]}
    if must:
        return found | {name: Decision(changes[name], "memory") for name in must if name in changes}
    groups = tuple(Group((device.name,), (now[device.name],)) for device in there)
    before = replace(plan.setting.problem, groups=groups).measure([{0: 1}] * len(groups)).objective
    better = 1.0 - plan.measures.objective / before if before else 0.0
    if better < gain:
        return found
    return found | {name: Decision(choice, "gain", better) for name, choice in changes.items()}


def _leaves(option: Option, memory_bytes: int, share: float) -> bool:
    """Whether ``option`` leaves a share of what it takes."""
    return option.prediction.memory_bytes * (1.0 + share) <= memory_bytes


def _any_fits(device: Device, fleet: Fleet, costs: Costs) -> bool:
    size = fleet.task.batch_size
    choices = [choice for rank in fleet.ranks for choice in grid(fleet.choices, costs.blocks, size, rank)]
    return any(fits(Option(choice, costs.predict(device.profile, choice), 0.0), device) for choice in choices)


def _lacks(device: Device, option: Option) -> str:
    needs, has = option.prediction.memory_bytes, device.profile.memory_bytes
    return f"needs {needs / 2**20:.0f} MiB, and {device.profile.name} has {has / 2**20:.0f}"
