"""Attacks on tokens, as a server would make them that follows the protocol and looks at what it is sent.

It knows what everybody knows: the pretrained model, its tokenizer, the cut, and some public text, which it runs through
the pretrained head itself. An attack learns from that (:meth:`Attack.learn`) and guesses the token behind every
activation (:meth:`Attack.guess`). To add one: a class here with a line ``name = "…"``, in :data:`ATTACKS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.models.packed import table_of
from flexp.models.stage import Stage

CHUNK = 512
"""Tokens that are compared with the whole vocabulary at once."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties, as shares of the mean variance of z."""
CANDIDATES = 64
"""Tokens that prefix search tries at every place."""


@dataclass(frozen=True)
class Sent:
    """Activations of one depth, one row a token of some texts, text by text; padding never counts.

    Attributes:
        z_NH: what went up, (N, H).
        positions_N: where in its text the token stands.
        texts_N: in which text.
    """

    z_NH: Tensor
    positions_N: Tensor
    texts_N: Tensor

    def __len__(self) -> int:
        return len(self.positions_N)

    @classmethod
    def of(cls, hiddens: Sequence[Tensor], masks: Sequence[Tensor]) -> Sent:
        """Of batches (B, T, H) with their masks (B, T)."""
        z, positions, texts, before = [], [], [], 0
        for hidden_BTH, mask_BT in zip(hiddens, masks, strict=True):
            z.append(hidden_BTH[mask_BT].float())
            positions.append((mask_BT.cumsum(1) - 1)[mask_BT])
            texts.append(torch.arange(before, before + len(mask_BT))[:, None].expand_as(mask_BT)[mask_BT])
            before += len(mask_BT)
        return cls(torch.cat(z), torch.cat(positions), torch.cat(texts))

    def as_one(self, cover: Callable[[Tensor], Tensor] = lambda means_UH: means_UH) -> Sent:
        """With the mean of its text, which ``cover`` changes, in every token's place: what is sent of pooled texts."""
        means_UH, at_N = _means(self)
        return replace(self, z_NH=cover(means_UH)[at_N])


@dataclass(frozen=True)
class Public:
    """What everybody knows.

    Attributes:
        stage: the pretrained model, or its ends and its first blocks.
        depth: after how many blocks the activations are taken.
        sent: what the pretrained head makes of public text, and ``ids_N`` which tokens those were.
        apart: the same before texts were pooled; ``None``: they were not, or nobody knows.
    """

    stage: Stage
    depth: int
    sent: Sent
    ids_N: Tensor
    apart: Sent | None = None

    @property
    def embeddings(self) -> Tensor:
        """The model's table of tokens."""
        return table_of(self.stage.model.get_input_embeddings()).float().cpu()


class Attack(ABC):
    """A way to read tokens. ``slow``: for a full audit only. ``causal``: works on decoders alone."""

    name: ClassVar[str]
    about: ClassVar[str]
    slow: ClassVar[bool]
    causal: ClassVar[bool]

    @abstractmethod
    def learn(self, public: Public) -> None:
        """From what the pretrained head sends for public text."""

    @abstractmethod
    def guess(self, sent: Sent) -> Tensor:
        """The token behind each activation, (N,)."""

    def read(self, sent: Sent, ids_N: Tensor) -> Tensor:
        """The guesses as they are compared with the truth, ``ids_N``."""
        return self.guess(sent)


class Table(Attack):
    """The nearest neighbour among the mean activations of every token of the public text."""

    name = "table"
    about = "nearest neighbour in a table of public activations"
    slow, causal = False, False

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        self._centre = _Centre(public.sent)
        z_NH = self._centre(public.sent)
        self._ids, inverse = torch.unique(public.ids_N, return_inverse=True)
        means = torch.zeros(len(self._ids), z_NH.shape[1]).index_add_(0, inverse, z_NH)
        self._table = F.normalize(means / inverse.bincount()[:, None], dim=1)

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        return torch.cat(
            [self._ids[(each @ self._table.T).argmax(1)] for each in torch.split(self._centre(sent), CHUNK)]
        )


