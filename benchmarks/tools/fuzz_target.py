"""What is fuzzed: the decoder, the joining handshake and everything that a server does with a frame that it accepts.

The server is real and tiny, and is fed in the thread that computes. No gradient can pass its bounds, so whatever
arrives, its weights must stay what they are.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any

import torch

from benchmarks.tools.fuzz_inputs import CODECS, CUT, HANDSHAKE, IN_FLIGHT, RAW, STRANGER, name_of, seeds
from flexp.config import AlignConfig, GuardConfig, OptimizerConfig, ServerConfig
from flexp.errors import FlexpError, LinkError
from flexp.links import frames
from flexp.links.coding import PLAIN
from flexp.links.frames import VERSION, Frame, Head, Incoming, parse, signed
from flexp.links.grpc.gate import Gate
from flexp.links.grpc.security import CLIENT_KEY, PROTOCOL_KEY, TOKEN_KEY
from flexp.links.grpc.serving import Serving
from flexp.links.grpc.tokens import Tokens
from flexp.links.messages import Abort, ForwardRequest, Join, Leave, Refusal
from flexp.links.rules import Agreement, Limits, check_reply, check_request
from flexp.models.fingerprint import fingerprint
from flexp.server import Server

MESSAGE = 2048
"""Bytes of a message here, so that small frames have several; elsewhere it is a mebibyte."""
KEPT = 10
CPU = torch.device("cpu")


class TurnedAwayError(Exception):
    """A stream was ended, as a context does it."""


class _Context:
    """A stream's context, as far as the gate knows it."""

    def __init__(self, name: bytes, token: bytes, host: int) -> None:
        self._said = ((PROTOCOL_KEY, str(VERSION)), (CLIENT_KEY, name), (TOKEN_KEY, token))
        self._host = host

    def invocation_metadata(self) -> Any:
        return self._said

    def peer(self) -> str:
        return f"ipv4:192.0.2.{self._host}:4711"

    async def abort(self, *_: Any) -> None:
        raise TurnedAwayError


