"""Which defence of texts, and how strong, keeps ``privacy.max_content_words``: the cheapest that does, on public texts
(:mod:`flexp.run.public_texts`). Clients check their own texts all the same, before the first is sent."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from flexp.config import PrivacyConfig
from flexp.errors import ConfigError, PrivacyError
from flexp.planner.infeasible import InfeasibleError
from flexp.planner.plan import Plan
from flexp.run.public_texts import Reader, Texts, words

NOISES = (0.0, 0.5, 1.0, 2.0)
"""Strengths of noise that are tried where none is named."""
POOLED_FROM = 5 / 6
"""Of a model's blocks, below the cut of pooled texts: what was measured; of shallower ones nothing is known."""


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
    """A plan that keeps the bound, with the defence that it is for, and what else was tried; ``read``: the share of
    content words at each s that was planned."""

    privacy: PrivacyConfig
    plan: Plan
    chosen: Tried
    read: Mapping[int, float]
    tried: tuple[Tried, ...] = ()

    @property
    def loss(self) -> float:
        """Of personal accuracy, as it is expected: by the cuts, and by the defence."""
        return self.plan.measures.loss + self.chosen.price

    @property
    def line(self) -> str:
        """What a user is told."""
        bound, mine = self.privacy.max_content_words, self.chosen
        others = ", ".join(each.line for each in self.tried if each is not mine)
        read = ", ".join(f"{100 * share:.0f} % at s = {depth}" for depth, share in sorted(self.read.items()))
        return (
            f"privacy.max_content_words = {bound:g} is kept {words(self.privacy)}, s of at least {mine.depth}: of "
            f"public texts' content words are read, as planned, {read}" + (f"; not chosen: {others}" if others else "")
        )

    def document(self, content: dict[str, Any]) -> dict[str, Any]:
        """A plan's document, with ``privacy``: what a run that follows it must say, and what was tried."""
        own = {name: getattr(self.privacy, name) for name in (*PrivacyConfig.DEFENCE, "max_content_words")}
        rows = [
            {"with": words(each.privacy), "s": each.depth, "content": each.read, "kept": each.kept,
             "price": each.price, "chosen": each is self.chosen, "lacks": each.lacks}
            for each in self.tried
        ]  # fmt: skip
        return {**content, "privacy": {**own, "tried": rows}}


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
    privacy: PrivacyConfig,
    texts: Texts,
    plan: Callable[[PrivacyConfig, int], Plan],
    least: int = 1,
    said: Callable[[str], None] | None = None,
) -> Defended:
    """The defence and the plan with the least expected loss of accuracy that keep ``privacy.max_content_words``.

    Args:
        plan: for a defence and the smallest s that may be cut at.
        least: the smallest s of all; where a penalty is named, one more than the blocks that are not trained.
        said: is told what each attack reads.

    Raises:
        PrivacyError: nothing that may be chosen keeps it.
        InfeasibleError: what keeps it fits no device.
        ConfigError: no s may be chosen.
        DataError: see :class:`Reader`.
    """
    least = max(least, texts.frozen + (privacy.penalty != "off"))
    if least >= texts.blocks:
        raise ConfigError(
            f"privacy.max_content_words is planned for s of 1 to {texts.blocks - 1}, and {least} or more is asked for: "
            "lower choices.starts, or model.base_depth and method.personal.frozen_head_blocks"
        )
    reader = Reader(privacy.public, texts, said)
    best: Defended | None = None
    tried: list[Tried] = []
    lacking: list[InfeasibleError] = []
    for own in candidates(privacy, texts):
        if best is not None and price(own) >= best.loss:
            break  # no cut makes up for that
        found = _tried(own, reader, least)
        if found.kept:
            try:
                made = _kept(found, reader, plan)
            except InfeasibleError as error:
                lacking.append(error)
                found = replace(found, lacks=str(error))
            else:
                found, best = made.chosen, made if best is None or made.loss < best.loss else best
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
    raise PrivacyError(_refusal(privacy, reader, tried))


def _kept(found: Tried, reader: Reader, plan: Callable[[PrivacyConfig, int], Plan]) -> Defended:
    """A plan with each s within the bound: where a deeper one tells more, from the next on that does not."""
    own, bound = found.privacy, found.privacy.max_content_words
    assert bound is not None
    while True:
        made = plan(own, found.depth)
        read = {option.choice.cut[0]: 0.0 for option in made.solution.options.values()}
        read = {depth: reader.read(own, depth) for depth in read}
        over = [depth for depth, share in read.items() if share > bound]
        if not over:
            return Defended(own, made, found, read)
        deeper = range(max(over) + 1, reader.texts.blocks)  # the last keeps it
        depth = next(depth for depth in deeper if reader.read(own, depth) <= bound)
        found = replace(found, depth=depth, read=reader.read(own, depth))


def _tried(privacy: PrivacyConfig, reader: Reader, least: int) -> Tried:
    """The shallowest s that keeps the bound, as if deeper cuts told less (:func:`_kept` looks at those planned)."""
    texts = reader.texts
    bound, deepest = privacy.max_content_words, texts.blocks - 1
    assert bound is not None
    read: dict[int, float] = {}

    def keeps(depth: int) -> bool:
        read[depth] = reader.read(privacy, depth)
        return read[depth] <= bound

    if privacy.pool:
        least = max(least, min(deepest, math.ceil(POOLED_FROM * texts.blocks)))
    kept = keeps(deepest)
    depth = least + bisect_left(range(least, deepest), True, key=keeps) if kept else deepest
    return Tried(privacy, price(privacy), depth, read[depth], kept)


def _refusal(privacy: PrivacyConfig, reader: Reader, tried: Sequence[Tried]) -> str:
    """What was read, and what would keep the bound: leaving a defence to the planner, or another bound."""
    texts = reader.texts
    allowed = candidates(privacy, texts)
    free = PrivacyConfig.model_validate(privacy.model_dump(exclude=set(privacy.DEFENCE), exclude_unset=True))
    others = [each for each in candidates(free, texts) if each.penalty == "off" and each not in allowed]
    would = next((found for each in others if (found := _tried(each, reader, texts.blocks - 1)).kept), None)
    nearest = min(tried, key=lambda each: each.read)
    if would is not None:
        named = " and ".join(f"privacy.{name}" for name in privacy.DEFENCE if name in privacy.model_fields_set)
        helps = f"{would.line} would be: leave out {named}"
    else:
        helps = f"a bound of {math.ceil(100 * nearest.read) / 100:g} would be kept {words(nearest.privacy)}"
        helps += "; or raise privacy.warm_up.steps or .weight" if nearest.privacy.penalty != "off" else ""
    return (
        f"privacy.max_content_words = {privacy.max_content_words:g} is kept by no cut that may be chosen: of public "
        f"texts are read {', '.join(each.line for each in tried)}; {helps}"
    )
