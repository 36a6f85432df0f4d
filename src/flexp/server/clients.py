"""What the server keeps of a client between its sessions, and who may come.

Who comes back goes on. Clients that keep sending what cannot be used are quarantined, and the operator is told.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexp.config import GuardConfig
from flexp.errors import BadValuesError, LinkError
from flexp.links.coding import load_residuals, save_residuals
from flexp.links.declaring import size
from flexp.rng import derived_seed

WINDOW = 256
"""Steps may complete in another order than they began; so far back it is remembered which ones did."""

Key = tuple[str, int]
"""What was asked in a step: the kind of request, and its exchange or block."""
FOREVER = float("inf")
log = logging.getLogger("flexp.server")


@dataclass
class Progress:
    """One client's steps. ``numbering`` is what tells its steps 1, 2, … from those of another run of that client.

    Attributes:
        newest: the highest step that was applied.
        kept_from: steps after this one keep their answers; ``None``: only the newest does.
        slow: seconds from an exchange's forward to its backward, at the most of the last ones.
    """

    numbering: int = 0
    newest: int = 0
    kept_from: int | None = None
    slow: float = 0.0
    _recent: set[int] = field(default_factory=set)
    _answers: dict[int, dict[Key, Any]] = field(default_factory=dict)
    _bytes: int = 0
    _too_large: int = 0

    def goes_on(self, numbering: int) -> bool:
        """Whether a client that joins with ``numbering`` goes on with these steps."""
        return 0 < numbering == self.numbering

    def applied(self, step: int) -> bool:
        """Whether the shared blocks have taken this step; never, if it is not numbered."""
        return step > 0 and (step in self._recent or step <= self.newest - WINDOW)

    def apply(self, step: int) -> None:
        """The step is complete and was given to the shared blocks."""
        if step <= 0:
            return
        self._recent.add(step)
        self.newest = max(self.newest, step)
        self._recent = {number for number in self._recent if number > self.newest - WINDOW}

    def held(self, since: float) -> None:
        """A backward has come whose forward ran at ``since`` of the monotonic clock."""
        self.slow = max(0.9 * self.slow, time.monotonic() - since)

    def answer(self, step: int, key: Key) -> Any | None:
        """What was answered to ``key`` in a step that was applied, if it is still known."""
        return self._answers.get(step, {}).get(key)

    def remember(self, step: int, key: Key, reply: Any, most_bytes: int) -> None:
        """Keep an answer of a numbered step; when all take more than ``most_bytes`` the oldest steps go, each whole,
        and a step that is too large by itself is not kept. What is not known any more is computed anew, not applied.
        """
        if step <= 0 or step == self._too_large:
            return
        known = self._answers.setdefault(step, {})
        self._bytes += size(reply) - (size(known[key]) if key in known else 0)
        known[key] = reply
        self.forget(step - 1 if self.kept_from is None else self.kept_from)
        while self._bytes > most_bytes:
            oldest = min(self._answers)
            self._drop(oldest)
            if oldest == step:
                self._too_large = step

    def forget(self, step: int) -> None:
        """Drop the answers of ``step`` and those before it."""
        for number in [number for number in self._answers if number <= step]:
            self._drop(number)

    def give_up(self, steps: set[int]) -> None:
        """Drop what was answered in steps that will not be completed as they began."""
        for number in steps & self._answers.keys():
            self._drop(number)

    def unapplied(self) -> set[int]:
        """Steps with answers that are not complete."""
        return {number for number in self._answers if not self.applied(number)}

    def state(self) -> Tensor:
        """Numbering and applied steps, int64; answers are not part of it."""
        return torch.tensor([self.numbering, self.newest, *sorted(self._recent)], dtype=torch.int64)

    @classmethod
    def restored(cls, state: Tensor) -> Progress:
        """From :meth:`state`."""
        numbering, newest, *recent = (int(value) for value in state)
        return cls(numbering, newest, _recent=set(recent))

    def _drop(self, step: int) -> None:
        self._bytes -= sum(size(reply) for reply in self._answers.pop(step).values())


@dataclass
class ClientRecord:
    """One client: its steps, what error feedback owes it, and the cut it joined with last."""

    progress: Progress = field(default_factory=Progress)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    cut: tuple[int, int] | None = None

    def numbered(self, numbering: int) -> Progress:
        """Its progress in the run whose steps it numbers so; if that is another run, it begins anew."""
        if not self.progress.goes_on(numbering):
            self.progress = Progress(numbering)
        return self.progress

    def cuts(self, cut: tuple[int, int]) -> None:
        """It joins with that cut. Answers to steps with another one would be wrong: a step that comes again is computed
        again, and not applied again."""
        if self.cut not in (None, cut):
            self.progress.forget(self.progress.newest)
        self.cut = cut


class ClientRegistry(dict[str, ClientRecord]):
    """All clients that ever joined, by name.

    Args:
        seed: of the clients' dropout.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def __missing__(self, client: str) -> ClientRecord:
        self[client] = ClientRecord()
        return self[client]

    def seed_of(self, client: str) -> int:
        """Of its dropout on this side."""
        return derived_seed(self._seed, "server", client)

    def state(self, *, progress: bool) -> dict[str, Tensor]:
        """As flat named tensors; ``progress``: whether their steps are part of it."""
        flat: dict[str, Tensor] = {}
        for name, record in self.items():
            if progress:
                flat[f"progress/{name}"] = record.progress.state()
            flat |= save_residuals(record.residuals, f"residuals/{name}/")
        return flat

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, whose entries may stand among others."""
        owed: dict[str, dict[str, Tensor]] = {name: {} for name in self}
        for record in self.values():
            record.progress = Progress()
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "progress":
                self[name].progress = Progress.restored(value)
            elif kind == "residuals":
                name, _, what = name.rpartition("/")
                owed.setdefault(name, {})[what] = value
        for name, residuals in owed.items():
            load_residuals(self[name].residuals, residuals)


@dataclass
class Conduct:
    """What is known of one client: its requests, and which of them were bad.

    Attributes:
        bad: how many were refused for their values, in all.
        until: when it may come again, in seconds since 1970; 0: it is not quarantined.
    """

    requests: int = 0
    bad: int = 0
    until: float = 0.0
    strikes: deque[int] = field(default_factory=deque)


class Quarantine:
    """Counts bad requests, by client, and keeps out who sends too many.

    Requests come under the server's lock; the rest may be asked from any thread.

    Attributes:
        say: told when a client is quarantined.
        listeners: told its name and why, besides: the server forgets its session, a link ends its stream.
    """

    def __init__(self, config: GuardConfig | None = None, clock: Callable[[], float] = time.time) -> None:
        self.config = config or GuardConfig()
        self.say: Callable[[str], None] = log.warning
        self.listeners: list[Callable[[str, str], None]] = []
        self._clock = clock
        self._records: dict[str, Conduct] = {}

    @contextmanager
    def request(self, client: str) -> Iterator[None]:
        """Count a request of ``client`` in the ``with`` block, and what it is refused for.

        Raises:
            LinkError: the client is quarantined.
        """
        why = self.aside(client)
        if why is not None:
            raise LinkError(why)
        record = self._records.setdefault(client, Conduct())
        record.requests += 1
        with self.judged(client):
            yield

    @contextmanager
    def judged(self, client: str) -> Iterator[None]:
        """Count what a request is refused for that has been counted itself."""
        try:
            yield
        except BadValuesError:
            self._strike(client, self._records.setdefault(client, Conduct()))
            raise

    def aside(self, client: str) -> str | None:
        """Why a client's requests are refused, if it is quarantined; afterwards it begins with a clean record."""
        record = self._records.get(client)
        if record is None or not record.until:
            return None
        left = record.until - self._clock()
        if left <= 0:
            self.readmit(client)
            return None
        when = "until the operator lets it in again" if left == FOREVER else f"for another {max(1, round(left))} s"
        return (
            f"client {client} is quarantined {when}: it sent {self.config.strikes} activations or gradients that "
            "cannot be used; lower its learning rate or use float32, and ask the server's operator (flexp readmit)"
        )

    def readmit(self, client: str) -> bool:
        """Let a client in again that was quarantined; gives whether it was."""
        record = self._records.get(client)
        if record is None or not record.until:
            return False
        record.until = 0.0
        record.strikes.clear()
        return True

    @property
    def all_aside(self) -> dict[str, float]:
        """Who is quarantined, and until when, in seconds since 1970."""
        return {name: record.until for name, record in list(self._records.items()) if self.aside(name) is not None}

    def bad(self, client: str | None = None) -> int:
        """How many requests were refused for their values: of one client, or of all."""
        records = list(self._records.values()) if client is None else [self._records.get(client, Conduct())]
        return sum(record.bad for record in records)

    def state(self) -> dict[str, Tensor]:
        """Who is quarantined; strikes of the others are forgotten."""
        return {f"aside/{name}": torch.tensor(until, dtype=torch.float64) for name, until in self.all_aside.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self._records.clear()
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "aside":
                self._records[name] = Conduct(until=float(value))

    def _strike(self, client: str, record: Conduct) -> None:
        record.bad += 1
        record.strikes.append(record.requests)
        while record.strikes[0] <= record.requests - self.config.within:
            record.strikes.popleft()
        if len(record.strikes) < self.config.strikes:
            return
        seconds = self.config.aside_seconds
        record.until = FOREVER if seconds is None else self._clock() + seconds
        why = self.aside(client)
        assert why is not None
        self.say(why)
        for listener in self.listeners:
            listener(client, why)
