"""The shipped fleets keep their plans, of a model configured as MiniLM; planning needs no weights."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import transformers

from flexp.planner.model import ModelCosts
from flexp.planner.plan import make_plan
from flexp.run.planned import load_fleet

from .tools import counted_on_tensors

FLEETS = Path(__file__).parents[2] / "experiments/fleets"
# Cuts, exchanges and memory are those of when whole activations crossed. Now only rows that are read cross down: bytes
# are 2·8·128·384·2 + 2·8·384·2 + 2·8·128 (z and its gradient; h and its; mask and flags) and seconds follow.
# (cut, micro-batch): how many clients; seconds of a round, bytes of a step, all clients' memory, objective
PLANS = {
    "heterogeneous": ({((1, 6), 8): 13}, 3.759484469116349, 1587200, 1953750136, 1.65),
    "laptops": ({((1, 6), 8): 8}, 0.39041070986439247, 1587200, 1202307776, 1.65),
    "phones-and-laptops": ({((1, 6), 8): 30}, 1.5766787822763266, 1587200, 4508654160, 1.65),
    "sentiment": ({((1, 6), 8): 8}, 0.9745092840607592, 811520, 832786384, 1.65),
    "thousand": (
        {((1, 6), 4): 131, ((1, 6), 2): 868, ((1, 6), 1): 1}, 1.3455985021538122, 1587200, 116942590160, 1.82738907,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("fleets") / "minilm"
    transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", PLANS)
def test_a_shipped_fleet_keeps_its_plan(model: str, name: str) -> None:
    fleet = load_fleet(FLEETS / f"{name}.toml")
    with nullcontext() if name == "heterogeneous" else counted_on_tensors():
        plan = make_plan(fleet, ModelCosts(model, fleet.task, fleet.choices, fleet.server))
    options = plan.solution.options.values()
    choices, seconds, size, memory, objective = PLANS[name]
    assert Counter((option.choice.cut, option.choice.micro_batch) for option in options) == choices
    assert not any(option.choice.checkpointing for option in options)
    assert plan.measures.round_seconds == pytest.approx(seconds)
    assert plan.measures.bytes == size
    assert sum(option.prediction.memory_bytes for option in options) == memory
    assert plan.measures.objective == pytest.approx(objective)
