"""A client's rows divided into training, validation and test rows; and which they were, in a few bytes: so that
whoever goes on with a run notices that its data are others now, before anything that was trained on becomes a test
example.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flexp.data.grouping import deal, shares
from flexp.data.types import ClientData, Example
from flexp.errors import DataError
from flexp.rng import generator


@dataclass(frozen=True)
class Split:
    """Row numbers, ascending; no number is in two of the lists."""

    train: list[int]
    validation: list[int]
    test: list[int]


def stratified_order(
    labels: Sequence[Hashable], rng: np.random.Generator, like: Mapping[Hashable, int] | None = None
) -> list[int]:
    """A random order of positions in which every prefix has nearly the label proportions of the whole.

    The r-th of n rows of a label (in random order) is sorted by (r + 1/2) / n: prefixes of any length are
    proportional to within one row of a label, and shorter ones are contained in longer ones.

    Args:
        like: labels and their counts elsewhere, whose proportions prefixes are to have as long as the labels last.
    """
    shuffled = [int(index) for index in rng.permutation(len(labels))]
    total = Counter(labels) if like is None else like
    seen: dict[Hashable, int] = {}
    key: dict[int, float] = {}
    for index in shuffled:
        label = labels[index]
        rank = seen.get(label, 0)
        seen[label] = rank + 1
        key[index] = (rank + 0.5) / total[label]
    return sorted(shuffled, key=key.__getitem__)  # stable: ties stay in random order


def split_client(
    name: str,
    rows: Sequence[int],
    labels: Sequence[Hashable] | None,
    *,
    test_fraction: float,
    validation_fraction: float,
    train_examples: int | None,
    test_examples: int | None,
    seed: int,
    private_seed: int | None = None,
    test_rows: Sequence[int] | None = None,
    test_labels: Sequence[Hashable] | None = None,
    groups: Sequence[str] | None = None,
) -> Split:
    """Divide one client's ``rows``; stratified by ``labels`` (parallel to ``rows``) when there are any.

    The test rows depend on the seed, the client's name and the two test settings only: they stay the same
    whatever ``train_examples`` and ``validation_fraction`` are. Few-shot subsets keep the client's own label
    proportions, and a smaller one is part of every larger one. Validation rows are taken out of the few-shot
    subset: a client with ``train_examples`` = 32 has 32 labelled examples in all.

    Args:
        private_seed: of the draw of private examples (and the validation rows among them); ``None``: ``seed``. With
            ``seed`` fixed, runs with different ones share their test rows, and no run trains on another's test rows.
        test_rows: rows of another source for testing; then all of ``rows`` are for training.
        test_labels: their labels, parallel.
        groups: parallel to ``rows``; rows of an equal group are on the same side. Whole groups are dealt out, so that
            fractions are met nearly; the numbers of examples are met exactly, in the client's label proportions.

    Raises:
        DataError: no row is left to train on, or none to test with.
    """
    private_seed = seed if private_seed is None else private_seed
    kind = dict.fromkeys(rows, 0) if labels is None else dict(zip(rows, labels, strict=True))
    group = None if groups is None else dict(zip(rows, groups, strict=True))
    if test_rows is None:
        test, left = _divided(rows, kind, group, test_fraction, (seed, "test", name))
    else:
        order = stratified_order(test_labels or [0] * len(test_rows), generator(seed, "test", name))
        test, left = [test_rows[index] for index in order], sorted(rows)
    test = test[:test_examples]
    chosen = _ordered(left, kind, (private_seed, "train", name), None if group is None else Counter(kind.values()))
    chosen = sorted(chosen[:train_examples])
    validation, train = _divided(chosen, kind, group, validation_fraction, (private_seed, "validation", name))
    split = Split(train, sorted(validation), sorted(test))
    tested = test_rows is not None or test_fraction > 0
    if not split.train or (tested and not split.test) or (validation_fraction > 0 and not split.validation):
        within = "" if groups is None else f" in {len(set(groups))} groups (data.group)"
        raise DataError(
            f"client {name!r} has {len(rows)} examples{within}: {len(split.train)} to train, "
            f"{len(split.validation)} to validate, {len(split.test)} to test; give it more, leave it out with "
            "data.clients.names, or change data.test_fraction or data.validation_fraction"
        )
    return split


def _share(count: int, fraction: float) -> int:
    """``fraction`` of ``count``, rounded; but one at least where something was asked for and two are there."""
    share = int(count * fraction + 0.5)
    if 0.0 < fraction < 1.0 and count >= 2:
        return min(max(share, 1), count - 1)
    return share


def _divided(
    rows: Sequence[int],
    kind: Mapping[int, Hashable],
    group: Mapping[int, str] | None,
    fraction: float,
    purpose: tuple[int, str, str],
) -> tuple[list[int], list[int]]:
    """``fraction`` of ``rows`` in random order with every prefix stratified, and the others, ascending."""
    if group is None:
        order = _ordered(rows, kind, purpose)
        count = _share(len(rows), fraction)
        return order[:count], sorted(order[count:])
    if fraction in (0.0, 1.0):
        some, others = (list(rows), []) if fraction else ([], sorted(rows))
    else:
        wanted = shares([kind[row] for row in rows], (fraction, 1.0 - fraction))
        some, others = deal(rows, group, kind, wanted, generator(*purpose, "groups"))
    return _ordered(some, kind, purpose, Counter(kind.values())), others


def _ordered(
    rows: Sequence[int],
    kind: Mapping[int, Hashable],
    purpose: tuple[int, str, str],
    like: Mapping[Hashable, int] | None = None,
) -> list[int]:
    order = stratified_order([kind[row] for row in rows], generator(*purpose), like)
    return [rows[index] for index in order]


Identity = dict[str, Any]
"""JSON: the classes, and of every client and each of its sets the number of examples and a SHA-256 over them."""

SETS = ("train", "validation", "test")
_MOST = 4  # differences that a message names


def identity(clients: Iterable[ClientData], labels: Sequence[str] | None) -> Identity:
    """What :func:`check_same` compares.

    Args:
        labels: the classes, in their order.
    """
    return {
        "labels": None if labels is None else list(labels),
        "clients": {
            client.name: {name: [len(examples), _digest(examples)] for name, examples in _sets(client)}
            for client in clients
        },
    }


def of_client(found: Identity | None, client: str) -> Identity | None:
    """The part of it that is one client's; ``None``: there is none."""
    if found is None or client not in found["clients"]:
        return None
    return {**found, "clients": {client: found["clients"][client]}}


