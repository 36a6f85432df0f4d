"""Prompts with ``{column}`` fields."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter

from flexp.errors import ConfigError


def fields(template: str) -> list[str]:
    """The names of the fields of ``template``, each once, in order. ``{{`` and ``}}`` stand for braces.

    Raises:
        ConfigError: braces do not match, or a field is more than a plain name.
    """
    names: dict[str, None] = {}
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"data.template: {error} in {template!r}; write {{column}} for a column and {{{{ or }}}} for a brace"
        ) from error
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name or spec or conversion or any(sign in name for sign in ".["):
            raise ConfigError(
                f"data.template: the field {{{name}}} in {template!r} must be a plain column name, like {{text}}"
            )
        names[name] = None
    return list(names)


def fill(template: str, values: Mapping[str, str]) -> str:
    """``template`` with its fields replaced; braces inside the values are kept as they are."""
    return "".join(
        literal + (values[name] if name is not None else "") for literal, name, _, _ in Formatter().parse(template)
    )
