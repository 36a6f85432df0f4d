"""What FlexP raises when the user, the data or the model is at fault.

Every message is one clear line: what is wrong, where, what was expected, how to mend it. The command line prints
that line and exits with :data:`USER_ERROR`; a traceback is reserved for FlexP's own mistakes.
"""

from __future__ import annotations

from flexp.texts import plain

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
    """The model cannot be loaded, or cannot be split exactly."""


class AssetError(FlexpError):
    """A named model or data set could not be obtained or verified."""


class LinkError(FlexpError):
    """The other side of a link refused or failed."""


class LinkLostError(LinkError):
    """The other side cannot be reached, or has forgotten this client: connecting and joining again may help."""


class BadValuesError(LinkError):
    """What a client sent is not finite, or beyond the server's bounds; nothing was done with it."""


class StorageError(FlexpError):
    """A file could not be written, or what was saved is damaged."""


class PrivacyError(FlexpError):
    """What a client would send tells more than its owner allows; nothing was sent."""


class TrainingError(FlexpError):
    """Training cannot go on, for instance because the loss is not a number."""
