"""Which defence of texts, and how strong, keeps ``privacy.max_content_words``: the cheapest that does, on public texts.

Heads are taught, covered and attacked as clients do before they send anything (:class:`flexp.client.guarding.Guard`),
with public texts as if they were private. What was read is kept for the next plan, one file a model, cut and defence,
in ``$FLEXP_HOME/audits``. Clients check their own texts all the same, before the first is sent.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from flexp.assets.store import root
from flexp.attacks.public import encoded, paragraphs
from flexp.client.guarding import PUBLIC, Guard
from flexp.config import ModelConfig, PrivacyConfig
from flexp.errors import PrivacyError
from flexp.files import read_json, write_json
from flexp.kinds import ModelKind
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage
from flexp.models.tuning import tune
from flexp.planner.infeasible import InfeasibleError
from flexp.planner.plan import Plan

NOISES = (0.0, 0.5, 1.0, 2.0)
"""Strengths of noise that are tried where none is named."""
POOLED_FROM = 5 / 6
"""Of a model's blocks, below the cut of pooled texts: what was measured; of shallower ones nothing is known."""
FIELDS = ("pool", "penalty", "noise")
"""Of ``[privacy]``: what makes a defence of texts."""


@dataclass(frozen=True)
class Texts:
    """What a public audit needs to know: the model as clients load it, and what its texts are like.

    Attributes:
        pools: whether ``privacy.pool`` may be chosen: for classifiers that read the mean, or whose head is drawn anew.
        longest: tokens of a text, at most.
        frozen: so many of the first blocks are not trained, so that no head is taught there.
    """

    model: ModelConfig
    kind: ModelKind
    blocks: int
    processor: Any
    longest: int
    labels: Sequence[str] | None = None
    pools: bool = False
    frozen: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Tried:
    """What public texts tell with one defence.

    Attributes:
        price: of accuracy, in shares, beside the cut's (:func:`price`).
        depth: the shallowest s that keeps the bound; where none does, the deepest.
        read: the share of content words that is read there.
        lacks: why no plan came of it although it keeps the bound.
    """

    privacy: PrivacyConfig
    price: float
    depth: int
    read: float
    kept: bool
    lacks: str = ""

    @property
    def line(self) -> str:
        """In words."""
        return f"{100 * self.read:.0f} % at s = {self.depth} {words(self.privacy)}"


@dataclass(frozen=True)
class Defended:
    """A plan that keeps the bound, with the defence that it is for, and what else was tried."""

    privacy: PrivacyConfig
    plan: Plan
    chosen: Tried
    tried: tuple[Tried, ...]

    @property
    def loss(self) -> float:
        """Of personal accuracy, as it is expected: by the cuts, and by the defence."""
        return self.plan.measures.loss + self.chosen.price

    @property
    def line(self) -> str:
        """What a user is told."""
        bound, mine = self.privacy.max_content_words, self.chosen
        others = ", ".join(each.line for each in self.tried if each is not mine)
        return (
            f"privacy.max_content_words = {bound:g} is kept {words(self.privacy)}, s of at least {mine.depth}: of "
            f"public texts {100 * mine.read:.0f} % of content words are read"
            + (f"; not chosen: {others}" if others else "")
        )

    def document(self, content: dict[str, Any]) -> dict[str, Any]:
        """A plan's document, with ``privacy``: what a run that follows it must say, and what was tried."""
        own = {name: getattr(self.privacy, name) for name in (*FIELDS, "max_content_words")}
        rows = [
            {"with": words(each.privacy), "s": each.depth, "content": each.read, "kept": each.kept,
             "price": each.price, "chosen": each is self.chosen, "lacks": each.lacks}
            for each in self.tried
        ]  # fmt: skip
        return {**content, "privacy": {**own, "tried": rows}}


def words(privacy: PrivacyConfig) -> str:
    """A defence in words: ``with privacy.pool = true and privacy.noise = 1``."""
    told = ["privacy.pool = true"] if privacy.pool else []
    told += [f'privacy.penalty = "{privacy.penalty}"'] if privacy.penalty != "off" else []
    told += [f"privacy.noise = {privacy.noise:g}"] if privacy.noise else []
    return f"with {' and '.join(told)}" if told else "without a defence"


def price(privacy: PrivacyConfig) -> float:
    """What a defence is expected to cost of personal accuracy, beside its cut, as a share.

    An order, with rough figures of small models (docs/security.md): pooled texts half a point, and noise on them a
    quarter to a half (sentiment, s = 5 of 6, 3 seeds: 0.4 and 0.3; CLINC150, of many classes, pays more: 3.3 and 23);
    noise on every token 8 points at ρ = 1 (the demo, s = 1 to 3); taught heads 12 within 10 %, which is all that was
    learnt.
    """
    if privacy.penalty != "off":
        return 0.12 + 0.08 * privacy.noise
    return 0.005 + 0.005 * privacy.noise if privacy.pool else 0.08 * privacy.noise


def candidates(privacy: PrivacyConfig, texts: Texts) -> list[PrivacyConfig]:
    """Defences that may be chosen, the cheapest first: what ``privacy`` names stays as it is. Taught heads are tried
    without noise unless that is named, since each takes a warm-up."""
    said = privacy.model_fields_set
    pools = (privacy.pool,) if "pool" in said else (False, True) if texts.pools else (False,)
    penalties = (privacy.penalty,) if "penalty" in said else ("off",) if texts.frozen else ("off", "nopeek")
    noises = (privacy.noise,) if "noise" in said else NOISES
    found = [
        privacy.model_copy(update={"pool": pool, "penalty": penalty, "noise": noise})
        for pool, penalty, noise in product(pools, penalties, noises)
        if penalty == "off" or not (pool or (noise and "noise" not in said))
    ]
    return sorted(found, key=price)


