"""A plan as one self-contained HTML page: what each device holds and takes, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexp.report import formats, pages
from flexp.report.figures import BLUE, GREEN, ORANGE, PURPLE, SKY, Plot, bars, blank, byte_unit
from flexp.report.tables import Table

MOST_ROWS = 40
"""Rows of a figure; equal clients share one, and what is beyond is left to the table."""

Row = dict[str, Any]


def alike(plan: Mapping[str, Any]) -> list[Row]:
    """Clients of ``plan.json`` that have equal choices and predictions as one row, with ``names`` and a ``label``."""
    rows: dict[str, Row] = {}
    for client in plan["clients"]:
        key = repr({name: value for name, value in client.items() if name != "name"})
        rows.setdefault(key, {**client, "names": []})["names"].append(client["name"])
    for row in rows.values():
        more = len(row["names"]) - 1
        row["label"] = row["names"][0] + (f" +{more}" if more else "")
    return list(rows.values())


def render(plan: Mapping[str, Any]) -> str:
    """The whole page as text."""
    totals, accuracy, rows = plan["totals"], plan["accuracy"], alike(plan)
    return pages.page(
        "plan.html.j2",
        kind="plan",
        name=plan["fleet"],
        facts=[
            f"model {plan['model']} ({plan['blocks']} blocks)",
            formats.plural(len(plan["clients"]), "client"),
            f"round {formats.seconds(totals['round_seconds'])}",
            f"expected loss of accuracy {100 * totals['loss']:.1f} points ({accuracy['source']})",
        ],
        warnings=[accuracy["note"]] if accuracy["source"] == "prior" else [],
        devices=_table(rows),
        figures=figures(plan, rows),
        machine={},
        config=None,
        version=plan["flexp"],
        source="the plan",
    )


def figures(plan: Mapping[str, Any], rows: Sequence[Row]) -> list[Plot]:
    """Blocks, memory, seconds, the accuracy curve and the front."""
    shown = list(reversed(rows[:MOST_ROWS]))
    made = [_blocks(plan, shown), _memory(shown), _time(shown), _curve(plan)]
    if len(plan["pareto"]) > 1:
        made.append(_front(plan))
    return made


def _table(rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        found = row["predicted"]
        exchange = f"{row['micro_batch']} × {row['accumulation']}" + (", checkpointing" if row["checkpointing"] else "")
        cells.append(
            [
                row["label"],
                formats.cut(row["cut"]),
                row["holds"],
                exchange,
                f"{formats.size(found['memory_bytes'])} of {formats.size(row['memory_available_bytes'])}",
                formats.seconds(found["step_seconds"]),
                formats.size(found["bytes_up"] + found["bytes_down"]),
                row["why_not"]["deeper"],
                row["why_not"]["shallower"],
            ]
        )
    headers = ["Client", "Cut", "Holds", "Exchange", "Memory", "Step", "Bytes", "Not deeper", "Not shallower"]
    return Table("devices", "Every device", "", headers, cells, words=(0, 2, 7, 8))


def _blocks(plan: Mapping[str, Any], rows: Sequence[Row]) -> Plot:
    blocks = plan["blocks"]
    parts = [
        ("on the device, below", BLUE, [row["cut"][0] for row in rows]),
        ("on the server", SKY, [row["cut"][1] - row["cut"][0] for row in rows]),
        ("on the device, above", ORANGE, [blocks - row["cut"][1] for row in rows]),
    ]
    figure = bars([row["label"] for row in rows], parts, "blocks")
    figure.update_xaxes(title="Blocks of the model", dtick=max(1, blocks // 12))
    return Plot("blocks", "Who runs which blocks", "Embeddings and head are always on the device.", figure)


def _memory(rows: Sequence[Row]) -> Plot:
    factor, unit = byte_unit(max(row["memory_available_bytes"] for row in rows))
    used = [row["predicted"]["memory_bytes"] / factor for row in rows]
    free = [row["memory_available_bytes"] / factor - value for row, value in zip(rows, used, strict=True)]
    figure = bars([row["label"] for row in rows], [("predicted peak", BLUE, used), ("left", SKY, free)], unit)
    figure.update_xaxes(title=f"Memory ({unit})")
    return Plot("memory", "Memory", "The predicted peak of training, and what the device has besides.", figure)


def _time(rows: Sequence[Row]) -> Plot:
    parts = [
        (name, colour, [row["predicted"][f"{key}_seconds"] for row in rows])
        for name, key, colour in (("device", "client", BLUE), ("link", "link", ORANGE), ("server", "server", PURPLE))
    ]
    figure = bars([row["label"] for row in rows], parts, "s")
    figure.update_xaxes(title="Seconds of a step (server: without waiting)")
    return Plot("time", "A step's time", "Predicted, one part after the other.", figure)


def _curve(plan: Mapping[str, Any]) -> Plot:
    points, accuracy = plan["accuracy"]["points"], plan["accuracy"]
    shares = [point["share"] for point in points]
    figure = blank(height=320)
    figure.add_scatter(
        x=[*shares, *reversed(shares)],
        y=[100 * point["high"] for point in points] + [100 * point["low"] for point in reversed(points)],
        fill="toself",
        mode="lines",
        line={"width": 0},
        fillcolor="rgba(0,114,178,0.18)",
        name="95 % interval" if accuracy["source"] == "pilots" else "assumed range",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=shares, y=[100 * point["loss"] for point in points], mode="lines+markers", name="expected loss",
        line={"color": BLUE, "width": 3},
    )  # fmt: skip
    figure.update_xaxes(title="Share of the blocks that are personal", tickformat=".0%")
    figure.update_yaxes(title="Loss of personal accuracy (points)")
    return Plot("curve", "What a deeper cut is taken to cost", str(accuracy["note"]), figure)


def _front(plan: Mapping[str, Any]) -> Plot:
    points = [point["totals"] for point in plan["pareto"]]
    factor, unit = byte_unit(max(point["bytes"] for point in points))
    figure = blank(height=380)
    for name, chosen, colour, symbol in (
        ("the front", points, GREEN, "circle"),
        ("this plan", [plan["totals"]], ORANGE, "star"),
    ):
        figure.add_scatter(
            x=[point["round_seconds"] for point in chosen],
            y=[100 * point["loss"] for point in chosen],
            mode="markers+text" if len(chosen) <= 12 else "markers",
            text=[f"{point['bytes'] / factor:.3g} {unit}" for point in chosen],
            textposition="top center",
            name=name,
            marker={"color": colour, "size": 11, "symbol": symbol},
            hovertemplate="%{x:.3g} s a round, %{y:.2f} points, %{text} a step<extra></extra>",
        )
    figure.update_xaxes(title="Seconds of a round")
    figure.update_yaxes(title="Expected loss of accuracy (points)")
    caption = "No plan beats one of these in time, accuracy and bytes; the text is the mean bytes of a step."
    return Plot("front", "The Pareto front", caption, figure)
