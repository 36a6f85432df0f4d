"""What training tells besides texts: labels by its gradients, membership by the weights that it made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexp.attacks import labels as label_attacks
from flexp.attacks.answers import pointed, said, trained
from flexp.attacks.gradients import inverted, words
from flexp.attacks.membership import membership
from flexp.audit.watching import Exchange, Known
from flexp.client.trainer import split_model_of
from flexp.kinds import IGNORED, Answers
from flexp.methods.split import Split
from flexp.models.stage import Stage

TRIED = 256
"""Backwards of an exchange through the public tail, one a class, at most; of many classes fewer exchanges are tried."""
SOLVED = 32
"""Exchanges whose answers are solved for: each takes up to sixty passes through the tail."""
TEXTS = 256
"""Texts that were trained on, and as many that were not, whose membership is asked for."""


def labels_told(exchanges: Sequence[Exchange], run: Known, kind: Answers) -> dict[str, float]:
    """What the gradients of all clients together tell, and the server's own activations, which it has of any text;
    nothing of heads that no attack here knows."""
    if kind == "class":
        return _by_activations(exchanges) | _by_gradients(exchanges, run.source)
    return _answers(exchanges, run) if kind == "next-token" else {}


def _by_activations(exchanges: Sequence[Exchange]) -> dict[str, float]:
    seen = [exchange for exchange in exchanges if exchange.h_BTH is not None]
    if not seen:
        return {}
    rows_NH = label_attacks.directions([one.h_BTH * one.mask.unsqueeze(-1) for one in seen if one.h_BTH is not None])
    labels_N = torch.cat([one.batch["labels"] for one in seen])
    found = {
        "features": label_attacks.clustered(rows_NH, labels_N),
        "features_known": label_attacks.with_known(rows_NH, labels_N),
        "features_auc": label_attacks.auc(rows_NH, labels_N),
        "majority": _majority(labels_N),
    }
    return {key: value for key, value in found.items() if value is not None}


def _by_gradients(exchanges: Sequence[Exchange], source: Stage) -> dict[str, float]:
    seen = [exchange for exchange in exchanges if exchange.grad_BTH is not None]
    if not seen:
        return {}
    grads = [exchange.grad_BTH for exchange in seen if exchange.grad_BTH is not None]
    labels_N = torch.cat([exchange.batch["labels"] for exchange in seen])
    rows_NH = label_attacks.directions(grads)
    found: dict[str, float | None] = {
        "clusters": label_attacks.clustered(rows_NH, labels_N),
        "known": label_attacks.with_known(rows_NH, labels_N),
        "auc": label_attacks.auc(rows_NH, labels_N),
        "majority": _majority(labels_N),
    }
    tried = seen[: max(1, TRIED // int(source.model.config.num_labels))]
    read = [
        inverted(source, one.cut[1], one.h_BTH, one.grad_BTH, one.batch)
        for one in tried
        if one.h_BTH is not None and one.grad_BTH is not None
    ]
    found["inverted"] = float((torch.cat(read) == labels_N[: sum(map(len, read))]).float().mean())
    return {key: value for key, value in found.items() if value is not None}


def _answers(exchanges: Sequence[Exchange], run: Known) -> dict[str, float]:
    """The words of answers that were trained on, by ∂task/∂h (the better of two attacks) and by h; and of those that
    clients' own tails would say now, by h, where these are here to ask."""
    right: dict[str, list[Tensor]] = {}
    for one in exchanges[:: -(-len(exchanges) // SOLVED)]:
        if one.h_BTH is None:
            continue
        wanted_BT, public_BT = one.batch["labels"][:, 1:], said(run.source, one.cut[1], one.h_BTH, one.batch)[:, :-1]
        there_BT = wanted_BT != IGNORED
        right.setdefault("majority", []).append(wanted_BT[there_BT])
        right.setdefault("outputs", []).append((public_BT == wanted_BT)[there_BT])
        if run.method is not None:
            tail = split_model_of(run.method.clients[one.client]).stage
            own_BT = said(tail, one.cut[1], one.h_BTH, one.batch)[:, :-1]
            right.setdefault("generated", []).append((public_BT == own_BT)[there_BT])
        if one.grad_BTH is not None:
            read_BT = trained(run.source, one.cut[1], one.h_BTH, one.grad_BTH / one.share, one.batch)[:, :-1]
            right.setdefault("solved", []).append((read_BT == wanted_BT)[there_BT])
            by_head_BT = pointed(run.source, one.grad_BTH)[:, :-1]
            right.setdefault("pointed", []).append((by_head_BT == wanted_BT)[there_BT])
    joined = {key: torch.cat(values) for key, values in right.items()}
    shares = {key: float(value.float().mean()) for key, value in joined.items() if key != "majority" and len(value)}
    both = [shares.pop(key) for key in ("solved", "pointed") if key in shares]
    if both:
        shares["answers"] = max(both)
    return shares | ({"majority": _majority(joined["majority"])} if shares else {})


def words_told(exchanges: Sequence[Exchange], run: Known) -> float | None:
    """The share of tokens, but special ones, that an optimising inversion reads out of the first exchange's ∂task/∂h;
    ``None``: there is none, or no whole model."""
    seen = next((one for one in exchanges if one.grad_BTH is not None), None)
    if seen is None or seen.grad_BTH is None or run.method is None:
        return None
    read_BT = words(run.source, seen.cut[1], seen.grad_BTH, seen.batch)
    ids_BT = seen.batch["input_ids"]
    real_BT = seen.mask & ~torch.isin(ids_BT, torch.tensor(run.task.processor.all_special_ids))
    return float((read_BT == ids_BT)[real_BT].float().mean())


def membership_told(exchanges: Sequence[Exchange], method: Split, *, words: bool) -> float | None:
    """Whether the server's blocks tell the texts that were sent from the clients' test texts."""
    seen = [ids[mask].tolist() for one in exchanges for ids, mask in zip(one.batch["input_ids"], one.mask, strict=True)]
    tests = [example["input_ids"] for client in method.world.federation.clients for example in client.test]
    members = {tuple(text): text for text in seen}
    if method.server.own:
        return None  # no blocks that all texts trained
    others = {tuple(text): text for text in tests if tuple(text) not in members}
    if not others:
        return None
    asked = (list(texts.values())[:: -(-len(texts) // TEXTS)] for texts in (members, others))  # of every client
    return membership(method.world.source, method.server.shared.stage, *asked, words=words)


def _majority(labels_N: Tensor) -> float:
    return float(torch.unique(labels_N, return_counts=True)[1].max() / len(labels_N))
