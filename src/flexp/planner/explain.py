"""A plan in words: what each device will hold, and why its cut is not deeper or shallower."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexp.planner.options import Option, fits_memory, in_time
from flexp.planner.plan import Plan
from flexp.planner.problem import Measures
from flexp.report.formats import seconds as duration
from flexp.report.formats import size as shown


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
