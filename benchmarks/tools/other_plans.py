"""What a plan is compared with: cuts by memory alone, and one cut for everybody; and any of them on the virtual clock.

Only the cuts are given: micro-batches, checkpointing and codecs are then chosen as well as they can be, as in the plan
itself, so that what the comparison shows is due to the cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flexp.cost.clock import SPLIT_ASYNC, ClientWork, Virtual, simulate
from flexp.cost.profile import Profile
from flexp.planner.fleet import Fleet
from flexp.planner.options import Option, fits
from flexp.planner.plan import Plan
from flexp.planner.solve import Solution, solve

Cut = tuple[int, int]


def memory_only(plan: Plan) -> Solution | None:
    """Every client keeps as many blocks as fit its device (and its deadline); ``None``: then the server cannot."""
    return _solved(plan, [_deepest(own, plan.blocks) for own in _fitting(plan)])


def static(plan: Plan) -> Solution | None:
    """All clients have one cut, the deepest that fits every device; ``None``: none does, or then the server cannot."""
    common = set.intersection(*({option.choice.cut for option in own} for own in _fitting(plan)))
    if not common:
        return None
    cut = max(common, key=lambda cut: _depth(cut, plan.blocks))
    return _solved(plan, [cut] * len(plan.setting.kinds))


def _fitting(plan: Plan) -> list[list[Option]]:
    return [[option for option in kind.options if fits(option, kind.devices[0])] for kind in plan.setting.kinds]


def _deepest(options: Sequence[Option], blocks: int) -> Cut:
    return max((option.choice.cut for option in options), key=lambda cut: _depth(cut, blocks))


def _depth(cut: Cut, blocks: int) -> tuple[int, Cut]:
    """Most blocks of one's own; of equals the deepest s."""
    return cut[0] + blocks - cut[1], cut


def _solved(plan: Plan, cuts: Sequence[Cut]) -> Solution | None:
    groups = tuple(
        replace(group, options=tuple(option for option in own if option.choice.cut == cut))
        for group, own, cut in zip(plan.setting.problem.groups, _fitting(plan), cuts, strict=True)
    )
    return solve(replace(plan.setting.problem, groups=groups))


def virtual_time(fleet: Fleet, options: Mapping[str, Option], steps: int = 20) -> Virtual:
    """Let everybody make ``steps`` steps, nobody waiting for anybody (``split-async``).

    The clock's operations are predicted seconds here, on devices that do one a second: a client's are spread over its
    step's three parts, the server's over forward and backward as 1 : 2, bytes over the four messages.
    """
    work, devices = {}, {}
    for device in fleet.devices:
        option = options[device.name]
        found, exchanges = option.prediction, option.choice.accumulation
        client, server = found.client_seconds / exchanges, found.server_seconds / exchanges
        work[device.name] = ClientWork(
            steps=[steps],
            before=client / 3.0,
            between=client / 3.0,
            after=client / 3.0,
            server_forward=server / 3.0,
            server_backward=2.0 * server / 3.0,
            forward_up=found.bytes_up / exchanges / 2.0,
            backward_up=found.bytes_up / exchanges / 2.0,
            forward_down=found.bytes_down / exchanges / 2.0,
            backward_down=found.bytes_down / exchanges / 2.0,
            exchanges=exchanges,
        )
        devices[device.name] = _seconds(device.profile)
    return simulate(SPLIT_ASYNC, work, devices, _seconds(fleet.server), slots=fleet.slots)


def _seconds(device: Profile) -> Profile:
    return device.model_copy(update={"flops": 1.0})
