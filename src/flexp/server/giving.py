"""Weights that a server gives away: of aligned blocks, which clients follow, and of blocks that they take over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from flexp.errors import LinkError
from flexp.links.asking import FetchReply, FetchRequest, PullReply, PullRequest
from flexp.links.codecs import codec_of
from flexp.links.frames import MOST_FIELDS
from flexp.models.fingerprint import tensor_fingerprint
from flexp.server.exchanges import Exchanges
from flexp.server.session import Session
from flexp.server.turns import Steps, handles

MOST_BYTES = 64 << 20
"""Bytes of weights in an answer, whatever is asked for; but for a tensor that is larger."""


class Giving(Exchanges):
    """A server whose weights may be asked for."""

    allow_export: bool

    @handles.register
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

    @handles.register
    def _fetch(self, request: FetchRequest, client: str) -> Steps[FetchReply]:
        """The trained shared weights of one block, as they are between two updates."""
        session = self._sessions[client]
        check_fetch(session, request, self.blocks, self.allow_export or self._leads(client))
        if self.chain is not None and request.block >= self.chain.first:
            version = self.shared.version  # theirs may count otherwise; updates come in the order of what is asked
            reply: FetchReply = yield self.chain.control.call(request)
            return replace(reply, version=version)
        # What was not trained (the base weights under LoRA, frozen blocks) is not sent: the client has it.
        block_of, parameters = self.shared.stage.block_of, session.shared.updater.parameters
        trained = {name: value for name, value in parameters.items() if block_of(name) == request.block}
        return FetchReply(session.shared.version, len(trained), *portion(trained, request, session.coded))

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


def check_pull(session: Session, request: PullRequest, base_depth: int) -> None:
    """Refuse to hand out weights of other blocks than this client's aligned ones.

    Raises:
        LinkError: see above.
    """
    stop = session.cut[0]
    if not base_depth <= request.start < request.stop <= stop:
        raise LinkError(
            f"client {session.join.client}: the weights of blocks [{request.start}, {request.stop}) were asked for, "
            f"expected some of its aligned blocks [{base_depth}, {stop})"
        )
    if request.first < 0 or request.most < 1:
        raise LinkError(
            f"client {session.join.client}: weights from tensor {request.first} on, {request.most} bytes at most, were "
            "asked for; expected a tensor from 0 on and at least one byte"
        )


def check_fetch(session: Session, request: FetchRequest, shared: tuple[int, int], allowed: bool) -> None:
    """Refuse to give a shared block to a client unless it keeps a copy of its own, which may begin with it; of the
    blocks that the server runs for it only where the operator gives them away.

    Args:
        shared: (s_min, e_max).

    Raises:
        LinkError: see above.
    """
    client, (start, stop), (low, high) = session.join.client, session.cut, shared
    if start <= request.block < stop and not allowed:
        raise LinkError(
            f"client {client}: this server gives no shared blocks away; its operator allows it with --allow-export "
            "(deployment.allow_export = true)"
        )
    if not low <= request.block < high or request.first < 0 or request.most < 1:
        raise LinkError(
            f"client {client}: block {request.block} from tensor {request.first} on, {request.most} bytes at most, was "
            f"asked for; expected one of the shared blocks [{low}, {high}), a tensor from 0 on and at least one byte"
        )


def portion(
    trained: Mapping[str, Tensor], request: FetchRequest | PullRequest, coded: str = "off"
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Of tensors, in the order of their names, from the first that is asked for on: which of them the client has, and
    copies of the others until ``request.most`` bytes, or :data:`MOST_BYTES`, are full.

    A tensor that is larger than that comes alone, so that every answer brings the client further.

    Args:
        coded: the codec in which weights cross: whoever has what it makes of a tensor has the tensor.
    """
    chosen: dict[str, Tensor] = {}
    same: list[str] = []
    size = 0
    for name, value in sorted(trained.items())[request.first :]:
        if name in request.known and request.known[name] in _fingerprints(value, coded):
            same.append(name)
            continue
        size += value.numel() * value.element_size()
        if chosen and (size > min(request.most, MOST_BYTES) or len(chosen) == MOST_FIELDS):
            break
        chosen[name] = value.detach().clone()
    return tuple(same), chosen


def _fingerprints(value: Tensor, coded: str) -> Iterator[str]:
    yield tensor_fingerprint(value)
    if coded != "off":
        codec = codec_of(coded, value.dtype)
        yield tensor_fingerprint(codec.decode(codec.encode(value), value.shape[-1], value.dtype))
