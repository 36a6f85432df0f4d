"""``flexp run``, ``flexp demo`` and ``flexp report``."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexp.cli.settings import Device, Settings, check_others, console, overrides, placed
from flexp.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from flexp.config import RunConfig

Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; default: runs/NAME-DATE.")]


def run(
    config: Annotated[Path | None, typer.Argument(help="The run's configuration, a TOML file.")] = None,
    settings: Settings = None,
    out: Out = None,
    seed: Annotated[int | None, typer.Option(help="Override the run's seed.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Continue the run in DIR.")] = None,
    device: Device = None,
) -> None:
    """Train a simulated federation; every client ends with its own model."""
    from flexp.config.loading import load

    if resume is not None:
        if config is not None or seed is not None or out is not None:
            raise ConfigError("--resume continues a run as it was configured: leave out CONFIG, --seed and --out")
        _go(resume, rounds=_rounds(settings or ()), device=device)
        return
    if config is None:
        raise ConfigError("say which run: flexp run CONFIG.toml, or flexp run --resume DIR")
    said = overrides(settings, **placed(device))
    loaded = load(config, said, seed)
    check_others(config, said)
    _go(out or fresh(loaded.name), loaded)


def demo(
    out: Out = None,
    seed: Annotated[int, typer.Option(help="The run's seed.")] = 0,
) -> None:
    """A first success: eight clients with different cuts fine-tune a sentence encoder on their own texts."""
    from importlib.resources import as_file, files

    from flexp.config.loading import load

    with as_file(files("flexp.run") / "demo.toml") as path:
        loaded = load(path, seed=seed)
    _go(out or fresh(loaded.name), loaded)


def report(folder: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Make the HTML report of a run anew, from its folder alone."""
    from flexp.report import write_report

    typer.echo(f"Report: {write_report(folder)}")


def _rounds(settings: Sequence[str]) -> Any:
    """What ``--set train.rounds=N`` says, the one setting that a run may have another of when it is resumed."""
    from flexp.config.loading import override

    said: dict[str, Any] = {}
    for setting in settings:
        override(said, setting)
    train = said.get("train")
    if said and (said.keys() != {"train"} or not isinstance(train, dict) or train.keys() != {"rounds"}):
        raise ConfigError(
            "--resume continues a run as it was configured: leave out --set, but for --set train.rounds=N, which makes "
            "it longer"
        )
    return train["rounds"] if train else None


def _go(folder: Path, config: RunConfig | None = None, rounds: int | None = None, device: str | None = None) -> None:
    """Start ``config`` in ``folder``, or resume what is there, and show the result.

    Raises:
        TrainingError: the run is over, and no client's model answers with finite numbers: whoever goes on with its
            models must not take them for trained ones.
    """
    from flexp.run import runner  # slow to import: only once the configuration is known to be right

    try:
        summary = runner.resume(folder, rounds=rounds, device=device) if config is None else runner.run(config, folder)
    except KeyboardInterrupt:
        if (folder / "config.json").exists():
            typer.echo(f"go on after the last finished round with: flexp run --resume {folder}", err=True)
        raise
    _show(summary, folder)
    taking_part = {client["name"] for client in summary["clients"]} - {
        one["name"] for one in summary.get("dropped", [])
    }
    if taking_part and taking_part <= set(summary["not_finite"]):
        raise TrainingError(
            f"no client's model answers with finite numbers, so that nothing in {folder} has a score; lower "
            "train.personal.lr or train.shared.lr, set their clip, or use model.dtype = 'float32'"
        )


def fresh(name: str) -> Path:
    name = re.sub(r"[^\w.-]+", "-", name).strip(".-")[:80] or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _show(summary: dict[str, Any], folder: Path) -> None:
    from flexp.report.summary import UNKNOWN
    from flexp.report.tables import client_table

    shown = console()
    shown.print(client_table(summary))
    reads = f"What the server can read: {summary['server_reads']}"
    reads += " (privacy.audit = true, or flexp audit)" if summary["server_reads"] == UNKNOWN else ""
    shown.print(reads, soft_wrap=True, markup=False, highlight=False)
    where = folder / "checkpoints"
    shown.print(f"Saved in {folder}; every client's personal weights in {where}", soft_wrap=True, markup=False)
    page = folder / "report.html"
    if page.exists():
        shown.print(f"Report: {page.resolve().as_uri()}", soft_wrap=True)


COMMANDS = {"demo": demo, "run": run, "report": report}
