"""A network in the query of a link's URL: ``grpc://clinic-a@HOST:PORT?latency=25ms&up=20mbit&down=20mbit``."""

from __future__ import annotations

import math
import re
from typing import Any
from urllib.parse import parse_qsl

from flexp.errors import ConfigError
from flexp.links.emulated import Network

_UNITS = {"s": 1.0, "ms": 1e-3, "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_KEYS = {
    "latency": ("latency_s", ("s", "ms")),
    "jitter": ("jitter_s", ("s", "ms")),
    "up": ("uplink_bps", ("bit", "kbit", "mbit", "gbit")),
    "down": ("downlink_bps", ("bit", "kbit", "mbit", "gbit")),
    "loss": ("loss", ("",)),
    "seed": ("seed", ("",)),
}


def split_url(url: str) -> tuple[str, Network | None]:
    """A URL without its query, and the network that the query describes, if there is one.

    ``latency`` (one way) and ``jitter`` in s or ms, ``up`` and ``down`` in bit, kbit, mbit or gbit a second, ``loss``
    as a probability of each message, ``seed`` as a whole number.

    Raises:
        ConfigError: a key or a value is none of these.
    """
    address, asked, query = url.partition("?")
    if not asked:
        return url, None
    values: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in _KEYS:
            raise ConfigError(f"the link's network has no {key!r}; expected {', '.join(_KEYS)}")
        name, units = _KEYS[key]
        values[name] = _value(key, text, units)
    return address, Network(**values)


def _value(key: str, text: str, units: tuple[str, ...]) -> float | int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", text)
    value = float(match[1]) * _UNITS.get(match[2], 1.0) if match and match[2] in units else math.nan
    if key == "seed" and value == value and value.is_integer():
        return int(value)
    if not value >= 0 or key == "seed" or (key == "loss" and value > 1) or (key in ("up", "down") and not value):
        what = {"loss": "a probability", "seed": "a whole number"}.get(key, f"a number with {' or '.join(units)}")
        raise ConfigError(f"the link's network has {key} = {text!r}, expected {what}, as in {_EXAMPLES[key]}")
    return value


_EXAMPLES = {
    "latency": "latency=25ms", "jitter": "jitter=5ms", "up": "up=20mbit", "down": "down=20mbit", "loss": "loss=0.001",
    "seed": "seed=1",
}  # fmt: skip
