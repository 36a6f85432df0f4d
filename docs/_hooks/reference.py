"""What the site generates from the source: the reference of the commands. MkDocs calls the functions named ``on_…``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

CLI_PAGE = "reference/cli.md"
CHECKOUT = Path(__file__).parents[2]
ROLE = re.compile(r":(?:py:)?(?:func|class|mod|meth|data|attr|exc|obj):<code>~?")


def on_files(files: Any, config: Any) -> Any:
    """Add the page of the commands."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, CLI_PAGE, content=cli_reference()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other things by Sphinx's roles, of which a reader needs the name alone."""
    return ROLE.sub("<code>", html)


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, as click sees it, with the words that call it."""
    import typer

    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))  # benchmarks/ is not installed
    from benchmarks import app as benchmarks
    from flexp.cli.main import app

    yield from _within(typer.main.get_command(app), ("flexp",))
    yield from _within(typer.main.get_command(benchmarks()), ("python", "-m", "benchmarks"))


def _within(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, child in inner.items():
        yield from _within(child, (*path, name))


def cli_reference() -> str:
    """The page: usage, arguments and options of every command, in its own words."""
    lines = [
        "# Commands",
        "",
        "Made from the commands themselves; `flexp COMMAND --help` says the same. A mistake of the user is one line "
        "and exit code 2; a traceback is for FlexP's own.",
        "",
    ]
    for path, command in commands():
        lines += [f"## `{' '.join(path)}`", "", _text(command.help or ""), "", "```", _usage(path, command), "```", ""]
        rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        if rows:
            lines += ["| | | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _usage(path: tuple[str, ...], command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name != "argument"]
    words = [*path, *(_name(p) if p.required else f"[{_name(p)}]" for p in arguments)]
    words += [_name(p) for p in options if p.required]
    return " ".join(words) + (" [OPTIONS]" if any(not p.required for p in options) else "")


def _row(parameter: Any) -> str:
    several = " (several times)" if parameter.multiple and parameter.param_type_name != "argument" else ""
    default = parameter.default
    plain = "" if default is None or isinstance(default, bool) or callable(default) else f"`{default}`"
    told = "**required**" if parameter.required else plain
    return f"| {_cell(f'`{_name(parameter)}`')} | {_cell(_text(parameter.help or '') + several)} | {told} |"


def _name(parameter: Any) -> str:
    """An argument's name, or an option with what it takes."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    name = max(parameter.opts, key=len)
    if parameter.is_flag:
        return " / ".join([name, *parameter.secondary_opts])
    return f"{name} {_takes(parameter)}"


def _takes(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    descriptor = getattr(parameter, "type_descriptor", None)
    choices = getattr(descriptor, "choices", None)
    if choices:
        return "|".join(str(getattr(choice, "value", choice)) for choice in choices)
    annotation = getattr(descriptor, "annotation", str)
    for branch in get_args(annotation):  # of an optional one
        if get_origin(branch) is Literal or branch in (int, float, Path):
            annotation = branch
            break
    if get_origin(annotation) is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    return {int: "N", float: "X", Path: "PATH"}.get(annotation, "TEXT")


def _text(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
