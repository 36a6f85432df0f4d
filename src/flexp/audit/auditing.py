"""The audit: some steps of a run as the server sees them, and what it can read of them.

An honest-but-curious server (it follows the protocol and looks) with public knowledge alone. What it cannot read here,
a better attacker may: an audit shows what leaks, never that nothing does.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexp.attacks.base import Attack, Public
from flexp.attacks.public import MANUAL, dull_tokens, encoded, known_to_all, paragraphs
from flexp.attacks.tokens import ATTACKS, ON_MEANS
from flexp.audit.guessing import by_labels, by_the_model, share, usual
from flexp.audit.training import labels_told, membership_told, words_told
from flexp.audit.truth import Truth
from flexp.audit.watching import Exchange, Known, Watch, watchable, watching
from flexp.client.guarding import Guard
from flexp.data.types import Example
from flexp.errors import ConfigError, PrivacyError
from flexp.kinds import KINDS
from flexp.methods.base import Method

PRETRAINED, TAUGHT, KNOWN = "pretrained", "taught", "known"
"""The heads that an attacker learns from: as everybody has it; taught in the way of the clients; and the clients' own,
by some of the very texts that were sent, which it knows from elsewhere."""
FEW = 4
"""Of so few texts none is known."""
AVERAGED = "z averaged"
SURROGATE = 400
"""Public texts on which an attacker teaches a head of its own, at most."""
SHOWN = 5
"""Texts that are shown beside what was read of them."""
_BY = {
    "clusters": "clusters", "inverted": "inverted", "answers": "answers by gradients",
    "outputs": "answers by activations", "known": "two of each known",
    "features": "by activations", "features_known": "by activations, two of each known",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What one attack read of what crosses at one place.

    Attributes:
        of: ``z`` at the cut, the same ``averaged`` over all times that a text was sent, or ``z_base``.
        head: that it learnt from: the ``pretrained`` one, one that it ``taught`` as clients do, or clients' own by a
            quarter of the texts themselves (100 at most), which are ``known`` and not asked for.
        tokens, content, texts: shares read right: of all tokens but special ones, of content words, of whole texts.
        rouge: ROUGE-L (Lin, 2004; F1 of the longest common subsequence) of what was read of a text, on average.
        by_step: ``content`` by the clients' step.
        seconds: of learning and reading.
    """

    attack: str
    about: str
    of: str
    head: str
    depth: int
    tokens: float
    content: float
    texts: float
    rouge: float
    by_step: dict[int, float]
    seconds: float

    @property
    def name(self) -> str:
        """The attack, on what, and with what head."""
        return f"{self.attack}, {self.of}" + {TAUGHT: ", taught head", KNOWN: ", some texts known"}.get(self.head, "")


@dataclass(frozen=True)
class Audit:
    """What a server can read, as far as these attacks can.

    Attributes:
        cuts: (s, e) by client.
        texts, tokens: how many were seen.
        public: what the attacker learnt from.
        blind: the share of tokens and of content words that the most frequent public token gives; of classifiers also
            what labels alone tell who knows some of the texts (``labelled``, ``labelled_content``), of language models
            what the public model says next, told the text so far (``foretold``, ``foretold_content``).
        labels: what ∂task/∂h, and h, tell of labels, beside ``majority``, the most frequent label's share.
        gradients: the share of tokens that an optimising inversion reads out of ∂task/∂h alone; ``None``: not tried.
        members: the area under the curve of which texts the shared blocks were trained on; ``None``: not attacked.
        worst: texts of which most was read: the truth, and what the best attack read.
        not_attacked: what a server could try besides, and was not tried here.
    """

    model: str
    method: str
    cuts: dict[str, tuple[int, int]]
    steps: int
    texts: int
    tokens: int
    public: str
    blind: dict[str, float]
    readings: list[Reading]
    labels: dict[str, float] = field(default_factory=dict)
    gradients: float | None = None
    members: float | None = None
    worst: list[tuple[str, str]] = field(default_factory=list)
    not_attacked: list[str] = field(default_factory=list)

    @property
    def content(self) -> float:
        """The content words that the best attack reads."""
        return max(reading.content for reading in self.readings)

    @property
    def by_gradients(self) -> bool:
        """Whether labels were attacked by gradients, which a client may not have sent."""
        return not self.labels.keys() <= {
            "features",
            "features_known",
            "features_auc",
            "majority",
            "outputs",
            "generated",
        }

    @property
    def line(self) -> str:
        """What the server can read, in a line."""
        best = max(self.readings, key=lambda reading: reading.content)
        said = f"{100 * best.content:.0f} % of content words ({best.name} at depth {best.depth}"
        step = max(max(reading.by_step.values()) for reading in self.readings)
        said += f"; in the worst step {100 * step:.0f} %)" if step > best.content + 0.005 else ")"
        told = {text: self.labels[key] for key, text in _BY.items() if key in self.labels}
        if not told:
            return f"{said}; labels were not attacked"
        by = max(told, key=lambda text: told[text])
        return f"{said}, {100 * told[by]:.0f} % of labels ({by})"

    def as_json(self) -> dict[str, Any]:
        """Schema 1; without the texts, which stay on the client."""
        return {"schema": 1, "line": self.line, **{key: value for key, value in asdict(self).items() if key != "worst"}}


