"""The words of a pooled text, by a linear map."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from flexp.attacks.base import RIDGES, Attack, Public, Sent, means


class Words(Attack):
    """For pooled texts (``privacy.pool``): one linear map from a text's mean to the words in it, in closed form (ridge
    regression, whose penalty is chosen on public texts held back); of a text with n tokens the n words that its mean
    makes likelier than they are anyhow. A word counts as read wherever it stands, since a mean tells no places; how
    long a text is, which is not sent, is given."""

    name = "words"
    about = "one linear map from a text's mean to the words in it, in closed form; in any order"
    slow, causal = False, False

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        means_UH, texts_N = means(public.sent)
        self._ids, words_N = torch.unique(public.ids_N, return_inverse=True)
        text_P, word_P = torch.unique(torch.stack([texts_N, words_N]), dim=1)  # each word of a text once
        held_U = torch.arange(len(means_UH)) % 10 == 0
        self._mean = means_UH[~held_U].mean(0)
        z_UH = means_UH - self._mean
        learnt_P = ~held_U[text_P]
        cross_VH = torch.zeros(len(self._ids), z_UH.shape[1]).index_add_(0, word_P[learnt_P], z_UH[text_P[learnt_P]])
        gram = z_UH[~held_U].T @ z_UH[~held_U]
        eye = torch.eye(len(gram)) * gram.diagonal().mean()
        there_UV = torch.zeros(len(z_UH), len(self._ids), dtype=torch.bool)
        there_UV[text_P, word_P] = True
        most = int(there_UV.sum(1).float().mean())
        best = -1
        for ridge in RIDGES:
            found = torch.linalg.solve(gram + ridge * eye, cross_VH.T)
            right = int(there_UV[held_U].gather(1, (z_UH[held_U] @ found).topk(most).indices).sum())
            if right > best:
                best, self._map = right, found

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`; of a text the likeliest first."""
        means_UH, texts_N = means(sent)
        read_N = torch.zeros(len(sent), dtype=torch.long)
        for text, mean_H in enumerate(means_UH):
            rows = texts_N == text
            best = ((mean_H - self._mean) @ self._map).topk(min(int(rows.sum()), len(self._ids))).indices
            read_N[rows.nonzero()[: len(best), 0]] = self._ids[best]
        return read_N

    def read(self, sent: Sent, ids_N: Tensor) -> Tensor:
        """See :class:`Attack`: every guess of a text where it is right, if it is right anywhere."""
        return anywhere(self.guess(sent), ids_N, sent.texts_N)


def anywhere(guess_N: Tensor, ids_N: Tensor, texts_N: Tensor) -> Tensor:
    """The guesses of each text, moved to where they are right: a word counts as read wherever it stands."""
    moved_N = torch.zeros_like(ids_N)
    for text in torch.unique(texts_N):
        rows = (texts_N == text).nonzero()[:, 0].tolist()
        left = Counter(guess_N[rows].tolist())
        wrong = []
        for row in rows:
            token = int(ids_N[row])
            if left[token] > 0:
                left[token] -= 1
                moved_N[row] = token
            else:
                wrong.append(row)
        for row, token in zip(wrong, left.elements(), strict=True):
            moved_N[row] = token
    return moved_N
