"""The figures of a run: plotly, labelled axes, transparent grounds, colour-blind safe colours.

Colours are of Okabe and Ito's palette; clients are told apart by dash pattern as well, so that no reading
depends on hue alone. Names of clients are shown literally: markup in them has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexp.report import formats
from flexp.report.figures import (
    BLUE,
    DASHES,
    GREEN,
    ORANGE,
    PALETTE,
    PURPLE,
    SIDE_COLOUR,
    SIDE_NAME,
    Plot,
    bars,
    blank,
    byte_unit,
    hover,
    known,
    literal,
    mean,
    name_axis,
    score_axis,
    score_title,
)
from flexp.report.metrics import Record
from flexp.report.progress import DECAY, Average
from flexp.report.summary import SIDES, aggregate, scores_by_round

MOST_POINTS = 1500
"""Points drawn of one client's training curve; longer curves are thinned evenly."""


def all_plots(summary: Mapping[str, Any], records: Sequence[Record]) -> list[Plot]:
    """Every figure for which there is data, in the order of reading."""
    makers: tuple[Callable[[Mapping[str, Any], Sequence[Record]], Plot | None], ...] = (
        learning_curves,
        dumbbells,
        training_loss,
        alignment,
        traffic,
        time_spent,
        score_by_depth,
    )
    made = (maker(summary, records) for maker in makers)
    return [plot for plot in made if plot is not None]


def learning_curves(summary: Mapping[str, Any], records: Sequence[Record]) -> Plot | None:
    """Mean personal and global score after each round, thin lines for single clients."""
    metric = str(summary["metric"])
    names = [str(client["name"]) for client in summary["clients"]]
    rounds = scores_by_round(records, names, metric)
    if len(rounds) < 2:
        return None
    figure = blank(height=430)
    shown: list[float] = []
    by_round = f"round %{{x}}: %{{y:{hover(metric)}}}<extra></extra>"
    for side in SIDES:
        colour = SIDE_COLOUR[side]
        for name in names:
            values = [scores[name][side] for scores in rounds.values()]
            shown += [value for value in values if value is not None]
            figure.add_scatter(
                x=list(rounds),
                y=values,
                name=literal(name),
                mode="lines",
                line={"color": colour, "width": 1},
                opacity=0.38,
                showlegend=False,
                legendgroup=side,
                hovertemplate=f"%{{fullData.name}}, {SIDE_NAME[side]}<br>" + by_round,
            )
        means = [aggregate(scores, bool(summary["higher_is_better"]))[f"{side}_mean"] for scores in rounds.values()]
        figure.add_scatter(
            x=list(rounds),
            y=means,
            name=f"mean, {SIDE_NAME[side]}",
            mode="lines+markers",
            line={"color": colour, "width": 3},
            marker={"size": 8, "symbol": "circle" if side == "personal" else "diamond"},
            legendgroup=side,
            hovertemplate=f"mean, {SIDE_NAME[side]}<br>" + by_round,
        )
    ticks = {"dtick": 1} if len(rounds) <= 16 else {}
    figure.update_xaxes(title="Round (0: before training)", **ticks)
    figure.update_yaxes(title=score_title(metric), **score_axis(metric, shown))
    caption = "Thick: mean over clients. Thin: single clients (point at one to see its name)."
    return Plot("learning", "Scores over the rounds", caption, figure)


def training_loss(summary: Mapping[str, Any], records: Sequence[Record]) -> Plot | None:
    """Training loss of every client by its own step: raw faint, smoothed on top."""
    caption = f"Faint: every step. Line: exponential moving average (decay {DECAY}, bias-corrected)."
    return _step_curves(summary, records, "loss", "Training loss (nats)", "Training loss", caption)


def alignment(summary: Mapping[str, Any], records: Sequence[Record]) -> Plot | None:
    """The alignment term of every client, where there is one."""
    caption = "How far a client's personal blocks are from the server's copy; smoothed like the training loss."
    return _step_curves(summary, records, "align", "Alignment term", "Alignment with the server", caption)


