"""Dots: every client under every method, the paired differences, and the trials on validation data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexp.comparison.report.results import chosen, ordered, results, settings_text
from flexp.comparison.report.styles import styles
from flexp.comparison.statistics import mean
from flexp.report import formats
from flexp.report.figures import Plot, blank, literal, name_axis, score_axis, score_title


def differences(comparison: Mapping[str, Any]) -> Plot | None:
    """A forest plot of how much better the reference is than each other method."""
    metric, reference, look = str(comparison["metric"]), comparison["reference"], styles(comparison)
    found = [(at.name, at.difference) for at in reversed(results(comparison)) if at.difference is not None]
    if not found:
        return None
    scale = 100 if formats.is_fraction(metric) else 1
    figure = blank(height=130 + 34 * len(found))
    figure.add_vline(x=0, line={"color": "rgba(128,128,128,0.8)", "width": 1.5})
    for place, (name, value) in enumerate(found):
        text = formats.difference(value.mean, value.half, metric, f"n = {value.n}" if value.half is None else "")
        symbol = "square" if value.excludes_zero else "square-open"
        figure.add_scatter(
            x=[scale * value.mean],
            y=[place],
            error_x={"array": [scale * (value.half or 0.0)], "thickness": 2.2, "width": 5},
            name=literal(name),
            mode="markers",
            marker={**look[name].marker(11), "symbol": symbol},
            showlegend=False,
            hovertemplate=f"%{{fullData.name}}: {text}<extra></extra>",
        )
    unit = "points" if formats.is_fraction(metric) else metric
    figure.update_xaxes(title=f"Lead of {literal(reference)} ({unit})")
    name_axis(figure, [name for name, _ in found])
    caption = (
        "Own test data after the last round, paired by seed, with 95 % interval. "
        f"Right of zero {reference} is better, left of it worse. Filled: the interval excludes zero. Hollow: it does "
        "not, or there is one seed alone."
    )
    return Plot("differences", f"Lead of {reference} over each other method", caption, figure)


def clients(comparison: Mapping[str, Any]) -> Plot | None:
    """Each client's mean score over seeds under each method, clients sorted by the reference's score."""
    metric, look = str(comparison["metric"]), styles(comparison)
    scores = {str(method["name"]): client_scores(method) for method in ordered(comparison)}
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    if not names:
        return None
    first = next(iter(scores.values()))
    worst = -1.0 if comparison["higher_is_better"] else 1.0
    known = {name: first.get(name) for name in names}
    names.sort(key=lambda name: -worst * (value if (value := known[name]) is not None else worst * 1e300))
    # Methods lie below one another within a client's row, so that equal scores do not hide one another.
    step = min(0.8 / len(scores), 0.16)
    figure = blank(height=150 + max(36, min(11 * len(scores), 90)) * len(names) + 24 * (len(scores) // 4))
    shown = list[float]()
    for index, (method, found) in enumerate(scores.items()):
        values = [found.get(name) for name in names]
        shown += [value for value in values if value is not None]
        shift = step * ((len(scores) - 1) / 2 - index)
        figure.add_scatter(
            x=values,
            y=[place + shift for place in range(len(names))],
            customdata=[[literal(name), formats.score(found.get(name), metric)] for name in names],
            name=literal(method),
            mode="markers",
            marker=look[method].marker(8),
            hovertemplate="%{customdata[0]}<br>%{fullData.name}: %{customdata[1]}<extra></extra>",
        )
    for place in range(1, len(names)):
        figure.add_hline(y=place - 0.5, line={"color": "rgba(128,128,128,0.22)", "width": 1})
    figure.update_xaxes(title=score_title(metric), **score_axis(metric, shown))
    name_axis(figure, names)
    caption = "Own test data after the last round, mean over seeds; sorted by the reference, best on top."
    return Plot("clients", "Client by client", caption, figure)


def client_scores(method: Mapping[str, Any]) -> dict[str, float | None]:
    """By client, the mean over seeds of its personal score after the last round."""
    found: dict[str, list[float | None]] = {}
    for run in method["runs"]:
        last = run["rounds"][-1] if run["rounds"] else run["before"]
        for name, score in (last.get("personal") or {}).items():
            found.setdefault(str(name), []).append(score)
    return {name: mean(scores) for name, scores in found.items()}


def trials(comparison: Mapping[str, Any]) -> Plot | None:
    """The validation score of everything that was tried, one row a method."""
    metric, look = str(comparison["metric"]), styles(comparison)
    tuned = [method for method in reversed(ordered(comparison)) if method["trials"]]
    if not tuned:
        return None
    figure = blank(height=140 + 34 * len(tuned))
    shown = list[float]()
    for place, method in enumerate(tuned):
        values = [trial["validation"] for trial in method["trials"]]
        shown += [value for value in values if value is not None]
        picked = [chosen(method, trial) for trial in method["trials"]]
        style = look[str(method["name"])]
        figure.add_scatter(
            x=values,
            y=[place] * len(values),
            text=[literal(settings_text(trial["settings"])) for trial in method["trials"]],
            customdata=[formats.score(value, metric) for value in values],
            name=literal(method["name"]),
            mode="markers",
            marker={
                "color": style.colour,
                "symbol": ["circle" if one else "circle-open" for one in picked],
                "size": [13 if one else 9 for one in picked],
                "line": {"width": 1.5, "color": style.colour},
            },
            showlegend=False,
            hovertemplate="%{fullData.name}: %{customdata}<br>%{text}<extra></extra>",
        )
    figure.update_xaxes(title=f"{score_title(metric)}, validation data", **score_axis(metric, shown))
    name_axis(figure, [method["name"] for method in tuned])
    caption = "Hollow: tried. Filled: chosen, and run with all seeds. Point at one to see its settings."
    return Plot("trials", "Trials", caption, figure)
