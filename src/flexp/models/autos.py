"""Which class of transformers a kind of model is, and what its configuration has to say for that."""

from __future__ import annotations

from typing import Any

import transformers

from flexp.kinds import KINDS

AUTO: dict[str, Any] = {kind: getattr(transformers, told.auto) for kind, told in KINDS.items()}


def set_head(config: Any, kind: str) -> None:
    """Tell a model's configuration which loss it has and how many numbers it gives, as far as its kind says that."""
    told = KINDS[kind]
    if told.problem is not None:
        config.problem_type = told.problem
    if told.outputs is not None and config.num_labels != told.outputs:
        config.num_labels = told.outputs
