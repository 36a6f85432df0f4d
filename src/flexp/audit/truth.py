"""What was sent at one place, and what it was: the truth by which attacks are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexp.attacks.base import Sent
from flexp.audit.watching import Exchange

MOST_KNOWN = 100
"""Texts that an attacker knows from elsewhere, at most; of few texts a quarter."""


@dataclass(frozen=True)
class Truth:
    """What was sent at one depth, and what it was; one row a token.

    Attributes:
        real_N: no special token.
        content_N: a content word.
        steps_N: of the client, in which it was sent.
        whose_N: which of the clients' texts it belongs to: the same whenever a client sends it again.
    """

    sent: Sent
    ids_N: Tensor
    real_N: Tensor
    content_N: Tensor
    steps_N: Tensor
    whose_N: Tensor

    @classmethod
    def of(cls, exchanges: Sequence[Exchange], of: str, special: Tensor, dull: Tensor) -> Truth:
        """Of ``z`` or ``z_base``.

        Args:
            special: tokens; ``dull``: those that are no content words.
        """
        hiddens = [exchange.z_BTH if of == "z" else exchange.base_BTH for exchange in exchanges]
        masks = [exchange.mask for exchange in exchanges]
        sent = Sent.of([hidden for hidden in hiddens if hidden is not None], masks)
        ids_N = torch.cat([exchange.batch["input_ids"][mask] for exchange, mask in zip(exchanges, masks, strict=True)])
        numbers: dict[tuple[str, tuple[int, ...]], int] = {}
        whose: list[int] = []
        for exchange, mask_BT in zip(exchanges, masks, strict=True):
            for ids_T, mask_T in zip(exchange.batch["input_ids"], mask_BT, strict=True):
                text = exchange.client, tuple(ids_T[mask_T].tolist())
                whose += [numbers.setdefault(text, len(numbers))] * len(text[1])
        steps = [torch.full((int(mask.sum()),), each.step) for each, mask in zip(exchanges, masks, strict=True)]
        return cls(sent, ids_N, ~torch.isin(ids_N, special), ~torch.isin(ids_N, dull), torch.cat(steps),
                   torch.tensor(whose))  # fmt: skip

    @property
    def texts(self) -> int:
        """How many there are, however often they were sent."""
        return int(self.whose_N.max()) + 1

    def averaged(self) -> Truth | None:
        """Each text once, of all the times that it was sent the mean: what an attacker has who waits for further
        epochs; ``None``: none was sent again."""
        if len(torch.unique(self.sent.texts_N)) == self.texts:
            return None
        place_N = self.whose_N * (int(self.sent.positions_N.max()) + 1) + self.sent.positions_N
        place_U, at_N, times_U = torch.unique(place_N, return_inverse=True, return_counts=True)
        sums_UH = torch.zeros(len(place_U), self.sent.z_NH.shape[1]).index_add_(0, at_N, self.sent.z_NH)
        last_U = torch.zeros(len(place_U), dtype=torch.long).scatter_reduce_(0, at_N, torch.arange(len(at_N)), "amax")
        once = self.only(last_U)
        return replace(once, sent=replace(once.sent, z_NH=sums_UH / times_U[:, None]))

    def known(self) -> Tensor:
        """The rows of texts, spread over all, that an attacker might know."""
        every = max(4, -(-self.texts // MOST_KNOWN))
        return self.whose_N % every == 0

    def only(self, rows: Tensor) -> Truth:
        """Some rows: flags (N,) or numbers."""
        sent = self.sent
        texts_N = torch.unique(sent.texts_N[rows], return_inverse=True)[1]
        some = Sent(sent.z_NH[rows], sent.positions_N[rows], texts_N)
        own = (self.ids_N, self.real_N, self.content_N, self.steps_N, self.whose_N)
        return Truth(some, *(value[rows] for value in own))
