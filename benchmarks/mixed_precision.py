"""What computing matrix products in bfloat16 saves on this machine.

Steps of the whole model in float32 and with ``model.autocast = "bfloat16"`` alternate in one process, on equal batches.
Predicted: 0.6 of the time where the processor knows bfloat16 (products two to four times as fast, but every step casts
the weights anew, and dropout, norms and the optimiser stay as they are); more than 1 where it does not.
"""

from __future__ import annotations

from benchmarks.tools.command import Examples, Kind, Length, Model, Pairs, Result, Threads, fetched
from benchmarks.tools.paired import paired
from benchmarks.tools.parties import Parties, Step, parties
from flexp.client.personal import WholeModel
from flexp.models.loading import AUTOCAST


def measure(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    pairs: Pairs = 20,
    examples: Examples = 8,
    length: Length = 32,
    threads: Threads = 2,
) -> Result:
    """A step with matrix products in bfloat16 ÷ one in float32; full tuning of the whole model."""
    here = parties(fetched(model, threads), kind, examples=examples, length=length)
    timed = paired(_step(here, "off"), _step(here, "bfloat16"), pairs)
    facts = {"model": model, "batch": [examples, length], "pairs": pairs}
    return Result(facts | timed.facts("float32", "mixed"), timed.rows("float32", "mixed"))


def _step(here: Parties, autocast: str) -> Step:
    stage = here.whole()
    stage.autocast = AUTOCAST[autocast]
    return here.step(stage, WholeModel(stage).train())
