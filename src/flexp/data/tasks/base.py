"""The parts of a task that most of them share: labels, scores and answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flexp.config import DataConfig
from flexp.data.columns import label_texts
from flexp.data.measures import MOST_CLASSES, class_scores, confusion, f1_by_class
from flexp.data.survey import Column
from flexp.data.types import PLACE, Batch, Example, Forward, Row, Tally
from flexp.errors import ConfigError, DataError
from flexp.kinds import KINDS, ModelKind


@dataclass(frozen=True)
class Limit:
    """How long a text may be, in tokens, and what happens to longer ones."""

    tokens: int
    long_texts: Literal["truncate", "error"] = "truncate"
    of_model: bool = False  # the model's positions, not data.max_length, set it

    def refuse(self, length: int, place: str) -> None:
        """Complain about a text of ``length`` tokens unless it may be cut.

        Raises:
            DataError: texts that are too long are errors.
        """
        if self.long_texts == "truncate":
            return
        what = "the model's positions" if self.of_model else "data.max_length"
        mend = "" if self.of_model else "raise data.max_length, "
        raise DataError(
            f"{place}: the text has {length} tokens, more than the {self.tokens} of {what}; "
            f'shorten it, {mend}or set data.long_texts = "truncate"'
        )


class BaseTask(ABC):
    """A :class:`~flexp.data.types.Task`, and what its class says of the data; another package may add one
    (:mod:`flexp.registry`).

    Attributes:
        labelled: the label column says what is right, and clients may be divided by it.
        classes: of a classifier over the labels of all clients, ``label_names``.
        images: the input is an image, which an image processor encodes.
        answers: it can say of a row what the model gives for it, as ``flexp predict`` writes it.
    """

    name: str
    model_kind: ModelKind = "causal-lm"
    metric: str = "perplexity"
    higher_is_better: bool = False
    labelled: ClassVar[bool] = False
    classes: ClassVar[bool] = False
    images: ClassVar[bool] = False
    answers: ClassVar[bool] = False

    def __init__(self, config: DataConfig, processor: Any, limit: Limit, label_names: Sequence[str] = ()) -> None:
        self.config, self.processor, self.limit = config, processor, limit
        self.label_names: list[str] | None = list(label_names) if self.classes else None
        self._number = {name: index for index, name in enumerate(label_names)}

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        """The keys of ``[data]`` that name the columns which this task would read, if there are such: a guess.

        Of several tasks the one that makes use of most of the data is offered first.
        """
        return None

    @classmethod
    def text_columns(cls, config: DataConfig) -> list[str]:
        """The columns whose text makes up an example's input; empty for images."""
        return []

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        """Further columns that the task reads, besides the label's, each with the configuration's key that names it."""
        return {}

    @classmethod
    def needed_columns(cls, config: DataConfig) -> dict[str, str]:
        """The columns that the task reads, each with the configuration's key that names it.

        Raises:
            ConfigError: the template cannot be read.
        """
        needed = dict.fromkeys(cls.text_columns(config), "data.template")
        for name, key in ((config.text, "text"), (config.prompt, "prompt")):
            if name in needed:
                needed[name] = f"data.{key}"
        return needed | cls.own_columns(config) | ({config.label: "data.label"} if cls.labelled else {})

    @classmethod
    def right_columns(cls, config: DataConfig) -> Collection[str]:
        """Those of the columns that say what is right, which nobody has who asks the model."""
        return [config.label] if cls.labelled else ()

    @classmethod
    def gaps(cls, config: DataConfig) -> Collection[str]:
        """Those of the columns in which a row may have nothing."""
        return ()

    @classmethod
    def read_labels(
        cls, values: Sequence[Any], names: list[str] | None, config: DataConfig, place: Callable[[int], str]
    ) -> list[Any]:
        """Every row's label as :meth:`encode` takes it.

        Args:
            names: of the classes, where the column holds their numbers.
            place: where a row stands, for messages.

        Raises:
            DataError: a value is no such label.
        """
        return label_texts(values, names, config.label, place)

    @classmethod
    def names_in(cls, label: Any) -> Sequence[str]:
        """The classes in the label of one row."""
        return [label]

    @classmethod
    def strata(cls, labels: Sequence[Any]) -> list[str]:
        """By what of their labels rows are divided among clients, and into training and test rows of one proportion."""
        return list(labels)

    @classmethod
    def no_label(cls, names: Sequence[str]) -> Any:
        """What stands in a row whose label is not known."""
        return names[0] if names else ""

    @classmethod
    def chat_template(cls, config: DataConfig, own: bool) -> str | None:
        """What stands for a chat template, with the field ``{prompt}``, in a model that was tuned to follow prompts.

        ``own``: whether the tokenizer has one, which is used where this is None. A template with other fields is no
        form of a chat, and :meth:`flexp.data.tasks.chat.ChatForm.check` refuses it.
        """
        return None

    def classes_in(self, example: Example) -> list[str]:
        """The names of the classes that an encoded example has; none where the task has no classes."""
        return [] if self.label_names is None else [self.label_names[example["labels"]]]

    def doubts(self) -> list[str]:
        """What of the classes is suspicious: one line each, for people to judge."""
        return []

    def nothing_to_find(self, examples: Sequence[Example]) -> bool:
        """Whether ``examples`` define no metric for a model that finds nothing in them."""
        return False

    def class_weights(self, wanted: Literal["balanced"] | Mapping[str, float], examples: Sequence[Example]) -> Tensor:
        """What each class counts in the loss, (C,).

        ``balanced``: n / (classes · n_c) of the n examples (or tokens) of the client, of whose classes n_c are c; where
        an example may have several classes, those without c by those with c. What the client does not have counts 1.

        Raises:
            ConfigError: the task has no classes, or not one that is named.
        """
        if self.label_names is None:
            raise ConfigError(f"train.class_weights is for classifiers; data.task = {self.name!r} has no classes")
        if wanted != "balanced":
            odd = [name for name in wanted if name not in self.label_names]
            if odd:
                raise ConfigError(
                    f"train.class_weights: there is no class {odd[0]!r}; expected some of {', '.join(self.label_names)}"
                )
            return torch.tensor([float(wanted.get(name, 1.0)) for name in self.label_names])
        counts = Counter(name for example in examples for name in self.classes_in(example))
        several = KINDS[self.model_kind].answers == "classes"
        total, classes = len(examples) if several else counts.total(), len(counts)
        return torch.tensor(
            [
                1.0 if not counts[name] else
                max(total - counts[name], 1) / counts[name] if several else total / (classes * counts[name])
                for name in self.label_names
            ]
        )  # fmt: skip

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """See :class:`~flexp.data.types.Task`, as for what follows."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch: ...

    @abstractmethod
    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally: ...

    def figures(self, tally: Tally) -> dict[str, Any]:
        """``accuracy`` with ``majority`` (the share of the most frequent answer, which a model that has learned nothing
        else reaches); or ``perplexity`` (exp of the loss) with ``tokens``, where no answer is right or wrong."""
        if tally.correct:
            count = len(tally.correct)
            return {"accuracy": sum(tally.correct) / count, "majority": max(Counter(tally.targets).values()) / count}
        items = sum(tally.items)
        loss = math.fsum(tally.loss) / items
        return {"perplexity": math.exp(loss) if loss < 700 else loss if math.isnan(loss) else math.inf, "tokens": items}

    def details(self, tally: Tally) -> dict[str, Any]:
        """Nothing further."""
        return {}

    def score(self, forward: Forward, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """Nothing further."""
        return {}

    def answer(self, logits: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """What to write of each row: ``predicted``, and what else there is to say.

        Raises:
            ConfigError: the task has no such answers.
        """
        raise ConfigError(f"flexp predict is for classifiers and such; this model is for {self.name}")

    def by_row(self, found: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """What :meth:`answer` says of all examples, in their order, as one for each row."""
        return found


def place(row: Row) -> str:
    """Where a row stands, for messages."""
    return str(row.get(PLACE, "a row"))


class Classifier(BaseTask):
    """A task with classes, ``label_names``."""

    label_names: list[str]
    higher_is_better = True
    labelled = True
    classes = True
    answers = True


class OneClass(Classifier):
    """One class for each example."""

    metric = "accuracy"

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """Cross-entropy, hits and probabilities."""
        return class_tally(logits, labels)

    def figures(self, tally: Tally) -> dict[str, Any]:
        """Besides accuracy and majority ``macro_f1`` and ``auc`` (with more than two classes the mean of each against
        the others)."""
        return super().figures(tally) | class_scores(tally.answers, tally.targets)

    def details(self, tally: Tally) -> dict[str, Any]:
        """``f1_by_class``, and the table of confusion: right answers are rows."""
        given = [max(range(len(row)), key=row.__getitem__) for row in tally.answers]
        return class_details(self.label_names, confusion(tally.targets, given, len(self.label_names)))

    def answer(self, logits: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """The label, its probability and those of all."""
        found = []
        for values in torch.softmax(logits.double(), dim=-1).tolist():
            row = dict(zip(self.label_names, values, strict=True))
            label = max(row, key=row.__getitem__)
            found.append({"predicted": label, "probability": row[label], "probabilities": row})
        return found


def class_details(names: Sequence[str], table: Any) -> dict[str, Any]:
    """F1 of each class by its name, and the table of confusion where there are not too many classes for one."""
    found: dict[str, Any] = {"f1_by_class": dict(zip(names, f1_by_class(table), strict=True))}
    return found | ({"confusion": table.tolist()} if len(names) <= MOST_CLASSES else {})


def class_tally(logits_BC: Tensor, labels_B: Tensor) -> Tally:
    """Cross-entropy and arg max of a classifier."""
    logits_BC = logits_BC.float()
    labels_B = labels_B.to(logits_BC.device)
    loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
    return Tally(
        loss=loss_B.tolist(),
        items=[1] * len(labels_B),
        correct=(logits_BC.argmax(-1) == labels_B).tolist(),
        targets=labels_B.tolist(),
        answers=torch.softmax(logits_BC, dim=-1).tolist(),
    )


class SeveralLabels(Classifier):
    """A task whose rows have a list of labels each: some of the classes, or one for every word."""

    @classmethod
    def names_in(cls, label: Sequence[str]) -> Sequence[str]:
        return label

    @classmethod
    def strata(cls, labels: Sequence[Sequence[str]]) -> list[str]:
        """Of each row's labels the one that the fewest rows have, so that rare ones are on every side; nothing of a row
        without any."""
        rows = Counter(name for names in labels for name in set(names))
        return [min(names, key=lambda name: (rows[name], name), default="") for names in labels]