class Linear(Attack):
    """One linear map from z to the embedding of its token in closed form (ridge regression, whose penalty is chosen on
    public texts held back), then the nearest embedding of the whole vocabulary."""

    name = "linear"
    about = "one linear map to the table of embeddings, in closed form"
    slow, causal = False, False

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        self._centre, self._embeddings = _Centre(public.sent), public.embeddings
        z_NH, e_NH = self._centre(public.sent), self._embeddings[public.ids_N]
        self._mean = e_NH.mean(0)
        held_N = public.sent.texts_N % 10 == 0
        gram, cross = z_NH[~held_N].T @ z_NH[~held_N], z_NH[~held_N].T @ (e_NH[~held_N] - self._mean)
        eye = torch.eye(len(gram)) * gram.diagonal().mean()
        maps = [torch.linalg.solve(gram + ridge * eye, cross) for ridge in RIDGES]
        some, truth = z_NH[held_N][:CHUNK], public.ids_N[held_N][:CHUNK]
        self._map = max(maps, key=lambda each: int((self._nearest(some @ each) == truth).sum()))

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        return torch.cat([self._nearest(each @ self._map) for each in torch.split(self._centre(sent), CHUNK)])

    def candidates(self, sent: Sent) -> Tensor:
        """The best :data:`CANDIDATES` for each activation, (N, C)."""
        most = min(CANDIDATES, len(self._embeddings))
        rows = torch.split(self._centre(sent) @ self._map, CHUNK)
        return torch.cat([self._closeness(each).topk(most).indices for each in rows])

    def _nearest(self, told_NE: Tensor) -> Tensor:
        return self._closeness(told_NE).argmax(1)

    def _closeness(self, told_NE: Tensor) -> Tensor:
        return (told_NE + self._mean) @ self._embeddings.T - self._embeddings.square().sum(1) / 2


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
        means_UH, texts_N = _means(public.sent)
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
        means_UH, texts_N = _means(sent)
        read_N = torch.zeros(len(sent), dtype=torch.long)
        for text, mean_H in enumerate(means_UH):
            rows = texts_N == text
            best = ((mean_H - self._mean) @ self._map).topk(min(int(rows.sum()), len(self._ids))).indices
            read_N[rows.nonzero()[: len(best), 0]] = self._ids[best]
        return read_N

    def read(self, sent: Sent, ids_N: Tensor) -> Tensor:
        """See :class:`Attack`: every guess of a text where it is right, if it is right anywhere."""
        guess_N, moved_N = self.guess(sent), torch.zeros_like(ids_N)
        for text in torch.unique(sent.texts_N):
            rows = (sent.texts_N == text).nonzero()[:, 0].tolist()
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
            noise_UH = _means(public.sent)[0] - _means(public.apart)[0]
            gram += len(z_NH) / len(noise_UH) * (noise_UH.T @ noise_UH / len(noise_UH))
        values, vectors = torch.linalg.eigh(gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram)))
        self._white = vectors * values.clamp_min(1e-12).rsqrt()
        self._table = (table_VH - self._mean) @ self._white

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        means_UH, at_N = _means(sent)
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


class Decoder(Attack):
    """A network with two hidden layers from z to the embedding of the token, trained on public text."""

    name = "decoder"
    about = "a small network, trained on public text"
    slow, causal = True, False
    steps, batch, width = 1500, 512, 1024

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        self._centre, self._embeddings = _Centre(public.sent), public.embeddings
        z_NH = self._centre(public.sent)
        self._scale = z_NH.std()
        # Only tokens that public text has can be learnt; scoring those alone is many times as fast.
        known, target_N = torch.unique(public.ids_N, return_inverse=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._net = nn.Sequential(
                nn.Linear(z_NH.shape[1], self.width), nn.GELU(), nn.LayerNorm(self.width),
                nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, self._embeddings.shape[1]),
            )  # fmt: skip
            optimiser = torch.optim.AdamW(self._net.parameters(), lr=1e-3)
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
            for _ in range(self.steps):
                rows = torch.randint(len(target_N), (self.batch,))
                told = self._net(z_NH[rows] / self._scale) @ self._embeddings[known].T
                optimiser.zero_grad()
                torch.autograd.backward(F.cross_entropy(told, target_N[rows]))
                optimiser.step()
                falling.step()

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        with torch.no_grad():
            return torch.cat(
                [
                    (self._net(each / self._scale) @ self._embeddings.T).argmax(1)
                    for each in torch.split(self._centre(sent), CHUNK)
                ]
            )


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


def _means(sent: Sent) -> tuple[Tensor, Tensor]:
    """The mean (U, H) of each text, and which of them each row, (N,), belongs to."""
    texts_U, at_N, counts_U = torch.unique(sent.texts_N, return_inverse=True, return_counts=True)
    sums_UH = torch.zeros(len(texts_U), sent.z_NH.shape[1]).index_add_(0, at_N, sent.z_NH)
    return sums_UH / counts_U[:, None], at_N


class _Centre:
    """Takes off the mean activation of a position, which says nothing of the token."""

    def __init__(self, sent: Sent) -> None:
        length = int(sent.positions_N.max()) + 1
        sums = torch.zeros(length, sent.z_NH.shape[1]).index_add_(0, sent.positions_N, sent.z_NH)
        counts = sent.positions_N.bincount(minlength=length)[:, None]
        self._means = torch.where(counts < 8, sent.z_NH.mean(0), sums / counts.clamp_min(1))

    def __call__(self, sent: Sent) -> Tensor:
        return sent.z_NH - self._means[sent.positions_N.clamp_max(len(self._means) - 1)]


ATTACKS: tuple[type[Attack], ...] = (Table, Linear, Decoder, Prefix)
ON_MEANS: tuple[type[Attack], ...] = (Table, Linear, Words, Pursuit, Decoder)
"""Where one vector of each text is sent."""
