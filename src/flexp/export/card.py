"""What an exported folder says of itself: ``flexp.json`` for FlexP, and the card for a person who finds it.

Of the card names are written as they are: nothing in them is markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexp._version import __version__
from flexp.assets.registry import ASSETS, Asset
from flexp.assets.store import PREFIX
from flexp.config import RunConfig
from flexp.kinds import KINDS
from flexp.models.heads import AUTO
from flexp.report import formats

FILE = "flexp.json"
SCHEMA = 1
TASK_KEYS = (
    "task", "text", "text_pair", "label", "label_separator", "image", "prompt", "answer", "choices", "template",
    "max_length", "long_texts", "block_length",
)  # fmt: skip
"""Of ``[data]``, what turns rows into examples; where the run's data are is nobody else's business."""

_UNKNOWN = "not known to FlexP; see where it came from"


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
        "data": {key: data[key] for key in TASK_KEYS},
        "source": origin(config.data.source),
    }


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


def card(facts: Mapping[str, Any]) -> str:
    """The content of ``README.md``; ``facts`` are those of ``flexp.json``."""
    adapter = facts["form"] == "adapter"
    lines = [
        *_front(facts, adapter),
        f"# Personal model of {plain(facts['client'])}",
        "",
        f"Made by FlexP {facts['flexp']} from a pretrained model and one client's own data, with the method "
        f"{facts['method']} ({plain(facts['run'])}, seed {facts['seed']}, after round {facts['round']} of "
        f"{facts['rounds']}).{_picked(facts)}{_absent(facts)}",
        "",
        "| | |",
        "|---|---|",
        f"| pretrained model | {_named(facts['model'])} |",
        f"| its licence | {plain(facts['model']['licence'] or _UNKNOWN)} |",
        f"| data | {_named(facts['source'])} |",
        f"| their licence | {plain(facts['source']['licence'] or _UNKNOWN)} |",
        f"| private examples | {facts['train_examples']} to train, {facts['test_examples']} to test |",
        f"| cut | {formats.cut(facts['cut'])}: a split leaves the blocks [s, e) to the server |",
        f"| trained | {_tuning(facts)} |",
        f"| weights | {facts['dtype']}, {'a peft adapter' if adapter else 'the whole model'} |",
        *([f"| labels | {', '.join(plain(label) for label in facts['labels'])} |"] if facts["labels"] else []),
        "",
        *_scores(facts),
        "## Use",
        "",
        *_use(facts, adapter),
        "",
        "## Limits",
        "",
        "It was trained on few examples of one client and is meant for that client. A model may give away some of the "
        "data that it was trained on: whoever may not see these should not get it.",
        "",
    ]
    return "\n".join(lines)


def plain(text: Any) -> str:
    """Text in which nothing is markup, on one line."""
    shown = str(text).encode("utf-8", "replace").decode("utf-8")
    shown = re.sub(r"[\s\x00-\x1f\x7f]+", " ", shown).strip()
    return re.sub(r"([\\`*_{}\[\]<>()#|!~&$])", r"\\\1", shown)


def _front(facts: Mapping[str, Any], adapter: bool) -> list[str]:
    address = str(facts["model"]["address"] or "")
    base = address.removeprefix("https://huggingface.co/") if address else None
    licence = str(facts["model"]["licence"] or "").lower()
    return [
        "---",
        f"library_name: {'peft' if adapter else 'transformers'}",
        f"pipeline_tag: {KINDS[facts['kind']].pipeline}",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        *([f"license: {licence}"] if re.fullmatch(r"[a-z0-9.-]+", licence) else []),
        "tags: [flexp, personalized-federated-learning]",
        "---",
        "",
    ]


def _named(origin: Mapping[str, str | None]) -> str:
    return plain(origin["name"]) + (f" ({origin['address']})" if origin["address"] else "")


def _picked(facts: Mapping[str, Any]) -> str:
    if facts["picked_on"] is None or facts["round"] == facts["rounds"]:
        return ""
    if facts["picked_on"] == "test":
        return " That round was the best on **test data**, so its scores flatter."
    return " That round was the best on validation data."


def _absent(facts: Mapping[str, Any]) -> str:
    return " The client took no part in training: its device could not hold it." if facts["absent"] else ""


def _tuning(facts: Mapping[str, Any]) -> str:
    lora = facts["lora"]
    how = (
        "all weights of the blocks and the head"
        if lora is None
        else f"LoRA, rank {lora['rank']}, alpha {lora['alpha']:g}"
    )
    mixed = f", matrix products in {facts['autocast']}" if facts["autocast"] != "off" else ""
    return how + mixed


def _scores(facts: Mapping[str, Any]) -> list[str]:
    after, before, metric = facts["scores"]["after"], facts["scores"]["before"], str(facts["metric"])
    if not after:
        return ["It was not scored after this round.", ""]
    rows = []
    for side, name in (("personal", "the client's own"), ("global", "everybody's")):
        earlier = (before or {}).get(side)
        rows.append(f"| {name} | {formats.score(earlier, metric)} | {formats.score(after.get(side), metric)} |")
    return [f"| {formats.inside(metric)} on test data | pretrained | this model |", "|---|---|---|", *rows, ""]


def _use(facts: Mapping[str, Any], adapter: bool) -> list[str]:
    auto, image = AUTO[facts["kind"]].__name__, KINDS[facts["kind"]].images
    processor = "AutoImageProcessor" if image else "AutoTokenizer"
    own = facts.get("pooling", "checkpoint") != "checkpoint"
    trust = ", trust_remote_code=True" if own else ""
    if not adapter:
        code = [
            f"from transformers import {auto}, {processor}",
            "",
            f'model = {auto}.from_pretrained("FOLDER"{trust})',
        ]
    else:
        code = [
            "from peft import PeftModel",
            f"from transformers import AutoConfig, {auto}, {processor}",
            "",
            'config = AutoConfig.from_pretrained("FOLDER")  # with the labels',
            f'base = {auto}.from_pretrained("PRETRAINED", config=config, ignore_mismatched_sizes=True)',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    length = "" if image else f"Texts were cut at {facts['data']['max_length']} tokens."
    if own:
        length += (
            f" Its head is one linear layer on the pooled last hidden states ({facts['pooling']}), which no "
            "architecture of transformers computes: `pooled.py` beside the weights does, and `trust_remote_code=True` "
            "lets it."
        )
    code += [f'processor = {processor}.from_pretrained("FOLDER")']
    return ["```python", *code, "```", *(["", length] if length else [])]
