"""What an exported folder says of itself: ``flexp.json`` for FlexP, and what of it the card shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexp._version import __version__
from flexp.assets.registry import ASSETS, Asset
from flexp.assets.store import PREFIX
from flexp.config import RunConfig
from flexp.data.types import ClientData
from flexp.export.client_folder import ClientFolder, Taken
from flexp.export.saved import SavedRun

FILE = "flexp.json"
SCHEMA = 1
TASK_KEYS = (
    "task", "text", "text_pair", "label", "image", "prompt", "answer", "choices", "template", "max_length",
    "long_texts", "block_length",
)  # fmt: skip
"""Of ``[data]``, what turns rows into examples; where the run's data are is nobody else's business."""


def gather(run: SavedRun, client: ClientData, form: str, dtype: str) -> dict[str, Any]:
    """The facts of one personal model, JSON-ready.

    Args:
        form: ``whole`` or ``adapter``.
        dtype: of the weights in the folder.
    """
    task = run.world.federation.task
    return {
        **described(run.config, form, dtype, task.model_kind, task.label_names),
        "client": client.name,
        "round": run.round,
        "picked_on": run.picked_on,
        "cut": list(run.cut(client.name)),
        "absent": client.name in run.world.absent,
        "train_examples": len(client.train),
        "test_examples": len(client.test),
        "metric": task.metric,
        "scores": {
            "before": run.scored.get(0, {}).get(client.name),
            "after": run.scored.get(run.round, {}).get(client.name),
        },
    }


def of_client(opened: ClientFolder, taken: Taken, form: str, dtype: str) -> dict[str, Any]:
    """The same of a client that took part over a network; a round is so many of its own steps."""
    known, size = opened.facts, opened.config.train.steps_per_round
    scores = {int(record["round"]): record["personal"].get(known["metric"]) for record in opened.records()}
    number, rest = divmod(taken.steps, size)
    before, after = ({"personal": value} if value is not None else None for value in map(scores.get, (0, number)))
    return {
        **described(opened.config, form, dtype, opened.kind, opened.labels),
        "client": opened.client,
        "round": number,
        "steps": taken.steps,
        "picked_on": None,
        "cut": list(taken.cut),
        "absent": False,
        "train_examples": known["train_examples"],
        "test_examples": known["test_examples"],
        "metric": known["metric"],
        "scores": {"before": before, "after": None if rest else after},
    }


def described(config: RunConfig, form: str, dtype: str, kind: str, labels: list[str] | None) -> dict[str, Any]:
    """What the configuration says of a personal model."""
    data = config.data.model_dump(mode="json")
    return {
        "schema": SCHEMA,
        "flexp": __version__,
        "form": form,
        "run": config.name,
        "seed": config.seed,
        "method": config.method.name,
        "rounds": config.train.rounds,
        "kind": kind,
        "tuning": config.model.tuning,
        "lora": config.model.lora.model_dump(mode="json") if config.model.tuning == "lora" else None,
        "dtype": dtype,
        "autocast": config.model.autocast,
        "attention": config.model.attention,
        "labels": labels,
        "data": {key: data[key] for key in TASK_KEYS},
        "model": origin(config.model.id),
        "source": origin(config.data.source),
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
