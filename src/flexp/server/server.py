"""The server: the shared blocks, and a session for each client that joined."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import singledispatchmethod
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from flexp.assets import resolve
from flexp.config import LoraConfig, ModelConfig, OptimizerConfig, ServerConfig
from flexp.errors import ConfigError, LinkError, LinkLostError
from flexp.kinds import ModelKind
from flexp.links.base import InProcessLink
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
    KeptForwardRequest,
    Leave,
    PullReply,
    PullRequest,
    Settle,
    SumReply,
    SumRequest,
    Welcome,
)
from flexp.links.packing import Places, arrived, on, pack
from flexp.models.anatomy import Part, block_count, check_cut
from flexp.models.loading import load_config, load_stage
from flexp.models.stage import Stage
from flexp.models.tuning import tune
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
from flexp.server.chain import PREVIOUS
from flexp.server.examples import Examples
from flexp.server.joining import can_join
from flexp.server.led import Led
from flexp.server.session import Session
from flexp.server.shared import portion
from flexp.server.turns import Steps


class Server(Led):
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
        only: the clients that may join; ``None``: all.
        sealed: the run is over: clients use and fetch what there is, and nobody trains. (A step that the shared blocks
            have taken already is answered again.)
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
        self.only: Collection[str] | None = None
        places = dict.fromkeys(stage.places.values()) or [stage.model.device]
        self._random = RandomStream(0, *places)  # of all: seeded anew for every block that anybody runs
        self.sealed = False

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
        stage = load_stage(own, kind, Part.server(start, stop), seed=seed).spread(config.device)
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

    @singledispatchmethod
    def _handle(self, request: Any, client: str) -> Any:
        return self._said(request, client)

    @_handle.register
    def _join(self, request: Join, client: str) -> Welcome:
        """Open a client's session, or open it anew with another cut."""
        following, leads = self.following, self._leads(client)
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
            if request.cut[1] > border:
                further = self.chain.join(client, request)
            else:
                self.chain.leave(client)
        record = self.clients[client]
        progress = record.numbered(request.numbering)
        record.cuts(request.cut)
        examples = Examples(request.examples_key)
        self._sessions[client] = Session(
            own,
            self.blocks_of(client),
            self.config,
            self._random,
            self.clients.seed_of(client),
            progress,
            peers=self._sessions,
            examples=examples,
            cut=request.cut,
            chain=self.chain,
            further=further,
            led=following is not None,
        )
        anatomy = self.shared.stage.anatomy
        whole, shared = self.chain is None and self.following is None, self._sessions[client].shared
        fixed = self.sealed or shared.frozen or not shared.updater.parameters
        trained = shared.fingerprint if whole and fixed else ""  # of one of a chain it would be a part's
        return Welcome(self.blocks[0], anatomy.blocks, anatomy.hidden, self.config.max_in_flight, trained=trained)

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
            base_BTH = reply.teachers[-1] if reply.teachers and session.aligned_further else None
            passed = replace(request, hidden_BTH=reply.hidden_BTH, base_BTH=base_BTH, inner_BTH=())
            there = yield from self._further(session, passed)
            reply = replace(reply, hidden_BTH=there.hidden_BTH)
            if base_BTH is not None:
                reply = session.compare(request.exchange, reply, there.teachers)
        if request.train:  # else it can be computed again at any time
            self._remember(session, request.step, ("forward", request.exchange), reply)
        return reply

    def _check(self, session: Session, request: ForwardRequest, in_flight: int) -> None:
        client, applied = session.join.client, session.progress.applied(request.step)
        trains = request.train or request.step > 0
        self._drop_late()
        check_forward(session, request, self.shared.stage, in_flight)
        if trains and self.sealed and not applied:
            raise LinkError(f"client {client}: the run is over, and this server trains no more")
        if trains and self.following is None:  # without training nothing but its own answer comes of it
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
            request, behind = yield from self._passed(session, pending, request)
        with session.random.active():
            reply = session.backward(request, behind)
        self._remember(session, request.step, key, reply)
        if session.settled is not None:
            yield session.settled
        return reply

    @_handle.register
    def _pull(self, request: PullRequest, client: str) -> Steps[PullReply]:
        session, key = self._sessions[client], ("pull", request.start << 16 | request.stop)
        check_pull(session, request, self.blocks[0])
        known = session.progress.answer(request.step, key)
        if known is None and request.first and session.pulled is not None and session.pulled[0] == (request.step, key):
            known = session.pulled[1]  # all portions are of one version, also where no answers are remembered
        if known is None:
            wanted = range(request.start, request.stop)
            parameters = session.shared.updater.parameters.items()
            block_of = self.shared.stage.block_of
            found = {name: value.detach().clone() for name, value in parameters if block_of(name) in wanted}
            if self.chain is not None and request.stop > self.chain.first:
                found |= yield from self._weights_further(range(max(request.start, self.chain.first), request.stop))
                self._still(session)
            known = PullReply(len(found), weights=found)  # all of them: the rest is asked for later, and some again
            self._remember(session, request.step, key, known)
        same, weights = portion(known.weights, request, session.coded)
        left = known.total - request.first - len(weights) - len(same)
        session.pulled = ((request.step, key), known) if left > 0 else None
        return PullReply(known.total, same, weights)

    @_handle.register
    def _fetch(self, request: FetchRequest, client: str) -> Steps[FetchReply]:
        """The trained shared weights of one block, as they are between two updates."""
        session = self._sessions[client]
        check_fetch(session, request, self.blocks, self.allow_export or self._leads(client))
        if self.chain is not None and request.block >= self.chain.first:
            version = self.shared.version  # theirs may count otherwise; updates come in the order of what is asked
            reply: FetchReply = yield self.chain.control.call(request)
            return replace(reply, version=version)
        return session.shared.give(request, session.coded)

    def _weights_further(self, blocks: range) -> Steps[dict[str, Tensor]]:
        """The trained weights of blocks further on, as they are now: updates come in the order of what is asked. (Of a
        block that needs several answers the later ones may have later updates.)"""
        assert self.chain is not None
        found = dict[str, Tensor]()
        asked = [(block, self.chain.weights(block, 0)) for block in blocks]
        for block, answer in asked:
            reply, count = (yield answer), 0
            while True:
                found |= reply.weights
                count += len(reply.weights)
                if count >= reply.total:
                    break
                if not reply.weights:
                    raise LinkError(f"the next server gives {count} of {reply.total} weights of block {block}")
                reply = yield self.chain.weights(block, count)
        return found

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
        stage, origin = self.shared.stage, request.hidden_BTH.device
        check_extend(session, request, stage, self._sessions.values())
        hidden_BTH = session.generations.extend(on(request, stage.model.device), stage, session.join.cut)
        reply = ExtendReply(pack(hidden_BTH, sent).to(origin))
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
        self._forget(client)
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


def _activations(request: ForwardRequest) -> list[Tensor]:
    return [value for value in (request.hidden_BTH, request.base_BTH, *request.inner_BTH) if value is not None]
