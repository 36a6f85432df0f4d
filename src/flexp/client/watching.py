"""Whether a server seems to compute what was agreed: seen from one client, from what crosses anyway.

Two things hold of every transformer's middle, whatever its weights are, and not of a server that makes answers up:

- Its backward is linear: an example whose ∂task/∂h is ten times smaller has a ∂task/∂z about ten times smaller. A
  server that trains clients' heads for a purpose of its own (feature-space hijacking, Pasquini et al., 2021, arXiv
  2012.02670) sends gradients that do not depend on ∂task/∂h. So within each exchange log ‖∂z‖ is regressed on
  log ‖∂h‖ over the examples; honest slopes are about 1, made-up ones about 0.
- Its residual stream carries z to h: tokens that were alike stay rather alike, and so do texts of which one token is
  read. Measured by linear CKA between both (Kornblith et al., 2019, arXiv 1905.00414; unbiased, Song et al., 2012),
  which is 0 on average for what is random.

A server that knows this can pass. What is found is told and refuses nothing.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from flexp.config import AlignConfig
from flexp.links.messages import ForwardRequest

TOKENS = 64
"""Of an exchange that are compared …"""
LEAST, TEXTS = 9, 32
"""… and at least so many tokens, or texts where one token of each is read, which some exchanges may have to bring."""
EXCHANGES = 16
"""After so many, and over so many of the last, something is said."""
SLOPE, LIKENESS = 0.5, 0.02
"""Below these it is."""
SPREAD = 0.1
"""Standard deviation of log ‖∂h‖ within exchanges that a slope needs."""
log = logging.getLogger("flexp.client")


class Watch:
    """Looks at every training exchange of one client.

    Args:
        tell: what its owner is told, once for each reason.
    """

    def __init__(self, tell: Callable[[str], None] = log.warning) -> None:
        self._tell = tell
        self._told: set[str] = set()
        self._slopes: deque[tuple[int, float, float]] = deque(maxlen=EXCHANGES)  # examples, Σx², Σxy
        self._likeness: deque[float] = deque(maxlen=EXCHANGES)
        self._pairs: list[tuple[Tensor, Tensor]] = []  # rows of z and h, until there are enough

    @property
    def slope(self) -> float | None:
        """Of log ‖∂z‖ on log ‖∂h‖; ``None``: not known."""
        count, squares, products = (sum(one[place] for one in self._slopes) for place in range(3))
        known = len(self._slopes) == EXCHANGES and squares > SPREAD**2 * count
        return products / squares if known else None

    @property
    def likeness(self) -> float | None:
        """CKA of z and h, on average; ``None``: not known."""
        return sum(self._likeness) / EXCHANGES if len(self._likeness) == EXCHANGES else None

    def exchange(
        self, request: ForwardRequest, hidden_BTH: Tensor, sent_BTH: Tensor, got_BTH: Tensor, most_align: float
    ) -> None:
        """One exchange is through.

        Args:
            hidden_BTH: h.
            sent_BTH: ∂task/∂h.
            got_BTH: ∂total/∂z.
            most_align: the norm that an example's alignment gradient in it has at most (:func:`most_alignment`).
        """
        sent, got = (value.float().flatten(1).norm(dim=1) for value in (sent_BTH, got_BTH))
        clear = (sent > 0) & (got > 4 * most_align)
        if int(clear.sum()) > 1:
            x, y = sent[clear].log(), got[clear].log()
            x, y = x - x.mean(), y - y.mean()
            self._slopes.append((len(x), float((x * x).sum()), float((x * y).sum())))
        texts = request.rows_BT is not None and bool((request.rows_BT.sum(1) == 1).all())
        self._pairs.append(_texts(request, hidden_BTH) if texts else _tokens(request, hidden_BTH))
        if sum(len(z) for z, _ in self._pairs) >= (TEXTS if texts else LEAST):
            self._likeness.append(_cka(*(torch.cat(rows) for rows in zip(*self._pairs, strict=True))))
            self._pairs.clear()
        self._say()

    def _say(self) -> None:
        slope, likeness = self.slope, self.likeness
        if slope is not None and slope < SLOPE:
            self._once(
                "slope",
                f"the server's gradients hardly depend on what this client sends (slope {slope:.2f}, expected about "
                "1), so they may serve a purpose of its own, such as reading this client's texts (feature-space "
                "hijacking); stop, and ask its operator",
            )
        if likeness is not None and likeness < LIKENESS:
            self._once(
                "likeness",
                f"the server's activations hardly depend on what this client sends (CKA {likeness:.3f}, expected more "
                "of a transformer's blocks), so it may not compute them with this model; stop, and ask its operator",
            )

    def _once(self, reason: str, line: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._tell(line)


def most_alignment(align: AlignConfig, request: ForwardRequest, share: float) -> float:
    """The largest norm that the alignment's part of an example's gradient can have; infinite where it has no bound.

    Args:
        share: of the step's tokens, that the exchange has.
    """
    if request.base_BTH is None or not align.has_term:
        return 0.0
    if align.kind != "kl" or align.normalize:
        return math.inf
    batch, length = request.hidden_BTH.shape[:2]
    tokens = batch * length if request.mask_BT is None else max(1, int(request.mask_BT.sum()))
    return align.weight * share * align.temperature * math.sqrt(2 * length) / tokens  # ‖q − p‖ ≤ √2 for each token


def _tokens(request: ForwardRequest, hidden_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """z and h, (n, H), of some of the tokens that came down."""
    read_BT = request.mask_BT if request.rows_BT is None else request.rows_BT
    read_BT = torch.ones_like(hidden_BTH[..., 0]) if read_BT is None else read_BT
    z, h = (value.detach().float()[read_BT.bool()] for value in (request.hidden_BTH, hidden_BTH))
    every = max(1, len(z) // TOKENS)
    return z[::every][:TOKENS], h[::every][:TOKENS]


def _texts(request: ForwardRequest, hidden_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each text's z, since a first token is the same in all of them, and h of the token that is read."""
    assert request.rows_BT is not None
    z_BTH, mask_BT = request.hidden_BTH.float(), request.mask_BT
    there_BT1 = (torch.ones_like(z_BTH[..., 0]) if mask_BT is None else mask_BT.to(z_BTH)).unsqueeze(-1)
    return (z_BTH * there_BT1).sum(1) / there_BT1.sum(1), hidden_BTH.detach().float()[request.rows_BT.bool()]


def _cka(left: Tensor, right: Tensor) -> float:
    """Linear CKA of two sets of n rows, from unbiased estimates of HSIC."""
    grams = []
    for rows in (left, right):
        rows = rows - rows.mean(0)
        gram = rows @ rows.T
        grams.append(gram - torch.diag(gram.diagonal()))
    a, b = grams
    size = len(a)

    def hsic(k: Tensor, m: Tensor) -> float:
        trace = (k * m).sum()
        means = k.sum() * m.sum() / ((size - 1) * (size - 2))
        mixed = 2 * (k.sum(0) * m.sum(0)).sum() / (size - 2)
        return float((trace + means - mixed) / (size * (size - 3)))

    scale = math.sqrt(max(hsic(a, a), 0.0) * max(hsic(b, b), 0.0))
    return hsic(a, b) / scale if scale > 0 else 0.0
