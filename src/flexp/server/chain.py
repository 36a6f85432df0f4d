"""Several servers as one: each holds some of the shared blocks, and is to the next one what a client is.

Clients reach the first server alone, and see one server that holds all blocks. It sends what comes out of its last
block on, over a link of its own for each client, and takes what comes back for what its own blocks gave. A step's
gradients stay where they arise; their norms, tensor by tensor, come to the first server, which alone judges the step
and then says to all, over one more link that keeps the order, what becomes of it. So nothing is applied anywhere before
the whole was judged, and every server does the same updates in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from flexp.config import AlignConfig, GuardConfig, ServerConfig
from flexp.errors import ConfigError, LinkError, LinkLostError
from flexp.links.asking import FetchReply, FetchRequest
from flexp.links.base import Link, ask
from flexp.links.declaring import Request
from flexp.links.messages import Join
from flexp.links.passing import Behind, Keep, Lead, Settle, Update
from flexp.optim import merged, norms, total
from flexp.server.kept import Gathered

PREVIOUS = "chain"
"""What the server before calls itself, and whose token it has."""
OFF = AlignConfig(kind="off")
NOTHING = torch.zeros(0)


class Chain:
    """The servers further on, as the one before them sees them.

    Args:
        reach: a link under a client's name to the next server.
        card: who this server is, and with ``cut`` which blocks are further on.
        settings: that must be the same there, by their names.
        run: that this server goes on with; empty: none.

    Attributes:
        first: of the blocks that are further on.
        end: behind the last of them.
        told: what was heard last.
        lost: why they can be used no more: what one of them has, the others may not have.

    Raises:
        ConfigError: they do not go on where this server ends, or have other settings.
        LinkError: they cannot be reached, or not yet.
    """

    def __init__(self, reach: Callable[[str], Link], card: Join, settings: Mapping[str, str], run: str) -> None:
        self.first, self.end = card.cut
        self.lost: LinkError | None = None
        self.told = Behind()
        self._reach, self._links = reach, dict[str, Link]()
        self._leaving = dict[str, Future[None]]()  # links of clients that have left, until their names are free
        self._aside = ThreadPoolExecutor(1, "flexp-leaving")  # leaving waits for an answer
        self._voided = dict[str, Future[Behind]]()
        self._asked = dict[tuple[int, int], Future[FetchReply]]()  # weights, by block and the first of them
        self.control = reach(PREVIOUS)
        try:
            welcome = ask(self.control, card)
            if welcome.base_depth != self.first:
                raise ConfigError(
                    f"this server's blocks end before block {self.first}, and the next server's begin at "
                    f"{welcome.base_depth}: set --blocks (deployment.blocks) so that they follow on each other"
                )
            self.told = ask(self.control, Lead(dict(settings), run))
        except BaseException:
            self.control.close()
            raise

    def join(self, client: str, request: Join) -> Link:
        """The link of a client that needs their blocks, as agreed there."""
        start, stop = request.cut
        align = request.align if start > self.first else OFF  # else there are no aligned blocks further on
        cut = max(start, self.first), stop
        card = replace(request, cut=cut, align=align, codec=None, numbering=0, examples_key="")
        leaving = self._leaving.pop(client, None)
        if leaving is not None:
            leaving.result()
        link = self._links.get(client)
        if link is None or getattr(link, "broken", None) is not None:
            link = self._links[client] = self._reach(client)
        ask(link, card)
        return link

    def leave(self, client: str) -> None:
        """A client has left, or needs their blocks no more: they forget it as well."""
        link = self._links.pop(client, None)
        if link is not None:
            self._leaving[client] = self._aside.submit(link.close)

    def void(self, client: str, step: int) -> None:
        """What they have of a step will not be applied. Whoever does the step again waits for :meth:`voided`, or this
        could be heard after it."""
        if self.lost is None:
            self._voided[client] = self.tell(Settle(client, step, take=False))

    def voided(self, client: str) -> Future[Behind] | None:
        """What is still to be heard of :meth:`void`."""
        told = self._voided.get(client)
        return None if told is None or told.done() else told

    def tell(self, request: Request[Behind]) -> Future[Behind]:
        """Say something that concerns all clients; what is said is done in this order."""
        if self.lost is not None:
            raise self.lost
        self._asked = {}  # it may change what they have
        return self._hear(self.control.call(request))

    def weights(self, block: int, first: int) -> Future[FetchReply]:
        """Trained weights of a block further on, from the first that is asked for; as long as they stay as they are
        nothing comes twice, whoever asks."""
        known = self._asked.get((block, first))
        if known is None or (known.done() and known.exception() is not None):
            self._asked[block, first] = self.control.call(FetchRequest(block, first=first))
        return self._asked[block, first]

    def norm(self, told: Future[Behind], gradients: Mapping[str, Tensor]) -> tuple[float, Future[Behind]]:
        """The norm of an update: of ``gradients``, and of what the servers further on have for it, who are told."""
        behind = told.result()
        names = sorted(gradients)
        own_N = norms([gradients[name] for name in names]) if names else NOTHING
        norm = total(merged(names, own_N, behind.names, behind.norms_N)[1])
        return norm, self.tell(Update(norm))

    def alive(self) -> None:
        """Notice that the next server has gone.

        Raises:
            LinkError: it has.
        """
        lost = self.lost or getattr(self.control, "broken", None)
        if lost is not None:
            raise LinkLostError(f"the next server has gone ({lost})")

    def close(self) -> None:
        """Leave."""
        links, self._links = list(self._links.values()), {}
        self._aside.shutdown()
        for link in (*links, self.control):
            link.close()

    def _hear(self, answer: Future[Behind]) -> Future[Behind]:
        answer.add_done_callback(self._heard)
        return answer

    def _heard(self, answer: Future[Behind]) -> None:
        error = answer.exception()
        if error is None:
            self.told = answer.result()
        elif self.lost is None:
            self.lost = LinkLostError(str(error))  # whoever needs it may come again: it begins anew


class Keeper(Protocol):
    """Saves the state of a server that others lead."""

    run: str
    numbers: Sequence[int]

    def keep(self, number: int, run: str, held: Collection[int]) -> None:
        """Save it as snapshot ``number`` of a run; of the others those stay that the leading server has ``held``."""
        ...

    def back(self, number: int) -> None:
        """Go back to a snapshot."""
        ...


@dataclass
class Following:
    """What a server keeps that another one leads.

    Attributes:
        settings: that the leading server must have too.
        complete: gradients of clients' steps that are not settled, by client and step.
        due: an update that waits for its norm.
        led: the leading server is here.
        run: that it goes on with, as far as it knows: one that is led itself hears it from the one before.
        over: the run has ended, or (``lost``) the leading server has gone: then this server must begin anew.
    """

    settings: Mapping[str, str]
    keeper: Keeper | None = None
    complete: dict[tuple[str, int], Gathered] = field(default_factory=dict)
    due: Mapping[str, Tensor] | None = None
    led: bool = False
    run: str = ""
    over: bool = False
    lost: bool = False

    def check(self, lead: Lead) -> None:
        """Refuse a leading server that would train otherwise, or another run.

        Raises:
            LinkError: see above.
        """
        if self.lost or (self.led and (self.run or not lead.run)):
            raise LinkLostError("this server is led already, or begins anew since the one that led it has gone")
        for name in sorted(self.settings.keys() | lead.settings.keys()):
            here, there = self.settings.get(name, "none"), lead.settings.get(name, "none")
            if here != there:
                raise LinkError(f"the server before has {name} = {there}, and this one {here}: give both the same "
                                "configuration")  # fmt: skip
        if self.keeper is not None and self.keeper.numbers and lead.run not in ("", self.keeper.run):
            raise LinkError(
                f"this server's state is of the run {self.keeper.run}, the server before goes on with {lead.run}; give "
                "each the --state that it had, or a new one to both"
            )

    def settled(self, request: Settle) -> Gathered:
        """What a client's step has gathered here; nothing, where its cut ends before.

        Raises:
            LinkError: it should be here, and is not.
        """
        found = self.complete.pop((request.client, request.step), None)
        if found is None and request.take and request.reaches and request.client:
            raise LinkError(f"step {request.step} of client {request.client} is not here, so it cannot be applied")
        return found if found is not None and request.reaches else Gathered()

    def save(self, request: Keep) -> None:
        """Save, go back or end, as the leading server says."""
        self.over = self.over or request.over
        if self.keeper is not None and request.number >= 0:
            if request.back:
                self.keeper.back(request.number)
            else:
                self.keeper.keep(request.number, request.run, request.held)


def check_can_chain(config: ServerConfig) -> None:
    """Refuse what servers of a chain could not do as one.

    Raises:
        ConfigError: see above.
    """
    odd = [
        key
        for key, is_set in (
            ('server.adapters = "own"', config.adapters == "own"),
            ("server.joined", config.joined),
            ("server.noise", config.noise > 0),
            ("server.guard.similar", config.guard.similar != GuardConfig().similar),
        )
        if is_set
    ]
    if odd:
        raise ConfigError(f"{odd[0]} is not supported with several servers (deployment.blocks): leave it out")
