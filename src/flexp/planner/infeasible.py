"""Why a fleet cannot be planned for: which device lacks what, and the smallest change that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexp.errors import ConfigError, ModelError
from flexp.planner.choice import Choice
from flexp.planner.fleet import Device, TaskShape
from flexp.planner.options import Option, in_time
from flexp.planner.problem import Problem
from flexp.planner.solve import solve
from flexp.report.formats import seconds as duration
from flexp.report.formats import size as shown

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


def device_lacks(devices: Sequence[Device], options: Sequence[Option], task: TaskShape, memory: Memory) -> Lack:
    """Why none of ``options`` fits these equal ``devices``."""
    device, names = devices[0], tuple(item.name for item in devices)
    available = device.usable_bytes
    least = min(options, key=lambda option: option.prediction.memory_bytes)
    if least.prediction.memory_bytes > available:
        change = _smallest(task, least.choice, available, memory)
        return Lack(names, "memory", least.prediction.memory_bytes, available, change, device.profile.memory_from)
    fitting = [option for option in options if option.prediction.memory_bytes <= available]
    fastest = min(fitting, key=lambda option: option.prediction.step_seconds)
    assert device.deadline_s is not None
    assert not in_time(fastest, device)
    need = fastest.prediction.step_seconds
    if any(in_time(option, device) for option in options):
        change = "what would be fast enough does not fit its memory: give it more, or a later deadline"
    else:
        change = f"smaller steps (task.batch_size), shorter texts (task.length) or a deadline of {duration(need)}"
    return Lack(names, "time", need, device.deadline_s, change)


def _smallest(task: TaskShape, choice: Choice, available: int, memory: Memory) -> str:
    """The first change of :func:`_changes` that fits, in words."""
    tried = 0
    for change in _changes(task, choice):
        try:
            needed = memory(change.task, change.choice)
        except ModelError:  # not with this model
            continue
        tried += 1
        if needed <= available:
            return f"{change.words} would fit ({shown(needed)})"
    return (
        f"none of {tried} changes (embeddings in their file, checkpointing, smaller batches, LoRA, bfloat16, shorter "
        "texts) would fit: it needs more memory or a smaller model"
    )


def _changes(task: TaskShape, choice: Choice) -> Iterator[Change]:
    """Changes from the smallest on: first what changes no result, then what changes a little, then all of it."""
    light = replace(choice, checkpointing=True)
    single = replace(choice, micro_batch=1, accumulation=task.batch_size)
    both = replace(single, checkpointing=True)
    lean = task.model_copy(update={"embeddings": "file"})
    may_lean = lean != task and not task.train_embeddings and task.kind != "image-classification"
    if may_lean:
        yield Change(lean, choice, 'embeddings that stay in their file (task.embeddings = "file")')
    if not choice.checkpointing:
        yield Change(task, light, "checkpointing (choices.checkpointing = [true])")
    for size in range(choice.micro_batch - 1, 0, -1):
        if task.batch_size % size == 0:
            small = replace(choice, micro_batch=size, accumulation=task.batch_size // size)
            yield Change(task, small, f"micro-batches of {size} (choices.micro_batches = [{size}])")
    if choice != both:
        yield Change(task, both, "checkpointing and micro-batches of 1")
    if may_lean:
        yield Change(lean, both, 'embeddings in their file (task.embeddings = "file") and micro-batches of 1')
    lengths = [length for length in (task.length // 2, task.length // 4, task.length // 8) if length >= 8]
    text = task.kind != "image-classification"
    for length in lengths if text else ():
        shorter = task.model_copy(update={"length": length})
        yield Change(shorter, both, f"texts of {length} tokens (task.length = {length})")
    ranks = [rank for rank in (task.rank, 4, 1) if choice.rank is None or rank < choice.rank]
    lora = task.model_copy(update={"tuning": "lora", "train_embeddings": False})
    for rank in dict.fromkeys(ranks):
        yield Change(lora, replace(both, rank=rank), f'LoRA of rank {rank} (task.tuning = "lora", task.rank = {rank})')
    half = lora.model_copy(update={"dtype": "bfloat16"})
    for rank in dict.fromkeys([choice.rank or task.rank, 1]):
        words = f'LoRA of rank {rank} in bfloat16 (task.dtype = "bfloat16")'
        if task.dtype != "bfloat16":
            yield Change(half, replace(both, rank=rank), words)
        for length in lengths if text else ():
            shorter = half.model_copy(update={"length": length})
            yield Change(shorter, replace(both, rank=rank), f"{words} on texts of {length} tokens")


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
