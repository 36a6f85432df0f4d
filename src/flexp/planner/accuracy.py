"""What a cut is expected to cost in personal accuracy: a stated prior, or a curve fitted to pilot runs.

A curve goes over the *personal share* of the model: the blocks that a client keeps for itself, s + L − e, in shares of
L. It gives the loss against the best share, as a fraction (0.01 is a percentage point). With pilots the score is taken
to be monotone in the share, in whichever direction fits better (isotonic regression: Barlow et al., 1972), after each
client's own level has been taken out; the interval is a bootstrap over clients.

Scores that are better when lower (perplexity) enter as −log(score): a loss of 0.01 is then one percent of perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator
from scipy.optimize import isotonic_regression

from flexp.config import Section
from flexp.cost.choice import Choice, codec_loss
from flexp.errors import ConfigError
from flexp.files import read_json, write_json
from flexp.registry import METHODS
from flexp.rng import generator

PRIOR = 0.06
"""Of the prior: lost when the whole model is personal. On scarce data, s = 3 instead of s = 1 of MiniLM's six blocks
cost 2.2 points of personal accuracy (docs/results.md, experiment 1: 88.0 against 85.8); that is 0.066 for all six."""
RANK_LOSS, RANK_ENOUGH = 0.005, 16
"""Assumed: each halving of the adapters' rank below 16 costs half a point."""

Loss01 = Annotated[float, Field(ge=0.0)]


class CurvePoint(Section):
    """The loss at one personal share, with the bounds of its 95 % interval; ``count``: scores behind it."""

    share: Annotated[float, Field(ge=0.0, le=1.0)]
    loss: Loss01
    low: Loss01
    high: Loss01
    count: Annotated[int, Field(ge=0)] = 0


class AccuracyCurve(Section):
    """Loss over personal share, linear between its points and level beyond them.

    Attributes:
        source: ``prior``: assumed, nothing was measured on this model and data.
        note: where it comes from, in words.
        score: what the losses are fractions of.
    """

    version: Literal[1] = 1
    source: Literal["prior", "pilots"]
    note: str
    model: str = ""
    score: str = "accuracy"
    points: Annotated[list[CurvePoint], Field(min_length=1)]

    @model_validator(mode="after")
    def _ascending(self) -> AccuracyCurve:
        shares = [point.share for point in self.points]
        if shares != sorted(set(shares)):
            raise ValueError("points must have ascending shares")
        return self

    def at(self, cut: tuple[int, int], blocks: int) -> CurvePoint:
        """Loss and interval for a cut of a model with ``blocks`` blocks."""
        share = personal_share(cut, blocks)
        places = [point.share for point in self.points]
        loss, low, high = (
            float(np.interp(share, places, [getattr(point, name) for point in self.points]))
            for name in ("loss", "low", "high")
        )
        return CurvePoint(share=share, loss=loss, low=low, high=high)

    def loss(self, choice: Choice, blocks: int, followed: int | None = None) -> float:
        """Expected loss of a choice: of its cut, its codec and its rank.

        ``followed``: blocks of the head from this one on are not personal, being the server's copies.
        """
        start, stop = choice.cut
        personal = (start if followed is None else min(start, followed), stop)
        rank = 0.0 if choice.rank is None else RANK_LOSS * max(0.0, math.log2(RANK_ENOUGH / choice.rank))
        return self.at(personal, blocks).loss + codec_loss(choice.codec) + rank

    def write(self, path: Path) -> None:
        """Save as JSON."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> AccuracyCurve:
        """Read what :meth:`write` wrote.

        Raises:
            StorageError: the file is missing or no JSON.
            ConfigError: it is no curve.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(f"{path} is no accuracy curve ({reason}); make one with flexp plan --pilots") from error


def personal_share(cut: tuple[int, int], blocks: int) -> float:
    """Blocks that a client keeps for itself ÷ all."""
    return (cut[0] + blocks - cut[1]) / blocks


def prior() -> AccuracyCurve:
    """The assumption that stands where there are no pilots."""
    ends = [
        CurvePoint(share=0.0, loss=0.0, low=0.0, high=0.0),
        CurvePoint(share=1.0, loss=PRIOR, low=0.0, high=2 * PRIOR),
    ]
    note = (
        f"a prior, not a measurement: {100 * PRIOR:.0f} points are lost when all blocks are personal, as on scarce "
        "data, and in proportion for fewer; pilot runs with several cuts measure it (flexp plan --pilots)"
    )
    return AccuracyCurve(source="prior", note=note, points=ends)


@dataclass(frozen=True)
class Pilot:
    """One client's last personal score in a pilot run; ``level``: scores with the same one may be compared."""

    level: str
    share: float
    score: float


