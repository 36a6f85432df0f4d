"""A transformer that is trained to read all activations of a text together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexp.attacks.base import CHUNK, Attack, Centre, Public, Sent
from flexp.attacks.decoder import sampled_loss


class Transformer(Attack):
    """Two layers over the activations of a text, each told its place, with a mask, to the embeddings of the tokens,
    trained on public text. What one activation leaves open its neighbours may tell."""

    name = "transformer"
    about = "two transformer layers over a text's activations, trained on public text"
    slow, causal = True, False
    steps, batch, layers = 300, 16, 2
    """Steps, of so many texts."""

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        self._centre, self._embeddings = Centre(public.sent), public.embeddings / public.embeddings.std()
        z_NH = self._centre(public.sent)
        self._scale = z_NH.std()
        z_NH = z_NH / self._scale
        texts, length = _texts(public.sent), int(public.sent.positions_N.max()) + 1
        known, target_N = torch.unique(public.ids_N, return_inverse=True)
        known_KE = self._embeddings[known]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._net = _Net(z_NH.shape[1], length, self.layers, self._embeddings.shape[1])
            optimiser = torch.optim.AdamW(self._net.parameters(), lr=1e-3)
            falling = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, self.steps + 1, pct_start=0.1)
            for _ in range(self.steps):
                rows = [texts[number] for number in torch.randint(len(texts), (self.batch,)).tolist()]
                told_NE = self._net(z_NH, public.sent.positions_N, rows)
                optimiser.zero_grad()
                torch.autograd.backward(sampled_loss(told_NE, target_N[torch.cat(rows)], known_KE))
                nn.utils.clip_grad_norm_(self._net.parameters(), 1.0)
                optimiser.step()
                falling.step()

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        z_NH, texts = self._centre(sent) / self._scale, _texts(sent)
        read_N = torch.zeros(len(sent), dtype=torch.long)
        with torch.no_grad():
            for start in range(0, len(texts), self.batch):
                rows = texts[start : start + self.batch]
                told_NE = self._net.eval()(z_NH, sent.positions_N, rows)
                closest = [(each @ self._embeddings.T).argmax(1) for each in torch.split(told_NE, CHUNK)]
                read_N[torch.cat(rows)] = torch.cat(closest)
        return read_N


class _Net(nn.Module):
    def __init__(self, hidden: int, length: int, layers: int, embedding: int) -> None:
        super().__init__()
        heads = next(count for count in (8, 4, 2, 1) if hidden % count == 0)
        layer = nn.TransformerEncoderLayer(hidden, heads, 2 * hidden, 0.0, "gelu", batch_first=True, norm_first=True)
        self.places = nn.Embedding(length, hidden)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(hidden, embedding)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, z_NH: Tensor, positions_N: Tensor, texts: list[Tensor]) -> Tensor:
        """The embeddings (M, E) that are read of the tokens in some ``texts``, each the rows of one."""
        rows_BT = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1)
        there_BT = rows_BT >= 0
        placed_BTH = self.places(positions_N[rows_BT].clamp_max(self.places.num_embeddings - 1))
        told_BTH = self.blocks(z_NH[rows_BT] + placed_BTH, src_key_padding_mask=~there_BT)
        told: Tensor = self.out(told_BTH[there_BT])
        return told


def _texts(sent: Sent) -> list[Tensor]:
    """The rows of each text."""
    order = sent.texts_N.argsort(stable=True)
    return list(torch.split(order, torch.unique(sent.texts_N, return_counts=True)[1].tolist()))
