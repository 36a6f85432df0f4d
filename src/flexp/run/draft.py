"""A first configuration for data that were looked at: what is guessed, and the commented file that says it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexp.config.loading import override
from flexp.data.survey import Column, Survey
from flexp.data.tasks.base import BaseTask
from flexp.errors import ConfigError, DataError
from flexp.registry import TASKS

_ENCODER = (
    *("sequence-classification", "multi-label-classification", "regression", "token-classification"),
    "question-answering",
)
MODELS = dict.fromkeys(_ENCODER, "asset:minilm-l6") | {"causal-lm": "asset:smollm2-135m"}
"""A small model for a kind of head, where FlexP knows one."""

CLIENTS = 4
"""Into so many clients data without owners are divided."""

MOST, LEAST = 8, 8
"""Clients that a first run has at most, and rows that each has at least, where there are such."""

_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
_STEPS, _BATCH = 50, 8
_TESTS = 200
_STRUCTURED = ("list", "chat", "image")

_MEANING = {
    "model.pooling": "what the classifier reads: the mean of a text's tokens",
    "method.meet.on": "begin with one classifier of everybody's class sums, end with one of each client's own",
    "model.id": "a folder, a Hugging Face id, or asset:NAME (flexp assets list)",
    "data.source": "a file, a folder, asset:NAME or a datasets id",
    "data.test_source": "what is tested on; without it test_fraction of each client's examples",
    "data.task": "what a row is",
    "data.group": "equal values share a client and a side of every split",
    "data.max_length": "tokens; what is longer is cut off, and counted",
    "data.test_fraction": "of each client's examples; they are never trained on",
    "data.clients.by": "whose a row is: a column, a file or folder, or a partitioner such as iid or dirichlet",
    "data.clients.cut": "a client keeps the embeddings and block 0, the server runs the rest; flexp plan finds others",
    "train.rounds": "turns of every client",
    "data.clients.names": "those with most rows, for a first look in minutes; without it all of them",
    "data.train_examples": "of each client's at most, for a first look in minutes; without it all of them",
    "data.test_examples": "of each client's at most",
    "train.steps_per_round": "about once through a client's examples",
    "train.batch_size": "examples of a step",
    "train.personal.lr": "the client's own parts",
    "train.personal.new_lr": "of weights that no checkpoint holds, such as a new classifier",
    "train.shared.lr": "the server's blocks",
}
_OFFERED = {
    "model": ['# tuning = "lora"  # adapters only: less memory, smaller exports'],
    "data": [
        "# validation_fraction = 0.2  # of the training examples: the best round is then picked on them",
        '# group = "document"  # a column whose equal values share a client and a side of every split',
    ],
}
"""Lines that a reader may want to turn on."""


@dataclass(frozen=True)
class Draft:
    """A task, with the keys of ``[data]`` that name its columns."""

    task: str
    keys: Mapping[str, Any] = field(default_factory=dict)


def fitting(columns: Sequence[Column]) -> list[Draft]:
    """The tasks that could read such data, first the one that makes use of most of it."""
    kinds = {column.name: column.kind for column in columns}

    def used(draft: Draft) -> int:
        names = [name for value in draft.keys.values() for name in (value if isinstance(value, list) else [value])]
        return sum(2 if kinds.get(name) in _STRUCTURED else 1 for name in names)

    found = []
    for name in TASKS:
        task: type[BaseTask] = TASKS[name]
        if (keys := task.suits(columns)) is not None:
            found.append(Draft(name, keys))
    return sorted(found, key=used, reverse=True)


def drafted(survey: Survey, draft: Draft, model: str, clients: str | None, out: Path) -> dict[str, Any]:
    """The content of a configuration for these data.

    Args:
        clients: the column that names them, ``file``, or a number of clients among whom rows are divided; ``None``: as
            the data suggest.
        out: the file that it will be in, beside which the source is found by its relative path.
    """
    clients = owners(survey) if clients is None else clients
    lengths = [column.long for column in survey.columns if column.name in draft.keys.values()]
    data: dict[str, Any] = {"source": _beside(survey.source, out), "task": draft.task, **draft.keys}
    group = survey.group()
    if group is not None and group.name not in (clients, *draft.keys.values()) and clients not in group.torn:
        data["group"] = group.name
    if survey.tests:
        data["test_source"] = f"{_beside(survey.source, out)}#test"
    if not TASKS[draft.task].images:
        tokens = max(lengths, default=0) / 3  # a token has three or four letters in most languages
        data["max_length"] = next((length for length in _LENGTHS if tokens + 8 <= length), _LENGTHS[-1])
    named = _named(survey, clients)
    count = max(1, _count(survey, clients))
    rows = sum(named.values()) / len(named) if any(named.values()) else survey.rows / count
    own = math.ceil(rows * (1.0 if survey.tests else 0.7))
    if not survey.tests:
        data["test_fraction"] = 0.3
    if own > _STEPS * _BATCH:
        data |= {"train_examples": _STEPS * _BATCH, "test_examples": _TESTS}
    text_classes = TASKS[draft.task].model_kind == "sequence-classification"
    pooled: dict[str, Any] = {"pooling": "mean"} if text_classes else {}
    return {
        "name": Path(survey.source.partition("#")[0].removeprefix("asset:")).stem,
        "model": {"id": model if not Path(model).exists() else _beside(model, out), **pooled},
        "data": {**data, "clients": {**_clients(clients), **({"names": list(named)} if named else {}), "cut": [1]}},
        "train": {
            "rounds": 3,
            "steps_per_round": min(max(math.ceil(own / _BATCH), 1), _STEPS),
            "batch_size": _BATCH,
            "personal": {"lr": 1e-4, "new_lr": 1e-3},
            "shared": {"lr": 1e-4},
        },
        **({"method": {"meet": {"on": True}}} if text_classes else {}),
    }


def owners(survey: Survey) -> str:
    """Who owns rows, as far as one can see: a column, ``file``, or a number where nobody is named."""
    if survey.files:
        return "file"
    client = survey.client()
    return str(CLIENTS) if client is None else client.name


def model_for(draft: Draft) -> str | None:
    """A small model that fits the task, if FlexP knows one."""
    task: type[BaseTask] = TASKS[draft.task]
    return MODELS.get(task.model_kind)


def columns_for(survey: Survey, task: str) -> Draft:
    """The draft for a task that the user named.

    Raises:
        ConfigError: there is no such task.
    """
    chosen: type[BaseTask] = TASKS[task]
    return Draft(task, chosen.suits(survey.columns) or {})


def candidates(survey: Survey) -> list[Draft]:
    """:func:`fitting`, of which there is one at least.

    Raises:
        DataError: no task could read these data.
    """
    found = fitting(survey.columns)
    if not found:
        names = ", ".join(repr(column.name) for column in survey.columns[:12])
        raise DataError(
            f"{survey.source}: no task is seen at once to read the columns {names}; say --task and, for instance, "
            "--set data.text=COLUMN"
        )
    return found


def toml(content: Mapping[str, Any], settings: Sequence[str], facts: Sequence[str]) -> str:
    """The file, which begins with ``facts`` and says what each key means; ``settings`` (``key=value``) go before what
    was guessed.

    Raises:
        ConfigError: a setting is none.
    """
    said = json.loads(json.dumps(content))
    for setting in settings:
        override(said, setting)
    lines = [f"# {line}" for line in facts]
    return "\n".join([*lines, *_table(said, "")]) + "\n"


def _table(content: Mapping[str, Any], name: str) -> list[str]:
    lines = [f"[{name}]"] if name and any(not isinstance(value, dict) for value in content.values()) else []
    for key, value in content.items():
        if not isinstance(value, dict):
            meaning = _MEANING.get(f"{name}.{key}")
            lines.append(f"{key} = {_value(value)}" + (f"  # {meaning}" if meaning else ""))
    lines += [line for line in _OFFERED.get(name, []) if line.removeprefix("# ").partition(" ")[0] not in content]
    for key, value in content.items():
        if isinstance(value, dict):
            lines += [*([""] if lines else []), *_table(value, f"{name}.{key}" if name else key)]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _clients(clients: str) -> dict[str, Any]:
    if clients == "file":
        return {"by": "file"}
    if clients.isdecimal():
        return {"by": "iid", "count": int(clients)}
    return {"by": "column", "column": clients}


def _named(survey: Survey, clients: str) -> dict[str, int]:
    """The clients that a first run takes, with their rows (0: unknown), where all would be too many or have too few."""
    if clients == "file":
        return dict.fromkeys(survey.files[:MOST], 0) if len(survey.files) > MOST else {}
    found = Counter[str]()
    for name, count in next((c.common for c in survey.columns if c.name == clients and c.kind != "list"), ()):
        found[name.strip()] += count
    enough = {name: count for name, count in found.most_common(MOST) if count >= LEAST}
    return enough if len(enough) < len(found) else {}


def _count(survey: Survey, clients: str) -> int:
    if clients == "file":
        return len(survey.files)
    if clients.isdecimal():
        return int(clients)
    column = next((column for column in survey.columns if column.name == clients), None)
    if column is None:
        names = ", ".join(repr(column.name) for column in survey.columns)
        raise ConfigError(f"there is no column {clients!r} to name clients; expected file, a number, or one of {names}")
    return column.distinct


def _beside(source: str, out: Path) -> str:
    """A path that is found from the folder of ``out`` if the source is in it, else from anywhere."""
    name, mark, split = source.partition("#")
    path = Path(name)
    if not path.exists():
        return source
    folder, whole = out.parent.resolve(), path.parent.resolve() / path.name
    return f"{whole.relative_to(folder) if whole.is_relative_to(folder) else whole}{mark}{split}"
