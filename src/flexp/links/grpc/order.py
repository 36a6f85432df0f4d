"""Requests of one stream in the order of their numbers: what comes twice is passed over, what comes late is told."""

from __future__ import annotations

from collections import deque

from flexp.errors import LinkLostError

LATE = "a request came after one that was sent later, so its step must be done again"
GAPS_KEPT = 64


class Order:
    """Numbers rise; a client may leave some out, but none may come after a higher one.

    gRPC keeps the order of a stream; what stands between client and server may not.
    """

    def __init__(self) -> None:
        self._newest = 0
        self._left_out: deque[range] = deque(maxlen=GAPS_KEPT)  # a client of ours leaves out few: refused requests

    def new(self, number: int) -> bool:
        """Whether this request is to be computed; otherwise it has come before.

        Raises:
            LinkLostError: it has not, and one that was sent later has been computed.
        """
        if number > self._newest:
            if number > self._newest + 1:
                self._left_out.append(range(self._newest + 1, number))
            self._newest = number
            return True
        if any(number in gap for gap in self._left_out):
            raise LinkLostError(LATE)
        return False
