"""What splitting costs when nothing has to travel.

Whole and split steps alternate in one process on equal batches, so that the ratio does not depend on how busy the
machine is. Predicted: 1.00–1.02, since every block does the same work and a plan costs less than a millisecond.
"""

from __future__ import annotations

from benchmarks.tools.command import Cut, Dtype, Examples, Kind, Length, Model, Pairs, Result, Threads, Tuning, fetched
from benchmarks.tools.paired import paired
from benchmarks.tools.parties import parties
from flexp.config import OptimizerConfig


def measure(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    cut: Cut = None,
    pairs: Pairs = 20,
    tuning: Tuning = "full",
    dtype: Dtype = "float32",
    examples: Examples = 8,
    length: Length = 64,
    threads: Threads = 2,
) -> Result:
    """Split step ÷ whole step, in one process."""
    here = parties(
        fetched(model, threads), kind, cut, examples=examples, length=length, tuning=tuning, dtype=dtype,
        optimizer=OptimizerConfig(clip=None),
    )  # fmt: skip
    whole = here.whole()
    timed = paired(here.step(whole, whole.model.train()), here.split_step(), pairs)
    facts = {
        "model": model, "cut": list(here.cut), "tuning": tuning, "dtype": dtype, "batch": [examples, length],
        "pairs": pairs,
    }  # fmt: skip
    return Result(facts | timed.facts("whole", "split"), timed.rows("whole", "split"))
