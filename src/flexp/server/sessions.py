"""The clients that have joined and not left."""

from __future__ import annotations

from torch import Tensor

from flexp.errors import LinkError
from flexp.server.session import Session


class Sessions(dict[str, Session]):
    """By name. Who asks for one that is not there is told that the client has not joined.

    Raises:
        LinkError: from ``sessions[client]``, see above.
    """

    def __missing__(self, client: str) -> Session:
        raise LinkError(f"client {client} has not joined: Join comes first")

    @property
    def in_flight(self) -> int:
        """Forwards of all clients whose backward has not come yet."""
        return sum(len(session.pending) for session in self.values())

    def end(self, client: str) -> None:
        """Close a client's session, if it has one, and drop what it has in flight."""
        session = self.pop(client, None)
        if session is not None:
            session.drop()

    def refuse_busy(self, what: str) -> None:
        """Refuse to have the server ``what`` (saved, restored, frozen) in the middle of a step.

        Raises:
            LinkError: a client has begun a step and not ended it.
        """
        busy = [name for name, session in self.items() if session.busy]
        if busy:
            raise LinkError(f"the server cannot be {what} in the middle of a step of {', '.join(busy)}")

    def begun(self) -> dict[str, Tensor]:
        """Of clients in the middle of a step: the state of their random generator when it began."""
        return {name: own.boundary for name, own in self.items() if own.busy and own.boundary is not None}
