"""A trained decoder of pooled texts: from one mean vector to the words that are in the text.

What an adaptive attacker would try after maps in closed form (inverting sentence embeddings: Song & Raghunathan, 2020,
arXiv 2004.00053): a network with two hidden layers learns which tokens a text has, from many more means than it has
texts, since it can make them itself: of a public text, and of any part of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.attacks.tokens import Public, Words, means


class Texts(Words):
    """For pooled texts: a network from the mean to the bag of its words, trained on means that it makes of public
    texts, with noise where clients add it; read as :class:`~flexp.attacks.tokens.Words` is."""

    name = "bag"
    about = "a small network from a text's mean to the words in it, trained on public text; in any order"
    slow, causal = True, False
    steps, batch, width = 1000, 64, 1024

    def learn(self, public: Public) -> None:
        """See :class:`~flexp.attacks.tokens.Attack`."""
        means_UH, at_N = means(public.sent)
        apart = public.sent if public.apart is None else public.apart
        plain_UH, _ = means(apart)
        noise_UH = means_UH - plain_UH
        self._ids, words_N = torch.unique(public.ids_N, return_inverse=True)
        there_UV = torch.zeros(len(means_UH), len(self._ids), dtype=torch.bool)
        there_UV[at_N, words_N] = True
        counts_U = at_N.bincount()
        starts_U = counts_U.cumsum(0) - counts_U
        order_N = at_N.argsort(stable=True)
        z_NH, words_N = apart.z_NH[order_N], words_N[order_N]
        self._table = public.embeddings[self._ids]
        self._mean, self._scale = means_UH.mean(0), means_UH.std()
        often_V = there_UV.float().mean(0).clamp(1e-4, 0.5)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._net = nn.Sequential(
                nn.Linear(means_UH.shape[1], self.width), nn.GELU(), nn.LayerNorm(self.width), nn.Dropout(0.1),
                nn.Linear(self.width, self.width), nn.GELU(), nn.LayerNorm(self.width), nn.Dropout(0.1),
                nn.Linear(self.width, public.embeddings.shape[1]),
            )  # fmt: skip
            self._bias = often_V.logit().requires_grad_()
            optimiser = torch.optim.AdamW([*self._net.parameters(), self._bias], lr=1e-3, weight_decay=0.01)
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
            for step in range(self.steps):
                texts_B = torch.randint(len(means_UH), (self.batch,))
                if step % 2 or public.apart is None:  # means as they come
                    made_BH, wanted_BV = means_UH[texts_B], there_UV[texts_B]
                else:  # of parts of texts, which the tokens' own activations are needed for
                    made_BH, wanted_BV = self._parts(texts_B, starts_U, counts_U, z_NH, words_N)
                    made_BH = made_BH + noise_UH[torch.randint(len(noise_UH), (self.batch,))]
                told_BV = self._told(made_BH)
                optimiser.zero_grad()
                torch.autograd.backward(F.binary_cross_entropy_with_logits(told_BV, wanted_BV.float()) * len(self._ids))
                optimiser.step()
                falling.step()
        self._net.eval()

    def scores(self, means_UH: Tensor) -> Tensor:
        """See :class:`~flexp.attacks.tokens.Words`."""
        with torch.no_grad():
            return self._told(means_UH)

    def _told(self, means_BH: Tensor) -> Tensor:
        return self._net((means_BH - self._mean) / self._scale) @ self._table.T + self._bias

    def _parts(
        self, texts_B: Tensor, starts_U: Tensor, counts_U: Tensor, z_NH: Tensor, words_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Means of random stretches of texts, and the words in them."""
        made, wanted = [], torch.zeros(len(texts_B), len(self._ids), dtype=torch.bool)
        for row, text in enumerate(texts_B.tolist()):
            count = int(counts_U[text])
            length = int(torch.randint(1, count + 1, ()))
            start = int(starts_U[text]) + int(torch.randint(count - length + 1, ()))
            made.append(z_NH[start : start + length].mean(0))
            wanted[row, words_N[start : start + length]] = True
        return torch.stack(made), wanted
