"""Do the baselines reach what a benchmark of personalized federated learning has published?

FlexP's own method classes on PFLlib's image task (Zhang et al., JMLR 2025, arXiv 2312.04992): Fashion-MNIST, its
4-layer CNN, its clients (:mod:`benchmarks.tools.pictures`), all of them in every round, one local epoch, batches of 10
and plain SGD with rate 0.005. A round's score is the share of all clients' test pictures that their own models get
right, which weights clients by their test pictures, as there. Published is the best of 2,000 rounds, picked on test
data, as the mean of three runs; the last round is not published.

The classes are the package's; only how long a turn is is said here: an epoch of the client's data, however many steps
that is. What differs from the benchmark: the last batch of an epoch, smaller than 10, is used rather than dropped, and
initial weights and batches are other draws.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.tools.command import Result, Threads, say
from benchmarks.tools.pictures import Pictures, Rule, divide, federation, read_pictures, small_cnn
from flexp.config import RunConfig
from flexp.data.scores import evaluate
from flexp.errors import ConfigError, StorageError
from flexp.methods import METHODS, World
from flexp.methods.base import Method, OnStep
from flexp.methods.federated import Client, Federated
from flexp.methods.harness import Weights
from flexp.methods.local import Local
from flexp.run.store import Store

PUBLISHED: dict[Rule, dict[str, tuple[float, float]]] = {
    "dirichlet": {
        "fedavg": (85.85, 0.19),
        "fedprox": (85.63, 0.57),
        "per-fedavg": (95.10, 0.10),
        "pfedme": (97.25, 0.17),
        "ditto": (97.47, 0.04),
        "apfl": (97.25, 0.08),
        "fedper": (97.44, 0.06),
        "fedrep": (97.56, 0.04),
    },
    "pathological": {
        "fedavg": (80.41, 0.08),
        "fedprox": (78.08, 0.15),
        "per-fedavg": (99.18, 0.08),
        "pfedme": (99.35, 0.14),
        "ditto": (99.44, 0.06),
        "apfl": (99.41, 0.02),
        "fedper": (99.47, 0.03),
        "fedrep": (99.56, 0.03),
    },
}
"""Accuracy in percent on Fashion-MNIST, mean and standard deviation of three runs: the benchmark's own page, 2024."""

NAMES = ("local", "fedavg", "fedper", "fedrep", "ditto", "pfedme")
"""The methods whose turn is known here."""

_OWN: dict[str, dict[str, Any]] = {
    # The benchmark's: λ = 15, K = 5 (its authors' advice and default), η = the learning rate.
    "pfedme": {"lam": 15.0, "inner_steps": 5, "eta": 0.005, "beta": 1.0},
    "ditto": {"lam": 0.1},  # not published
}
# pFedMe's inner solver there: its own rate, and a weight decay that is fixed in its optimiser.
_SGD: dict[str, dict[str, float]] = {"pfedme": {"lr": 0.01, "weight_decay": 0.001}}

COLUMNS = ("method", "rounds", "best (round)", "last", "published: best of 2,000", "best − published")


class EpochTurns(Federated):
    """Put before a method of the federated kind: its turn is one epoch of the client's own data."""

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        worker = next(iter(client.workers.values()))
        self.per_round = _epoch(len(worker.data.train), worker.config.batch_size)
        self.evaluations()  # where a method divides a round's steps, it does so here
        return super().turn(client, received, number, on_step)


class LocalEpochs(Local):
    """Local training, an epoch a round."""

    def train_round(self, number: int, on_step: OnStep) -> None:
        for trainer in self.clients.values():
            for _ in range(_epoch(len(trainer.data.train), self.world.config.train.batch_size)):
                on_step(trainer.step())


def make_method(world: World) -> Method:
    """The package's method of the world's name, with turns of an epoch."""
    name = world.config.method.name
    if name == "local":
        return LocalEpochs(world)
    kind = METHODS[name]
    assert isinstance(kind, type)
    made: Method = type(f"Epoch{kind.__name__}", (EpochTurns, kind), {})(world)
    return made


def settings(method: str, rounds: int, seed: int) -> RunConfig:
    """The benchmark's settings of ``method`` as FlexP writes them.

    Raises:
        ConfigError: the method's turn is not known here.
    """
    if method not in NAMES:
        raise ConfigError(f"--method {method}: expected one of {', '.join(NAMES)}")
    sgd = {"name": "sgd", "lr": 0.005, "clip": None} | _SGD.get(method, {})
    own = {method: _OWN[method]} if method in _OWN else {}
    return RunConfig.model_validate(
        {
            "seed": seed,
            "model": {"id": "small-cnn"},
            "data": {"source": "pictures", "task": "image-classification"},
            "train": {"rounds": rounds, "steps_per_round": 1, "batch_size": 10, "personal": sgd},
            "method": {"name": method, "budget": "paper", **own},
            "evaluation": {"batch_size": 250},
        }
    )


def score(method: Method, world: World) -> dict[str, float]:
    """``accuracy``: of all clients' test pictures; ``mean_accuracy``: every client counts the same. In percent."""
    right, everything, shares = 0.0, 0, []
    for client in world.federation.clients:
        found = evaluate(method.personal(client.name), world.federation.task, client.test, 250, extras=False)
        right += found["accuracy"] * found["n"]
        everything += len(client.test)
        shares.append(found["accuracy"])
    return {"accuracy": 100.0 * right / everything, "mean_accuracy": 100.0 * sum(shares) / len(shares)}


