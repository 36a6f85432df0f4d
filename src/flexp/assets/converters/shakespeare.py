"""Shakespeare's plays, speech by speech: every play is a client, or every speaker (McMahan et al. 2017).

The texts are Project Gutenberg's modern spellings. A block between blank lines that begins with a name is a
speech; stage directions in brackets are left out.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

from flexp.assets.converters import Row, write_rows

FEWEST_SPEECHES = 100  # the poems have none; every play has hundreds
_START = re.compile(r"^\s*ACT (I|1|FIRST)\b", re.IGNORECASE | re.MULTILINE)
_DIRECTION = re.compile(r"\[[^\]]{0,600}\]|\[[^\n]*")
_BREAK = re.compile(r"\n[ \t]*\n")
_HEADING = re.compile(r"^(?P<name>[A-Z][\w'’&,. -]{0,38}?)\s*(?P<dot>[.:]?)\s*$")
_DIVISION = re.compile(r"^(ACT|SCENE|THE END|FINIS)\b", re.IGNORECASE)


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Write ``shakespeare.jsonl``: text (one speech), client (the play), speaker (play/name), in order."""
    rows: list[Row] = []
    for path in sorted(source.rglob("*_gut.txt")):
        play = path.name.removesuffix("_gut.txt").removeprefix("tragedy_of_")
        speeches = _speeches(path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n"))
        if len(speeches) >= FEWEST_SPEECHES:
            rows += [{"text": text, "client": play, "speaker": f"{play}/{name}"} for name, text in speeches]
    return write_rows(target / "shakespeare.jsonl", rows)


def _speeches(text: str) -> list[tuple[str, str]]:
    starts = list(_START.finditer(text))
    if not starts:
        return []
    body = _DIRECTION.sub("", text[starts[0].start() :])
    blocks = [[line.strip() for line in block.strip().split("\n")] for block in _BREAK.split(body) if block.strip()]
    names = collections.Counter(name for block in blocks if (name := _speaker(block)))
    speeches: list[tuple[str, str]] = []
    for block in blocks:
        name = _speaker(block)
        if name and (block[0].isupper() or names[name] > 2):
            speeches.append((name, "\n".join(block[1:])))
        elif speeches and not _DIVISION.match(block[0]):  # a speech goes on after a stage direction
            speaker, said = speeches[-1]
            speeches[-1] = (speaker, f"{said}\n" + "\n".join(block))
    return [(name, said.strip()) for name, said in speeches if said.strip()]


def _speaker(block: list[str]) -> str | None:
    match = _HEADING.match(block[0])
    if len(block) < 2 or match is None or _DIVISION.match(block[0]):
        return None
    if not match["dot"] and not block[0].isupper():  # without a full stop only capitals are a name
        return None
    return match["name"].rstrip(" .,").upper() if len(match["name"].split()) <= 5 else None
