"""What the seconds between a client's messages tell beyond the lengths of its texts: of words, and of labels.

The best case for who looks: one text a message, a network and a server that take no time, and of the client's seconds
the processor's alone, so that nothing else of its machine is in them. Each text is sent again and again, and what is
left of its seconds beside the other texts of its length is asked for two things: whether it comes again (or nothing of
a text is in it), and whether it tells the label.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.tools.command import Result, Threads, say
from flexp.attacks.labels import area
from flexp.client.exchange import Piece
from flexp.config.loading import load
from flexp.cost.echo import EchoLink
from flexp.links.declaring import Request
from flexp.links.messages import BackwardRequest, ForwardRequest
from flexp.methods.parties import split_model
from flexp.models.anatomy import Part
from flexp.run.settle import settle_client

DEMO = str(files("flexp.run") / "demo.toml")
DRAWN = 2000


class Timed(EchoLink):
    """Knows when a message went, in seconds of the processor."""

    def call(self, request: Request[Any]) -> Future[Any]:
        if isinstance(request, ForwardRequest | BackwardRequest):
            self.at = time.process_time()
        found = super().call(request)
        self.answered = time.process_time()
        return found


def measure(
    config: Annotated[str, typer.Option(help="A run's configuration; the default is the demo's.")] = DEMO,
    client: Annotated[str, typer.Option(help="Whose texts.")] = "amazon-a",
    passes: Annotated[int, typer.Option(min=4, help="Over its training texts.")] = 8,
    threads: Threads = 1,
) -> Result:
    """What the seconds between a client's messages tell of its words and labels, beyond lengths."""
    torch.set_num_threads(threads)
    setup = settle_client(load(Path(config)), client, None)
    stage = setup.load(Part.client(setup.cut, setup.run.blocks))
    link = Timed(setup.run.blocks, stage.model.config.hidden_size, setup.cut[0])
    task, texts = setup.run.federation.task, setup.data.train
    model = split_model(setup.config, stage, setup.cut, link, task.model_kind, codec=None).train()
    batches = [task.collate([text]) for text in texts]
    draw, seconds_PN = np.random.default_rng(0), np.zeros((passes, len(texts)))
    for number in range(-1, passes):  # the first warms up
        for index in draw.permutation(len(texts)):
            seconds_PN[max(number, 0), index] = _seconds(model, link, batches[index])
        say(f"pass {number + 1} of {passes}")
    lengths = np.array([len(text["input_ids"]) for text in texts])
    labels = np.array([int(text["labels"]) for text in texts])
    return _told(seconds_PN, lengths, labels)


def _seconds(model: Any, link: Timed, batch: dict[str, Any]) -> float:
    """From h's coming to ∂task/∂h's going, and from its answer's coming to the end of the step: the client's own."""
    with model.part_of_step(Piece()):
        loss = model(**batch).loss
        before = link.answered
        torch.autograd.backward(loss)
        own = link.at - before + time.process_time() - link.answered
    for value in model.parameters():
        value.grad = None
    return own


def _told(seconds_PN: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> Result:
    own_PN, kept = np.log(seconds_PN), np.zeros(len(lengths), dtype=bool)
    spread = own_PN.mean(0).var()
    for length in np.unique(lengths):
        some = lengths == length
        kept |= some & (some.sum() > 1)
        own_PN[:, some] -= own_PN[:, some].mean(1, keepdims=True)
    left_PN, labels = own_PN[:, kept], labels[kept]
    halves = left_PN[::2].mean(0), left_PN[1::2].mean(0)
    again = float(np.corrcoef(*halves)[0, 1])
    mean_N, draw = left_PN.mean(0), np.random.default_rng(1)
    auc = _auc(mean_N, labels)
    chance = sorted(_auc(mean_N, draw.permutation(labels)) for _ in range(DRAWN))[int(0.95 * DRAWN)]
    by_chance = sorted(
        abs(float(np.corrcoef(halves[0], draw.permutation(halves[1]))[0, 1])) for _ in range(DRAWN)
    )[int(0.95 * DRAWN)]  # fmt: skip
    by_length = 1 - float(mean_N.var() / spread)
    facts = {
        "texts": int(kept.sum()),
        "by_length": by_length,
        "again": again,
        "again_by_chance": by_chance,
        "auc": auc,
        "auc_by_chance": chance,
    }
    rows = [
        ["texts, of whose length there are others", str(facts["texts"])],
        ["of the seconds' variance their lengths explain", f"{100 * by_length:.1f} %"],
        ["what is left comes again: correlation of two halves of the passes", f"{again:.2f} (chance: {by_chance:.2f})"],
        ["what is left tells the label: AUC", f"{auc:.2f} (chance: {chance:.2f})"],
    ]
    return Result(facts, rows, notes=["chance: exceeded by 5 % of 2,000 permutations."])


def _auc(told_N: np.ndarray, labels_N: np.ndarray) -> float:
    yes, no = (torch.from_numpy(told_N[labels_N == label]) for label in (1, 0))
    found = area(yes, no)
    return max(found, 1 - found)
