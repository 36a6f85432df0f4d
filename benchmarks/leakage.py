"""What a curious server reads of a run, with each defence, and what that costs: the tables of docs/security.md.

Each row is ``flexp run CONFIG`` with the settings beside its name and ``privacy.audit = true``: of the first round what
attacks read; of the whole run accuracy, bytes and the device's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import plotly.graph_objects as go
import typer
from rich.console import Console

from benchmarks.tools.command import Result, Steps, say
from flexp.config.loading import load
from flexp.errors import ConfigError, PrivacyError
from flexp.files import folder_name, read_json, write_json, write_text
from flexp.report.figures import blank
from flexp.report.progress import Progress
from flexp.run.audited import AUDIT
from flexp.run.runner import run

DEMO = str(files("flexp.run") / "demo.toml")
TAIL = "data.clients.each=[{cut=[1,4]},{cut=[2,4]},{cut=[3,4]}]"
DEEP = "data.clients.each=[{cut=[5,6]}]"
POOLED = ("model.pooling=mean", "privacy.pool=true")
WITHIN = (DEEP, "privacy.max_content_words=0.1", "privacy.warm_up.lr=1e-3", "privacy.warm_up.steps=240")
ROWS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "kl": ("method.align.kind=kl",),
    "tail": (TAIL,),
    "tail, label_epsilon 1": (TAIL, "privacy.label_epsilon=1"),
    "label_epsilon 0.4": ("privacy.label_epsilon=0.4",),
    "noise 1": ("privacy.noise=1",),
    "noise 3": ("privacy.noise=3",),
    "nopeek": ("privacy.penalty=nopeek",),
    "deep": (DEEP,),
    "deep, noise 1": (DEEP, "privacy.noise=1"),
    "deep, pooled": (DEEP, *POOLED),
    "deep, pooled, noise 0.5": (DEEP, *POOLED, "privacy.noise=0.5"),
    "deep, pooled, noise 1": (DEEP, *POOLED, "privacy.noise=1"),
    "no gradients": ("privacy.gradients=false",),
    "deep, nopeek within 10 %": ("privacy.penalty=nopeek", *WITHIN),
    "deep, adversary within 10 %": ("privacy.penalty=adversary", *WITHIN),
    "fedavg": ("method.name=fedavg",),
    "local": ("method.name=local",),
}
"""Names, and what they set."""


def measure(
    config: Annotated[str, typer.Option(help="A run's configuration; the default is the demo's.")] = DEMO,
    steps: Steps = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Of so many steps each; the first is audited.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the runs.")] = 0,
    only: Annotated[str | None, typer.Option(help=f"Some of: {'; '.join(ROWS)}; separated by ';'.")] = None,
    draw: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Draw what is read beside accuracy.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="A folder of rows: those that are there are not made again.")
    ] = None,
) -> Result:
    """What the server reads of texts and labels, with and without defences, and what they cost."""
    chosen = list(ROWS) if only is None else [name.strip() for name in only.split(";")]
    if unknown := [name for name in chosen if name not in ROWS]:
        raise ConfigError(f"--only {unknown[0]}: expected some of {'; '.join(ROWS)}")
    facts: dict[str, Any] = {}
    base = [f"train.steps_per_round={steps}", f"train.rounds={rounds}", f"seed={seed}", "privacy.audit=true",
            "output.html=false", "output.checkpoint_every=0"]  # fmt: skip
    for name in chosen:
        settings = [*base, *ROWS[name]]
        file = None if keep is None else keep / f"{folder_name(name)}.json"
        found = None if file is None or not file.is_file() else read_json(file)
        if found is None or found["made"] != [config, settings]:
            say(f"{name}: flexp run {config} " + " ".join(f"--set '{setting}'" for setting in settings))
            found = _made(config, settings) | {"made": [config, settings]}
            if file is not None:
                write_json(file, found)
        facts[name] = found
    if draw is not None:
        write_text(draw, _front(facts))
    return Result(
        {"steps": steps, "rounds": rounds, "seed": seed, "rows": facts},
        [[name, *_row(found)] for name, found in facts.items()],
        ("with", "content words by depth", "at the worst step", "of z_base", "labels by clustering", "AUC",
         "by inversion", "members (AUC)", "own", "everybody's", "MB a client", "MiB of the device"),
        ("Content words: by the best attack of a quick audit, in percent. Better attacks may read more.",),
    )  # fmt: skip


def _made(config: str, settings: list[str]) -> dict[str, Any]:
    shown = partial(Progress, console=Console(stderr=True))  # standard output may be JSON
    with TemporaryDirectory() as folder:
        try:
            summary = run(load(Path(config), settings), Path(folder) / "run", progress=shown)
        except PrivacyError as error:
            return {"refused": str(error)}
        audit = Path(folder) / "run" / AUDIT
        found = _costs(summary) | (read_json(audit) if audit.is_file() else {})
    return found | {"line": summary["server_reads"]}


def _costs(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Scores after the last round, and a client's bytes and peak memory (the largest)."""
    clients = summary["clients"]
    return {
        "scores": {key: summary["scores"]["last"].get(key) for key in ("personal_mean", "global_mean")},
        "bytes": sum(one["bytes_up"] + one["bytes_down"] for one in clients) / len(clients),
        "memory": max((one["peak_memory_bytes"] or 0 for one in clients), default=0),
    }


def _row(found: Mapping[str, Any]) -> list[str]:
    if "refused" in found:
        return [f"refused: {found['refused']}", *[""] * 10]
    readings = found.get("readings", ())

    def best(of: str, *, worst: bool = False) -> str:
        read: dict[int, float] = {}
        for one in readings:
            if one["of"].split()[0] == of:  # z averaged is z
                share = max(one["by_step"].values()) if worst else one["content"]
                read[one["depth"]] = max(share, read.get(one["depth"], 0.0))
        return ", ".join(f"{depth}: {100 * read[depth]:.0f}" for depth in sorted(read)) or "not sent"

    def told(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    labels, scores = found.get("labels", {}).get, found["scores"]
    return [best("z"), best("z", worst=True), best("z_base"), told(labels("clusters", labels("features")), ".0%"),
            told(labels("auc", labels("features_auc")), ".2f"), told(labels("inverted"), ".0%"),
            told(found.get("members"), ".2f"), told(scores["personal_mean"], ".1%"),
            told(scores["global_mean"], ".1%"), f"{found['bytes'] / 1e6:.1f}",
            f"{found['memory'] / 2**20:.0f}" if found["memory"] else ""]  # fmt: skip


def _front(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """What is read beside accuracy; larger circles send more bytes, and say memory where one points at them."""
    shown = {name: found for name, found in facts.items() if "refused" not in found}
    most = max((found["bytes"] for found in shown.values()), default=0.0) or 1.0
    figure = blank(height=480)
    figure.add_trace(
        go.Scatter(
            x=[100 * max((one["content"] for one in found.get("readings", ())), default=0.0)
               for found in shown.values()],
            y=[100 * found["scores"]["global_mean"] for found in shown.values()],
            text=list(shown),
            hovertext=[f"{found['bytes'] / 1e6:.1f} MB, {found['memory'] / 2**20:.0f} MiB" for found in shown.values()],
            mode="markers+text",
            textposition="top center",
            marker={"size": [8 + 30 * (found["bytes"] / most) ** 0.5 for found in shown.values()]},
        )
    )  # fmt: skip
    figure.update_xaxes(title="content words read by the best attack (%)", range=[-5, 105])
    figure.update_yaxes(title="accuracy on everybody's test data (%)")
    return str(figure.to_html())
