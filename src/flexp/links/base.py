"""The link: all that a client sees of the server, and the service: all that a link sees of it.

Whatever carries the messages, the code above it is the same. Both have one verb. A call gives a future at once, so that
several exchanges of one client may be in flight.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from flexp.links.coding import Coding
from flexp.links.declaring import Request, size
from flexp.links.messages import Join, Leave, Welcome
from flexp.links.rules import dtype_of
from flexp.rng import current_turn, resting

R = TypeVar("R")
CPU = torch.device("cpu")


@dataclass
class Traffic:
    """Bytes of tensors each way, exchanges, and the seconds that the other side computed and the client waited."""

    bytes_up: int = 0
    bytes_down: int = 0
    exchanges: int = 0
    server_seconds: float = 0.0
    waited_seconds: float = 0.0


@dataclass
class Meter:
    """What one client's link carried, counted where it happens; training apart from evaluation."""

    training: Traffic = field(default_factory=Traffic)
    evaluation: Traffic = field(default_factory=Traffic)

    def of(self, train: bool) -> Traffic:
        """The account of training or of evaluation."""
        return self.training if train else self.evaluation

    def counting(self, request: Request[Any]) -> Traffic | None:
        """The account that a request and its answer go to, if they have tensors."""
        if request.trains is None:
            return None
        return self.of(request.trains and (getattr(request, "train", True) or getattr(request, "step", 0) > 0))

    @contextmanager
    def as_training(self) -> Iterator[None]:
        """Count what runs without a backward inside the ``with`` block as training's: training is what it is for."""
        before, self.evaluation = self.evaluation, Traffic()
        try:
            yield
        finally:
            spent, self.evaluation = self.evaluation, before
            for name, value in asdict(spent).items():
                setattr(self.training, name, getattr(self.training, name) + value)

    def state(self) -> dict[str, dict[str, float]]:
        """All counts, JSON-ready."""
        return {"training": asdict(self.training), "evaluation": asdict(self.evaluation)}

    def load(self, state: dict[str, dict[str, float]]) -> None:
        """Continue from :meth:`state`."""
        self.training = Traffic(**state["training"])  # type: ignore[arg-type]
        self.evaluation = Traffic(**state["evaluation"])  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """All counts as a checkpoint holds them, flat and exact."""
        return {
            f"meter/{kind}/{name}": torch.tensor(value, dtype=torch.float64)
            for kind, counts in self.state().items()
            for name, value in counts.items()
        }

    def load_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`tensors`, which may stand among others."""
        found = self.state()
        for kind, counts in found.items():
            for name, zero in counts.items():
                counts[name] = type(zero)(state[f"meter/{kind}/{name}"])
        self.load(found)


@runtime_checkable
class Link(Protocol):
    """Carries requests from one client to the server, and the answers back.

    Attributes:
        residuals: what error feedback owes the server (:class:`flexp.links.coding.Coding`), to be saved and given back.
    """

    meter: Meter
    residuals: dict[str, Tensor]

    @property
    def client(self) -> str:
        """The name of the client whose link this is."""
        ...

    def call(self, request: Request[R]) -> Future[R]:
        """Send a request, :class:`~flexp.links.messages.Join` before any other.

        The future has the answer, or a LinkError where the server refuses or cannot be reached.
        """
        ...

    def close(self) -> None:
        """Leave; what is in flight is dropped, caches are."""
        ...


class Service(Protocol):
    """What a server offers to links."""

    def answer(self, client: str, request: Request[R]) -> R | Future[R]:
        """Answer a client's request, or say that the answer will come later.

        Args:
            client: its name, which comes from the link, never from a message's content.

        Raises:
            LinkError: the server refuses.
        """
        ...

    @property
    def busy(self) -> bool:
        """Whether anybody waits whom :meth:`work` would answer."""
        ...

    def work(self) -> float | None:
        """Answer the next of those that wait; a thread that never waits calls it between requests.

        Returns:
            After how many seconds to call it again; ``None``: when another request has come.
        """
        ...

    def residuals(self, client: str) -> dict[str, Tensor]:
        """Where this side's error feedback for a client is kept (:class:`flexp.links.coding.Coding`)."""
        ...

    def aside(self, client: str) -> str | None:
        """Why a client's requests are refused that was quarantined; ``None``: it was not."""
        ...

    def readmit(self, client: str) -> bool:
        """Let a client in again that was quarantined; gives whether it was."""
        ...

    @property
    def aside_listeners(self) -> list[Callable[[str, str], None]]:
        """Told the name of each client that is quarantined, and why; in the thread that computes."""
        ...


