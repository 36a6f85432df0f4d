"""The server: the shared blocks, and a session for each client that joined."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import singledispatchmethod
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from flexp.assets import resolve
from flexp.config import LoraConfig, ModelConfig, OptimizerConfig, ServerConfig
from flexp.errors import LinkError
from flexp.links.inprocess import InProcessLink
from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    Done,
    EndGeneration,
    ExtendReply,
    ExtendRequest,
    FetchReply,
    FetchRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    Leave,
    Order,
    PullReply,
    PullRequest,
    Ready,
    Request,
    Welcome,
)
from flexp.models.loading import ModelKind, load_config, load_stage
from flexp.models.parts import Part, check_cut
from flexp.models.stage import Stage
from flexp.models.tuning import tune
from flexp.server.admission import alike, check_backward, check_fetch, check_forward, check_join, check_pull
from flexp.server.bounds import Bounds, check_finite
from flexp.server.fetching import give
from flexp.server.generations import check_extend, drop_unused
from flexp.server.guard import Guard
from flexp.server.progress import Key
from flexp.server.regulars import Regulars
from flexp.server.session import Session
from flexp.server.sessions import Sessions
from flexp.server.shared import SharedBlocks

R = TypeVar("R")


class Conductor(Protocol):
    """Tells clients what to do next; called between two requests."""

    def ready(self, client: str, ready: Ready) -> Future[Order]:
        """A client waits for its order; it may take as long as others take."""
        ...

    def gone(self, client: str) -> None:
        """A client has left; whatever it waited for it will ask again."""
        ...


class Server:
    """Runs and trains the shared blocks for all clients; each request as it arrives, one at a time.

    Args:
        stage: blocks [s_min, e_max), tuned already.
        lora: the adapters of ``stage``, which clients that say theirs must have too.
        total_steps: client steps in all, for schedules of the shared learning rate.
        seed: of the clients' dropout on this side.
        remembers: keep the answers of clients' last steps, for clients that may go back to a snapshot.
        allow_export: give a client the trained weights of the blocks that it has computed here, if it asks.

    Attributes:
        conductor: tells clients what to do next, if this server conducts a run.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        tuning: str = "full",
        lora: LoraConfig | None = None,
        config: ServerConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        remembers: bool = False,
        allow_export: bool = False,
    ) -> None:
        self.config = config or ServerConfig()
        self.tuning = tuning
        self.lora = lora
        self.shared = SharedBlocks(stage, self.config, optimizer or OptimizerConfig(), total_steps)
        self.compute_seconds = 0.0
        self.bounds, self.guard = Bounds(self.config.guard), Guard(self.config.guard)
        self.remembers, self.allow_export = remembers, allow_export
        self.regulars = Regulars(seed, self._device)
        self.conductor: Conductor | None = None
        self._sessions = Sessions()
        self._lock = threading.RLock()
        self.guard.listeners.append(lambda client, _: self._sessions.end(client))

    @classmethod
    def from_pretrained(
        cls,
        model: ModelConfig | str | Path,
        kind: ModelKind = "causal-lm",
        *,
        base_depth: int = 1,
        end: int | None = None,
        config: ServerConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        remembers: bool = False,
        allow_export: bool = False,
        **settings: Any,
    ) -> Server:
        """Load blocks [``base_depth``, ``end``) of a pretrained model, and nothing else of it.

        A base depth of 0 is for clients that agree to send their bare embeddings, from which tokens can be read.

        Args:
            config: its ``tuning`` says how the shared blocks are tuned where that is not as ``model`` says.
            settings: keys of ``[model]`` beside the name, such as ``tuning="lora"`` or ``autocast="bfloat16"``. Those
                that activations depend on must be the clients'.

        Example:
            >>> server = flexp.Server.from_pretrained("path/to/model", "sequence-classification")
            >>> link = server.connect("clinic-a")

        Raises:
            ModelError: the model cannot be loaded or split.
            ConfigError: there are no such blocks or settings.
        """
        wanted = ModelConfig.of(model, **settings)
        wanted = wanted.at(resolve(wanted.id))
        blocks = int(load_config(wanted.id).get_text_config().num_hidden_layers)
        start, stop = check_cut((base_depth, end), blocks, where="server blocks (base_depth, end)")
        stage = load_stage(wanted, kind, Part.server(start, stop), seed=seed)
        config = config or ServerConfig()
        tuning = config.tuning or wanted.tuning
        tune(stage, wanted, tuning, seed=seed)
        return cls(
            stage,
            tuning=tuning,
            lora=wanted.lora,
            config=config,
            optimizer=optimizer,
            total_steps=total_steps,
            seed=seed,
            remembers=remembers,
            allow_export=allow_export,
        )

    @property
    def blocks(self) -> tuple[int, int]:
        """(s_min, e_max): the shared blocks are [s_min, e_max)."""
        owned = self.shared.stage.part.blocks
        return min(owned), max(owned) + 1

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.shared.stage.model.device
        return device

    def connect(self, client: str) -> InProcessLink:
        """A link for ``client`` inside this process."""
        return InProcessLink(self, client)

    def answer(self, client: str, request: Request[R]) -> R | Future[R]:
        """Answer a request of a client; all but :class:`Join` and :class:`Leave` need it to have joined.

        Raises:
            LinkError: the request does not go with this server, with what was agreed on joining, or with what is in
                flight; it has no effect then.
        """
        if isinstance(request, Ready):
            return cast("Future[R]", self._next_order(client, request))
        with self._lock:
            if issubclass(request.reply, Done):  # it only makes the server forget, which nobody is refused
                return cast(R, self._handle(request, client))
            with self.guard.request(client), nullcontext() if request.trains is None else self._computing():
                return cast(R, self._handle(request, client))

    def _next_order(self, client: str, request: Ready) -> Future[Order]:
        if self.conductor is None:
            raise LinkError("this server conducts no run")
        return self.conductor.ready(client, request)

    @singledispatchmethod
    def _handle(self, request: Any, client: str) -> Any:
        raise LinkError(f"client {client}: this server has no answer to {type(request).__name__}")

    @_handle.register
    def _join(self, request: Join, client: str) -> Welcome:
        """Open a client's session, or open it anew with another cut."""
        check_join(client, request, self.shared.stage, self.tuning, self.lora, self.config.codecs)
        self._sessions.end(client)
        regular = self.regulars[client]
        progress = regular.numbered(request.numbering)
        regular.cuts(request.cut)
        self._sessions[client] = Session(
            request, self.shared, self.config, regular.random, progress, bounds=self.bounds
        )
        anatomy = self.shared.stage.anatomy
        return Welcome(self.blocks[0], anatomy.blocks, anatomy.hidden, self.config.max_in_flight)

    @_handle.register
    def _forward(self, request: ForwardRequest, client: str) -> ForwardReply:
        session, key = self._sessions[client], ("forward", request.exchange)
        known = session.progress.answer(request.step, key) if request.train else None
        applied = session.progress.applied(request.step)
        if known is not None and applied and alike(request.hidden_BTH, known.hidden_BTH):
            return cast(ForwardReply, known)
        check_forward(session, request, self.shared.stage, self._sessions.in_flight)
        if request.train:  # without training nothing but its own answer comes of it
            check_finite(client, f"an activation of exchange {request.exchange}", _activations(request))
        with session.random.active():
            reply = session.forward(request)
        self._remember(session, request.step, key, reply)
        return reply

    @_handle.register
    def _backward(self, request: BackwardRequest, client: str) -> BackwardReply:
        """Blocks [s, e) backward, and the update that follows."""
        session, key = self._sessions[client], ("backward", request.exchange)
        known = session.progress.answer(request.step, key)
        complete = request.exchange not in session.pending
        if known is not None and complete and alike(request.grad_BTH, known.grad_BTH):
            return cast(BackwardReply, known)
        check_backward(session, request)
        with session.random.active():
            reply = session.backward(request)
        self._remember(session, request.step, key, reply)
        return reply

    @_handle.register
    def _pull(self, request: PullRequest, client: str) -> PullReply:
        session, key = self._sessions[client], ("pull", request.start << 16 | request.stop)
        check_pull(session, request, self.blocks[0])
        known = session.progress.answer(request.step, key)
        if known is not None:
            return cast(PullReply, known)
        wanted = range(request.start, request.stop)
        parameters = self.shared.updater.parameters.items()
        block_of = self.shared.stage.block_of
        reply = PullReply({name: value.detach().clone() for name, value in parameters if block_of(name) in wanted})
        self._remember(session, request.step, key, reply)
        return reply

    @_handle.register
    def _fetch(self, request: FetchRequest, client: str) -> FetchReply:
        """The trained shared weights of one block, as they are between two updates."""
        check_fetch(self._sessions[client], request, self.blocks, self.allow_export)
        return give(self.shared, request)

    @_handle.register
    def _extend(self, request: ExtendRequest, client: str) -> ExtendReply:
        """Blocks [s, e) on the next tokens of an answer, whose cache is kept here."""
        session = self._sessions[client]
        drop_unused(self._sessions.values(), self.config.generation_seconds)
        check_extend(session, request, self.shared.stage, self._sessions.values())
        return ExtendReply(session.generations.extend(request, self.shared.stage, session.join.cut))

    @_handle.register
    def _end_generation(self, request: EndGeneration, client: str) -> Done:
        self._sessions[client].generations.end(request.generation)
        return Done()

    @_handle.register
    def _abort(self, _: Abort, client: str) -> Done:
        self._sessions[client].drop()
        return Done()

    @_handle.register
    def _leave(self, _: Leave, client: str) -> Done:
        self._sessions.end(client)
        if self.conductor is not None:
            self.conductor.gone(client)
        return Done()

    def flush(self) -> None:
        """At the end of a run: update the shared blocks with the steps that ``update = "mean"`` has gathered so far."""
        with self._lock, self._computing():
            self.shared.flush()

    def freeze(self) -> None:
        """From now on serve the shared blocks as they are, without training them.

        Raises:
            LinkError: exchanges are in flight, which would train them.
        """
        with self._lock:
            self._sessions.refuse_busy("frozen")
            self.shared.freeze()

    def counts(self) -> dict[str, float]:
        """``updates``, ``compute_seconds``, forwards ``in_flight`` and ``versions`` of the weights that are held.

        And ``bad_requests``, which were refused for their values, and how many ``clients_aside`` there are.
        """
        with self._lock:
            return {
                "updates": self.shared.version,
                "compute_seconds": self.compute_seconds,
                "in_flight": self._sessions.in_flight,
                "versions": 1 + len(self.shared.stashed),
                "bad_requests": self.guard.bad(),
                "clients_aside": len(self.guard.all_aside),
            }

    def aside(self, client: str) -> str | None:
        """Why the requests of a client are refused that was put aside; ``None``: it was not."""
        return self.guard.aside(client)  # without the lock, for a link must not wait for what is computed

    def readmit(self, client: str) -> bool:
        """Let a client in again that was put aside; gives whether it was."""
        return self.guard.readmit(client)

    @property
    def aside_listeners(self) -> list[Callable[[str, str], None]]:
        """Told the name of each client that is put aside, and why."""
        return self.guard.listeners

    def cut_of(self, client: str) -> tuple[int, int] | None:
        """The cut of a client that has joined and not left."""
        with self._lock:
            session = self._sessions.get(client)
            return None if session is None else session.join.cut

    def keep_answers_after(self, client: str, step: int) -> None:
        """A client has saved its state after ``step``: keep the answers of its later steps, and drop the others."""
        with self._lock:
            progress = self.regulars[client].progress
            progress.kept_from = step
            progress.forget(step)

    def residuals(self, client: str) -> dict[str, Tensor]:
        """Of error feedback in what a client is sent: see :class:`flexp.links.coding.Coding`, which writes in it."""
        return self.regulars[client].residuals

    def state(self, *, unfinished: bool = False) -> dict[str, Tensor]:
        """Everything that :meth:`load` needs to go on bit for bit.

        These are the live tensors: write them, or copy them, before the next step.

        Args:
            unfinished: take the state in the middle of clients' steps as well; they are not part of it.

        Raises:
            LinkError: exchanges are in flight, whose clients would wait for ever.
        """
        with self._lock:
            if not unfinished:
                self._sessions.refuse_busy("saved")
            flat = {f"shared/{name}": value for name, value in self.shared.state().items()}
            flat |= self.regulars.state(self._sessions.begun(), progress=self.remembers)
            flat |= {f"guard/{name}": value for name, value in (self.bounds.state() | self.guard.state()).items()}
            return flat | {"compute_seconds": torch.tensor(self.compute_seconds, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, whether clients joined already or will.

        Raises:
            LinkError: exchanges are in flight, which belong to other weights.
            StorageError: the state belongs to other blocks or another tuning.
        """
        with self._lock:
            self._sessions.refuse_busy("restored")
            self.shared.load(_under("shared/", state))
            self.bounds.load(_under("guard/", state))
            self.guard.load(_under("guard/", state))
            self.compute_seconds = float(state["compute_seconds"])
            self.regulars.load(state)
            for name, session in self._sessions.items():
                session.progress = self.regulars[name].numbered(session.join.numbering)

    def _remember(self, session: Session, step: int, key: Key, reply: Any) -> None:
        if self.remembers:
            session.progress.remember(step, key, reply, self.config.keep_answers_bytes)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Count the seconds, and let none of the caller's modes in, which a link to another process would not carry.

        A backward in the same process, for instance, arrives with gradients switched off, a Trainer's forward perhaps
        with mixed precision switched on.
        """
        began = time.perf_counter()
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self._device.type, enabled=False):
                yield
        finally:
            self.compute_seconds += time.perf_counter() - began


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _activations(request: ForwardRequest) -> list[Tensor]:
    return [value for value in (request.hidden_BTH, request.base_BTH, *request.inner_BTH) if value is not None]
