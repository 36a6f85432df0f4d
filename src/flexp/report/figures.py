"""What the figures have in common: colours, axes, and names shown literally."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from flexp.report import formats

BLUE, VERMILION, GREEN, SKY, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00", "#CC79A7"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)
"""Okabe and Ito's colours, less the two that vanish on a white or a black ground."""
DASHES = ("solid", "dash", "dot", "dashdot")
SIDE_COLOUR = {"personal": BLUE, "global": VERMILION}
SIDE_NAME = {"personal": "own test data", "global": "everybody's test data"}
GRID = "rgba(128,128,128,0.22)"


@dataclass(frozen=True)
class Plot:
    """A figure with what is written above and below it."""

    key: str
    title: str
    caption: str
    figure: Any


def bars(names: Sequence[Any], parts: Sequence[tuple[str, str, list[float]]], unit: str, stacked: bool = True) -> Any:
    """Horizontal bars, one place a name, from the bottom upwards; ``parts`` are (name, colour, values)."""
    figure = blank(height=150 + (34 if stacked else 40) * len(names))
    for part, colour, values in parts:
        figure.add_bar(
            x=values,
            y=list(range(len(names))),
            orientation="h",
            name=part,
            marker={"color": colour},
            text=[literal(name) for name in names],
            textposition="none",
            hovertemplate=f"%{{text}}<br>{part}: %{{x:.4g}} {unit}<extra></extra>",
        )
    figure.update_layout(barmode="stack" if stacked else "group", bargap=0.3)
    figure.update_layout(legend={"traceorder": "normal" if stacked else "reversed"})
    name_axis(figure, names)
    return figure


def blank(height: int) -> Any:
    """An empty figure in the house's style."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 16, "t": 16, "b": 56},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"align": "left"},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,128,128,0.6)", "activecolor": BLUE},
    )
    axis = {"gridcolor": GRID, "zeroline": False, "ticks": "outside", "tickcolor": GRID, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def name_axis(figure: Any, names: Sequence[Any]) -> None:
    """Write the clients' names along the vertical axis."""
    places = list(range(len(names)))
    figure.update_yaxes(
        tickvals=places,
        ticktext=[literal(_shortened(str(name))) for name in names],
        range=[-0.6, len(names) - 0.4],
        showgrid=False,
    )


def score_title(metric: str) -> str:
    """The title of an axis of scores, with its unit."""
    return f"{formats.name(metric)} {'(%)' if formats.is_fraction(metric) else '(lower is better)'}"


def score_axis(metric: str, shown: Sequence[float]) -> dict[str, Any]:
    """An axis for the values ``shown``: percent within 0 and 100 for accuracies; logarithmic where other scores span
    more than a factor of 20."""
    if not shown:
        return {}
    low, high = min(shown), max(shown)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    if formats.is_fraction(metric):  # an interval may reach beyond, a score cannot; its marker may
        return {"tickformat": ".0%", "range": [max(low - room, -0.02), min(high + room, 1.02)]}
    positive = [value for value in shown if value > 0]
    if not positive or high <= 20 * min(positive):
        return {"rangemode": "nonnegative"}
    decades = range(math.floor(math.log10(min(positive))), math.ceil(math.log10(high)) + 1)
    return {"type": "log", **log_ticks([first * 10.0**decade for decade in decades for first in (1, 2, 5)])}


def log_ticks(ticks: Sequence[float]) -> dict[str, Any]:
    """The labels of a logarithmic axis."""
    return {"tickvals": list(ticks), "ticktext": [f"{tick:,.12g}" for tick in ticks]}


def hover(metric: str) -> str:
    """The d3 format of a score."""
    return ".1%" if formats.is_fraction(metric) else ".4g"


def byte_unit(largest: float) -> tuple[float, str]:
    """The factor and name of the unit in which ``largest`` reads well."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= factor:
            return factor, unit
    return 1.0, "bytes"


def literal(name: Any) -> str:
    """``name`` so that plotly shows it as it is: plotly reads a subset of HTML."""
    return html.escape(str(name), quote=False)


def _shortened(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None when a value is missing."""
    given = list(values)
    present = [value for value in given if value is not None]
    return sum(present) / len(present) if present and len(present) == len(given) else None


def known(value: float | None, otherwise: float) -> float:
    """``value``, or ``otherwise`` when it is missing."""
    return otherwise if value is None else value
