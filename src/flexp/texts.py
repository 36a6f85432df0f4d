"""Text that comes from outside, before a person sees it."""

from __future__ import annotations

MOST = 4000
"""Letters that one line is worth; what a server, a client or a file says may be longer."""


def plain(text: object, most: int = MOST, keep: str = "") -> str:
    r"""``text`` with everything that a terminal would obey, and every line break, as an escape (``\x1b``, ``\u202e``).

    Whoever sends text could else move the cursor, change colours or titles, forge lines of a log, or turn the direction
    of reading. Half of a surrogate pair, which no file or stream takes, is escaped as well.

    Args:
        most: letters that are left of it; what was cut is said with dots.
        keep: letters that stay as they are, such as line breaks where several lines are wanted.
    """
    said = str(text)
    if len(said) > most:
        said = said[:most] + "…"
    if said.isprintable():
        return said
    return "".join(letter if letter.isprintable() or letter in keep else _escaped(letter) for letter in said)


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