def measure(
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with the four files of Fashion-MNIST or MNIST, or asset:digits. Default: where Debian's "
            "package dataset-fashion-mnist puts them."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Again for each; default: all that can run.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Epochs of every client.")] = 10,
    every: Annotated[int, typer.Option(min=1, help="Score after every so many rounds.")] = 1,
    partition: Annotated[
        str, typer.Option(help="dirichlet (0.1) or pathological (two labels a client).")
    ] = "dirichlet",
    clients: Annotated[int, typer.Option(min=1, help="The published figures are of 20.")] = 20,
    seed: Annotated[int, typer.Option(help="Of initial weights and batches; the clients stay.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for scores and states; a run that is there already is gone on with.")
    ] = None,
    threads: Threads = 1,
) -> Result:
    """The baselines on PFLlib's image task, beside the accuracy that it published.

    Of each method: best and last accuracy, that of every scored round, seconds of computing, and best − published.
    """
    if partition not in PUBLISHED:
        raise ConfigError(f"--partition {partition}: expected dirichlet or pathological")
    rule: Rule = partition
    configs = [settings(name, rounds, seed) for name in methods or NAMES]
    torch.set_num_threads(threads)
    pictures = read_pictures(data)
    data_of_all = federation(pictures, divide(pictures.labels, clients, rule))
    published = PUBLISHED[rule] if _is_published(pictures, clients) else {}
    found = []
    for config in configs:
        name = config.method.name
        classes = len(data_of_all.task.label_names or ())
        world = World(config, data_of_all, small_cnn(seed, side=pictures.pixels.shape[1], classes=classes), {})
        facts = {"data": pictures.name, "pictures": len(pictures.labels), "rule": rule, "clients": clients}
        head = {"method": name, **facts, "seed": seed, "settings": _identity(config)}
        log = _Log(out, name, head)
        _train(make_method(world), world, log, rounds, every)
        found.append(_row(name, log.lines, published.get(name)))
    sizes = [len(client.train) for client in data_of_all.clients]
    facts = {"data": pictures.name, "rule": rule, "clients": clients, "sizes": sizes, "seed": seed, "rows": found}
    rows = []
    for row in found:
        given, gap = row["published"], row["difference"]
        rows.append([
            row["method"], str(row["rounds"]), f"{row['best']:.2f} ({row['best_round']})", f"{row['last']:.2f}",
            "–" if given is None else f"{given[0]:.2f} ± {given[1]:.2f}", "–" if gap is None else f"{gap:+.2f}",
        ])  # fmt: skip
    return Result(facts, rows, COLUMNS, [f"{pictures.name}, {rule}; accuracy in %"])


def _train(method: Method, world: World, log: _Log, rounds: int, every: int) -> None:
    done = log.restore(method)
    seconds = log.lines[-1]["seconds"] if log.lines else 0.0
    for number in range(done + 1, rounds + 1):
        began = time.process_time()
        method.train_round(number, lambda step: None)
        if number % every == 0 or number == rounds:
            line = {"method": world.config.method.name, "round": number, **score(method, world)}
            seconds += time.process_time() - began
            log.add(line | {"seconds": round(seconds, 1)}, method)
            say(f"{line['method']} round {number}: {line['accuracy']:.2f} % ({seconds:.0f} s)")
        else:
            seconds += time.process_time() - began
    method.close()


class _Log:
    """The scores of one method as JSON lines, and its last state beside them; in memory alone without a folder."""

    def __init__(self, out: Path | None, name: str, head: dict[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self.path = None if out is None else out / f"{name}.jsonl"
        self.states = None if out is None else Store(out / name)
        if self.path is None:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        first, *rest = self.path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != json.loads(json.dumps(head)):
            raise StorageError(f"{self.path} is of another experiment; choose another folder with --out")
        self._head, self.lines = first, [json.loads(line) for line in rest if line.endswith("}")]

    def restore(self, method: Method) -> int:
        """Give ``method`` the last state that was saved; returns its round, after which no scores stay."""
        number = 0
        if self.states is not None:
            self.states.claim()
            number = max(self.states.numbers(), default=0)
        if self.states is not None and number:
            method.load(self.states.load(number))
        self.lines = [line for line in self.lines if line["round"] <= number]
        if self.path is not None:
            kept = [self._head, *(json.dumps(line) for line in self.lines)]
            self.path.write_text("\n".join(kept) + "\n", encoding="utf-8")
        return number

    def add(self, line: dict[str, Any], method: Method) -> None:
        self.lines.append(line)
        if self.path is not None and self.states is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.states.save(line["round"], method.state())


def _row(name: str, lines: list[dict[str, Any]], published: tuple[float, float] | None) -> dict[str, Any]:
    best = max(lines, key=lambda line: float(line["accuracy"]))
    return {
        "method": name,
        "rounds": lines[-1]["round"],
        "best": best["accuracy"],
        "best_round": best["round"],
        "last": lines[-1]["accuracy"],
        "last_mean": lines[-1]["mean_accuracy"],
        "curve": [[line["round"], line["accuracy"]] for line in lines],
        "seconds": lines[-1]["seconds"],
        "published": published,
        "difference": None if published is None else best["accuracy"] - published[0],
    }


def _is_published(pictures: Pictures, clients: int) -> bool:
    """Whether these may be Fashion-MNIST, whole: the published figures are of nothing else."""
    counts = torch.bincount(torch.from_numpy(pictures.labels))
    return clients == 20 and counts.tolist() == [7000] * 10


def _identity(config: RunConfig) -> dict[str, Any]:
    """What two runs must share for one to go on from the other: all but the number of rounds."""
    content = config.resolved()
    return {"optimizer": content["train"]["personal"], "method": content["method"].get(config.method.name, {})}


def _epoch(examples: int, batch: int) -> int:
    return -(-examples // batch)
