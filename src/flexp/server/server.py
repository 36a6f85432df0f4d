"""The server: the shared blocks, and a session for each client that joined."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexp.assets import resolve
from flexp.config import LoraConfig, OptimizerConfig, ServerConfig
from flexp.errors import LinkError
from flexp.links.inprocess import InProcessLink
from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    PullReply,
    PullRequest,
    Welcome,
)
from flexp.models.loading import ModelKind, load_stage
from flexp.models.parts import Part, check_cut
from flexp.models.stage import Stage
from flexp.models.tuning import tune
from flexp.rng import RandomStream, derived_seed
from flexp.server.admission import check_backward, check_forward, check_join, check_pull
from flexp.server.session import Session
from flexp.server.shared import SharedBlocks


class Server:
    """Runs and trains the shared blocks for all clients; each request as it arrives, one at a time.

    Args:
        stage: blocks [s_min, e_max), tuned already.
        lora: the adapters of ``stage``, which clients that say theirs must have too.
        total_steps: client steps in all, for schedules of the shared learning rate.
        seed: of the clients' dropout on this side.
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
    ) -> None:
        self.config = config or ServerConfig()
        self.tuning = tuning
        self.lora = lora
        self.shared = SharedBlocks(stage, self.config, optimizer or OptimizerConfig(), total_steps)
        self.compute_seconds = 0.0
        self._seed = seed
        self._sessions: dict[str, Session] = {}
        self._random: dict[str, RandomStream] = {}  # outlives sessions: who comes back goes on
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        kind: ModelKind = "causal-lm",
        *,
        base_depth: int = 1,
        end: int | None = None,
        tuning: str = "full",
        lora: LoraConfig | None = None,
        dtype: str = "float32",
        autocast: str = "off",
        attention: str = "sdpa",
        seed: int = 0,
        **options: Any,
    ) -> Server:
        """Load blocks [``base_depth``, ``end``) of a pretrained model, and nothing else of it.

        ``autocast`` is a type to compute matrix products in (``bfloat16``), which must be the clients'. A base depth
        of 0 is for clients that agree to send their bare embeddings, from which tokens can be read.

        Example:
            >>> server = flexp.Server.from_pretrained("path/to/model", "sequence-classification")
            >>> link = server.connect("clinic-a")

        Raises:
            ModelError: the model cannot be loaded or split.
            ConfigError: there are no such blocks.
        """
        from flexp.models.loading import load_config

        model_id = resolve(str(model_id))
        blocks = int(load_config(str(model_id)).get_text_config().num_hidden_layers)
        start, stop = check_cut((base_depth, end), blocks, where="server blocks (base_depth, end)")
        part = Part.server(start, stop)
        stage = load_stage(model_id, kind, part, dtype=dtype, autocast=autocast, attention=attention, seed=seed)
        tune(stage, tuning, lora=lora, seed=seed)  # type: ignore[arg-type]
        return cls(stage, tuning=tuning, lora=lora or LoraConfig(), seed=seed, **options)

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

    def join(self, client: str, request: Join) -> Welcome:
        """Open a client's session, or open it anew with another cut.

        Raises:
            LinkError: the client's model or cut does not go with this server.
        """
        with self._lock:
            check_join(client, request, self.shared.stage, self.tuning, self.lora)
            earlier = self._sessions.pop(client, None)
            if earlier is not None:
                earlier.drop()
            if client not in self._random:
                self._random[client] = RandomStream(derived_seed(self._seed, "server", client), self._device)
            random = self._random[client]
            steps = earlier.steps if earlier else 0
            self._sessions[client] = Session(request, self.shared, self.config, random, steps=steps)
            anatomy = self.shared.stage.anatomy
            return Welcome(self.blocks[0], anatomy.blocks, anatomy.hidden)

    def forward(self, client: str, request: ForwardRequest) -> ForwardReply:
        """Blocks [s, e) forward for one client.

        Raises:
            LinkError: the client never joined, the message does not fit what was agreed, or too much is in flight.
        """
        with self._lock, self._computing():
            session = self._session(client)
            in_flight = sum(len(other.pending) for other in self._sessions.values())
            check_forward(session, request, self.shared.stage, in_flight)
            with session.random.active():
                return session.forward(request)

    def backward(self, client: str, request: BackwardRequest) -> BackwardReply:
        """Blocks [s, e) backward for one client, and the update that follows.

        Raises:
            LinkError: no forward of that client and number is in flight, or the gradient is not finite.
        """
        with self._lock, self._computing():
            session = self._session(client)
            check_backward(session, request)
            with session.random.active():
                return session.backward(request)

    def pull(self, client: str, request: PullRequest) -> PullReply:
        """The shared weights of some of the client's aligned blocks [s_min, s).

        Raises:
            LinkError: the client never joined, or asks for other blocks.
        """
        with self._lock:
            check_pull(self._session(client), request, self.blocks[0])
            wanted = range(request.start, request.stop)
            parameters = self.shared.updater.parameters.items()
            block_of = self.shared.stage.block_of
            return PullReply({name: value.detach().clone() for name, value in parameters if block_of(name) in wanted})

    def abort(self, client: str, request: Abort) -> None:
        """Forget what a client has in flight and what its unfinished steps have gathered.

        Raises:
            LinkError: the client never joined.
        """
        with self._lock:
            self._session(client).drop()

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
            self._refuse_busy("frozen")
            self.shared.freeze()

    def leave(self, client: str) -> None:
        """Close a client's session and drop what it has in flight."""
        with self._lock:
            session = self._sessions.pop(client, None)
            if session is not None:
                session.drop()

    def state(self) -> dict[str, Tensor]:
        """Everything that :meth:`load` needs to go on bit for bit.

        These are the live tensors: write them, or copy them, before the next step.

        Raises:
            LinkError: exchanges are in flight, whose clients would wait for ever.
        """
        with self._lock:
            self._refuse_busy("saved")
            flat = {f"shared/{name}": value for name, value in self.shared.state().items()}
            flat |= {f"random/{name}": random.state for name, random in self._random.items()}
            return flat | {"compute_seconds": torch.tensor(self.compute_seconds, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, whether clients joined already or will.

        Raises:
            LinkError: exchanges are in flight, which belong to other weights.
            StorageError: the state belongs to other blocks or another tuning.
        """
        with self._lock:
            self._refuse_busy("restored")
            parts: dict[str, dict[str, Tensor]] = {"shared": {}, "random": {}}
            for key, value in state.items():
                kind, _, name = key.partition("/")
                parts.setdefault(kind, {})[name] = value
            self.shared.load(parts["shared"])
            self.compute_seconds = float(state["compute_seconds"])
            for name, value in parts["random"].items():
                self._random.setdefault(name, RandomStream(0, self._device)).state = value

    def _refuse_busy(self, what: str) -> None:
        busy = [name for name, session in self._sessions.items() if session.pending or session.gathered]
        if busy:
            raise LinkError(f"the server cannot be {what} in the middle of a step of {', '.join(busy)}")

    def _session(self, client: str) -> Session:
        if client not in self._sessions:
            raise LinkError(f"client {client} has not joined: call link.join first")
        return self._sessions[client]

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
