"""The server: the shared blocks, and a session for each client that joined."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial, singledispatchmethod
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from flexp.assets import resolve
from flexp.config import LoraConfig, ModelConfig, OptimizerConfig, ServerConfig
from flexp.errors import ConfigError, LinkError, LinkLostError, StoppedError
from flexp.kinds import ModelKind
from flexp.links.base import InProcessLink, waiting_thread
from flexp.links.declaring import Request
from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    Behind,
    Done,
    EndGeneration,
    ExtendReply,
    ExtendRequest,
    FetchReply,
    FetchRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    Keep,
    KeptForwardRequest,
    Lead,
    Leave,
    Order,
    PassedBackward,
    PassedReply,
    PullReply,
    PullRequest,
    Ready,
    Settle,
    SumReply,
    SumRequest,
    Update,
    Welcome,
)
from flexp.links.packing import Places, arrived, pack
from flexp.models.anatomy import Part, block_count, check_cut
from flexp.models.loading import load_config, load_stage
from flexp.models.stage import Stage
from flexp.models.tuning import tune
from flexp.optim import merged, norms
from flexp.rng import RandomStream
from flexp.server.admission import (
    alike,
    check_backward,
    check_extend,
    check_fetch,
    check_finite,
    check_forward,
    check_join,
    check_pull,
    check_taking_part,
    same_exchange,
)
from flexp.server.chain import PREVIOUS, Following
from flexp.server.clients import Key
from flexp.server.examples import Examples
from flexp.server.joining import can_join
from flexp.server.line import Line, Waiting
from flexp.server.session import Session
from flexp.server.shared import portion
from flexp.server.state import ServerState
from flexp.server.together import Ready as ReadyForward
from flexp.server.together import Together

R = TypeVar("R")
Steps = Generator[Future[Any], Any, R]
"""A handler that gives an answer, and on the way futures that it waits for."""
log = logging.getLogger("flexp.server")
STOPS = "the server stops; save, leave, and come again when it is back"


class Conductor(Protocol):
    """Tells clients what to do next; called between two requests."""

    def ready(self, client: str, ready: Ready) -> Future[Order]:
        """A client waits for its order; it may take as long as others take."""
        ...

    def gone(self, client: str) -> None:
        """A client has left; whatever it waited for it will ask again."""
        ...

    def dismiss(self, why: LinkError) -> None:
        """Nobody gets an order any more."""
        ...


class Server(ServerState):
    """Runs and trains the shared blocks for all clients; each request as it arrives, one at a time.

    Args:
        stage: blocks [s_min, e_max), tuned already.
        lora: the adapters of ``stage``, which clients that say theirs must have too.
        total_steps: client steps in all, for schedules of the shared learning rate.
        seed: of the clients' dropout on this side.
        remembers: keep the answers of clients' last steps, for clients that may go back to a snapshot.
        allow_export: give a client the trained weights of the blocks that it has computed here, if it asks.
        clients_tuning: how clients tune their own blocks; ``None``: as they like. Likewise ``clients_quantization``.

    Raises:
        ConfigError: clients are to have adapters of their own, and the tuning is no LoRA.

    Attributes:
        conductor: tells clients what to do next, if this server conducts a run.
        only: the clients that may join; ``None``: all.
        sealed: the run is over: clients use and fetch what there is, and nobody trains. (A step that the shared blocks
            have taken already is answered again.)
        stops: clients were told to save and leave.
        submit: runs what goes on when the servers further on have answered; :func:`flexp.run.server.run_server` does it
            in the thread that computes.
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
        clients_tuning: str | None = None,
        clients_quantization: str | None = None,
    ) -> None:
        chosen = config or ServerConfig()
        super().__init__(stage, chosen, optimizer or OptimizerConfig(), total_steps, seed, remembers)
        if chosen.adapters == "own" and tuning != "lora":
            raise ConfigError(f'server.adapters = "own" is for LoRA, and the shared blocks\' tuning is {tuning!r}; set '
                              'model.tuning or server.tuning = "lora"')  # fmt: skip
        why = can_join(stage, self.shared.updater.parameters) if chosen.joined else ""
        if why:
            raise ConfigError(f"server.joined cannot be had of these blocks: {why}; leave server.joined off")
        self.tuning, self.lora, self.allow_export = tuning, lora, allow_export
        self.clients_tuning, self.clients_quantization = clients_tuning, clients_quantization
        self._together = Together(stage, self._sessions)
        self._line = Line(self._sessions, chosen.exchange_seconds, self._look_after_line)
        self.conductor: Conductor | None = None
        self.only: Collection[str] | None = None
        self.sealed = self.stops = False
        self.submit: Callable[[Callable[[], None]], object] = lambda work: work()

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
            config: its ``tuning`` and ``quantization`` say how the shared blocks are where that is not as in ``model``.
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
        blocks = block_count(wanted.id, load_config(wanted.id))
        start, stop = check_cut((base_depth, end), blocks, where="server blocks (base_depth, end)")
        config = config or ServerConfig()
        own = wanted.quantized(config.quantization).on(config.device)
        stage = load_stage(own, kind, Part.server(start, stop), seed=seed)
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
            clients_tuning=wanted.tuning,
            clients_quantization=wanted.quantization,
        )

    def connect(self, client: str) -> InProcessLink:
        """A link for ``client`` inside this process."""
        return InProcessLink(self, client)

    def answer(self, client: str, request: Request[R]) -> R | Future[R]:
        """Answer a request of a client; all but :class:`Join` and :class:`Leave` need it to have joined.

        Raises:
            LinkError: the request does not go with this server, with what was agreed on joining, or with what is in
                flight; it has no effect then.
        """
        if self.stops and not issubclass(request.reply, Done):
            raise StoppedError(STOPS)
        if isinstance(request, Ready):
            return cast("Future[R]", self._next_order(client, request))
        with self._lock:
            if self._must_wait(client, request):
                return self._line.add(client, request)
            try:
                return cast(R, self._now(client, request))
            finally:
                if waiting_thread() is not None:  # a link calls work() itself
                    self._work_off()

    @property
    def busy(self) -> bool:
        """Whether anybody is in line; then :meth:`work` is to be called, in the thread that computes."""
        return len(self._line) > 0

    def work(self) -> float | None:
        """Answer whoever is next in line, and those that can go along.

        Returns:
            After how many seconds to call it again; ``None``: when another request has come.
        """
        with self._lock:
            group, wait = self._together.choose(self._line.firsts())
            if not group:
                return wait
            self._line.take(group)
            one, began = group[0], time.perf_counter()
            kind = "backward" if isinstance(one.request, BackwardRequest) else "forward"
            joined, tokens = len(group) > 1 or self._together.was_joined(one), self._together.tokens(one)
            if len(group) == 1:
                one.tell(partial(self._now, one.client, one.request))
            else:
                try:
                    (self._forwards if kind == "forward" else self._backwards)(group)
                except Exception:
                    log.exception("%d requests could not be answered together, so they are one by one", len(group))
                    for other in group:
                        other.tell(partial(self._now, other.client, other.request))
            self._together.pace.note(kind, joined, tokens, (time.perf_counter() - began) / len(group))
            return 0.0

    def _work_off(self) -> None:
        while self.work() == 0.0:
            pass

    def _finished(self, client: str, made: Any) -> Any:
        """What a handler gives; where it waits for the servers further on, a future, and it goes on later."""
        if not isinstance(made, Generator):
            return made
        value, waited = driven(made)
        if waited is None:
            return value
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()

        def go_on(come: Future[Any]) -> None:
            try:
                with self._lock:
                    with self.guard.judged(client), self._computing():
                        value, waited = driven(made, come)
                    self._work_off()
            except Exception as error:
                answer.set_exception(error)
                return
            if waited is None:
                answer.set_result(value)
            else:
                waited.add_done_callback(later)

        def later(come: Future[Any]) -> None:
            self.submit(lambda: go_on(come))

        waited.add_done_callback(later)
        return answer

    def dismiss(self) -> None:
        """Tell all clients to save and leave: those that wait for something now, the others when they ask for
        something; called between two requests."""
        self.stops = True
        for waited in (self.sums, self.conductor, self._line):
            if waited is not None:
                waited.dismiss(StoppedError(STOPS))

    def _now(self, client: str, request: Request[Any]) -> Any:
        if issubclass(request.reply, Done):  # it only makes the server forget, which nobody is refused
            return self._handle(request, client)
        if client in self.own:
            self.own[client].enter()
        with self.guard.request(client), nullcontext() if request.trains is None else self._computing():
            return self._finished(client, self._handle(request, client))

    def _must_wait(self, client: str, request: Request[Any]) -> bool:
        """Whether a request goes into the line: it may be answered together with others, which only links wait for, or
        it is a forward that would hold one version of the weights too many.

        A client that holds weights already never waits, nor does one whose thread does, since it would wait for itself;
        so every version is let go at last.
        """
        session = self._sessions.get(client)
        if session is None:
            return False
        if self.config.joined and waiting_thread() is None and isinstance(request, ForwardRequest | BackwardRequest):
            return True
        if not isinstance(request, ForwardRequest | KeptForwardRequest) or session.pending:
            return False
        if not getattr(request, "train", True):
            return False
        session.thread = waiting_thread()
        if session.shared.has_room and not self._line:
            return False
        self._drop_late()
        self._work_off()
        if session.thread in {other.thread for other in self._sessions.values() if other.pending} - {None}:
            return False
        return len(self._line) > 0 or not session.shared.has_room

    def _forwards(self, group: Sequence[Waiting]) -> None:
        """Several clients' forwards in one pass."""
        ready: list[tuple[Waiting, ForwardRequest, Places | None]] = []
        for one in group:
            with self._telling(one):
                request = cast(ForwardRequest, one.request)
                known = self._known_forward(one.session, request)
                if known is not None:
                    one.tell(partial(_same, known))
                    continue
                whole, sent = arrived(request, f"client {one.client}")
                self._check(one.session, whole, self._sessions.in_flight + len(ready))
                ready.append((one, whole, sent))
        if not ready:
            return
        began = time.perf_counter()
        with self._computing():
            replies = self._together.forward([ReadyForward(one.session, whole, sent) for one, whole, sent in ready])
        each = (time.perf_counter() - began) / len(ready)
        for (one, whole, _), reply in zip(ready, replies, strict=True):
            self._remember(one.session, whole.step, ("forward", whole.exchange), reply)
            one.tell(partial(_same, reply), each)

    def _backwards(self, group: Sequence[Waiting]) -> None:
        """Several clients' backwards in one pass; each trains the blocks in turn."""
        ready: list[tuple[Waiting, BackwardRequest]] = []
        for one in group:
            with self._telling(one):
                request = cast(BackwardRequest, one.request)
                check_backward(one.session, request)
                ready.append((one, request))
        if not ready:
            return
        began = time.perf_counter()
        with self._computing():
            replies = self._together.backward([(one.session, request) for one, request in ready])
        each = (time.perf_counter() - began) / len(ready)
        for (one, request), reply in zip(ready, replies, strict=True):
            with self._telling(one):
                if isinstance(reply, Exception):
                    raise reply
                self._remember(one.session, request.step, ("backward", request.exchange), reply)
                one.tell(partial(_same, reply), each)

    @contextmanager
    def _telling(self, one: Waiting) -> Iterator[None]:
        """Count a request that is answered with others, and tell its client alone what it is refused for."""
        try:
            with self.guard.request(one.client):
                yield
        except Exception as error:
            one.tell(partial(_raise, error))

    def _look_after_line(self) -> None:
        """While forwards wait nobody else may come, whose request would do this."""
        with self._lock:
            self._drop_late()
            self._work_off()
            self._line.watch()

    def _drop_late(self) -> None:
        for session in self._sessions.values():
            session.drop_late(self.config.exchange_seconds)

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
        following, leads = self.following, client == PREVIOUS
        if following is not None and not (leads or following.led):
            raise LinkLostError("no server leads this one yet, which holds the further blocks of several")
        if not leads:
            check_taking_part(client, request, self.only, self.clients_tuning, self.clients_quantization)
        codecs = None if following else self.config.codecs
        check_join(client, request, self.shared.stage, self.blocks, self.tuning, self.lora, codecs)
        self._sessions.end(client)
        own, further = request, None
        if self.chain is not None and not leads:
            border = self.chain.first
            own = replace(request, cut=(min(request.cut[0], border), min(request.cut[1], border)))
            further = self.chain.join(client, request) if request.cut[1] > border else None
        record = self.clients[client]
        progress = record.numbered(request.numbering)
        record.cuts(request.cut)
        examples = Examples(request.examples_key)
        self._sessions[client] = Session(
            own,
            self.blocks_of(client),
            self.config,
            RandomStream(0, self.shared.stage.model.device),
            self.clients.seed_of(client),
            progress,
            peers=self._sessions,
            examples=examples,
            cut=request.cut,
            chain=self.chain,
            further=further,
        )
        anatomy = self.shared.stage.anatomy
        return Welcome(self.blocks[0], anatomy.blocks, anatomy.hidden, self.config.max_in_flight)

    @_handle.register
    def _forward(self, request: ForwardRequest, client: str) -> Steps[ForwardReply]:
        session = self._sessions[client]
        known = self._known_forward(session, request)
        if known is not None:
            return known
        return (yield from self._run(session, *arrived(request, f"client {client}")))

    def _known_forward(self, session: Session, request: ForwardRequest) -> ForwardReply | None:
        """What was answered to it, if it comes again and its step was applied."""
        known = session.progress.answer(request.step, ("forward", request.exchange)) if request.train else None
        applied = session.progress.applied(request.step)
        return known if known is not None and applied and same_exchange(session, request, known) else None

    @_handle.register
    def _kept_forward(self, request: KeptForwardRequest, client: str) -> Steps[ForwardReply]:
        """A forward of examples some of which are here."""
        session = self._sessions[client]
        whole, new = session.examples.whole(request, client)
        reads = whole.mask_BT if whole.rows_BT is None else whole.rows_BT
        known = session.progress.answer(request.step, ("forward", request.exchange))
        if known is not None and session.progress.applied(request.step):
            assert reads is not None
            if known.hidden_BTH.shape[1] == int(reads.sum()):
                return cast(ForwardReply, replace(known, kept=self._keep(session, new)))
        assert whole.mask_BT is not None
        reply = yield from self._run(session, whole, Places.of(whole.mask_BT))
        return replace(reply, kept=self._keep(session, new))

    def _keep(self, session: Session, new: dict[int, Tensor]) -> bool:
        held = sum(other.examples.bytes for other in self._sessions.values())
        return session.examples.keep(new, self.config.max_examples_bytes - held)

    def _run(self, session: Session, request: ForwardRequest, sent: Places | None) -> Steps[ForwardReply]:
        """A forward with whole activations, of which ``sent`` crossed."""
        self._check(session, request, self._sessions.in_flight)
        with session.random.active():
            reply = session.forward(request, sent)
        if request.train and self.config.joined:
            self._together.drew(session.drew)
        if session.further is not None:
            passed = replace(request, hidden_BTH=reply.hidden_BTH, base_BTH=None, inner_BTH=())
            there = yield from self._further(session, passed)
            reply = replace(reply, hidden_BTH=there.hidden_BTH)
        self._remember(session, request.step, ("forward", request.exchange), reply)
        return reply

    def _check(self, session: Session, request: ForwardRequest, in_flight: int) -> None:
        client, applied = session.join.client, session.progress.applied(request.step)
        self._drop_late()
        check_forward(session, request, self.shared.stage, in_flight)
        if request.train and self.sealed and not applied:
            raise LinkError(f"client {client}: the run is over, and this server trains no more")
        if request.train and self.following is None:  # without training nothing but its own answer comes of it
            check_finite(client, f"an activation of exchange {request.exchange}", _activations(request))

    @_handle.register
    def _backward(self, request: BackwardRequest, client: str) -> Steps[BackwardReply]:
        """Blocks [s, e) backward, and the update that follows."""
        session, key = self._sessions[client], ("backward", request.exchange)
        known = session.progress.answer(request.step, key)
        complete = request.exchange not in session.pending
        answered = session.progress.answer(request.step, ("forward", request.exchange))
        fits = known is not None and answered is not None and alike(request.grad_BTH, answered.hidden_BTH)
        if fits and complete:
            return cast(BackwardReply, known)
        if self.following is not None:
            raise LinkError(f"client {client}: this server trains as the server before says")
        pending, behind = check_backward(session, request), None
        if session.further is not None:
            behind = yield from self._passed_further(session, request)
            request = replace(request, grad_BTH=behind.grad_BTH)
            if session.pending.get(request.exchange) is not pending:
                raise LinkLostError(f"client {client}: exchange {request.exchange} was given up meanwhile")
        with session.random.active():
            reply = session.backward(request, behind)
        self._remember(session, request.step, key, reply)
        if session.settled is not None:
            yield session.settled
        return reply

    def _further(self, session: Session, request: Request[R]) -> Steps[R]:
        """What the servers further on answer; if they do not, the step is given up."""
        assert session.further is not None
        try:
            reply: R = yield session.further.call(request)
        except LinkError:
            session.drop()
            raise
        if self._sessions.get(session.join.client) is not session:
            raise LinkLostError(f"client {session.join.client} has left, or joined anew, meanwhile")
        return reply

    def _passed_further(self, session: Session, request: BackwardRequest | PassedBackward) -> Steps[PassedReply]:
        names = (item.name for item in fields(PassedBackward))
        reply = yield from self._further(session, PassedBackward(**{name: getattr(request, name) for name in names}))
        return reply

    @_handle.register
    def _passed_backward(self, request: PassedBackward, client: str) -> Steps[PassedReply]:
        """Blocks backward for the server before, which says later what becomes of the step."""
        following, session, behind = self._followed(PREVIOUS), self._sessions[client], None
        pending = check_backward(session, request)
        if session.further is not None:
            behind = yield from self._passed_further(session, request)
            request = replace(request, grad_BTH=behind.grad_BTH)
            if session.pending.get(request.exchange) is not pending:
                raise LinkLostError(f"client {client}: exchange {request.exchange} was given up meanwhile")
        with session.random.active():
            return session.pass_back(request, behind, following.complete)

    @_handle.register
    def _lead(self, request: Lead, client: str) -> Behind:
        """The server before has come."""
        following = self._followed(client, led=False)
        following.check(request)
        following.led = True
        return self._report()

    @_handle.register
    def _settle(self, request: Settle, client: str) -> Steps[Behind]:
        """What becomes of a client's step."""
        following = self._followed(client)
        further = None if self.chain is None else self.chain.tell(request)
        step = following.settled(request)
        due: Mapping[str, Tensor] | None = None
        if request.take and not request.client:
            due = self.shared.gathered()
        elif request.take:
            scale, gradients = request.scale, step.gradients
            if scale is not None:
                gradients = {name: value * scale for name, value in gradients.items()}
            due = self.shared.collect(gradients, request.weight)
        if due is None or request.norm is not None:
            if due is not None:
                self.shared.apply(due, request.norm)
            if further is not None:
                yield further
            return self._report()
        following.due, names = due, sorted(due)
        own_N = norms([due[name] for name in names]) if names else torch.zeros(0)
        behind = Behind() if further is None else (yield further)
        told, norms_N = merged(names, own_N, behind.names, behind.norms_N)
        return replace(self._report(), names=told, norms_N=norms_N if told else None)

    @_handle.register
    def _update(self, request: Update, client: str) -> Steps[Behind]:
        """The norm of the update that waits for it."""
        following = self._followed(client)
        further = None if self.chain is None else self.chain.tell(request)
        if following.due is not None:
            self.shared.apply(following.due, request.norm)
            following.due = None
        if further is not None:
            yield further
        return self._report()

    @_handle.register
    def _keep_state(self, request: Keep, client: str) -> Steps[Behind]:
        following = self._followed(client)
        further = None if self.chain is None else self.chain.tell(request)
        following.save(request)
        if further is not None:
            yield further
        return self._report()

    def _followed(self, client: str, *, led: bool = True) -> Following:
        """What is kept for the server before, where it is that which asks.

        Raises:
            LinkError: it is not, or has not come yet.
        """
        if self.following is None or client != PREVIOUS or (led and not self.following.led):
            raise LinkError(f"client {client}: only the server before may say this, to a server that it leads")
        return self.following

    def _report(self) -> Behind:
        """What the server before is told of this one, and of those further on."""
        behind = Behind() if self.chain is None else self.chain.told
        kept = None if self.following is None else self.following.keeper
        numbers = set() if kept is None else set(kept.numbers)
        if self.chain is not None:
            numbers &= set(behind.snapshots)
        own = range(min(self.shared.stage.part.blocks), max(self.shared.stage.part.blocks) + 1)
        facts = {f"[{own.start}, {own.stop})": self.counts()} | behind.facts
        return Behind(self.blocks[1], "" if kept is None else kept.run, tuple(sorted(numbers)), facts=facts)

    @_handle.register
    def _pull(self, request: PullRequest, client: str) -> PullReply:
        session, key = self._sessions[client], ("pull", request.start << 16 | request.stop)
        check_pull(session, request, self.blocks[0])
        if self.chain is not None and request.stop > self.chain.first:
            raise LinkError(f"client {client}: weights of aligned blocks on several servers are not supported")
        known = session.progress.answer(request.step, key)
        if known is None:
            wanted = range(request.start, request.stop)
            parameters = session.shared.updater.parameters.items()
            block_of = self.shared.stage.block_of
            found = {name: value.detach().clone() for name, value in parameters if block_of(name) in wanted}
            known = PullReply(len(found), weights=found)  # all of them: the rest is asked for later, and some again
            self._remember(session, request.step, key, known)
        return PullReply(known.total, *portion(known.weights, request, session.coded))

    @_handle.register
    def _fetch(self, request: FetchRequest, client: str) -> Steps[FetchReply]:
        """The trained shared weights of one block, as they are between two updates."""
        session = self._sessions[client]
        check_fetch(session, request, self.blocks, self.allow_export or client == PREVIOUS)
        if self.chain is not None and request.block >= self.chain.first:
            version = self.shared.version  # theirs may count otherwise; updates come in the order of what is asked
            reply: FetchReply = yield self.chain.control.call(request)
            return replace(reply, version=version)
        return session.shared.give(request, session.coded)

    @_handle.register
    def _sum(self, request: SumRequest, client: str) -> Future[SumReply]:
        """Clients' tensors, added up when all have come."""
        self._sessions[client]  # it has joined
        return self.sums.give(client, request)

    @_handle.register
    def _extend(self, request: ExtendRequest, client: str) -> Steps[ExtendReply]:
        """Blocks [s, e) on the next tokens of an answer, whose cache is kept here."""
        session = self._sessions[client]
        request, sent = arrived(request, f"client {client}")
        for other in self._sessions.values():
            other.generations.drop_unused(self.config.generation_seconds)
        check_extend(session, request, self.shared.stage, self._sessions.values())
        reply = ExtendReply(pack(session.generations.extend(request, self.shared.stage, session.join.cut), sent))
        if session.further is not None:
            try:
                reply = yield session.further.call(replace(request, hidden_BTH=reply.hidden_BTH))
            except LinkError:
                session.generations.end(request.generation)  # whoever asks again sends all of it
                raise
        return reply

    @_handle.register
    def _end_generation(self, request: EndGeneration, client: str) -> Done:
        session = self._sessions[client]
        session.generations.end(request.generation)
        if session.further is not None:
            session.further.call(request)
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
        if self.following is not None and client == PREVIOUS:
            self.following.lost = self.following.led
        return Done()

    def flush(self) -> None:
        """At the end of a run: update the shared blocks with the steps that ``update = "mean"`` has gathered so far."""
        chain, told = self.chain, list[Future[Behind]]()

        def whole(gradients: Mapping[str, Tensor]) -> float:
            assert chain is not None
            norm, answer = chain.norm(chain.tell(Settle("")), gradients)
            told.append(answer)
            return norm

        with self._lock, self._computing():
            self.shared.flush(None if chain is None else whole)
        for answer in told:
            answer.result()

    def _remember(self, session: Session, step: int, key: Key, reply: Any) -> None:
        if self.remembers:
            session.progress.remember(step, key, reply, self.config.keep_answers_bytes)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Count the seconds, and let none of the caller's modes in, which a link to another process would not carry.

        A backward in the same process, for instance, arrives with gradients switched off, a Trainer's forward perhaps
        with mixed precision switched on.
        """
        began, device = time.perf_counter(), self.shared.stage.model.device
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                yield
        finally:
            self.compute_seconds += time.perf_counter() - began


def driven(work: Steps[R], come: Future[Any] | None = None) -> tuple[R | None, Future[Any] | None]:
    """Let a handler go on with what has ``come`` until it has ended, or waits for something that is not there yet; what
    it gives, or what it waits for."""
    while True:
        try:
            if come is None:
                waited = next(work)
            elif (error := come.exception()) is not None:
                waited = work.throw(error)
            else:
                waited = work.send(come.result())
        except StopIteration as end:
            return end.value, None
        if not waited.done():
            return None, waited
        come = waited


def _same(value: Any) -> Any:
    return value


def _raise(error: Exception) -> Any:
    raise error


def _activations(request: ForwardRequest) -> list[Tensor]:
    return [value for value in (request.hidden_BTH, request.base_BTH, *request.inner_BTH) if value is not None]
