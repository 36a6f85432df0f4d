"""FlexP: flexible personalized split federated fine-tuning of transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexp._version import __version__

if TYPE_CHECKING:
    from flexp.client.callback import TrainerCallback
    from flexp.client.generation import SplitGenerator
    from flexp.client.pretrained import (
        SplitModelForCausalLM,
        SplitModelForImageClassification,
        SplitModelForMultiLabelClassification,
        SplitModelForQuestionAnswering,
        SplitModelForRegression,
        SplitModelForSequenceClassification,
        SplitModelForTokenClassification,
    )
    from flexp.links.grpc import connect, serve
    from flexp.server import Server

_HOMES = {
    "Server": "flexp.server",
    "SplitGenerator": "flexp.client.generation",
    "SplitModelForCausalLM": "flexp.client.pretrained",
    "SplitModelForImageClassification": "flexp.client.pretrained",
    "SplitModelForMultiLabelClassification": "flexp.client.pretrained",
    "SplitModelForQuestionAnswering": "flexp.client.pretrained",
    "SplitModelForRegression": "flexp.client.pretrained",
    "SplitModelForTokenClassification": "flexp.client.pretrained",
    "SplitModelForSequenceClassification": "flexp.client.pretrained",
    "TrainerCallback": "flexp.client.callback",
    "connect": "flexp.links.grpc",
    "serve": "flexp.links.grpc",
}

__all__ = [
    "Server",
    "SplitGenerator",
    "SplitModelForCausalLM",
    "SplitModelForImageClassification",
    "SplitModelForMultiLabelClassification",
    "SplitModelForQuestionAnswering",
    "SplitModelForRegression",
    "SplitModelForSequenceClassification",
    "SplitModelForTokenClassification",
    "TrainerCallback",
    "__version__",
    "connect",
    "serve",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first asked for: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flexp' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    if name.startswith("SplitModel"):
        found.plan_cut = staticmethod(_plan_cut)
        found.write = staticmethod(_write)
    return found


def _plan_cut(*args: Any, **kwargs: Any) -> tuple[int, int]:
    """For ``from_pretrained(cut="auto")``: clients are below the planner and do not know it."""
    from flexp.planner.model import own_cut

    return own_cut(*args, **kwargs)


def _write(*args: Any, **kwargs: Any) -> None:
    """For ``save_pretrained``: clients are below export, too."""
    from flexp.export.live import save

    save(*args, **kwargs)


def __dir__() -> list[str]:
    return sorted(__all__)
