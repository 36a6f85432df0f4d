"""What is guessed of texts without anything that was sent: what an attacker has without us."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexp.attacks.answers import said
from flexp.attacks.base import Public
from flexp.attacks.words import anywhere
from flexp.audit.training import SOLVED
from flexp.audit.truth import Truth
from flexp.audit.watching import Exchange
from flexp.models.stage import Stage

WEIGHT = 2.0
"""Texts of all classes that count beside those of a class, for words that were not seen in it."""


def usual(known: Public, truth: Truth, special: Tensor) -> dict[str, float]:
    """The shares of tokens, but special ones, and of content words that the most frequent public token is."""
    tokens, counts = torch.unique(known.ids_N[~torch.isin(known.ids_N, special)], return_counts=True)
    right_N = truth.ids_N == tokens[counts.argmax()]
    return {"tokens": share(right_N[truth.real_N]), "content": share(right_N[truth.content_N])}


def by_labels(truth: Truth, labels_U: Tensor) -> dict[str, float]:
    """The shares that the label of each text tells who knows some of the texts with theirs (:meth:`Truth.known`): of a
    text of n tokens the n that are likeliest in texts of its class, in any order. What is said at this accuracy tells
    its class, so hardly a defence hides more than this leaves; nothing where hardly any text is there to be known.

    Args:
        labels_U: the class of each text of ``truth.sent``.
    """
    known_N = truth.known()
    asked = truth.only(~known_N)
    if len(asked.ids_N) == 0 or len(torch.unique(truth.whose_N[known_N])) < 2:
        return {}
    tokens, at_N = torch.unique(truth.ids_N, return_inverse=True)
    pairs = torch.stack([truth.whose_N, labels_U[truth.sent.texts_N], at_N])[:, known_N]
    _, classes_P, words_P = torch.unique(pairs, dim=1)  # each word of a text once, however often it was sent
    texts_2K = torch.unique(pairs[:2], dim=1)
    count_C = texts_2K[1].bincount(minlength=int(labels_U.max()) + 1)
    seen_CV = torch.zeros(len(count_C), len(tokens)).index_put_((classes_P, words_P), torch.ones(()), accumulate=True)
    likely_CV = (seen_CV + WEIGHT * seen_CV.sum(0) / texts_2K.shape[1]) / (count_C[:, None] + WEIGHT)
    order_CV = likely_CV.argsort(dim=1, descending=True, stable=True)
    first_N = torch.cat([torch.arange(int(n)) for n in asked.sent.texts_N.bincount()])
    label_N = labels_U[truth.sent.texts_N][~known_N]
    read_N = anywhere(tokens[order_CV[label_N, first_N.clamp_max(len(tokens) - 1)]], asked.ids_N, asked.sent.texts_N)
    right_N = read_N == asked.ids_N
    return {"labelled": share(right_N[asked.real_N]), "labelled_content": share(right_N[asked.content_N])}


def by_the_model(exchanges: Sequence[Exchange], source: Stage, special: Tensor, dull: Tensor) -> dict[str, float]:
    """The shares of tokens, but special ones, and of content words that the public language model gives by itself as
    the next one, told all before it: what is guessed without anything of the client's. First tokens it cannot know."""
    right: dict[str, list[Tensor]] = {"foretold": [], "foretold_content": []}
    source.model.eval()
    for one in exchanges[:: -(-len(exchanges) // SOLVED)]:
        with torch.no_grad():
            hidden_BTH = source.plan({key: value for key, value in one.batch.items() if key != "labels"})[0]
            next_BT = said(source, 0, hidden_BTH, one.batch)
        ids_BT = one.batch["input_ids"].cpu()
        right_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        right_BT[:, 1:] = next_BT[:, :-1] == ids_BT[:, 1:]
        for key, left_out in (("foretold", special), ("foretold_content", dull)):
            right[key].append(right_BT[one.mask.cpu() & ~torch.isin(ids_BT, left_out)])
    joined = {key: torch.cat(values) for key, values in right.items()}
    return {key: float(value.float().mean()) for key, value in joined.items() if len(value)}


def share(right: Tensor) -> float:
    """The mean of flags; 0 of none."""
    return float(right.float().mean()) if len(right) else 0.0
