"""An audit as tables, and as one self-contained HTML page, which holds private texts and stays with their owner."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from flexp import __version__
from flexp.audit.auditing import Audit, Reading
from flexp.report import formats, pages
from flexp.report.figures import DASHES, PALETTE, Plot, blank
from flexp.report.tables import Table

_LABELS = {
    "clusters": "classes, by clustering gradients alone",
    "known": "classes, with two examples of each known",
    "inverted": "classes, by the label whose gradient in the public tail fits best",
    "answers": "words of answers, by gradients through the public tail",
    "outputs": "words of answers, as the public tail says them of the server's own activations",
    "generated": "words that the client's own tail would say now, in the same way",
    "features": "classes, by clustering the server's own activations",
    "features_known": "classes, by these activations, with two examples of each known",
    "majority": "the most frequent label, without us",
}


def tables(found: Audit) -> list[Table]:
    """What attacks read of tokens, and of labels."""
    rows = [
        [one.name, str(one.depth), *map(_percent, (one.tokens, one.content, one.texts)), f"{one.rouge:.2f}",
         formats.seconds(one.seconds)]
        for one in found.readings
    ]  # fmt: skip
    rows.append(["blind guess", "", _percent(found.blind["tokens"]), _percent(found.blind["content"]), "", "", ""])
    if "labelled" in found.blind:
        guessed = map(_percent, (found.blind["labelled"], found.blind["labelled_content"]))
        rows.append(["labels alone, some texts known, in any order", "", *guessed, "", "", ""])
    if "foretold" in found.blind:
        guessed = map(_percent, (found.blind["foretold"], found.blind["foretold_content"]))
        rows.append(["the public model's own next token", "", *guessed, "", "", ""])
    if found.gradients is not None:
        rows.append(["inverting gradients alone", "", _percent(found.gradients), "", "", "", ""])
    made = [
        Table(
            key="tokens",
            title="Texts that the server can read",
            caption=f"{found.texts} texts of {found.tokens} tokens; the attacker learnt from {found.public}.",
            headers=["attack", "depth", "tokens", "content words", "whole texts", "ROUGE-L", "took"],
            rows=rows,
        )
    ]
    labels = [[text, _percent(found.labels[key])] for key, text in _LABELS.items() if key in found.labels]
    if labels:
        areas = {"auc": "of gradients", "features_auc": "of activations"}
        labels += [
            [f"area under the curve (AUC) {what}, with two of each known", f"{found.labels[key]:.2f}"]
            for key, what in areas.items()
            if key in found.labels
        ]
        sent = "" if found.by_gradients else "; no gradients were sent"
        made.append(Table("labels", "Labels that the server can read", f"Of all clients together{sent}.",
                          ["labels", "right"], labels))  # fmt: skip
    if found.members is not None:
        told = ["area under the curve (AUC), nothing being 0.50", f"{found.members:.2f}"]
        made.append(Table("members", "Texts that the shared blocks were trained on",
                          "By these blocks, beside clients' test texts.", ["membership", "told"], [told]))  # fmt: skip
    if found.not_attacked:
        left = [[what, "not attacked"] for what in found.not_attacked]
        made.append(Table("left", "What was not tried", "A server could.", ["what", "told"], left, words=(0, 1)))
    return made


def render(found: Audit) -> str:
    """The whole page as text."""
    worst = Table(
        key="worst",
        title="The texts that were read best",
        caption="Private: what was sent, and what the best attack read.",
        headers=["text", "read"],
        rows=[list(pair) for pair in found.worst],
        words=(0, 1),
    )
    return pages.page(
        "audit.html.j2",
        kind="audit",
        name=f"What the server can read: {found.model}",
        facts=[f"method {found.method}", formats.plural(len(found.cuts), "client"), found.line],
        warnings=["This page shows private texts: it stays with their owner.",
                  "An audit shows what leaks to these attacks, never that nothing leaks to better ones."],
        tables=[*tables(found), worst],
        figures=[_by_step(found.readings), _by_cut(found.readings)],
        machine={},
        config=None,
        version=__version__,
        source="the audit",
    )  # fmt: skip


def _by_step(readings: Sequence[Reading]) -> Plot:
    figure = blank(height=360)
    for number, one in enumerate(readings):
        line = {"color": PALETTE[number % len(PALETTE)], "dash": DASHES[number // len(PALETTE) % len(DASHES)]}
        figure.add_trace(
            go.Scatter(
                x=list(one.by_step),
                y=[100 * value for value in one.by_step.values()],
                name=f"{one.name} at depth {one.depth}",
                mode="lines+markers",
                line=line,
            )
        )
    figure.update_xaxes(title="step of the clients", rangemode="tozero")
    figure.update_yaxes(title="content words read (%)", range=[0, 102])
    return Plot(
        "steps", "What is read, step by step", "Content words of each step's texts that an attack reads.", figure
    )


def _by_cut(readings: Sequence[Reading]) -> Plot:
    figure, depths = blank(height=360), sorted({one.depth for one in readings})
    for number, name in enumerate(dict.fromkeys(one.name for one in readings)):
        told = {one.depth: 100 * one.content for one in readings if one.name == name}
        values = [told.get(depth) for depth in depths]
        figure.add_bar(x=depths, y=values, name=name, marker={"color": PALETTE[number % len(PALETTE)]})
    figure.update_layout(barmode="group")
    figure.update_xaxes(title="blocks on the client, s", tickvals=depths)
    figure.update_yaxes(title="content words read (%)", range=[0, 102])
    return Plot("cuts", "What is read, by cut and attack", "Content words of all texts that an attack reads.", figure)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
