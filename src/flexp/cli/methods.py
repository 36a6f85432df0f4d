"""``flexp methods``: the methods that ``method.name`` may name, FlexP's own and those of other packages."""

from __future__ import annotations

from flexp.cli.settings import console
from flexp.errors import ConfigError


def methods() -> None:
    """Show every method: whether all get one model, whether the model is split, and what leaves a client."""
    from rich.markup import escape
    from rich.table import Table

    from flexp.registry import METHODS

    table = Table(box=None, pad_edge=False)
    for title in ("name", "one model for all", "split", "sends", "from"):
        table.add_column(title, no_wrap=title == "name")
    table.add_column("what it is", overflow="fold")
    for name in METHODS:
        try:
            method = METHODS[name]
        except ConfigError as error:
            table.add_row(name, "", "", "", "", f"[red]{escape(str(error))}[/]")
            continue
        about = (method.__doc__ or "").strip().partition("\n")[0]
        split = method.held.part in ("ends", "start")
        cells = (name, _yes(method.same_for_all), _yes(split), method.sends, METHODS.owner(name), about)
        table.add_row(*map(escape, cells))
    console(160).print(table)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


COMMANDS = {"methods": methods}