def audit(
    method: Method, *, rounds: int = 1, public: Path | None = None, full: bool = False, only: Collection[str] = ()
) -> Audit:
    """Train ``rounds`` rounds of a method that begins, or was trained already, and attack what the server was sent.

    Args:
        public: a file of public texts, one a line; ``None``: :data:`~flexp.attacks.public.MANUAL`.
        full: with the slow attacks and more public text.
        only: the attacks on tokens that are made, slow ones too; none named: all.

    Raises:
        ConfigError: the method sends no activations, or its input is no text.
        DataError: the public texts cannot be read.
    """
    watch = Watch.of(watchable(method))
    _kinds(watch.known(), full=full, only=only)  # an unknown name is told before anything is trained
    with watching(watchable(method), watch):
        for number in range(1, rounds + 1):
            method.train_round(number, lambda _: None)
    return attacked(watch, public=public, full=full, only=only)


def attacked(watch: Watch, *, public: Path | None = None, full: bool = False, only: Collection[str] = ()) -> Audit:
    """:func:`audit` of what was watched already.

    Raises:
        ConfigError: an attack of that name is not made here.
        DataError: the public texts cannot be read.
        Exception: what went wrong while it was watched, if anything did.
    """
    if watch.failed is not None:
        raise watch.failed
    run = watch.known()
    config, tokenizer = run.config, run.task.processor
    examples = encoded(
        tokenizer,
        paragraphs(public, 4000 if full else 1000),
        passes=2 if full else 1,
    )
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    answers = KINDS[run.task.model_kind].answers
    decoder = answers == "next-token"
    kinds = _kinds(run, full=full, only=only)
    readings: list[Reading] = []
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    places = _places(watch.exchanges)
    blind: dict[str, float] = {}
    for depth in sorted({depth for _, depth in places}):
        heads = _heads(run, depth, examples)
        dull = dull_tokens(heads[PRETRAINED], special.tolist())
        truths = {of: Truth.of(seen, of, special, dull) for (of, where), seen in places.items() if where == depth}
        again = truths["z"].averaged() if "z" in truths else None
        truths |= {} if again is None else {AVERAGED: again}
        blind = blind or usual(heads[PRETRAINED], next(iter(truths.values())), special)
        if "z" in truths and truths["z"].texts > FEW and (full or config.privacy.of_texts):
            some = truths["z"].only(truths["z"].known())
            heads[KNOWN] = replace(heads[PRETRAINED], sent=some.sent, ids_N=some.ids_N, apart=None)
            whose = torch.unique(some.whose_N)
        for head, known in heads.items():
            for attack in (kind() for kind in kinds):
                began = time.perf_counter()
                attack.learn(known)
                for of, truth in truths.items():
                    if of == "z_base" and head != PRETRAINED:
                        continue
                    asked = truth if head != KNOWN else truth.only(~torch.isin(truth.whose_N, whose))
                    reading, read_N = _read(attack, known.depth, asked, of, head, began)
                    readings.append(reading)
                    if best is None or reading.content > best[0]:
                        best = reading.content, asked.ids_N, read_N, asked.sent.texts_N
                    began = time.perf_counter()
    assert best is not None
    if answers == "class" and all("labels" in one.batch for one in watch.exchanges):  # a client's audit has none
        labels_U = torch.cat([one.batch["labels"] for one in watch.exchanges])
        blind |= by_labels(Truth.of(watch.exchanges, "z", special, dull), labels_U)
    if decoder and len(run.source.part.blocks) == run.source.anatomy.blocks:
        blind |= by_the_model(watch.exchanges, run.source, special, dull)
    pooled = config.privacy.pool  # those two run a model without the mean between its blocks
    labels = labels_told(watch.exchanges, run, answers)
    members = None if run.method is None or pooled else membership_told(watch.exchanges, run.method, words=decoder)
    tried = {"labels": bool(labels), "membership": members is not None}
    return Audit(
        model=config.model.id,
        method=config.method.name,
        cuts={exchange.client: exchange.cut for exchange in watch.exchanges},
        steps=max(exchange.step for exchange in watch.exchanges),
        texts=sum(len(exchange.z_BTH) for exchange in watch.exchanges),
        tokens=sum(int(exchange.mask.sum()) for exchange in watch.exchanges),
        public=MANUAL if public is None else str(public.name),
        blind=blind,
        readings=readings,
        labels=labels,
        gradients=words_told(watch.exchanges, run) if full and not pooled else None,
        members=members,
        worst=_worst(*best[1:], tokenizer),
        not_attacked=[what for what, was in tried.items() if not was] + list(run.unheard),
    )


