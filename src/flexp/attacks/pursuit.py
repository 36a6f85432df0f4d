"""The words of a pooled text, by matching pursuit."""

from __future__ import annotations

import torch
from torch import Tensor

from flexp.attacks.base import CHUNK, Public, Sent, means
from flexp.attacks.words import Words


class Pursuit(Words):
    """For pooled texts: the tokens whose activations add up to the text's, each as the head makes it on average of
    public texts, sought one after the other (matching pursuit, Mallat & Zhang, 1993) and each once again when all are
    there; distances are whitened by how activations of one token differ, and by the noise."""

    name = "pursuit"
    about = "the tokens whose average activations add up to a text's; in any order"
    slow, causal = False, False

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        z_NH = (public.sent if public.apart is None else public.apart).z_NH
        self._mean = z_NH.mean(0)
        self._ids, at_N, counts_V = torch.unique(public.ids_N, return_inverse=True, return_counts=True)
        table_VH = torch.zeros(len(self._ids), z_NH.shape[1]).index_add_(0, at_N, z_NH) / counts_V[:, None]
        often_N = counts_V[at_N] > 1
        apart_NH = (z_NH - table_VH[at_N])[often_N] if bool(often_N.any()) else z_NH - self._mean
        gram = apart_NH.T @ apart_NH / len(apart_NH)
        if public.apart is not None:  # of n tokens the sum differs by n of these, and by n times the noise on the mean
            noise_UH = means(public.sent)[0] - means(public.apart)[0]
            gram += len(z_NH) / len(noise_UH) * (noise_UH.T @ noise_UH / len(noise_UH))
        values, vectors = torch.linalg.eigh(gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram)))
        self._white = vectors * values.clamp_min(1e-12).rsqrt()
        self._table = (table_VH - self._mean) @ self._white

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        means_UH, at_N = means(sent)
        counts_U = at_N.bincount()
        left_UH = counts_U[:, None] * ((means_UH - self._mean) @ self._white)
        squares_V, chosen_UT = self._table.square().sum(1), torch.zeros(len(left_UH), int(counts_U.max())).long()
        for again in (False, True):
            for place in range(chosen_UT.shape[1]):
                there = counts_U > place
                if again:
                    left_UH[there] += self._table[chosen_UT[there, place]]
                best = torch.cat([
                    (2 * each @ self._table.T - squares_V).argmax(1) for each in torch.split(left_UH[there], CHUNK)
                ])  # fmt: skip
                chosen_UT[there, place] = best
                left_UH[there] -= self._table[best]
        read_N = torch.zeros(len(sent), dtype=torch.long)
        for text, rows in enumerate(torch.split(at_N.argsort(stable=True), counts_U.tolist())):
            read_N[rows] = self._ids[chosen_UT[text, : len(rows)]]
        return read_N
