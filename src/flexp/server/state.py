"""What a server holds, how it is saved and restored, and what its operator may see and do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from flexp.config import OptimizerConfig, ServerConfig
from flexp.models.stage import Stage
from flexp.server.chain import Chain, Following
from flexp.server.clients import ClientRegistry, Quarantine
from flexp.server.kept import Sessions
from flexp.server.shared import SharedBlocks
from flexp.server.sums import SumTable

RESIDENT = 8
"""Adapters of so many idle clients stay on a GPU; those of others are in main memory until they are used."""


class ServerState:
    """The shared blocks, the clients that ever joined, and the sessions of those that are here."""

    def __init__(
        self,
        stage: Stage,
        config: ServerConfig,
        optimizer: OptimizerConfig,
        total_steps: int | None,
        seed: int,
        remembers: bool,
    ) -> None:
        self.config = config
        self.remembers = remembers
        self.shared = SharedBlocks(stage, config, optimizer, total_steps)
        self.own: dict[str, SharedBlocks] = {}  # by client, with server.adapters = "own": all begin as shared is
        self.bounds, self.guard = self.shared.bounds, Quarantine(config.guard)
        self.clients = ClientRegistry(seed)
        self.compute_seconds = 0.0
        self.sums = SumTable()
        self.chain: Chain | None = None  # the servers further on
        self.following: Following | None = None  # the server before
        self._sessions = Sessions()
        self._lock = threading.RLock()
        self.guard.listeners.append(lambda client, _: self._forget(client))

    def _forget(self, client: str) -> None:
        """A client goes; what it has in flight, here and further on, is dropped, and its caches are."""
        self._sessions.end(client)
        if self.chain is not None:
            self.chain.leave(client)

    @property
    def blocks(self) -> tuple[int, int]:
        """(s_min, e_max): the shared blocks are [s_min, e_max), those of the servers further on among them; (L, L) if
        there are none."""
        owned = self.shared.stage.part.blocks
        if not owned:
            return (self.shared.stage.anatomy.blocks,) * 2
        return min(owned), max(owned) + 1 if self.chain is None else self.chain.end

    def blocks_of(self, client: str) -> SharedBlocks:
        """The blocks as a client has them; with adapters of its own, the model is made of these from now on."""
        if self.config.adapters == "shared":
            return self.shared
        if client not in self.own:
            self.own[client] = self.shared.apart()
        self.own[client].enter()
        self._used([client])
        return self.own[client]

    def _used(self, clients: Iterable[str]) -> None:
        """Their own adapters were used last, if they have any; those of who is idle longest leave a GPU."""
        for client in clients:
            if client in self.own:
                self.own[client] = self.own.pop(client)
        idle = [name for name in self.own if name not in self._sessions or not self._sessions[name].busy]
        for name in idle[:-RESIDENT]:
            self.own[name].park()

    @property
    def updates(self) -> int:
        """How often weights were updated, whosoever they are."""
        return self.shared.version + sum(blocks.version for blocks in self.own.values())

    @property
    def skipped(self) -> Counter[str]:
        """Steps of clients that were answered and not applied, by client."""
        return sum((blocks.skipped for blocks in self.own.values()), Counter(self.shared.skipped))

    def freeze(self) -> None:
        """From now on serve the shared blocks as they are, without training them.

        Raises:
            LinkError: exchanges are in flight, which would train them.
        """
        with self._lock:
            self._sessions.refuse_busy("frozen")
            for blocks in (self.shared, *self.own.values()):
                blocks.freeze()

    def counts(self) -> dict[str, float]:
        """``updates``, ``compute_seconds``, forwards ``in_flight`` and ``versions`` of the weights that are held.

        And ``bad_requests``, which were refused for their values, how many ``clients_aside`` there are, and how many
        ``skipped_steps`` were answered and not applied.
        """
        with self._lock:
            return {
                "updates": self.updates,
                "compute_seconds": self.compute_seconds,
                "in_flight": self._sessions.in_flight,
                "versions": sum(1 + len(blocks.stashed) for blocks in (self.own.values() or (self.shared,))),
                "bad_requests": self.guard.bad(),
                "clients_aside": len(self.guard.all_aside),
                "skipped_steps": self.skipped.total(),
            }

    def aside(self, client: str) -> str | None:
        """Why the requests of a client are refused that was quarantined; ``None``: it was not."""
        return self.guard.aside(client)  # without the lock, for a link must not wait for what is computed

    def readmit(self, client: str) -> bool:
        """Let a client in again that was quarantined; gives whether it was."""
        return self.guard.readmit(client)

    @property
    def aside_listeners(self) -> list[Callable[[str, str], None]]:
        """Told the name of each client that is quarantined, and why."""
        return self.guard.listeners

    def cut_of(self, client: str) -> tuple[int, int] | None:
        """The cut of a client that has joined and not left."""
        with self._lock:
            session = self._sessions.get(client)
            return None if session is None else session.cut

    def keep_answers_after(self, client: str, step: int) -> None:
        """A client has saved its state after ``step``: keep the answers of its later steps, and drop the others."""
        with self._lock:
            progress = self.clients[client].progress
            progress.kept_from = step
            progress.forget(step)

    def residuals(self, client: str) -> dict[str, Tensor]:
        """Of error feedback in what a client is sent: see :class:`flexp.links.coding.Coding`, which writes in it."""
        return self.clients[client].residuals

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
            flat |= self.clients.state(progress=self.remembers)
            flat |= {f"guard/{name}": value for name, value in (self.bounds.state() | self.guard.state()).items()}
            for client, blocks in self.own.items():
                place = f"own/{quote(client, safe='')}"
                flat |= {f"{place}/blocks/{name}": value for name, value in blocks.state().items()}
                flat |= {f"{place}/guard/{name}": value for name, value in blocks.bounds.state().items()}
            return flat | {"compute_seconds": torch.tensor(self.compute_seconds, dtype=torch.float64)}

    def trained(self) -> dict[str, list[int]]:
        """By client: which run of it was here last (its numbering), and the newest of its steps that was applied."""
        with self._lock:
            return {name: [own.progress.numbering, own.progress.newest] for name, own in self.clients.items()}

    def load(self, state: Mapping[str, Tensor], *, only_weights: bool = False) -> None:
        """Go on from :meth:`state`, whether clients joined already or will.

        Args:
            only_weights: take the shared weights alone, and go on otherwise as before.

        Raises:
            LinkError: exchanges are in flight, which belong to other weights.
            StorageError: the state belongs to other blocks or another tuning.
        """
        with self._lock:
            self._sessions.refuse_busy("restored")
            if only_weights:
                self.shared.load_weights(_under("shared/weights/", state))
                return
            self.shared.load(_under("shared/", state))
            self.bounds.load(_under("guard/", state))
            self.guard.load(_under("guard/", state))
            self.own = {}
            for place in {"/".join(name.split("/", 2)[:2]) for name in state if name.startswith("own/")}:
                blocks = self.blocks_of(unquote(place.removeprefix("own/")))
                blocks.load(_under(f"{place}/blocks/", state))
                blocks.bounds.load(_under(f"{place}/guard/", state))
            self.compute_seconds = float(state["compute_seconds"])
            self.clients.load(state)
            for name, session in self._sessions.items():
                session.progress = self.clients[name].numbered(session.join.numbering)
                session.shared = self.blocks_of(name)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