class Target:
    """Feeds inputs to a server and watches what comes of them.

    Attributes:
        counts: inputs by what became of them: ``handshake``, ``refused`` (no frame, or none that was agreed on),
            ``denied`` (by the server, with a reason) and ``answered``.
        findings: what should never happen, with one input each.
    """

    def __init__(self) -> None:
        optimizer = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.0)
        guard = GuardConfig(max_norm=1e-300, strikes=10**9)
        config = ServerConfig(guard=guard, keep_answers_bytes=1 << 16, max_cached_tokens=256)
        self.server = Server.from_pretrained("arch:llama", config=config, optimizer=optimizer, remembers=True)
        self.counts: Counter[str] = Counter()
        self.findings: dict[str, bytes] = {}
        stage = self.server.shared.stage
        self._join = Join("", fingerprint(stage.model.config), (2, 4), "torch.float32", "full", AlignConfig(kind="off"))
        self.seeds = seeds(self._join)
        self._joins = {data[0] & 7: data[1:] for data in self.seeds if b'"Join"' in data}
        self._agreements: dict[int, Agreement] = {}
        self._serving = Serving(self.server, limits=Limits(max_tokens=64, frame_bytes=1 << 16))
        self._gate = Gate(Tokens({"a": hashlib.sha256(b"secret").digest()}), None, self.server.aside, lambda _: None)

    def close(self) -> None:
        """Stop the server."""
        self._serving.stop()

    @property
    def digest(self) -> str:
        """Of the shared weights and their optimiser; :meth:`Server.state` must be possible at any time, too."""
        self.server.state(unfinished=True)
        found = hashlib.sha256()
        for name, value in sorted(self.server.shared.updater.parameters.items()):
            found.update(name.encode() + value.detach().numpy().tobytes())
        return found.hexdigest()

    def feed(self, data: bytes) -> None:
        """One input."""
        if not data:
            return
        state = data[0] & 7
        try:
            if state == HANDSHAKE:
                self.counts["handshake"] += 1
                self._knock(data[1:])
            else:
                self._prepare(state)
                self.counts[self._frame(state, data)] += 1
        except Exception as error:
            self._found(f"{type(error).__name__}: {error}", data)

    def _knock(self, data: bytes) -> None:
        size = data[0] if data else 0
        context = _Context(data[1 : 1 + size], data[1 + size :], len(data) % 256)
        with contextlib.suppress(TurnedAwayError, FlexpError, UnicodeDecodeError):
            client = _driven(self._gate.admit(context))
            if (client, data[1 + size :]) != ("a", b"secret"):
                raise AssertionError("a stranger was let in")

    def _prepare(self, state: int) -> None:
        """Put the client of this state back into it."""
        client = name_of(state)
        if state == STRANGER:
            self.server.answer(client, Leave())
            self._agreements.pop(state, None)
            return
        if state not in self._agreements:
            self._accept(state, self._joins[state])
        pending = self.server._sessions[client].pending
        if len(pending) > 4:
            self.server.answer(client, Abort())
        if state == max(CODECS) and IN_FLIGHT not in pending:
            self.server.answer(client, ForwardRequest(IN_FLIGHT, torch.ones(1, 2, 32), train=True))

    def _frame(self, state: int, data: bytes) -> str:
        content = data[1:] if not data[0] & RAW else signed(data[1:])
        try:
            frame = _received(list(_messages(content, data[0])), self._agreements.get(state), name_of(state))
        except LinkError:
            return "refused"
        became = self._judged(state, frame, data)
        if became == "answered" and frame.head.message in (Join.__name__, Leave.__name__):
            self._agreements.pop(state, None)  # it is not in its state any more, and joins anew
        return became

    def _accept(self, state: int, content: bytes) -> None:
        frame = _received(list(_messages(content, 0)), None, name_of(state))
        welcome, _ = self._answer(state, frame)
        self._agreements[state] = Agreement.of(PLAIN.message(frame, CPU), welcome)

    def _answer(self, state: int, frame: Frame) -> tuple[Any, Head]:
        answer = self._serving._work(name_of(state), frame)
        assert isinstance(answer, tuple)  # only an order would come later, and nobody conducts a run here
        said, made = answer
        return said, made.head if isinstance(made, Frame) else parse(made[0])  # a frame is yet to be encoded

    def _judged(self, state: int, frame: Frame, data: bytes) -> str:
        answer, head = self._answer(state, frame)
        if isinstance(answer, Refusal):
            if "the server failed (" in answer.error:
                self._found(answer.error, data)
            return "denied"
        check_reply(head, frame.head, self._agreements.get(state))
        return "answered"

    def _found(self, what: str, data: bytes) -> None:
        self.counts["findings"] += 1
        if len(self.findings) < KEPT:
            self.findings.setdefault(what[:300], data)


@contextlib.contextmanager
def target() -> Iterator[Target]:
    """A target whose messages are small, for the ``with`` block."""
    chunk, frames.CHUNK = frames.CHUNK, MESSAGE
    try:
        made = Target()
        try:
            yield made
        finally:
            made.close()
    finally:
        frames.CHUNK = chunk


def _messages(content: bytes, how: int) -> Iterator[bytes]:
    """The messages of a frame: as they should be, or one is missing, comes twice or is cut short."""
    pieces = [content[at : at + MESSAGE] for at in range(0, len(content), MESSAGE)] or [b""]
    match how & CUT:
        case 0x40 if len(pieces) > 1:
            pieces[1] = pieces[1][:-1]
        case 0x80:
            pieces.insert(1, pieces[-1])
        case 0xC0 if len(pieces) > 1:
            del pieces[-1]
    yield from pieces


def _received(messages: list[bytes], agreement: Agreement | None, client: str) -> Frame:
    """As :func:`flexp.links.grpc.loop.read_frame` does it.

    Raises:
        LinkError: this is no frame, or none that was agreed on.
    """
    incoming = Incoming(messages[0])
    check_request(incoming.head, agreement, client)
    incoming.allocate()
    for message in messages[1:]:
        if incoming.done:
            break  # the next frame's
        incoming.add(message)
    if not incoming.done:
        raise LinkError("the stream ended in the middle of a frame")
    return incoming.frame()


def _driven(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the gate waits")
