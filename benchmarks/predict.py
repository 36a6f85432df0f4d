"""Predicted against measured: peak memory and step time, over architectures and cuts.

Models of random weights, large enough for a step to take half a second, are written to a temporary folder. This machine
is profiled on each (:mod:`flexp.cost.measure`), which looks at two blocks and at a client of cut (1, L); every cut
that is then compared is another one. Memory is the peak of a client in a process of its own
(:mod:`flexp.cost.probe`). Time is a whole step in one process, client and server without a network, and the
client's alone, with a link that answers at once: the shortest of several, of the process's own seconds. Expected: all
within 15 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, cast

import torch
import transformers
import typer

from benchmarks.tools.command import Examples, Result, Threads, Tuning, say
from benchmarks.tools.parties import Parties, parties, probe, random_model
from flexp.cost.choice import Choice
from flexp.cost.echo import client_model
from flexp.cost.measure import clock, flops_per_second, measure_model
from flexp.cost.model_cost import model_cost
from flexp.cost.predict import predict
from flexp.cost.probe import measure as peak
from flexp.cost.profile import Profile
from flexp.errors import ConfigError

VOCABULARY = 4096
COLUMNS = ("model", "cut", "peak memory, MB", "client's step, ms", "client + server, ms")
UNITS = {"memory_bytes": 1e-6, "client_seconds": 1e3, "seconds": 1e3}
"""What is predicted, and in what unit it is shown; ``seconds``: of client and server."""

MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert": (
        "sequence-classification",
        lambda: transformers.BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, vocab_size=VOCABULARY
        ),
    ),
    "llama": (
        "causal-lm",
        lambda: transformers.LlamaConfig(
            hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5, num_key_value_heads=5,
            vocab_size=VOCABULARY, max_position_embeddings=512, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        ),
    ),
    "gpt2": (
        "causal-lm",
        lambda: transformers.GPT2Config(
            n_embd=256, n_layer=12, n_head=4, vocab_size=VOCABULARY, n_positions=512, bos_token_id=0, eos_token_id=0
        ),
    ),
}  # fmt: skip
"""Kind and configuration of what is measured, by name."""


def cuts_of(blocks: int) -> list[tuple[int, int]]:
    """Five cuts from shallow to deep, none of them the one that a profile measures."""
    return [(1, blocks - 1), (2, blocks), (blocks // 2, blocks - 1), (blocks - 3, blocks - 2), (blocks - 1, blocks)]


def measure(
    models: Annotated[
        list[str] | None, typer.Option("--model", help="bert, llama or gpt2; again for each. Default: all.")
    ] = None,
    examples: Examples = 8,
    length: Annotated[int, typer.Option(min=2)] = 64,
    tuning: Tuning = "full",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Checkpoint the client's blocks.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Steps, of which the shortest counts.")] = 10,
    threads: Threads = 1,
) -> Result:
    """Predicted against measured: a client's peak memory and a step's time, for five cuts of three architectures."""
    for name in models or ():
        if name not in MODELS:
            raise ConfigError(f"--model {name}: expected one of {', '.join(MODELS)}")
    torch.set_num_threads(threads)
    rank = 8 if tuning == "lora" else None
    found = [row for name in models or MODELS for row in _model(name, examples, length, rank, checkpointing, repeats)]
    worst = {key: max(abs(error(row[key])) for row in found) for key in UNITS}
    facts = {
        "batch": [examples, length], "tuning": tuning, "checkpointing": checkpointing, "rows": found, "worst": worst
    }  # fmt: skip
    rows = []
    for row in found:
        pairs = [(unit * row[key][0], unit * row[key][1], error(row[key])) for key, unit in UNITS.items()]
        cells = [f"{predicted:.0f}, {measured:.0f} ({100 * off:+.1f} %)" for predicted, measured, off in pairs]
        rows.append([row["model"], f"{row['cut'][0]}:{row['cut'][1]}/{row['blocks']}", *cells])
    notes = ["predicted, measured (error)", "largest errors: " + ", ".join(f"{100 * w:.1f} %" for w in worst.values())]
    return Result(facts, rows, COLUMNS, notes)


def error(pair: Sequence[float]) -> float:
    """(predicted − measured) ÷ measured."""
    return (pair[0] - pair[1]) / pair[1]


def _model(
    name: str, examples: int, length: int, rank: int | None, checkpointing: bool, repeats: int
) -> Iterator[dict[str, Any]]:
    kind, configuration = MODELS[name]
    with random_model(kind, configuration()) as folder:
        cost = model_cost(folder, kind, length=length)
        devices = {}
        for role in ("client", "server"):
            measured = measure_model(cost, role=cast(Any, role), examples=examples, rank=rank, repeats=repeats)
            device = Profile.from_class("laptop", role=cast(Any, role))
            devices[role] = device.model_copy(update={"measured": [measured], "flops": flops_per_second(measured)})
        for cut in cuts_of(cost.blocks):
            choice = Choice(cut, examples, checkpointing=checkpointing, rank=rank)
            predicted = predict(cost, devices["client"], choice, devices["server"])
            here = parties(
                folder, kind, f"{cut[0]}:{cut[1]}", examples=examples, length=length,
                tuning="full" if rank is None else "lora", lora={"rank": rank or 8},
                gradient_checkpointing=checkpointing,
            )  # fmt: skip
            asked = probe(here.model, kind, cut, examples, length)
            alone, together = _seconds(here, client_model(asked, here.client_stage()).train(), repeats)
            row: dict[str, Any] = {
                "model": name, "blocks": cost.blocks, "cut": list(cut),
                "memory_bytes": [predicted.memory_bytes, peak(asked).peak],
                "client_seconds": [predicted.client_seconds, alone],
                "seconds": [predicted.client_seconds + predicted.server_seconds, together],
            }  # fmt: skip
            say(f"{name} {cut}: " + ", ".join(f"{key} {error(row[key]):+.1%}" for key in UNITS))
            yield row


def _seconds(here: Parties, model: Any, repeats: int) -> tuple[float, float]:
    """Of a client's step with an echo for a server, and of one with a server in this process: in turn."""
    steps, now = (here.step(model.stage, model), here.split_step()), clock(torch.device("cpu"))
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 2):
        for step, seconds in zip(steps, found, strict=True):
            began = now()
            step()
            if number >= 2:
                seconds.append(now() - began)
    return min(found[0]), min(found[1])
