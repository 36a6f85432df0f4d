"""What of an exchange a server refuses, and the one line that says why. Nothing is computed for a message that does not
fit, and no gradient trains the shared blocks whose norm is out of bounds."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexp.config import GuardConfig
from flexp.errors import BadValuesError, LinkError, LinkLostError
from flexp.links.messages import BackwardRequest, ForwardReply, ForwardRequest
from flexp.links.passing import PassedBackward
from flexp.models.stage import Stage
from flexp.server.kept import size_kept

if TYPE_CHECKING:
    from flexp.server.kept import Pending
    from flexp.server.session import Session

LONGEST = 1 << 24
"""Tokens of a text; where a model has no table of positions, it would take any number for one."""


def check_forward(session: Session, request: ForwardRequest, stage: Stage, in_flight: int) -> None:
    """Refuse a forward that does not fit the model, what was agreed on joining, or the bound on what is in flight.

    Raises:
        LinkLostError: others keep so much that it may be answered later.
        LinkError: see above.
    """
    client, hidden = session.join.client, request.hidden_BTH
    if not stage.part.blocks:
        raise LinkError(f"client {client} sends an activation, and this server has no blocks: clients have all of them")
    if hidden.dim() != 3 or hidden.shape[2] != stage.anatomy.hidden or hidden.dtype != stage.model.dtype:
        raise LinkError(
            f"client {client}: the activation is {_facts(hidden)}, "
            f"expected (B, T, {stage.anatomy.hidden}) {stage.model.dtype}"
        )
    shape = tuple(hidden.shape[:2])
    one_row = (1, shape[1])  # models broadcast positions; a mask says of every token whether it counts
    for name, value, fits in (
        ("mask", request.mask_BT, {shape}),
        ("positions", request.positions_BT, {shape, one_row}),
        ("rows", request.rows_BT, {shape}),
    ):
        if value is not None and tuple(value.shape) not in fits:
            raise LinkError(f"client {client}: the {name} has shape {tuple(value.shape)}, expected {shape}")
    if request.rows_BT is not None and not bool(request.rows_BT.any()):
        raise LinkError(f"client {client}: no row of exchange {request.exchange} is read, expected one at least")
    check_positions(client, request.positions_BT, stage)
    _check_aligned(session, request, min(stage.part.blocks))
    if request.exchange in session.pending:
        raise LinkError(f"client {client}: exchange {request.exchange} is in flight already")
    if not request.train:
        return
    own, config = len(session.pending), session.config
    if own >= config.max_in_flight:
        raise LinkError(
            f"client {client}: {own} exchanges are in flight, the most that server.max_in_flight allows; "
            "send a backward first, give them up with model.abort(), or raise the bound"
        )
    if in_flight >= config.max_in_flight_total and not session.pending:
        raise LinkError(
            f"client {client}: {in_flight} exchanges of all clients are in flight, the most that "
            "server.max_in_flight_total allows, and its own thread holds some, so it cannot wait; send their backwards "
            "first, or raise the bound"
        )
    size = size_kept(request)
    if not session.has_room(size, graph=False):
        if not session.kept_bytes and size <= config.max_kept_bytes:
            raise LinkLostError(f"client {client}: others fill server.max_kept_bytes, and {size} more are beyond its "
                                f"share, {session.share_bytes}; do the step again")  # fmt: skip
        raise LinkError(
            f"client {client}: {session.kept_bytes} bytes wait for its backwards, and {size} more are beyond its share "
            f"of server.max_kept_bytes, {session.share_bytes}, while others need theirs; send a backward first, use "
            "smaller (micro-)batches, or raise the bound"
        )


def check_backward(session: Session, request: BackwardRequest | PassedBackward) -> Pending:
    """The forward in flight that ``request`` belongs to.

    Raises:
        LinkError: there is none, or the gradient does not fit it.
    """
    client = session.join.client
    pending = session.pending.get(request.exchange)
    if pending is None and request.exchange in session.late:
        since = session.late[request.exchange]
        session.progress.held(since)  # that long it takes, and may the next time
        raise LinkLostError(
            f"client {client}: the backward of exchange {request.exchange} comes after {time.monotonic() - since:.3g} "
            "s, and it was given up (server.exchange_seconds, or server.hold_seconds while others wait); do the step "
            "again"
        )
    if pending is None:
        raise LinkError(
            f"client {client}: exchange {request.exchange} has no forward in flight "
            f"(in flight: {sorted(session.pending) or 'none'})"
        )
    given, whole = request.grad_BTH, pending.input_BTH
    shape = whole.shape if pending.reads is None else (1, len(pending.reads), whole.shape[2])
    if tuple(given.shape) != tuple(shape) or given.dtype != whole.dtype:
        raise LinkError(
            f"client {client}: the gradient is {_facts(given)}, expected {tuple(shape)} {whole.dtype} as the activation"
        )
    base, sent = getattr(request, "base_BTH", None), pending.sent  # from the server before
    crossed = whole.shape if sent is None else (1, len(sent), whole.shape[2])
    if base is not None and (tuple(base.shape) != tuple(crossed) or base.dtype != whole.dtype):
        raise LinkError(f"client {client}: what is taught is {_facts(base)}, expected {tuple(crossed)} {whole.dtype}")
    most = whole.shape[0] * whole.shape[1]  # items are tokens or examples; more would outweigh the other clients'
    if not (0 < request.tokens <= 1 and 0 < request.weight <= most):
        raise LinkError(
            f"client {client}: exchange {request.exchange} counts tokens = {request.tokens} and weight = "
            f"{request.weight}, expected 0 < tokens <= 1 and 0 < weight <= {most}, its tokens"
        )
    step = session.gathered.get(request.step)
    least = step.exchanges if step else 1
    if request.exchanges < least:
        raise LinkError(
            f"client {client}: step {request.step} has {request.exchanges} exchanges now, "
            f"expected {f'{least} as before, or more' if step else 'at least 1'}"
        )
    if step is None and len(session.gathered) >= session.config.max_in_flight:
        raise LinkError(
            f"client {client}: {len(session.gathered)} steps are unfinished, the most that server.max_in_flight "
            "allows; send their other exchanges first, or give them up with model.abort()"
        )
    return pending


def alike(given: Tensor, answered: Tensor) -> bool:
    """Whether what comes again is of the size that was answered; else (smaller exchanges since) it is computed anew."""
    return given.shape == answered.shape and given.dtype == answered.dtype


def same_exchange(session: Session, request: ForwardRequest, answered: ForwardReply) -> bool:
    """Whether a forward that comes again, as it crossed, is the one that was answered so."""
    back = session.progress.answer(request.step, ("backward", request.exchange))
    given = request.hidden_BTH
    if back is not None and back.grad_BTH is not None and not alike(given, back.grad_BTH):
        return False
    if request.rows_BT is not None:
        return answered.hidden_BTH.shape[1] == int(request.rows_BT.sum())
    return alike(given, answered.hidden_BTH)


def check_positions(client: str, positions_BT: Tensor | None, stage: Stage) -> None:
    """Refuse positions that no text of this model has.

    Raises:
        BadValuesError: see above.
    """
    if positions_BT is None:
        return
    config = stage.model.config.get_text_config()
    turned = any(name.startswith(("rope", "rotary")) for name in config.to_dict())  # positions have no table
    most = LONGEST if turned else getattr(config, "max_position_embeddings", None) or LONGEST
    low, high = int(positions_BT.min()), int(positions_BT.max())
    if low < 0 or high >= most:
        raise BadValuesError(f"client {client}: its positions go from {low} to {high}, expected 0 to {most - 1}")


def check_finite(client: str, request: ForwardRequest) -> None:
    """Refuse activations that are not finite.

    Raises:
        BadValuesError: see above.
    """
    for value in (request.hidden_BTH, request.base_BTH, *request.inner_BTH):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise BadValuesError(
                f"client {client}: an activation of exchange {request.exchange} is not finite; lower "
                "train.personal.lr, or use float32"
            )


def _check_aligned(session: Session, request: ForwardRequest, base_depth: int) -> None:
    client, hidden = session.join.client, request.hidden_BTH
    given = [value for value in (request.base_BTH, *request.inner_BTH) if value is not None]
    if not given:
        return
    for value in given:
        if value.shape != hidden.shape or value.dtype != hidden.dtype:
            raise LinkError(f"client {client}: an aligned activation is {_facts(value)}, expected {_facts(hidden)}")
    depth, align = session.cut[0] - base_depth, session.align
    inner = depth - 1 if align.at == "every-block" and align.has_term and not session.led else 0
    wanted = depth > 0 and ((align.teach and not session.led) or align.has_term)
    if not wanted or request.base_BTH is None or len(request.inner_BTH) != inner:
        raise LinkError(
            f"client {client}: {len(given)} activations came for alignment, expected {1 + inner if wanted else 0} "
            f"with align.kind = {session.align.kind!r} at {session.align.at!r} and {depth} aligned blocks"
        )


def _facts(value: Tensor) -> str:
    return f"{tuple(value.shape)} {value.dtype}"


SMALL = 1.0
"""A median below this counts as this: where training has converged, an ordinary gradient is many times the median."""


OWN = 16
"""Norms of each client that ``clip = "median"`` looks at: a client has one vote, however many steps it does."""


class Bounds:
    """Judges gradients by their global norm, and remembers the norms that it accepted."""

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        self._norms: deque[float] = deque(maxlen=self.config.median_over)
        self._own: dict[str, deque[float]] = {}  # the last of each client's, for clip = "median"

    @property
    def most(self) -> float | None:
        """The largest norm that is accepted now; ``None``: any that is finite."""
        limits = [] if self.config.max_norm is None else [self.config.max_norm]
        if self.config.explode is not None and len(self._norms) >= min(self.config.settle, self.config.median_over):
            limits.append(self.config.explode * max(SMALL, statistics.median(self._norms)))
        return min(limits, default=None)

    def judge(self, client: str, step: int, norm: float) -> float | None:
        """What a whole step's gradient of this norm is to be scaled by before it reaches the shared weights; ``None``:
        nothing.

        Raises:
            BadValuesError: the norm is not finite, or beyond a bound.
        """
        most = self.most
        if not norm < float("inf"):
            raise BadValuesError(f"client {client}: the gradient of step {step} is not finite")
        if most is not None and norm > most:
            raise BadValuesError(
                f"client {client}: the gradient of step {step} has the norm {norm:.3g}, the server takes at most "
                f"{most:.3g} ({self._why(most)}), so the shared blocks were not updated; lower train.personal.lr"
            )
        clip = self._clip(client)
        self._norms.append(norm)
        if self.config.clip == "median":
            self._own.setdefault(client, deque(maxlen=OWN)).append(norm)
        return None if clip is None or norm <= clip else clip / norm

    def state(self) -> dict[str, Tensor]:
        """The norms accepted last; nothing before the first."""
        own = {f"norms/{name}": torch.tensor(list(norms), dtype=torch.float64) for name, norms in self._own.items()}
        return own | ({"norms": torch.tensor(list(self._norms), dtype=torch.float64)} if self._norms else {})

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self._norms.clear()
        self._norms.extend(float(value) for value in state.get("norms", ()))
        found = {key.removeprefix("norms/"): value for key, value in state.items() if key.startswith("norms/")}
        self._own = {name: deque(map(float, value), maxlen=OWN) for name, value in found.items()}

    def _clip(self, client: str) -> float | None:
        """What a larger norm of this client is scaled down to."""
        if self.config.clip != "median":
            return self.config.clip
        others = [statistics.median(norms) for name, norms in self._own.items() if name != client]
        return statistics.median(others) if others else None

    def _why(self, most: float) -> str:
        if most == self.config.max_norm:
            return "server.guard.max_norm"
        return f"server.guard.explode = {self.config.explode:g} times the median of the last {len(self._norms)}"
