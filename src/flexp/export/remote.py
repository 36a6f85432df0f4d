"""Exporting the personal model of a client that is not on the server's machine.

The client has its own parts and the pretrained model; the shared blocks come from the server, one at a time. One block,
or the ends of the model, is written before the next is begun: the tensors of no more than one are ever in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flexp.errors import LinkError, ModelError
from flexp.export.adapter import write_adapter
from flexp.export.client_folder import ClientFolder, Taken
from flexp.export.facts import of_client
from flexp.export.fetching import ChangedError, Fetched, check_names
from flexp.export.folder import DTYPES, Form, check_target, ready, writing
from flexp.export.whole import fill, let_go
from flexp.files import write_json
from flexp.links.base import Link
from flexp.links.opening import connected
from flexp.models.parts import Part
from flexp.models.stage import Stage

TRIES = 3
"""How often all shared blocks are fetched when they are updated meanwhile."""
INDEX = "model.safetensors.index.json"
FILE_BYTES = 256 << 20
"""Of one file, at most; a larger tensor has one of its own. Writing takes as much memory again."""


def export_remote(
    opened: ClientFolder,
    connect: Callable[[str], Link],
    out: Path,
    form: Form = "whole",
    dtype: str | None = None,
    which: str = "last",
) -> dict[str, Any]:
    """Write the personal model of a client into the new folder ``out``.

    Args:
        connect: gives a link of the client that is named to the running server.
        form: ``whole``, adapters merged into the weights; or ``adapter``, without the base model.
        dtype: of the weights; ``None``: as they were trained.
        which: the snapshot (:meth:`ClientFolder.taken`).

    Returns:
        The facts of the model, as ``flexp.json`` has them.

    Raises:
        ConfigError: ``out`` is taken, there is no such type, or the model has no adapter.
        LinkError: the server does not give its blocks, or they are updated all the time.
        StorageError: no snapshot is whole, or the disk cannot be written; nothing is left in ``out``.
    """
    check_target(out, dtype)
    taken = opened.taken(which)
    processor = ready(opened.processor(), opened.kind)
    facts = of_client(opened, taken, form, dtype or opened.config.model.dtype)
    work = _Export(opened, taken, processor, None if dtype is None else DTYPES[dtype])
    with connected(connect(opened.client)) as link, writing(out, opened.config.model.id, processor, facts) as part:
        if form == "adapter":
            work.adapter(part, link)
        else:
            work.whole(part, link)
    return facts


class _Export:
    def __init__(self, opened: ClientFolder, taken: Taken, processor: Any, dtype: torch.dtype | None) -> None:
        self.opened, self.taken, self.processor, self.dtype = opened, taken, processor, dtype
        lora = opened.config.model.lora
        self.scaling = lora.alpha / lora.rank
        self.blocks = opened.blocks
        self.shared = range(*taken.cut)

    def whole(self, folder: Path, link: Link) -> None:
        """The ends, then every block, each a shard; and their index."""
        stage = self._stage(Part(frozenset(), ends=True))
        fetched = Fetched(link, self.opened, self.taken, stage)
        shards = _Shards(folder)
        shards.write(0, self._filled(stage, self._own(stage, None)), settings=True)
        let_go(stage.model)
        for index in range(self.blocks):
            if index not in self.shared:
                self._block(shards, index, None)

        def middle() -> None:
            for index in self.shared:
                self._block(shards, index, fetched)

        of_one_version(fetched, middle)
        shards.finish()

    def _block(self, shards: _Shards, index: int, fetched: Fetched | None) -> None:
        stage = self._stage(Part(frozenset([index]), ends=False))
        if fetched is None:
            weights = self._own(stage, index)
        else:
            weights = fetched.block(index)
            check_names(weights, stage.model, index)
        shards.write(index + 1, self._filled(stage, weights))
        let_go(stage.model)

    def _own(self, stage: Stage, block: int | None) -> dict[str, Tensor]:
        return self.taken.personal(lambda name: stage.block_of(name) == block)

    def adapter(self, folder: Path, link: Link) -> None:
        """All adapters are one small file; peft tries them block by block."""
        first = self._stage(Part(frozenset([0]), ends=True))
        fetched = Fetched(link, self.opened, self.taken, first)
        weights = self.taken.personal()

        def middle() -> None:
            for index in self.shared:
                weights.update(fetched.block(index))

        of_one_version(fetched, middle)
        if self.dtype is not None:
            weights = {name: value.to(self.dtype) for name, value in weights.items()}
        lora, base = self.opened.config.model.lora, self.opened.model_id
        write_adapter(folder, first, weights, lora, self.opened.kind, base, self._parts())
        first.model.config.save_pretrained(folder)

    def _parts(self) -> Iterator[Stage]:
        for index in range(self.blocks):
            stage = self._stage(Part(frozenset([index]), ends=True))
            yield stage
            let_go(stage.model)

    def _stage(self, part: Part) -> Stage:
        return self.opened.stage(part, self.processor)

    def _filled(self, stage: Stage, weights: Mapping[str, Tensor]) -> Any:
        try:
            return fill(stage.model, weights, self.scaling, self.dtype)
        except (AttributeError, KeyError, RuntimeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{self.opened.folder}: weights do not fit this model ({first})") from error


class _Shards:
    """Files of one model, as transformers names and indexes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[int, Path] = {}

    def write(self, number: int, model: Any, settings: bool = False) -> None:
        """Save what is there of ``model``, under the names that transformers gives; once more, if need be.

        Args:
            settings: and the model's configuration with it.
        """
        place = self._parts[number] = self.folder / f"part-{number}"
        shutil.rmtree(place, ignore_errors=True)
        model.save_pretrained(place, max_shard_size=FILE_BYTES)
        for file in place.glob("*.json"):
            if settings and not file.name.endswith(".index.json"):
                file.replace(self.folder / file.name)

    def finish(self) -> None:
        """Give all files their names, and write their index."""
        files = [file for _, place in sorted(self._parts.items()) for file in sorted(place.glob("*.safetensors"))]
        places: dict[str, str] = {}
        size = 0
        for number, old in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            with safe_open(old, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                places |= dict.fromkeys(slices, name)
                size += sum(map(_bytes, slices.values()))
            old.replace(self.folder / name)
        for place in self._parts.values():
            shutil.rmtree(place)
        write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _bytes(entry: Any) -> int:
    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}.get(entry.get_dtype(), 1)
    size = width
    for length in entry.get_shape():
        size *= length
    return size


def of_one_version(fetched: Fetched, work: Callable[[], None]) -> None:
    """Run ``work``, which fetches all shared blocks, until they were of one version.

    Raises:
        LinkError: they never were.
    """
    for _ in range(TRIES):
        fetched.begin()
        try:
            work()
        except ChangedError:
            continue
        return
    raise LinkError(
        f"the shared blocks were updated each of the {TRIES} times that they were fetched, so others are training; "
        "export when the run rests or is over"
    )
