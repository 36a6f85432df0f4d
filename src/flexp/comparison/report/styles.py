"""How methods are told apart in figures: by colour, by marker and by dash, so that no reading depends on hue alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexp.comparison.report.results import ordered
from flexp.report.figures import BLUE, DASHES, GREEN, ORANGE, PURPLE, SKY, VERMILION, literal

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star", "pentagon", "hourglass")
"""Ten of them and six colours: the two together come round again after thirty methods, with the dashes never."""
LABEL_GAP = 17
"""Pixels between the middles of two labels above one another."""


@dataclass(frozen=True)
class Style:
    """Of one method. The reference is the first: blue, solid and heavy."""

    colour: str
    dash: str
    symbol: str
    heavy: bool

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "width": 3.5 if self.heavy else 2, "dash": self.dash}

    def marker(self, size: int = 8) -> dict[str, Any]:
        grown, line = size + 2 if self.heavy else size, {"width": 1.5, "color": self.colour}
        return {"color": self.colour, "symbol": self.symbol, "size": grown, "line": line}


def styles(comparison: Mapping[str, Any]) -> dict[str, Style]:
    """A style for each method, in the order of :func:`~flexp.comparison.report.results.ordered`."""
    names = [str(method["name"]) for method in ordered(comparison)]
    return {
        name: Style(
            colour=COLOURS[index % len(COLOURS)],
            dash=DASHES[index // len(COLOURS) % len(DASHES)],
            symbol=SYMBOLS[index % len(SYMBOLS)],
            heavy=name == comparison["reference"],
        )
        for index, name in enumerate(names)
    }


def translucent(colour: str, opacity: float) -> str:
    """``#0072B2`` as an rgba colour."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def label_points(figure: Any, points: Sequence[tuple[str, float, float]], bottom: float, top: float) -> None:
    """Write names beside points so that no two lie over one another at any width of the page.

    Args:
        figure: of a fixed height; its vertical axis is set to run from ``bottom`` to ``top``, so that heights in pixels
            are known, and its horizontal one is linear.
        points: (name, x, y).
    """
    layout = figure.layout
    height = layout.height - layout.margin.t - layout.margin.b
    middle = (max(x for _, x, _ in points) + min(x for _, x, _ in points)) / 2
    by_height = sorted(points, key=lambda point: -point[2])
    own = [(top - y) / (top - bottom) * height for _, _, y in by_height]
    gap = min(LABEL_GAP, height / max(len(points), 1))
    for (name, x, y), here, place in zip(by_height, own, spread(own, gap, height), strict=True):
        right = x <= middle  # towards the middle of the figure, where there is room
        figure.add_annotation(
            x=x,
            y=y,
            ax=26 if right else -26,
            ay=place - here,
            text=literal(name),
            xanchor="left" if right else "right",
            showarrow=True,
            arrowhead=0,
            arrowwidth=1,
            arrowcolor="rgba(128,128,128,0.55)",
            standoff=7,
            font={"size": 12},
        )
    figure.update_yaxes(range=[bottom, top])


def spread(places: Sequence[float], gap: float, most: float) -> list[float]:
    """Ascending ``places`` moved as little as needed to be ``gap`` apart and within 0 and ``most``."""
    if not places:
        return []
    groups: list[list[float]] = []  # [sum of wished starts, count]: labels that touch move as one
    for index, place in enumerate(places):
        groups.append([place - index * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    room = max(0.0, most - (len(places) - 1) * gap)
    starts = [min(max(total / count, 0.0), room) for total, count in groups for _ in range(int(count))]
    return [start + index * gap for index, start in enumerate(starts)]
