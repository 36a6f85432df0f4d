"""Why a fleet cannot be planned for: which device lacks what, and the smallest change that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexp.cost.choice import Choice
from flexp.errors import ConfigError, ModelError
from flexp.kinds import KINDS
from flexp.planner.fleet import Device, TaskShape
from flexp.planner.options import Option, fits_memory, in_time
from flexp.planner.problem import Problem
from flexp.planner.solve import solve
from flexp.report.formats import seconds as duration
from flexp.report.formats import size as shown

FLEET = {
    "embeddings": 'task.embeddings = "file"',
    "checkpointing": "choices.checkpointing = [true]",
    "micro_batch": "choices.micro_batches = [{}]",
    "batch_size": "task.batch_size",
    "length": "task.length",
    "lora": 'task.tuning = "lora", task.rank = {}',
    "bfloat16": 'task.dtype = "bfloat16"',
}
"""What changes are called in a fleet's file; :data:`RUN`: in a run's."""
RUN = {
    "embeddings": 'model.embeddings = "file"',
    "checkpointing": "model.gradient_checkpointing = true",
    "micro_batch": "train.micro_batch = {}",
    "batch_size": "train.batch_size",
    "length": "data.max_length",
    "lora": 'model.tuning = "lora", model.lora.rank = {}',
    "bfloat16": 'model.dtype = "bfloat16"',
}

Memory = Callable[[TaskShape, Choice], int]
"""The client's peak for a choice when the task is another one."""


@dataclass(frozen=True)
class Change:
    """Another task or choice, and what it is called."""

    task: TaskShape
    choice: Choice
    words: str


@dataclass(frozen=True)
class Lack:
    """What is missing on some equal devices; ``needed`` and ``available`` in bytes or seconds, as ``what`` says.

    ``limit``: which limit of memory it is, where one was measured.
    """

    devices: tuple[str, ...]
    what: str
    needed: float
    available: float
    change: str
    limit: str = ""

    def words(self) -> str:
        """One line."""
        names = self.devices[0] if len(self.devices) == 1 else f"{self.devices[0]} and {len(self.devices) - 1} like it"
        if self.what == "memory":
            of_limit = "" if self.limit in ("", "device class") else f" of {self.limit}"
            return (
                f"{names}: needs {shown(self.needed)} at the least, may use {shown(self.available)}{of_limit} "
                f"({shown(self.needed - self.available)} short); {self.change}"
            )
        return (
            f"{names}: its fastest step takes {duration(self.needed)}, its deadline is {duration(self.available)}; "
            f"{self.change}"
        )


class InfeasibleError(ConfigError):
    """No plan exists; ``lacks`` say why, device by device (empty: it is the server that lacks something)."""

    def __init__(self, lacks: Sequence[Lack], message: str) -> None:
        super().__init__(message)
        self.lacks = tuple(lacks)


def device_lacks(
    devices: Sequence[Device], options: Sequence[Option], task: TaskShape, memory: Memory, keys: Mapping[str, str]
) -> Lack:
    """Why none of ``options`` fits these equal ``devices``; ``keys``: :data:`FLEET` or :data:`RUN`."""
    device, names = devices[0], tuple(item.name for item in devices)
    available = device.usable_bytes
    least = min(options, key=lambda option: option.prediction.memory_bytes)
    if least.prediction.memory_bytes > available:
        limit = device.profile.memory_from
        may_map = "RLIMIT_AS" not in limit  # which counts the whole map of a file
        change = _smallest(task, least.choice, available, memory, keys, may_map)
        return Lack(names, "memory", least.prediction.memory_bytes, available, change, limit)
    fitting = [option for option in options if fits_memory(option, device)]
    if not fitting:  # of those that the GPU can hold none fits the machine that it is in
        host = min(option.prediction.host_bytes for option in options
                   if option.prediction.memory_bytes <= available)  # fmt: skip
        change = "the weights are loaded there before they go to its GPU: give it more, or a smaller model"
        return Lack(names, "memory", host, int(device.usable_host_bytes), change, "the machine itself")
    fastest = min(fitting, key=lambda option: option.prediction.step_seconds)
    assert device.deadline_s is not None
    assert not in_time(fastest, device)
    need = fastest.prediction.step_seconds
    if any(in_time(option, device) for option in options):
        change = "what would be fast enough does not fit its memory: give it more, or a later deadline"
    else:
        batch, length = keys["batch_size"], keys["length"]
        change = f"smaller steps ({batch}), shorter texts ({length}) or a deadline of {duration(need)}"
    return Lack(names, "time", need, device.deadline_s, change)