def dumbbells(summary: Mapping[str, Any], records: Sequence[Record]) -> Plot | None:
    """Every client's score before and after training, on its own and on everybody's test data."""
    metric, clients = str(summary["metric"]), list(summary["clients"])
    sign = 1.0 if summary["higher_is_better"] else -1.0
    clients.sort(key=lambda client: sign * known(client["last"]["personal"], -sign * math.inf))
    figure = blank(height=150 + 44 * len(clients))
    value = f"%{{x:{hover(metric)}}}"
    shown: list[float] = []
    for side, shift, symbol in (("personal", 0.16, "circle"), ("global", -0.16, "diamond")):
        colour = SIDE_COLOUR[side]
        lines: tuple[list[float | None], list[float | None]] = ([], [])
        for place, client in enumerate(clients):
            before, last = client["before"][side], client["last"][side]
            if before is not None and last is not None:
                lines[0].extend((before, last, None))
                lines[1].extend((place + shift, place + shift, None))
        figure.add_scatter(
            x=lines[0],
            y=lines[1],
            mode="lines",
            line={"color": colour, "width": 3},
            opacity=0.45,
            showlegend=False,
            legendgroup=side,
            hoverinfo="skip",
        )
        for which, when, filled in (("before", "before", False), ("last", "after", True)):
            values = [client[which][side] for client in clients]
            shown += [value for value in values if value is not None]
            figure.add_scatter(
                x=values,
                y=[place + shift for place in range(len(clients))],
                text=[literal(client["name"]) for client in clients],
                name=f"{SIDE_NAME[side]}, {when}",
                mode="markers",
                marker={
                    "size": 11,
                    "symbol": symbol if filled else f"{symbol}-open",
                    "color": colour,
                    "line": {"width": 2, "color": colour},
                },
                legendgroup=side,
                hovertemplate=f"%{{text}}<br>{SIDE_NAME[side]}, {when}: {value}<extra></extra>",
            )
    if not shown:
        return None
    figure.update_xaxes(title=score_title(metric), **score_axis(metric, shown))
    name_axis(figure, [client["name"] for client in clients])
    return Plot(
        "change",
        "Before and after, client by client",
        "Hollow: before training. Filled: after the last round. Best on own test data on top.",
        figure,
    )


def traffic(summary: Mapping[str, Any], records: Sequence[Record]) -> Plot | None:
    """Bytes that each client sent and received while training."""
    clients = list(reversed(summary["clients"]))
    values = [known(client.get(key), 0) for client in clients for key in ("bytes_up", "bytes_down")]
    if not any(values):
        return None
    factor, unit = byte_unit(max(values))
    # Bars are put upwards from the axis: what is listed last stands on top, and first in the legend.
    parts = [
        (name, colour, [known(client.get(key), 0) / factor for client in clients])
        for name, colour, key in (
            ("down: server to client", ORANGE, "bytes_down"),
            ("up: client to server", BLUE, "bytes_up"),
        )
    ]
    figure = bars([client["name"] for client in clients], parts, unit, stacked=False)
    figure.update_xaxes(title=f"Traffic of training ({unit})")
    caption = "Activations, gradients, masks and headers as metered on the link; evaluation is not included."
    return Plot("traffic", "Traffic", caption, figure)


def time_spent(summary: Mapping[str, Any], records: Sequence[Record]) -> Plot | None:
    """Seconds of computing for each client, on its device and on the server."""
    clients = list(reversed(summary["clients"]))
    parts = [
        (name, colour, [known(client.get(key), 0.0) for client in clients])
        for name, colour, key in (
            ("on the client", GREEN, "client_seconds"),
            ("on the server, for this client", PURPLE, "server_seconds"),
        )
    ]
    if not any(value for _, _, values in parts for value in values):
        return None
    figure = bars([client["name"] for client in clients], parts, "s")
    figure.update_xaxes(title="Computing (seconds)")
    return Plot("time", "Computing time", "Training only, on the machine that ran it.", figure)