def check_same(then: Identity | None, now: Identity, where: object, mend: str, what: str = "run") -> None:
    """Refuse data that are not those of ``then``; ``None``: nobody knows what they were.

    Args:
        where: what was saved with them.
        mend: what to do about it.
        what: it was.

    Raises:
        DataError: see above; it names what is different.
    """
    found = [] if then is None else differences(then, now)
    if found:
        more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise DataError(f"{where}: the data are not those of the {what}: {'; '.join(found[:_MOST])}{more}; {mend}")


def differences(then: Identity, now: Identity) -> list[str]:
    """What is different now, in words."""
    found = []
    if then["labels"] != now["labels"]:
        found.append(f"the labels are {listed(now['labels'])}, they were {listed(then['labels'])}")
    before, after = then["clients"], now["clients"]
    found += [f"client {name} is new" for name in after if name not in before]
    found += [f"client {name} is gone" for name in before if name not in after]
    for name in (name for name in after if name in before):
        for key in SETS:
            (was, digest), (count, other) = before[name][key], after[name][key]
            if was != count:
                found.append(f"{name} has {count} {key} examples, it had {was}")
            elif digest != other:
                found.append(f"{name} has other {key} examples (or in another order), {count} as before")
    return found


def _sets(client: ClientData) -> Iterable[tuple[str, list[Example]]]:
    return zip(SETS, (client.train, client.validation, client.test), strict=True)


def _digest(examples: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, default=_plain).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _plain(value: Any) -> Any:
    """A tensor (or an array) as its type, shape and the SHA-256 of its bytes."""
    tensor = torch.as_tensor(value).contiguous()
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()]


def listed(labels: Sequence[str] | None) -> str:
    """Some of the labels, for a message."""
    return "none" if labels is None else ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