def _smallest(
    task: TaskShape, choice: Choice, available: int, memory: Memory, keys: Mapping[str, str], may_map: bool
) -> str:
    """The first change of :func:`_changes` that fits, in words."""
    tried = lean = 0
    for change in _changes(task, choice, keys, may_map):
        try:
            needed = memory(change.task, change.choice)
        except ModelError:  # not with this model
            continue
        tried, lean = tried + 1, lean + (change.task.embeddings != task.embeddings == "memory")
        if needed <= available:
            return f"{change.words} would fit ({shown(needed)})"
    kinds = "embeddings in their file, checkpointing" if lean else "checkpointing"
    return (
        f"none of {tried} changes ({kinds}, smaller batches, LoRA, bfloat16, shorter texts) would fit: it needs more "
        "memory or a smaller model"
    )


def _changes(task: TaskShape, choice: Choice, keys: Mapping[str, str], may_map: bool) -> Iterator[Change]:
    """Changes from the smallest on: first what changes no result, then what changes a little, then all of it.

    Each comes once more with embeddings in their file, which changes no result, where they may be there.
    """
    own = Change(task, choice, "")
    for change in (own, *_lossless(task, choice, keys), *_lossy(task, choice, keys)):
        if change is not own:
            yield change
        other = change.task
        loaded = other.embeddings == "memory" and other.dtype == task.dtype  # the file has but one type
        if may_map and loaded and not other.train_embeddings and not KINDS[other.kind].images:
            words = f"{change.words} and embeddings" if change.words else "embeddings that stay"
            lean = other.model_copy(update={"embeddings": "file"})
            yield Change(lean, change.choice, f"{words} in their file ({keys['embeddings']})")


def _lossless(task: TaskShape, choice: Choice, keys: Mapping[str, str]) -> Iterator[Change]:
    both = _lightest(task, choice)
    if not choice.checkpointing:
        yield Change(task, replace(choice, checkpointing=True), f"checkpointing ({keys['checkpointing']})")
    for size in range(choice.micro_batch - 1, 0, -1):
        if task.batch_size % size == 0:
            small = replace(choice, micro_batch=size, accumulation=task.batch_size // size)
            yield Change(task, small, f"micro-batches of {size} ({keys['micro_batch'].format(size)})")
    if choice != both:
        yield Change(task, both, "checkpointing and micro-batches of 1")


def _lossy(task: TaskShape, choice: Choice, keys: Mapping[str, str]) -> Iterator[Change]:
    both = _lightest(task, choice)
    lengths = [length for length in (task.length // 2, task.length // 4, task.length // 8) if length >= 8]
    text = not KINDS[task.kind].images
    for length in lengths if text else ():
        shorter = task.model_copy(update={"length": length})
        yield Change(shorter, both, f"texts of {length} tokens ({keys['length']} = {length})")
    ranks = [rank for rank in (task.rank, 4, 1) if choice.rank is None or rank < choice.rank]
    lora = task.model_copy(update={"tuning": "lora", "train_embeddings": False})
    for rank in dict.fromkeys(ranks):
        yield Change(lora, replace(both, rank=rank), f"LoRA of rank {rank} ({keys['lora'].format(rank)})")
    half = lora.model_copy(update={"dtype": "bfloat16", "embeddings": "memory", "blocks": "memory"})
    for rank in dict.fromkeys([choice.rank or task.rank, 1]):
        words = f"LoRA of rank {rank} in bfloat16 ({keys['bfloat16']})"
        if task.dtype != "bfloat16":
            yield Change(half, replace(both, rank=rank), words)
        for length in lengths if text else ():
            shorter = half.model_copy(update={"length": length})
            yield Change(shorter, replace(both, rank=rank), f"{words} on texts of {length} tokens")


def _lightest(task: TaskShape, choice: Choice) -> Choice:
    """``choice`` with everything that saves memory and changes no result."""
    return replace(choice, micro_batch=1, accumulation=task.batch_size, checkpointing=True)


def server_lacks(problem: Problem, name: str) -> InfeasibleError:
    """Why no plan of ``problem``, in which every device has options, keeps what clients share."""
    if solve(replace(problem, server_memory=2**62)) is not None:
        least = problem.measure(_each(problem, _left_to_the_server))
        return InfeasibleError(
            (),
            f"{name}: its server has {shown(problem.server_memory)}, which no plan keeps to; with the deepest cuts it "
            f"needs {shown(least.server_memory_bytes)}; give it more, or allow smaller micro-batches or deeper cuts",
        )
    busy = problem.measure(_each(problem, lambda option: option.prediction.server_seconds)).server_seconds
    deadline = min(group.deadline_s for group in problem.groups if group.deadline_s is not None)
    return InfeasibleError(
        (),
        f"{name}: its server needs at least {duration(busy / problem.slots)} for a step of everybody, later than the "
        f"earliest deadline of {duration(deadline)}; give it more slots or speed, or later deadlines",
    )


def _left_to_the_server(option: Option) -> tuple[int, int]:
    return option.choice.cut[1] - option.choice.cut[0], option.prediction.server_memory_bytes


def _each(problem: Problem, key: Callable[[Option], Any]) -> list[dict[int, int]]:
    """Everybody takes the option with the least ``key``."""
    return [{group.options.index(min(group.options, key=key)): len(group.clients)} for group in problem.groups]