def score_by_depth(summary: Mapping[str, Any], records: Sequence[Record]) -> Plot | None:
    """Scores after training against the blocks that a client keeps; None when all keep as many."""
    metric = str(summary["metric"])
    blocks = int(summary["model"]["blocks"])
    clients = [client for client in summary["clients"] if client.get("cut") is not None]
    depths = [blocks - (client["cut"][1] - client["cut"][0]) for client in clients]
    if len(set(depths)) < 2:
        return None
    figure = blank(height=400)
    shown: list[float] = []
    for side in SIDES:
        colour, symbol = SIDE_COLOUR[side], "circle" if side == "personal" else "diamond"
        values = [client["last"][side] for client in clients]
        shown += [value for value in values if value is not None]
        figure.add_scatter(
            x=depths,
            y=values,
            text=[f"{literal(client['name'])}, cut {formats.cut(client['cut'])}" for client in clients],
            name=SIDE_NAME[side],
            mode="markers",
            marker={"size": 11, "symbol": symbol, "color": colour, "opacity": 0.75},
            legendgroup=side,
            hovertemplate=f"%{{text}}<br>{SIDE_NAME[side]}: %{{y:{hover(metric)}}}<extra></extra>",
        )
        steps = sorted(set(depths))
        means = [mean(value for value, depth in zip(values, depths, strict=True) if depth == step) for step in steps]
        figure.add_scatter(
            x=steps,
            y=means,
            mode="lines",
            name=f"mean, {SIDE_NAME[side]}",
            line={"color": colour, "width": 2, "dash": "solid" if side == "personal" else "dash"},
            showlegend=False,
            legendgroup=side,
            hoverinfo="skip",
        )
    if not shown:
        return None
    figure.update_xaxes(title=f"Blocks kept by the client (of {blocks})", dtick=1 if max(depths) <= 16 else None)
    figure.update_yaxes(title=score_title(metric), **score_axis(metric, shown))
    caption = (
        "After the last round; lines join the means of equal depths. Clients differ in their data as well as "
        "in their cuts: this shows where to look, not what causes what."
    )
    return Plot("depth", "Score and depth of the personal part", caption, figure)


def smooth(values: Sequence[float | None]) -> list[float | None]:
    """Bias-corrected exponential moving average; missing values stay missing and do not count."""
    average = Average()
    return [None if value is None else average.add(value) for value in values]


def _step_curves(
    summary: Mapping[str, Any], records: Sequence[Record], key: str, axis: str, title: str, caption: str
) -> Plot | None:
    figure = blank(height=430)
    drawn = False
    for index, client in enumerate(summary["clients"]):
        steps = [record for record in records if record.get("kind") == "step" and record["client"] == client["name"]]
        steps = [record for record in steps if record.get(key) is not None]
        if not steps:
            continue
        drawn = True
        values = [float(record[key]) for record in steps]
        stride = math.ceil(len(steps) / MOST_POINTS)
        x = [record["step"] for record in steps][::stride]
        colour, dash = PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]
        group = f"client {index}"
        figure.add_scatter(
            x=x,
            y=values[::stride],
            mode="lines",
            line={"color": colour, "width": 1},
            opacity=0.22,
            showlegend=False,
            legendgroup=group,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=x,
            y=smooth(values)[::stride],
            mode="lines",
            name=literal(client["name"]),
            line={"color": colour, "width": 2.2, "dash": dash},
            legendgroup=group,
            hovertemplate="%{fullData.name}<br>step %{x}: %{y:.4g} (smoothed)<extra></extra>",
        )
    figure.update_xaxes(title="Step of the client")
    figure.update_yaxes(title=axis, rangemode="nonnegative")
    return Plot(key, title, caption, figure) if drawn else None
