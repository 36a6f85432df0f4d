"""What a configuration chooses by name: methods, alignments, codecs, tasks and partitioners.

One of FlexP's own is a class with a line ``name = "…"`` in its kind's place (:data:`METHODS` and so on). Names are
read from the source, so that nothing is imported before it is used. Another package adds a component by an entry point
whose name is the component's::

    [project.entry-points."flexp.methods"]
    my-method = "my_package.my_method:MyMethod"
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from flexp.errors import ConfigError

_HERE = Path(__file__).parent


class Registry(Mapping[str, Any]):
    """The components of one kind by name.

    Args:
        word: what one of them is called; the group of entry points is ``flexp.`` and its plural.
        place: the file or the folder of our own, below the package.
    """

    def __init__(self, word: str, place: str) -> None:
        self.word, self.group = word, f"flexp.{word}s"
        self._place = _HERE / place

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Any:
        """The component.

        Raises:
            ConfigError: there is none, there are two, or what another package calls so cannot be imported.
        """
        if name not in self._found:
            raise ConfigError(f"there is no {self.word} {name!r}; {self.hint(name, self)}")
        first, *others = self._found[name]
        if others:
            both = " and ".join(f"{found.value} ({_owner(found)})" for found in (first, *others))
            raise ConfigError(f"two {self.word}s are called {name!r}: {both}; uninstall or rename one")
        try:
            return first.load()
        except Exception as error:
            if first.dist is None:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ConfigError(
                f"the {self.word} {name!r} of {_owner(first)} cannot be imported from {first.value} ({reason}); "
                "mend or uninstall that package"
            ) from error

    def owner(self, name: str) -> str:
        """The package that brings it: ``flexp``, or another one with its version."""
        return _owner(self._found[name][0])

    @staticmethod
    def hint(name: str, known: Iterable[str]) -> str:
        """What may have been meant by an unknown ``name``."""
        known = list(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        return f"{f'did you mean {near[0]!r}? ' if near else ''}known: {', '.join(known)}"

    @cached_property
    def _found(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for entry in (*self._own(), *entry_points(group=self.group)):
            same = found.setdefault(entry.name, [])
            if entry.value not in [other.value for other in same]:  # a folder may be on the path twice
                same.append(entry)
        return dict(sorted(found.items()))

    def _own(self) -> Iterator[EntryPoint]:
        for file in sorted(self._place.glob("*.py")) if self._place.is_dir() else [self._place]:
            module = ".".join(("flexp", *file.relative_to(_HERE).with_suffix("").parts))
            for statement in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(statement, ast.ClassDef) and (name := _name(statement)) is not None:
                    yield EntryPoint(name, f"{module}:{statement.name}", self.group)


def _name(statement: ast.ClassDef) -> str | None:
    """What a class says in its line ``name = "…"``, if it has one."""
    for line in statement.body:
        match line:
            case ast.Assign(targets=[ast.Name(id="name")], value=ast.Constant(value=str(name))):
                return name
    return None


def _owner(entry: EntryPoint) -> str:
    return "flexp" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


METHODS = Registry("method", "methods")
"""Subclasses of :class:`flexp.methods.base.Method`."""

ALIGNMENTS = Registry("alignment", "server/alignment.py")
"""Subclasses of :class:`flexp.server.alignment.Alignment`: terms of the loss."""

CODECS = Registry("codec", "links/codecs.py")
"""Subclasses of :class:`flexp.links.codecs.Codec`."""

TASKS = Registry("task", "data/tasks")
"""Classes with what :class:`flexp.data.types.Task` says."""

PARTITIONERS = Registry("partitioner", "data/partitioners.py")
"""Subclasses of :class:`flexp.data.partition.Partitioner`."""

VERIFIERS = Registry("verifier", "links/grpc/attesting.py")
"""Classes with what :class:`flexp.links.grpc.attesting.Verifier` says."""
