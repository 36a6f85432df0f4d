"""How numbers are written for people: one place, so that the terminal, Markdown and HTML agree."""

from __future__ import annotations

MISSING = "–"
HUGE = 1e9
"""From here on a number is written with a power of ten, so that it stays within its column."""

_NAMES = {"n": "Examples", "auc": "AUC", "rmse": "RMSE", "mae": "MAE", "r2": "R²"}


def name(metric: str) -> str:
    """What a table calls it: ``Accuracy``, ``Micro F1``, ``RMSE``."""
    return _NAMES.get(metric) or metric.capitalize().replace("_", " ").replace("f1", "F1")


def inside(metric: str) -> str:
    """The same within a sentence: ``accuracy``, ``micro F1``, ``RMSE``."""
    text = name(metric)
    return text[0].lower() + text[1:] if text[1:2].islower() else text


def score(value: float | None, metric: str) -> str:
    """An accuracy or an F1 as percent (``0.8391`` → ``83.9 %``), any other metric as a plain number (``24.2``)."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f} %" if is_fraction(metric) else number(value)


def change(before: float | None, after: float | None, metric: str) -> str:
    """The signed difference: percentage points for accuracy (``+4.1``), plain otherwise."""
    if before is None or after is None:
        return MISSING
    difference = after - before
    text = f"{100 * difference:+.1f}" if is_fraction(metric) else _written(difference, _decimals(difference), "+")
    return text.replace("-", "−") if text.strip("+-0.") else "±0"


def interval(mean: float | None, half: float | None, metric: str, note: str = "") -> str:
    """A mean and half its interval with equal decimals: ``83.9 ± 1.2 %``, ``24.2 ± 0.3``; ``note`` in brackets.

    A loss has three decimals at least.
    """
    if mean is None:
        return MISSING
    scale, unit = (100, " %") if is_fraction(metric) else (1, "")
    decimals = 1 if is_fraction(metric) else _enough(max(_decimals(mean), 3 if metric == "loss" else 0), half)
    spread = "" if half is None else f" ± {_written(scale * half, decimals, ',')}"
    return f"{_written(scale * mean, decimals, ',')}{spread}{unit}" + (f" ({note})" if note else "")


def difference(mean: float | None, half: float | None, metric: str, note: str = "") -> str:
    """A signed difference and half its interval, accuracies in points: ``+4.1 ± 1.0``; ``note`` in brackets."""
    if mean is None:
        return MISSING
    scale = 100 if is_fraction(metric) else 1
    decimals = 1 if is_fraction(metric) else _enough(_decimals(max(abs(mean), half or 0.0)), half)
    size = _written(abs(scale * mean), decimals, ",")
    sign = "" if not size.strip("0.") else "−" if mean < 0 else "+"
    spread = "" if half is None else f" ± {_written(scale * half, decimals, ',')}"
    return f"{sign}{size}{spread}" + (f" ({note})" if note else "")


def pair(before: float | None, after: float | None, metric: str) -> str:
    """``63.2 → 83.9 %``; the unit is written once."""
    if before is None:
        return score(after, metric)
    return f"{score(before, metric).removesuffix(' %')} → {score(after, metric)}"


def is_fraction(metric: str) -> bool:
    """Whether the metric lies in 0..1 and is shown as percent."""
    return metric.endswith(("accuracy", "f1", "exact_match", "precision", "recall"))


def number(value: float) -> str:
    """Three or four significant figures, thousands separated: ``24.2``, ``0.0312``, ``12,431``, ``1.24e+89``."""
    return _written(value, _decimals(value), ",")


def size(count: float | None) -> str:
    """Bytes in decimal units: ``512 B``, ``1.23 MB``, ``45.6 GB``."""
    if count is None:
        return MISSING
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0 or value >= 99.95:
        return f"{value:.0f} {units[unit]}"
    return f"{value:.1f} {units[unit]}" if value >= 9.995 else f"{value:.2f} {units[unit]}"


def seconds(value: float | None) -> str:
    """``0.42 s``, ``38 s``, ``12 min 05 s``, ``3 h 20 min``."""
    if value is None:
        return MISSING
    if value < 9.95:
        return f"{value:.2g} s" if value < 0.995 else f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def left(value: float) -> str:
    """``38 s left``; nothing in the last second, where a guess says no more."""
    return f"{seconds(value)} left" if value >= 1 else ""


def count(value: float | None) -> str:
    """A count with a short unit when it is large: ``940``, ``12,300``, ``22.7 M``, ``1.50 G``."""
    if value is None:
        return MISSING
    if value < 1e5:
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            scaled = value / unit
            return f"{scaled:.{_decimals(scaled)}f} {name}"
    raise AssertionError  # 1e5 and more has a unit


def plural(number: int, noun: str) -> str:
    """``1 client``, ``8 clients``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def cut(value: tuple[int, int] | list[int] | None) -> str:
    """A cut as the papers write it: ``(1, 6)``."""
    return MISSING if value is None else f"({value[0]}, {value[1]})"


def _written(value: float, decimals: int, sign: str) -> str:
    """With so many ``decimals``; ``sign`` as of a format: ``,`` or ``+``. A huge number has a power of ten instead."""
    return f"{value:{sign.strip(',')}.2e}" if abs(value) >= HUGE else f"{value:{sign}.{decimals}f}"


def _decimals(value: float) -> int:
    magnitude = abs(value)
    if magnitude >= 99.95:
        return 0
    if magnitude >= 9.995:
        return 1
    return 2 if magnitude >= 0.0995 else 4


def _enough(decimals: int, half: float | None) -> int:
    """More decimals, four at most, where half an interval would else be written as zero."""
    while half and decimals < 4 and not f"{half:.{decimals}f}".strip("0."):
        decimals += 1
    return decimals
