"""What saved parts of a run belong to: facts that must be the same where they are gone on from, or exported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexp._version import __version__
from flexp.assets.registry import ASSETS, Asset
from flexp.assets.store import PREFIX
from flexp.config import RunConfig
from flexp.errors import ConfigError
from flexp.kinds import ModelKind
from flexp.methods.base import method_of
from flexp.models.stage import Stage

BELONGS = "belongs"  # among the facts of a checkpoint

MUST_MATCH = {
    "fingerprint": "configuration of the model",
    "weights": "pretrained model (its weights differ)",
    "model_kind": "head",
    "labels": "set of labels",
    "method": "method.name",
    "cut": "cut",
    "tuning": "model.tuning",
    "lora": "model.lora",
    "train_embeddings": "model.train_embeddings",
    "dtype": "model.dtype",
    "optimizer": "train.personal.name",
    "shared_optimizer": "train.shared.name",
    "update": "server.update",
    "follow": "method.align.follow",
    "pooling": "model.pooling",
    "pool": "privacy.pool",
    "template": "data.template",
    "max_length": "data.max_length",
}
"""Facts in which what was saved and what goes on from it must agree, and what each is called."""

OLDER = {"follow": False}
"""What older versions did not write, where all of them were so. Other facts that are not written are not compared: what
was saved must find back into its own run."""

SESSION = tuple(key for key in MUST_MATCH if key not in ("cut", "template", "max_length"))
"""Of them, those in which a party and its own snapshots must agree: a cut may move, and whether texts have changed the
data say."""

PRETRAINED = ("fingerprint", "weights")
"""Of them, those that say which pretrained model it is."""

SERVED = (*PRETRAINED, "lora")
"""Of them, those in which a server that trains nothing must agree with what it serves."""

START = ("fingerprint", "weights", "model_kind", "labels", "tuning", "lora", "pooling", "pool")
"""Of them, those that say what the weights mean: in these a file must agree where a newcomer only starts from it."""


def belonging(config: RunConfig, source: Stage, kind: ModelKind, labels: list[str] | None) -> dict[str, Any]:
    """What the states of a run's clients belong to, JSON-ready.

    Args:
        source: of the pretrained model, any part.
    """
    return (
        run_facts(config, labels)
        | source.pretrained
        | {
            "model_kind": kind,
            "train_embeddings": config.model.train_embeddings,
            "optimizer": config.train.personal.name,
            "follow": method_of(config).aligns and config.method.align.follow,
            "pooling": config.model.pooling,
            "pool": config.privacy.pool,
            "template": config.data.template,
            "max_length": config.data.max_length,
        }
    )


def run_facts(config: RunConfig, labels: list[str] | None) -> dict[str, Any]:
    """What an exported model and a backup both say of the run that they are from."""
    return {
        "flexp": __version__,
        "run": config.name,
        "seed": config.seed,
        "model": origin(config.model.id),
        "labels": labels,
        "method": config.method.name,
        "tuning": config.model.tuning,
        "lora": config.model.lora.model_dump(mode="json") if config.model.tuning == "lora" else None,
        "dtype": config.model.dtype,
    }


def origin(name: str) -> dict[str, str | None]:
    """Name, address and licence of a model or of data, as far as the registry of assets knows them.

    Of a local file or folder only its own name is told.
    """
    asset: Asset | None = ASSETS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if asset is not None:
        return {"name": name, "address": asset.source, "licence": asset.licence}
    shown = Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
    return {"name": shown or name, "address": None, "licence": None}


def check_session(
    facts: Mapping[str, Any], there: Mapping[str, Any], folder: Path, keys: Iterable[str] = SESSION
) -> None:
    """Refuse to go on from a snapshot in ``folder`` with another model, tuning or method.

    Args:
        facts: of the snapshot; those of older versions do not say what they belong to.

    Raises:
        ConfigError: see above.
    """
    mend = "set it as it was, or begin anew in another folder"
    check_match(facts.get(BELONGS, {}), there, keys, folder, "this run now", mend)


def check_pretrained(facts: Mapping[str, Any], source: Stage, folder: Path) -> None:
    """Refuse to put what was trained into another pretrained model than it was trained in.

    Raises:
        ConfigError: see above.
    """
    mend = "put the model back as it was"
    check_match(facts.get(BELONGS, {}), source.pretrained, PRETRAINED, folder, "its model.id now", mend)


def check_match(
    saved: Mapping[str, Any], there: Mapping[str, Any], keys: Iterable[str], what: object, where: object, mend: str
) -> None:
    """Refuse what was saved with another of ``keys``, of :data:`MUST_MATCH`, than is there now.

    Args:
        saved: what it belongs to.
        there: what it is to belong to.
        what: the file or folder, for the message; ``where``: what it is not of.
        mend: what to do about it.

    Raises:
        ConfigError: see above.
    """
    known = {**OLDER, **saved}
    for key in keys:
        if key in known and key in there and known[key] != there[key]:
            raise ConfigError(
                f"{what}: was saved with another {MUST_MATCH[key]} than {where} has "
                f"({_short(known[key])}, not {_short(there[key])}); {mend}"
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