def _kinds(run: Known, *, full: bool, only: Collection[str]) -> list[type[Attack]]:
    """The attacks that are made on tokens."""
    decoder = KINDS[run.task.model_kind].answers == "next-token"
    made = [kind for kind in (ON_MEANS if run.config.privacy.pool else ATTACKS) if decoder or not kind.causal]
    names = [kind.name for kind in made]
    if strange := sorted(set(only) - set(names)):
        raise ConfigError(f"--attack {strange[0]}: not made on what is sent here; choose of {', '.join(names)}")
    return [kind for kind in made if (kind.name in only if only else full or not kind.slow)]


def _heads(run: Known, depth: int, examples: Sequence[Example]) -> dict[str, Public]:
    """What the heads that an attacker learns from make of public text: the pretrained one, and where clients teach
    theirs or add noise, one that it taught in the same way, until the same bound is kept, with such noise."""
    pretrained, config = known_to_all(run.source, depth, examples), run.config.privacy
    if config.pool:
        pretrained = replace(pretrained, sent=pretrained.sent.as_one(), apart=pretrained.sent)
    heads = {PRETRAINED: pretrained}
    if config.of_texts and depth > 0:
        surrogate = run.surrogate(depth)
        bound = config.max_content_words if config.penalty != "off" else None  # else there is nothing to teach until it
        own = config.model_copy(update={"max_content_words": bound})
        guard = Guard(own, examples[:SURROGATE], run.task.processor, SURROGATE, SURROGATE)
        with suppress(PrivacyError):  # it needs not keep the bound
            guard.teach(surrogate, depth)
        heads[TAUGHT] = guard.covered(known_to_all(surrogate, depth, examples))
    return heads


def _places(exchanges: Sequence[Exchange]) -> dict[tuple[str, int], list[Exchange]]:
    """What was sent, by what it is and after how many blocks."""
    places: dict[tuple[str, int], list[Exchange]] = {}
    for exchange in exchanges:
        places.setdefault(("z", exchange.cut[0]), []).append(exchange)
        if exchange.base_BTH is not None:
            places.setdefault(("z_base", exchange.base_depth), []).append(exchange)
    return places


def _read(attack: Attack, depth: int, truth: Truth, of: str, head: str, began: float) -> tuple[Reading, Tensor]:
    read_N = attack.read(truth.sent, truth.ids_N)
    right_N, texts_N, content_N = read_N == truth.ids_N, truth.sent.texts_N, truth.content_N
    wrong = torch.zeros(int(texts_N.max()) + 1).index_add_(0, texts_N, (truth.real_N & ~right_N).float())
    by_step = {int(step): share(right_N[content_N & (truth.steps_N == step)]) for step in torch.unique(truth.steps_N)}
    reading = Reading(
        attack=attack.name,
        about=attack.about,
        of=of,
        head=head,
        depth=depth,
        tokens=share(right_N[truth.real_N]),
        content=share(right_N[content_N]),
        texts=share(wrong == 0),
        rouge=_rouge(truth, read_N),
        by_step=by_step,
        seconds=time.perf_counter() - began,
    )
    return reading, read_N


def _rouge(truth: Truth, read_N: Tensor) -> float:
    """The mean ROUGE-L of all texts, special tokens apart."""
    kept_N, texts_N = truth.real_N, truth.sent.texts_N
    counts = texts_N[kept_N].bincount()
    pairs = zip(*(torch.split(each[kept_N], counts.tolist()) for each in (truth.ids_N, read_N)), strict=True)
    found = [rouge_l(said.tolist(), read.tolist()) for said, read in pairs if len(said)]
    return sum(found) / len(found) if found else 0.0


def rouge_l(said: Sequence[int], read: Sequence[int]) -> float:
    """ROUGE-L of two texts of tokens: F1 of their longest common subsequence."""
    longest = [0] * (len(read) + 1)
    for token in said:
        before = list(longest)
        for place, other in enumerate(read):
            longest[place + 1] = before[place] + 1 if token == other else max(before[place + 1], longest[place])
    return 2 * longest[-1] / (len(said) + len(read)) if len(said) + len(read) else 0.0


def _worst(truth_N: Tensor, read_N: Tensor, texts_N: Tensor, tokenizer: Any) -> list[tuple[str, str]]:
    right = torch.zeros(int(texts_N.max()) + 1).index_add_(0, texts_N, (truth_N == read_N).float())
    order = (right / texts_N.bincount()).argsort(descending=True, stable=True)[:SHOWN]

    def text_of(ids_N: Tensor, text: Tensor) -> str:
        return str(tokenizer.decode(ids_N[texts_N == text], skip_special_tokens=True))

    return [(text_of(truth_N, text), text_of(read_N, text)) for text in order]
