"""What a curious server reads of a run, with each defence: the tables of docs/security.md, made anew.

Each row is ``flexp audit CONFIG`` with the settings beside its name, of the first ``steps`` steps of every client.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.tools.command import Result, Steps, say
from flexp.audit import Audit, audit
from flexp.config.loading import load
from flexp.errors import ConfigError
from flexp.run.settle import build_world

DEMO = str(files("flexp.run") / "demo.toml")
TAIL = "data.clients.each=[{cut=[1,4]},{cut=[2,4]},{cut=[3,4]}]"
ROWS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "kl": ("method.align.kind=kl",),
    "tail": (TAIL,),
    "tail, label_epsilon 1": (TAIL, "privacy.label_epsilon=1"),
    "label_epsilon 0.4": ("privacy.label_epsilon=0.4",),
    "noise 1": ("privacy.noise=1",),
    "noise 3": ("privacy.noise=3",),
    "nopeek": ("privacy.penalty=nopeek",),
}
"""Names, and what they set."""


def measure(
    config: Annotated[str, typer.Option(help="A run's configuration; the default is the demo's.")] = DEMO,
    steps: Steps = 6,
    only: Annotated[str | None, typer.Option(help=f"Some of: {'; '.join(ROWS)}; separated by ';'.")] = None,
) -> Result:
    """What the server reads of texts and labels, with and without defences."""
    chosen = list(ROWS) if only is None else [name.strip() for name in only.split(";")]
    if unknown := [name for name in chosen if name not in ROWS]:
        raise ConfigError(f"--only {unknown[0]}: expected some of {'; '.join(ROWS)}")
    facts, rows = {}, []
    for name in chosen:
        say(f"{name}: flexp audit {config} --set train.steps_per_round={steps} "
            + " ".join(f"--set '{setting}'" for setting in ROWS[name]))  # fmt: skip
        world = build_world(load(Path(config), [f"train.steps_per_round={steps}", *ROWS[name]]))
        found = audit(world.method(world))
        facts[name] = found.as_json()
        rows.append([name, *_row(found)])
    return Result(
        {"steps": steps, "rows": facts},
        rows,
        ("with", "content words by depth", "of z_base", "labels by clustering", "AUC", "by inversion", "members (AUC)"),
        ("Content words: by the best attack of a quick audit, in percent. Better attacks may read more.",),
    )


def _row(found: Audit) -> list[str]:
    def best(of: str) -> str:
        depths = sorted({one.depth for one in found.readings if one.of == of})
        read = [max(one.content for one in found.readings if (one.of, one.depth) == (of, depth)) for depth in depths]
        return ", ".join(f"{depth}: {100 * share:.0f}" for depth, share in zip(depths, read, strict=True)) or "not sent"

    def told(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    labels = found.labels.get
    return [best("z"), best("z_base"), told(labels("clusters"), ".0%"), told(labels("auc"), ".2f"),
            told(labels("inverted"), ".0%"), told(found.members, ".2f")]  # fmt: skip
