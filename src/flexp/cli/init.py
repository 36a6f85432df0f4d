"""``flexp init``: from data to a first configuration that runs."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexp.cli.settings import Settings, console
from flexp.errors import ConfigError

if TYPE_CHECKING:
    from flexp.data.survey import Survey
    from flexp.run.draft import Draft


def init(
    data: Annotated[str, typer.Argument(help="A file, a folder, asset:NAME or a datasets id.")],
    out: Annotated[Path | None, typer.Option("--out", help="The new file; default: NAME.toml.")] = None,
    model: Annotated[str | None, typer.Option(help="A folder, a Hugging Face id, or asset:NAME.")] = None,
    task: Annotated[str | None, typer.Option(help="What a row is, as data.task.")] = None,
    clients: Annotated[
        str | None, typer.Option(metavar="COLUMN|file|N", help="Whose a row is; N: divide rows among N clients.")
    ] = None,
    settings: Settings = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is guessed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over an older file.")] = False,
) -> None:
    """Look at data, ask what cannot be seen, and write a configuration that runs."""
    from flexp.assets.registry import ASSETS
    from flexp.cli.data import show
    from flexp.config.loading import parsed
    from flexp.data.survey import survey
    from flexp.files import write_text
    from flexp.run import draft as drafts

    seen = survey(data)
    _tell(seen)
    found = drafts.candidates(seen) if task is None else [drafts.columns_for(seen, task)]
    asks = sys.stdin.isatty() and not yes
    chosen = _ask(seen, found) if asks else found[0]
    if clients is None and asks:
        names = [column.name for column in seen.columns]
        text = "whose is a row? a column, file, or a number of clients to divide the rows among"
        clients = _answer(text, drafts.owners(seen), [*names, "file"], numbers=True)
    if model is None:
        guess = drafts.model_for(chosen)
        brought = ", ".join(f"asset:{asset.name}" for asset in ASSETS.values() if asset.kind == "model")
        model = _answer(f"which model? a folder, a Hugging Face id, or {brought}", guess) if asks else guess
    if model is None:
        raise ConfigError(f"FlexP brings no model for {chosen.task}: say which, --model FOLDER or a Hugging Face id")
    name = Path(data.partition("#")[0].removeprefix("asset:")).stem or "run"
    place = Path(f"{name}.toml") if out is None else out
    if place.exists() and not force:
        raise ConfigError(f"{place} is there already; choose another --out, or write over it with --force")
    facts = [
        f"Written by flexp init for {data}: {seen.rows} rows.",
        f"Look at it again: flexp data {place}. Train: flexp run {place}. All keys: docs/configuration.md.",
    ]
    text = drafts.toml(drafts.drafted(seen, chosen, model, clients, place), settings or (), facts)
    typer.echo(f"\nTask {chosen.task}, model {model}\n")
    show(parsed(text, place), None, 1, most=1)  # what cannot be run is not written
    write_text(place, text)
    typer.echo(f"\nWritten: {place}. Train it with: flexp run {place}")


def _tell(seen: Survey) -> None:
    """The columns with what they hold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("Column", "Kind", "Filled", "Distinct", "For instance", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in seen.columns:
        often = ", ".join(f"{value[:24]} ({count})" for value, count in column.common[:6]) if column.repeats else ""
        once = ", ".join(value[:40] for value, _ in column.common[:1])
        cells = (column.name, column.kind, str(column.filled), str(column.distinct or ""), often or once)
        table.add_row(*map(Text, cells))
    shown = console()
    shown.print(f"{seen.source}: {seen.rows} rows", markup=False, soft_wrap=True)
    if seen.files:
        names = ", ".join(seen.files[:8]) + (" …" if len(seen.files) > 8 else "")
        shown.print(f"{len(seen.files)} files or folders that may be clients: {names}", markup=False, soft_wrap=True)
    if seen.tests:
        shown.print("there are test data beside the training data", markup=False)
    for note in seen.notes:
        shown.print(note, markup=False, soft_wrap=True)
    shown.print(table)


def _ask(seen: Survey, found: list[Draft]) -> Draft:
    """The task and its columns, as the user wants them."""
    from flexp.run.draft import Draft

    tasks = [draft.task for draft in found]
    task = _answer(f"what is a row? {', '.join(tasks)}", tasks[0], tasks) if len(tasks) > 1 else tasks[0]
    draft = next(draft for draft in found if draft.task == task)
    names = [column.name for column in seen.columns]
    keys = {
        key: _answer(f"the column for data.{key}", value, names) if isinstance(value, str) and value in names else value
        for key, value in draft.keys.items()
    }
    return Draft(task, keys)


def _answer(text: str, default: str | None, allowed: Collection[str] = (), numbers: bool = False) -> str:
    """What the user types, until it is one of ``allowed`` (or, with ``numbers``, a number)."""
    while True:
        answer = str(typer.prompt(text, default=default)).strip()
        if not allowed or answer in allowed or (numbers and answer.isdecimal() and int(answer) > 0):
            return answer
        typer.echo(f"{answer!r} is none of {', '.join(allowed)}", err=True)


COMMANDS = {"init": init}