def read_pilots(folders: Sequence[Path]) -> tuple[list[Pilot], str, str]:
    """Scores of finished runs of ``flexp run``, the model's name, and the name of the score.

    Raises:
        ConfigError: a run is not finished, is of a method without cuts, or of another model or score than the first.
        StorageError: a folder holds no run.
    """
    pilots: list[Pilot] = []
    first: tuple[str, str] | None = None
    for folder in folders:
        summary: dict[str, Any] = read_json(folder / "summary.json")
        finished, method = summary.get("finished"), str(summary.get("method"))
        if not finished or METHODS[method].held.part != "ends":  # others' runs say nothing about cuts
            raise ConfigError(
                f"{folder} is no pilot: expected a finished run of a method whose clients keep what their cut says, "
                f"not {method if finished else 'an unfinished one'}"
            )
        what = (Path(str(summary["model"]["id"])).name, str(summary["metric"]))
        first = first or what
        if what != first:
            raise ConfigError(
                f"{folder} is about {what[0]} and {what[1]}, other pilots about {first[0]} and {first[1]}"
            )
        blocks = int(summary["model"]["blocks"])
        left_out = {str(one["name"]) for one in summary.get("dropped") or ()}  # they have trained nothing
        for client in summary["clients"]:
            score = client["last"]["personal"]
            if score is None or client["name"] in left_out:
                continue
            value = float(score) if summary["higher_is_better"] else -math.log(float(score))
            level = f"{client['name']}, seed {summary['seed']}"
            pilots.append(Pilot(level, personal_share(tuple(client["cut"]), blocks), value))
    if first is None or not pilots:
        raise ConfigError("the pilots have no scores; expected folders of finished runs with several cuts")
    return pilots, *first


def fit(pilots: Iterable[Pilot], model: str = "", score: str = "accuracy", resamples: int = 400) -> AccuracyCurve:
    """A monotone curve through pilots' scores.

    Raises:
        ConfigError: they have only one cut.
    """
    given = list(pilots)
    shares = sorted({pilot.share for pilot in given})
    if len(shares) < 2:
        raise ConfigError("the pilots have only one personal share; run them with several values of data.clients.cut")
    seen = _by_level(given)
    paired = {level: own for level, own in seen.items() if len({pilot.share for pilot in own}) > 1}
    if paired and {pilot.share for own in paired.values() for pilot in own} == set(shares):
        seen, how = paired, f"{len(paired)} clients at several cuts each, compared with themselves"
    else:
        paired, how = {}, f"{len(seen)} clients at one cut each: differences between clients are in it"
    curve = _losses(list(seen.values()), shares, own_level=bool(paired))
    levels = list(seen.values())
    random = generator(0, "pilots", "bootstrap")
    drawn = []
    for _ in range(resamples):
        again = [levels[int(index)] for index in random.integers(0, len(levels), len(levels))]
        if {pilot.share for own in again for pilot in own} == set(shares):
            drawn.append(_losses(again, shares, own_level=bool(paired)))
    low, high = np.quantile(np.array(drawn or [curve]), (0.025, 0.975), axis=0)
    counts = [sum(pilot.share == share for own in levels for pilot in own) for share in shares]
    points = [
        CurvePoint(share=share, loss=loss, low=min(a, loss), high=max(b, loss), count=count)
        for share, loss, a, b, count in zip(shares, curve, low.tolist(), high.tolist(), counts, strict=True)
    ]
    note = f"fitted to {sum(counts)} scores of pilot runs ({how})"
    return AccuracyCurve(source="pilots", note=note, model=model, score=score, points=points)


def _by_level(pilots: Iterable[Pilot]) -> dict[str, list[Pilot]]:
    found: dict[str, list[Pilot]] = {}
    for pilot in pilots:
        found.setdefault(pilot.level, []).append(pilot)
    return found


def _losses(levels: Sequence[Sequence[Pilot]], shares: Sequence[float], own_level: bool) -> list[float]:
    """The fitted loss at each share: the better of a falling and a rising curve, beside a level for each client."""
    place = {share: index for index, share in enumerate(shares)}
    who = np.array([index for index, own in enumerate(levels) for _ in own])
    where = np.array([place[pilot.share] for own in levels for pilot in own])
    score = np.array([pilot.score for own in levels for pilot in own])
    weights = np.bincount(where, minlength=len(shares)).astype(float)
    best: tuple[float, np.ndarray] | None = None
    for increasing in (False, True):
        curve, level = np.zeros(len(shares)), np.full(len(levels), score.mean())
        for _ in range(100 if own_level else 1):  # alternating least squares of a convex problem
            residual = score - level[who]
            means = np.bincount(where, residual, minlength=len(shares)) / weights
            before, curve = curve, isotonic_regression(means, weights=weights, increasing=increasing).x
            if own_level:
                level = np.bincount(who, score - curve[where]) / np.bincount(who)
            if np.abs(curve - before).max() < 1e-9:
                break
        error = float(((score - level[who] - curve[where]) ** 2).sum())
        if best is None or error < best[0] - 1e-12:
            best = (error, curve)
    assert best is not None
    return [float(value) for value in best[1].max() - best[1]]
