"""What FlexP raises when the user, the data or the model is at fault.

Every message is one clear line: what is wrong, where, what was expected, how to mend it. The command line prints
that line and exits with :data:`USER_ERROR`; a traceback is reserved for FlexP's own mistakes.
"""

from __future__ import annotations

USER_ERROR = 2
"""Exit code of a command that failed because of what the user gave it."""


class FlexpError(Exception):
    """Base of everything that a caller may want to catch. What it says is one line that a terminal only shows."""

    def __str__(self) -> str:
        return plain(super().__str__())


class ConfigError(FlexpError):
    """A key of the run's configuration is unknown, of the wrong type, or impossible."""


class DataError(FlexpError):
    """The data cannot be read, or does not hold what the task needs."""


class ModelError(FlexpError):
    """The model cannot be loaded, cannot be split exactly, or does not answer with finite numbers."""


class AssetError(FlexpError):
    """A named model or data set could not be obtained or verified."""


class LinkError(FlexpError):
    """The other side of a link refused or failed."""


class LinkLostError(LinkError):
    """The other side cannot be reached, or has forgotten this client: connecting and joining again may help."""


class StoppedError(LinkLostError):
    """The server stops, and wants its clients to save and leave until it is back."""


class BadValuesError(LinkError):
    """What a client sent is not finite, or beyond the server's bounds; nothing was done with it."""


class FullError(LinkError, MemoryError):
    """The server's memory ran out at a client's request, which had no effect: less at a time may fit."""


class StorageError(FlexpError):
    """A file could not be written, or what was saved is damaged."""


class PrivacyError(FlexpError):
    """What a client would send tells more than its owner allows; nothing was sent."""


class TrainingError(FlexpError):
    """Training cannot go on, for instance because the loss is not a number."""


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
