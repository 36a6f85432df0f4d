"""The server: the shared blocks, and a session for each client that joined."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flexp.assets import resolve
from flexp.config import LoraConfig, ModelConfig, OptimizerConfig, ServerConfig
from flexp.errors import ConfigError, LinkLostError
from flexp.kinds import ModelKind
from flexp.links.asking import SumReply, SumRequest
from flexp.links.base import InProcessLink, waiting_thread
from flexp.links.messages import Abort, Done, Join, Leave, Welcome
from flexp.links.passing import Behind, Settle
from flexp.models.anatomy import Part, block_count, check_cut
from flexp.models.loading import load_config, load_stage
from flexp.models.stage import Stage
from flexp.models.tuning import tune
from flexp.rng import RandomStream
from flexp.server.admission import (
    check_join,
    check_taking_part,
)
from flexp.server.chain import PREVIOUS
from flexp.server.examples import Examples
from flexp.server.extending import Extending
from flexp.server.giving import Giving
from flexp.server.joining import can_join
from flexp.server.session import Session
from flexp.server.turns import handles


class Server(Giving, Extending):
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
        start, stop = check_cut((base_depth, end), blocks, where="server blocks (base_depth, end)", nothing=True)
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

    def belongs(self, *, saved: bool = False) -> dict[str, Any]:
        """What its state belongs to, JSON-ready.

        Args:
            saved: for a state that is being saved, which says by what rule steps wait for an update if some do.
        """
        lora = self.lora if self.tuning == "lora" else None
        found = {
            **self.shared.stage.pretrained,
            "tuning": self.tuning,
            "lora": None if lora is None else lora.model_dump(mode="json"),
            "shared_optimizer": self.shared.updater.config.name,
        }
        return found if saved and not self.shared.waiting else found | {"update": self.config.update}

    def connect(self, client: str) -> InProcessLink:
        """A link for ``client`` inside this process."""
        return InProcessLink(self, client)

    @handles.register
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
            progress,
            random=self._random,
            seed=self.clients.seed_of(client),
            peers=self._sessions,
            examples=examples,
            cut=request.cut,
            chain=self.chain,
            further=further,
            led=following is not None,
        )
        if self.config.joined and not self.shared.frozen and waiting_thread() is None:
            self._together.measure(self._sessions[client])
        anatomy = self.shared.stage.anatomy
        whole, shared = self.chain is None and self.following is None, self._sessions[client].shared
        fixed = self.sealed or shared.frozen or not shared.updater.parameters
        trained = shared.fingerprint if whole and fixed else ""  # of one of a chain it would be a part's
        return Welcome(self.blocks[0], anatomy.blocks, anatomy.hidden, self.config.max_in_flight, trained=trained)

    @handles.register
    def _sum(self, request: SumRequest, client: str) -> Future[SumReply]:
        """Clients' tensors, added up when all have come."""
        self._sessions[client]  # it has joined
        return self.sums.give(client, request)

    @handles.register
    def _abort(self, _: Abort, client: str) -> Done:
        self._sessions[client].drop()
        return Done()

    @handles.register
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
