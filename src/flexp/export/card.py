"""What an exported folder says of itself: ``flexp.json`` for FlexP, and the card for a person who finds it.

Of the card names are written as they are: nothing in them is markup.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flexp.config import RunConfig
from flexp.kinds import KINDS
from flexp.models.heads import AUTO
from flexp.report import formats
from flexp.run.belonging import origin, run_facts

FILE = "flexp.json"
SCHEMA = 1
TASK_KEYS = (
    "task", "text", "text_pair", "label", "label_separator", "image", "prompt", "answer", "choices", "template",
    "max_length", "long_texts", "block_length",
)  # fmt: skip
"""Of ``[data]``, what turns rows into examples; where the run's data are is nobody else's business."""


def described(config: RunConfig, form: str, dtype: str, kind: str, labels: list[str] | None) -> dict[str, Any]:
    """What the configuration says of a personal model, JSON-ready.

    Args:
        form: ``whole`` or ``adapter``.
        dtype: of the weights in the folder.
    """
    data = config.data.model_dump(mode="json")
    return run_facts(config, labels) | {
        "schema": SCHEMA,
        "form": form,
        "rounds": config.train.rounds,
        "kind": kind,
        "dtype": dtype,
        "autocast": config.model.autocast,
        "attention": config.model.attention,
        "pooling": config.model.pooling,
        # In the run's scores; nothing leaves an exported model that could be covered.
        "noise": config.privacy.noise or None,
        "data": {key: data[key] for key in TASK_KEYS},
        "source": origin(config.data.source),
    }


def card(facts: Mapping[str, Any]) -> str:
    """The content of ``README.md``; ``facts`` are those of ``flexp.json``."""
    head = KINDS[facts["kind"]]
    address, licence = str(facts["model"]["address"] or ""), str(facts["model"]["licence"] or "").lower()
    more = {
        "adapter": facts["form"] == "adapter",
        "head": head,
        "auto": AUTO[facts["kind"]].__name__,
        "processor": "AutoImageProcessor" if head.images else "AutoTokenizer",
        "base": json.dumps(address.removeprefix("https://huggingface.co/")) if address else "",
        "licence": licence if re.fullmatch(r"[a-z0-9.-]+", licence) else "",
        "own_head": facts.get("pooling", "checkpoint") != "checkpoint",
    }
    return _cards().get_template("card.md.j2").render(**facts, **more)


@functools.cache
def _cards() -> Environment:
    made = Environment(
        loader=PackageLoader("flexp.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
    )
    made.filters |= {function.__name__: function for function in (formats.cut, formats.inside, formats.score)}
    return made


def plain(text: Any) -> str:
    """Text in which nothing is markup, on one line."""
    shown = str(text).encode("utf-8", "replace").decode("utf-8")
    shown = re.sub(r"[\s\x00-\x1f\x7f]+", " ", shown).strip()
    return re.sub(r"([\\`*_{}\[\]<>()#|!~&$])", r"\\\1", shown)
