"""Scores of methods over rounds, and against what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flexp.comparison import views
from flexp.comparison.report.results import TAKING_PART, ordered, results
from flexp.comparison.report.styles import Style, label_points, styles, translucent
from flexp.comparison.statistics import Interval, interval, mean
from flexp.report import formats
from flexp.report.figures import SIDE_NAME, Plot, blank, byte_unit, literal, log_ticks, score_axis, score_title

HEIGHT = 470
MOST_BANDS = 4
"""With more methods than this only the reference's interval is drawn as a band: more hide one another."""


def learning(comparison: Mapping[str, Any], side: str) -> Plot | None:
    """Mean score after each round on ``side``, with the interval over seeds."""
    metric, look = str(comparison["metric"]), styles(comparison)
    curves = {str(method["name"]): curve(method, side) for method in ordered(comparison)}
    curves = {name: points for name, points in curves.items() if points}
    if not any(len(points) > 1 for points in curves.values()):
        return None
    figure = blank(height=HEIGHT + 24 * (len(curves) // 4))
    bands = [name for name in curves if look[name].heavy or len(curves) <= MOST_BANDS]
    for name in bands:
        _band(figure, name, curves[name], look[name])
    for name, points in reversed(curves.items()):  # what is drawn last, the reference, lies on top
        _line(figure, name, [float(round) for round in points], points, look[name], "round %{x}", metric)
    shown = [value for points in curves.values() for point in points.values() for value in _ends(point)]
    rounds = {round for points in curves.values() for round in points}
    figure.update_xaxes(title="Round (0: before training)", **({"dtick": 1} if max(rounds) <= 16 else {}))
    figure.update_yaxes(title=score_title(metric), **score_axis(metric, shown))
    figure.update_layout(legend={"traceorder": "reversed"})
    caption = f"On {SIDE_NAME[side]}: mean over clients and seeds."
    if any(point.half is not None for name in bands for point in curves[name].values()):
        caption += f" Band: 95 % interval{'' if len(bands) == len(curves) else ' of the reference'} over seeds."
    caption += " Click a name to hide a method, twice to see it alone."
    return Plot(f"learning-{side}", f"Learning curves, {SIDE_NAME[side]}", caption, figure)


def curve(method: Mapping[str, Any], side: str) -> dict[int, Interval]:
    """By round, the mean over clients and its interval over seeds; only rounds that all runs evaluated."""
    runs = method["runs"]
    common = [{views.BEFORE, *(int(entry["round"]) for entry in run["rounds"])} for run in runs]
    found = {}
    for round in sorted(set.intersection(*common)) if common else []:
        point = interval(mean(views.side_scores(run, side, round)) for run in runs)
        if point is not None:
            found[round] = point
    return found


def against_cost(comparison: Mapping[str, Any], axis: views.Axis) -> Plot | None:
    """Mean personal score against bytes or time spent, one curve a method."""
    metric, look, clock = str(comparison["metric"]), styles(comparison), views.has_clock(comparison)
    paths = {}
    for method in ordered(comparison):
        points = curve(method, "personal")
        costs = {round: _cost(method, round, axis, clock) for round in points}
        kept = {round: cost for round, cost in costs.items() if cost is not None}
        if len(kept) > 1:
            paths[str(method["name"])] = ([kept[round] for round in kept], {round: points[round] for round in kept})
    largest = max((max(costs) for costs, _ in paths.values()), default=0.0)
    if not largest:
        return None
    factor, unit = byte_unit(largest) if axis == "bytes" else (1.0, "s")
    totals = [max(costs) for costs, _ in paths.values() if max(costs) > 0]
    wide = max(totals) > 20 * min(totals)
    figure = blank(height=HEIGHT + 24 * (len(paths) // 4))
    least = min(cost for costs, _ in paths.values() for cost in costs if cost > 0) / factor
    for name, (spent, points) in reversed(paths.items()):
        x, label = [cost / factor for cost in spent], name
        if wide and not any(x):  # a logarithmic axis has no place for what costs nothing: a level line instead
            last = points[max(points)]
            x, points, label = [least, largest / factor], {0: last, 1: last}, f"{name} (costs nothing)"
        elif wide:
            kept_points = [(cost, item) for cost, item in zip(x, points.items(), strict=True) if cost > 0]
            x, points = [cost for cost, _ in kept_points], dict(item for _, item in kept_points)
        _line(figure, label, x, points, look[name], f"%{{x:.4g}} {unit}", metric)
    shown = [value for _, points in paths.values() for point in points.values() for value in _ends(point)]
    if axis == "bytes":
        title, what = f"Up and down per client ({unit})", f"sent and received, mean over {TAKING_PART} and over seeds"
    else:
        title = "Virtual time (s)" if clock else "Computing per client (s)"
        computed = f"seconds that a client computed, mean over {TAKING_PART} and over seeds"
        what = "virtual time" if clock else computed
    figure.update_xaxes(title=title, **(_log_ticks(least, largest / factor) if wide else _from_zero(largest / factor)))
    figure.update_yaxes(title=score_title(metric), **score_axis(metric, shown))
    figure.update_layout(legend={"traceorder": "reversed"})
    caption = f"Own test data after each evaluated round, against {what}." + (" Logarithmic." if wide else "")
    return Plot(f"against-{axis}", f"Score against {'traffic' if axis == 'bytes' else 'time'}", caption, figure)


def against_memory(comparison: Mapping[str, Any]) -> Plot | None:
    """The last personal score against the peak memory of a client, one labelled point a method."""
    metric, look = str(comparison["metric"]), styles(comparison)
    everything = results(comparison)
    found = [(at, at.memory, at.personal) for at in everything if at.memory is not None and at.personal is not None]
    if not found:
        return None
    largest = max(memory for _, memory, _ in found)
    factor, unit = byte_unit(largest)
    figure = blank(height=HEIGHT)
    points = []
    for result, memory, score in found:
        points.append((result.name + (" †" if result.dropped.most else ""), memory / factor, score.mean))
        figure.add_scatter(
            x=[memory / factor],
            y=[score.mean],
            name=literal(result.name),
            mode="markers",
            marker=look[result.name].marker(11),
            showlegend=False,
            hovertemplate=f"%{{fullData.name}}<br>%{{x:.4g}} {unit}: {_shown(score, metric)}<extra></extra>",
        )
    heights = [height for _, _, height in points]
    margin = 0.1 * (max(heights) - min(heights)) or 0.1 * abs(heights[0]) or 1.0
    label_points(figure, points, min(heights) - margin, max(heights) + margin)
    figure.update_xaxes(title=f"Peak memory of a client ({unit})", range=[0, 1.06 * largest / factor])
    ticks = {"tickformat": ".0%"} if formats.is_fraction(metric) else {}
    figure.update_yaxes(title=score_title(metric), **ticks)
    caption = "Own test data after the last round, mean over clients and seeds. Memory: the highest of any client."
    unknown = [result.name for result in everything if result.memory is None]
    if unknown:
        caption += f" Not measured: {', '.join(unknown)}."
    if any(result.dropped.most for result, _, _ in found):
        caption += " † Some clients' devices cannot hold this method."
    return Plot("against-memory", "Score against memory", caption, figure)


def _line(
    figure: Any, name: str, x: list[float], points: Mapping[int, Interval], style: Style, place: str, metric: str
) -> None:
    """One method's curve; ``place`` says in d3 terms where a point is."""
    figure.add_scatter(
        x=x,
        y=[point.mean for point in points.values()],
        customdata=[_shown(point, metric) for point in points.values()],
        name=literal(name),
        mode="lines+markers",
        line=style.line,
        marker=style.marker(7),
        legendgroup=literal(name),
        hovertemplate=f"%{{fullData.name}}<br>{place}: %{{customdata}}<extra></extra>",
    )


def _band(figure: Any, name: str, points: Mapping[int, Interval], style: Style) -> None:
    known = {round: point for round, point in points.items() if point.half is not None}
    if len(known) < 2:
        return
    rounds = list(known)
    figure.add_scatter(
        x=[*rounds, *reversed(rounds)],
        y=[*(point.high for point in known.values()), *(point.low for point in reversed(known.values()))],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=translucent(style.colour, 0.16),
        legendgroup=literal(name),
        showlegend=False,
        hoverinfo="skip",
    )


def _cost(method: Mapping[str, Any], round: int, axis: views.Axis, clock: bool) -> float | None:
    """The mean over the method's runs of what was spent until the end of ``round``."""
    if round == views.BEFORE:
        return 0.0
    entries = [entry for run in method["runs"] for entry in run["rounds"] if int(entry["round"]) == round]
    return mean(views.spent(entry, axis, clock) for entry in entries)


def _ends(point: Interval) -> tuple[float, ...]:
    return (point.mean,) if point.low is None or point.high is None else (point.low, point.mean, point.high)


def _shown(point: Interval, metric: str) -> str:
    note = f"n = {point.n}" if point.half is None else ""
    return formats.interval(point.mean, point.half, metric, note)


def _from_zero(most: float) -> dict[str, Any]:
    """With room beside zero, where the curves of methods that cost nothing stand."""
    return {"range": [-0.025 * most, 1.04 * most]}


def _log_ticks(least: float, most: float) -> dict[str, Any]:
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    firsts = (1, 2, 5) if len(decades) <= 3 else (1, 3) if len(decades) <= 4 else (1,)
    ticks = [first * 10.0**decade for decade in decades for first in firsts]
    low, high = math.log10(least / 1.15), math.log10(most * 1.15)
    return {"type": "log", **log_ticks(ticks), "range": [low, high]}
