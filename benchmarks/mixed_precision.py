"""``python -m benchmarks mixed-precision``: what computing matrix products in bfloat16 saves on this machine.

Steps of the whole model in float32 and with ``model.autocast = "bfloat16"`` alternate in one process, on equal batches.
Predicted: 0.6 of the time where the processor knows bfloat16 (products two to four times as fast, but every step casts
the weights anew, and dropout, norms and the optimiser stay as they are); more than 1 where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from benchmarks.paired import paired
from flexp.client.whole import WholeModel
from flexp.config import ModelConfig, OptimizerConfig
from flexp.cost.echo import random_batch
from flexp.cost.probe import Probe
from flexp.machine import machine
from flexp.models.loading import DTYPES, ModelKind, load_stage
from flexp.models.parts import Part
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.optim import Updater


def mixed_precision(
    model: str,
    kind: str = "sequence-classification",
    *,
    examples: int = 8,
    length: int = 32,
    pairs: int = 20,
) -> dict[str, Any]:
    """Time ``pairs`` of steps (forward, backward, update) with full tuning, in float32 and mixed in turn.

    Returns:
        ``ratio``: the median of mixed ÷ float32 over the pairs, with its quartiles and the seconds of either.
    """
    labels = None if kind == "causal-lm" else ["a", "b"]
    source = load_stage(model, cast(ModelKind, kind), labels=labels, pad_token_id=0)
    batch = random_batch(Probe(model, kind, None, examples, length, labels, {}, {}), source.model.config)
    plain, mixed = (_step(source, autocast, batch) for autocast in ("off", "bfloat16"))
    timed = paired(plain, mixed, pairs)
    return {
        "bench": "mixed-precision",
        "model": model,
        "batch": [examples, length],
        "pairs": pairs,
        "ratio": timed.ratio,
        "ratio_quartiles": timed.quartiles,
        "float32_seconds": timed.first,
        "mixed_seconds": timed.second,
        "machine": machine(),
    }


def _step(source: Stage, autocast: str, batch: dict[str, Any]) -> Callable[[], None]:
    stage = carve(source, Part.whole(source.anatomy.blocks))
    stage.autocast = DTYPES.get(autocast)
    tune(stage, ModelConfig(id="any"))
    updater = Updater(stage.trainable(), OptimizerConfig())
    model = WholeModel(stage).train()

    def step() -> None:
        model(**batch).loss.backward()
        updater.step()

    return step
