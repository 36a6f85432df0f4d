"""``flexp data``: a configuration's data before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexp.cli.settings import Settings, console
from flexp.errors import ConfigError

if TYPE_CHECKING:
    from flexp.config import RunConfig


def data(
    config: Annotated[Path, typer.Argument(help="A run's configuration, as for flexp run.")],
    settings: Settings = None,
    client: Annotated[
        str | None, typer.Option("--client", metavar="NAME", help="Whose examples; default: the first two.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Examples to show of a client.")] = 2,
) -> None:
    """Show what each client has, examples as the model will see them, and what is suspicious."""
    from flexp.config.loading import load

    show(load(config, settings or ()), client, examples)


def show(config: RunConfig, client: str | None, examples: int, most: int = 2) -> None:
    """Print the clients, some examples of one or of the first ``most`` clients, notes and warnings.

    Raises:
        FlexpError: what is wrong with the model, the data or the configuration.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from flexp.data import preview
    from flexp.run.settle import settle

    found = settle(config, plan=False).federation
    clients, task = found.clients, found.task
    if client is not None and client not in [one.name for one in clients]:
        raise ConfigError(f"there is no client {client!r}; expected one of {', '.join(one.name for one in clients)}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    titles = ["Client", "Train", "Validation", "Test", "Tokens: middle, most", "Labels"]
    for title in titles:
        table.add_column(title, justify="left" if title in ("Client", "Labels") else "right", overflow="fold")
    for one in clients:
        table.add_row(*map(Text, preview.facts(one, task)))
    shown = console()
    shown.print(table)
    chosen = [one for one in clients if client in (None, one.name)][: most if client is None else 1]
    for one in chosen if examples else []:
        for number, example in enumerate(one.train[:examples], start=1):
            shown.print(Text(f"\n{one.name}, training example {number}:", style="bold"))
            shown.print(Text(preview.written(example, task)), soft_wrap=True)
    if examples and task.model_kind == "causal-lm":
        shown.print(Text(f"\n{preview.MARKS[0]} {preview.MARKS[1]} is what the model learns to write"))
    if found.remarks:
        shown.print()
    for line in found.remarks:
        shown.print(Text(line), soft_wrap=True)


COMMANDS = {"data": data}
