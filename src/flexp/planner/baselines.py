"""What a plan is compared with: cuts by memory alone, and one cut for everybody."""

from __future__ import annotations

from collections.abc import Sequence

from flexp.planner.explain import personal
from flexp.planner.options import Option, fits
from flexp.planner.plan import Plan
from flexp.planner.problem import Group, Problem
from flexp.planner.solve import Solution


def memory_only(plan: Plan) -> Solution:
    """Every client keeps as many blocks as fit its device (and its deadline); the rest as a run has it by default."""
    chosen = [
        _deepest([o for o in kind.options if fits(o, kind.devices[0])], plan.blocks) for kind in plan.setting.kinds
    ]
    return _measured(plan, chosen)


def static(plan: Plan) -> Solution | None:
    """All clients have one cut, the deepest that fits every device; ``None``: none fits all of them."""
    kinds = plan.setting.kinds
    common = set.intersection(*({o.choice.cut for o in kind.options if fits(o, kind.devices[0])} for kind in kinds))
    if not common:
        return None
    cut = max(common, key=lambda cut: (cut[0] + plan.blocks - cut[1], cut))
    chosen = [
        _deepest([o for o in kind.options if fits(o, kind.devices[0]) and o.choice.cut == cut], plan.blocks)
        for kind in kinds
    ]
    return _measured(plan, chosen)


def _deepest(options: Sequence[Option], blocks: int) -> Option:
    """Most blocks; of equals the deepest s, then no checkpointing and the largest exchange, then the fewest bytes."""
    return max(
        options,
        key=lambda option: (
            personal(option, blocks),
            option.choice.cut,
            not option.choice.checkpointing,
            option.choice.micro_batch,
            -option.bytes,
        ),
    )


def _measured(plan: Plan, chosen: Sequence[Option]) -> Solution:
    groups = tuple(
        Group(kind.names, (option,), kind.devices[0].deadline_s)
        for kind, option in zip(plan.setting.kinds, chosen, strict=True)
    )
    old = plan.setting.problem
    problem = Problem(groups, old.server_memory, old.block_bytes, old.weights, old.scales, old.slots)
    options = {name: option for kind, option in zip(plan.setting.kinds, chosen, strict=True) for name in kind.names}
    return Solution(options, problem.measure([{0: len(group.clients)} for group in groups]))