def defended(
    privacy: PrivacyConfig, texts: Texts, plan: Callable[[PrivacyConfig, int], Plan], least: int = 1
) -> Defended:
    """The defence and the plan with the least expected loss of accuracy that keep ``privacy.max_content_words``.

    Args:
        plan: for a defence and the smallest s that may be cut at.
        least: the smallest s of all.

    Raises:
        PrivacyError: nothing that may be chosen keeps it.
        InfeasibleError: what keeps it fits no device.
    """
    best: Defended | None = None
    tried: list[Tried] = []
    lacking: list[InfeasibleError] = []
    for own in candidates(privacy, texts):
        if best is not None and price(own) >= best.loss:
            break  # no cut makes up for that
        found = _tried(own, texts, least)
        if found.kept:
            try:
                made = Defended(own, plan(own, found.depth), found, ())
            except InfeasibleError as error:
                lacking.append(error)
                found = replace(found, lacks=str(error))
            else:
                best = made if best is None or made.loss < best.loss else best
        tried.append(found)
    if best is not None:
        return replace(best, tried=tuple(tried))
    if lacking:
        shallowest = min((each for each in tried if each.lacks), key=lambda each: each.depth)
        raise InfeasibleError(
            lacking[0].lacks,
            f"privacy.max_content_words = {privacy.max_content_words:g} is kept {words(shallowest.privacy)} from s = "
            f"{shallowest.depth} on: {shallowest.lacks}",
        )
    raise PrivacyError(_refusal(privacy, texts, tried))


def _tried(privacy: PrivacyConfig, texts: Texts, least: int) -> Tried:
    """The shallowest s that keeps the bound; that deeper cuts tell less is taken for granted."""
    bound, deepest = privacy.max_content_words, texts.blocks - 1
    assert bound is not None
    read: dict[int, float] = {}

    def keeps(depth: int) -> bool:
        read[depth] = public_read(privacy, texts, depth)
        return read[depth] <= bound

    if privacy.pool:
        least = max(least, min(deepest, math.ceil(POOLED_FROM * texts.blocks)))
    kept = keeps(deepest)
    depth = least + bisect_left(range(least, deepest), True, key=keeps) if kept else deepest
    return Tried(privacy, price(privacy), depth, read[depth], kept)


def _refusal(privacy: PrivacyConfig, texts: Texts, tried: Sequence[Tried]) -> str:
    """What was read, and what would keep the bound: leaving a defence to the planner, or another bound."""
    allowed = candidates(privacy, texts)
    free = PrivacyConfig.model_validate(privacy.model_dump(exclude=set(FIELDS), exclude_unset=True))
    others = [each for each in candidates(free, texts) if each.penalty == "off" and each not in allowed]
    would = next((found for each in others if (found := _tried(each, texts, texts.blocks - 1)).kept), None)
    nearest = min(tried, key=lambda each: each.read)
    if would is not None:
        named = " and ".join(f"privacy.{name}" for name in FIELDS if name in privacy.model_fields_set)
        helps = f"{would.line} would be: leave out {named}"
    else:
        helps = f"a bound of {math.ceil(100 * nearest.read) / 100:g} would be kept {words(nearest.privacy)}"
        helps += "; or raise privacy.warm_up.steps or .weight" if nearest.privacy.penalty != "off" else ""
    return (
        f"privacy.max_content_words = {privacy.max_content_words:g} is kept by no cut that may be chosen: of public "
        f"texts are read {', '.join(each.line for each in tried)}; {helps}"
    )


def public_read(privacy: PrivacyConfig, texts: Texts, depth: int) -> float:
    """The share of public content words that is read at ``depth``, as it was found earlier, or now."""
    model = texts.model
    stage = load_stage(model, texts.kind, Part.client((depth, texts.blocks), texts.blocks), labels=texts.labels)
    said: list[object] = [stage.weights, depth, texts.longest, texts.seed]
    said += [model.dtype, model.quantization, model.quantize_ends]
    said += [privacy.public, privacy.clip, privacy.pool, privacy.noise]
    if privacy.penalty != "off":
        said += [privacy.penalty, privacy.max_content_words, privacy.warm_up, model.tuning, model.lora, texts.frozen]
    key = hashlib.sha256("|".join(map(str, said)).encode()).hexdigest()[:32]
    kept = root().parent / "audits" / f"{key}.json"
    if kept.is_file() and stage.weights is not None:
        return float(read_json(kept)["content"])
    tune(stage, model, seed=texts.seed, frozen=texts.frozen)
    public = paragraphs(None if privacy.public is None else Path(privacy.public), 2 * PUBLIC)
    held = encoded(texts.processor, public[PUBLIC:] or public, passes=0)
    short = [{"input_ids": each["input_ids"][: texts.longest]} for each in held]
    guard = Guard(privacy, short, texts.processor, texts.seed, key=texts.seed)  # these are no secrets
    with suppress(PrivacyError):
        guard.teach(stage, depth)
    assert guard.read is not None
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, {"model": model.id, "s": depth, "with": words(privacy), "content": guard.read})
    return guard.read