def ask(link: Link, request: Request[R]) -> R:
    """Send a request and wait for its answer; the caller's random numbers rest meanwhile.

    Raises:
        LinkError: the server refuses or cannot be reached.
    """
    with resting(current_turn()):  # a server in this process may need a turn before it can answer
        return link.call(request).result()


_thread = threading.local()


def never_wait() -> None:
    """Say that this thread waits for none of the answers that it asks for: it hands them on when they are known."""
    _thread.free = True


def waiting_thread() -> int | None:
    """This thread, or the one in whose place it asks, if it may wait for what it asks for."""
    return None if getattr(_thread, "free", False) else getattr(_thread, "place", None) or threading.get_ident()


@contextmanager
def in_place_of(thread: int | None) -> Iterator[None]:
    """Inside the ``with`` block ask in the place of another thread, which waits for the answer."""
    _thread.place = thread
    try:
        yield
    finally:
        _thread.place = None


def finished(make: Callable[[], R]) -> Future[R]:
    """A future of what ``make`` gives or raises, now."""
    future: Future[R] = Future()
    try:
        future.set_result(make())
    except Exception as error:
        future.set_exception(error)
    return future


class Later(Future[R]):
    """An answer that is not known yet, to a request that the service keeps meanwhile, and counts. ``seconds``: that it
    took to compute."""

    seconds = 0.0


class InProcessLink:
    """Calls a server in the same process; tensors pass by reference, detached by whoever makes the message.

    With a codec they become frames and messages again, as over a network, and only the bytes in between are left out.

    Attributes:
        service: the server.
    """

    def __init__(self, service: Service, client: str) -> None:
        self.meter = Meter()
        self.residuals: dict[str, Tensor] = {}
        self.service = service
        self._client = client
        self._ends: tuple[Coding, Coding] | None = None  # this one and the server's, if anything is coded

    @property
    def client(self) -> str:
        return self._client

    def call(self, request: Request[R]) -> Future[R]:
        future: Future[R] = Future()
        traffic, began = self.meter.counting(request), time.perf_counter()
        try:
            if traffic is None:
                answer: Any = self.service.answer(self._client, request)
                if isinstance(answer, Future):
                    return answer
                if isinstance(request, Join) and isinstance(answer, Welcome):
                    self._agree(request, answer)
                future.set_result(answer)
                return future
            sent, up = self._cross(request, up=True)
            traffic.bytes_up += up
            answer = self.service.answer(self._client, sent)
            if isinstance(answer, Future):
                answer.add_done_callback(lambda done: self._arrived(done, future, traffic))
                return future
            self._arrive(answer, future, traffic, began)
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        self.service.answer(self._client, Leave())

    def _arrive(self, answer: Any, future: Future[Any], traffic: Traffic, began: float) -> None:
        answer, down = self._cross(answer, up=False)
        traffic.bytes_down += down
        traffic.exchanges += 1
        traffic.server_seconds += time.perf_counter() - began
        future.set_result(answer)

    def _arrived(self, done: Future[Any], future: Future[Any], traffic: Traffic) -> None:
        """The same for an answer that came later, when others had come; what was waited for them was no computing."""
        try:
            self._arrive(done.result(), future, traffic, time.perf_counter() - getattr(done, "seconds", 0.0))
        except Exception as error:
            future.set_exception(error)

    def _agree(self, join: Join, welcome: Welcome) -> None:
        kept = self.residuals, self.service.residuals(self._client)
        ours, theirs = (Coding(join.codec, dtype_of(join), welcome.hidden, where) for where in kept)
        self._ends = None if ours.exact else (ours, theirs)

    def _cross(self, message: R, *, up: bool) -> tuple[R, int]:
        """What the other side makes of a message, and how many bytes of tensors carry it."""
        if self._ends is None:
            return message, size(message)
        sender, receiver = self._ends if up else self._ends[::-1]
        frame = sender.frame(message, 0)
        device = frame.tensors[0].device if frame.tensors else CPU
        return receiver.message(frame, device), frame.head.payload
