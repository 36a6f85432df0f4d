"""Prefix search: decoders make the same activations of the same beginning."""

from __future__ import annotations

import torch
from torch import Tensor

from flexp.attacks.base import Attack, Public, Sent
from flexp.attacks.linear import Linear


class Prefix(Attack):
    """Prefix search: token by token, the candidate whose activation, after what was read so far, the public head makes
    most alike to the one that was sent. Candidates are the linear map's."""

    name = "prefix"
    about = "prefix search with the public head"
    slow, causal = True, True

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        self._public, self._linear = public, Linear()
        self._linear.learn(public)

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        stage, depth = self._public.stage, self._public.depth
        candidates_NC, read_N = self._linear.candidates(sent), torch.zeros(len(sent), dtype=torch.long)
        for text in torch.unique(sent.texts_N):
            rows = (sent.texts_N == text).nonzero()[:, 0]
            for place, row in enumerate(rows):
                tried_C = candidates_NC[row]
                ids_CT = torch.cat([read_N[rows[:place]].expand(len(tried_C), -1), tried_C[:, None]], 1)
                with torch.no_grad():
                    hidden_CTH, plan = stage.plan({"input_ids": ids_CT, "attention_mask": torch.ones_like(ids_CT)})
                    made_CH = stage.run(hidden_CTH, plan, 0, depth)[:, -1].float().cpu()
                read_N[row] = tried_C[(made_CH - sent.z_NH[row]).square().sum(1).argmin()]
        return read_N
