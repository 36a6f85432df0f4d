"""What is suspicious about data that can be read all the same: one line each, for people to judge.

Examples are compared as the model sees them, after templates and cuts, so that every task has the same checks.
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from flexp.data.columns import NUMBER
from flexp.data.tasks.base import BaseTask
from flexp.data.types import ClientData, Example
from flexp.kinds import LABELS

FEW = 25
"""Test examples below which a score says little: with so many its standard error may be 10 points."""

_SHOWN = 6


def warnings_of(clients: Sequence[ClientData], task: BaseTask) -> list[str]:
    """One line for each suspicion about the clients' data, the worst first."""
    return [
        *_trained_on(clients),
        *_repeated(clients),
        *(_labels(clients, task) if task.label_names is not None else ()),
        *task.doubts(),
        *alike("clients", [client.name for client in clients]),
        *_nothing_to_find(clients, task),
        *_few(clients),
    ]


def cut_note(whose: str, examples: Sequence[Example], tokens: int | None = None) -> list[str]:
    """A line where texts were cut, at ``tokens``."""
    cut = sum("cut" in example for example in examples)
    at = "" if tokens is None else f" at {tokens} tokens"
    return [f"{whose}: {cut} of {len(examples)} texts were cut{at}"] if cut else []


def _trained_on(clients: Sequence[ClientData]) -> Iterable[str]:
    """Test examples that are trained on: by the client itself, or by another, whose steps reach the shared blocks."""
    owners: defaultdict[bytes, set[str]] = defaultdict(set)
    for client in clients:
        for example in client.train:
            owners[_seen(example)].add(client.name)
    own, others = Counter[str](), Counter[str]()
    for client in clients:
        for example in (*client.validation, *client.test):
            found = owners.get(_seen(example), set())
            own[client.name] += client.name in found
            others[client.name] += bool(found) and client.name not in found
    total = sum(len(client.validation) + len(client.test) for client in clients)
    for counts, whom in ((own, "the same client"), (others, "another client")):
        if sum(counts.values()):
            yield (
                f"{counts.total()} of {total} test and validation examples are also training examples of {whom} "
                f"({_counted(counts)}), so scores are too good: remove them, or name with data.group what repeats share"
            )


def _repeated(clients: Sequence[ClientData]) -> Iterable[str]:
    repeats, total = Counter[str](), 0
    answers: defaultdict[bytes, set[str]] = defaultdict(set)
    for client in clients:
        seen = [_seen(example) for example in client.train]
        repeats[client.name] = len(seen) - len(set(seen))
        total += len(seen)
        for key, example in zip(seen, client.train, strict=True):
            answers[key].add(repr([example.get(label) for label in LABELS]))
    if repeats.total():
        yield f"{repeats.total()} of {total} training examples repeat another of the same client ({_counted(repeats)})"
    torn = sum(len(given) > 1 for given in answers.values())
    if torn:
        yield f"{torn} training inputs are there with more than one label: nobody can get all of them right"


def _labels(clients: Sequence[ClientData], task: BaseTask) -> Iterable[str]:
    found = {
        client.name: [task.classes_in(example) for example in (*client.train, *client.validation, *client.test)]
        for client in clients
    }
    counts = Counter(name for rows in found.values() for names in rows for name in set(names))
    yield from _never_trained(clients, task)
    examples = sum(map(len, found.values()))
    one_each = all(len(names) == 1 for rows in found.values() for names in rows)
    if one_each and len(counts) > examples / 2 and examples > 4:
        yield (
            f"there are {len(counts)} labels for {examples} examples, nearly one each: is data.label the right column?"
        )
    elif single := [name for name, count in counts.items() if count == 1]:
        yield f"there is one example only of {_named('the label', single)}: it is trained on or tested, never both"
    given = {client.name: {frozenset(task.classes_in(example)) for example in client.train} for client in clients}
    of_one = [name for name, answers in given.items() if len(answers) == 1 and max(map(len, answers)) <= 1]
    if of_one:
        yield (
            f"{_named('client', of_one)} {'has' if len(of_one) == 1 else 'have'} training examples of one label only, "
            "and there is nothing to tell apart"
        )
    yield from alike("labels", counts)


def _never_trained(clients: Sequence[ClientData], task: BaseTask) -> Iterable[str]:
    """Labels of tests alone: nobody can get them right."""
    trained = {name for client in clients for example in client.train for name in task.classes_in(example)}
    tested = [set(task.classes_in(each)) for client in clients for each in (*client.validation, *client.test)]
    odd = sum(not names <= trained for names in tested)
    if odd:
        names = sorted(set[str]().union(*tested) - trained)
        yield (
            f"{odd} of {len(tested)} test and validation examples have labels that no training example has: "
            f"{_named('label', names)}"
        )


def alike(what: str, names: Iterable[str]) -> Iterable[str]:
    """Names that differ in capitals, spaces, the way a number is written, or the like only."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups[repr(float(plain)) if NUMBER.fullmatch(plain) else plain].append(name)
    found = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    for group in found[:_SHOWN]:
        yield f"the {what} {group} differ in spelling only: if they are one, make them one"
    if len(found) > _SHOWN:
        yield f"and {len(found) - _SHOWN} more {what} differ in spelling only"


def _nothing_to_find(clients: Sequence[ClientData], task: BaseTask) -> Iterable[str]:
    """Test examples without any entity, where its F1 is no measure."""
    odd = [client.name for client in clients if client.test and task.nothing_to_find(client.test)]
    if odd:
        yield (
            f"the test examples of {_named('client', odd)} hold no entity: such a client has no {task.metric}, and is "
            f"in no mean, unless its model finds entities there ({task.metric} 0); raise data.test_fraction, or bring "
            "more data"
        )


def _few(clients: Sequence[ClientData]) -> Iterable[str]:
    few = Counter({client.name: len(client.test) for client in clients if 0 < len(client.test) < FEW})
    if few:
        yield (
            f"fewer than {FEW} test examples ({_counted(few)}): too few to tell anything of such a client alone; raise "
            "data.test_fraction, or bring more data"
        )


def _seen(example: Example) -> bytes:
    """A digest of the input that the model gets."""
    ids = example.get("input_ids")
    content = example["pixel_values"].numpy().tobytes() if ids is None else array("q", ids).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _counted(counts: Mapping[str, int]) -> str:
    """``north 4, south 2 and 3 more``."""
    some = [f"{name} {count}" for name, count in counts.items() if count]
    return ", ".join(some[:_SHOWN]) + (f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else "")


def _named(noun: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{noun}{'' if len(names) == 1 else 's'} {', '.join(map(repr, names[:_SHOWN]))}{more}"
