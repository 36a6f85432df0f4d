"""Exporting the personal model of a client that is not on the server's machine.

The client has its own parts and the pretrained model; the shared blocks come from the server, one at a time. One block,
or the ends of the model, is written before the next is begun: the tensors of no more than one are ever in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexp.client.taking import fetched
from flexp.config import CodecConfig
from flexp.errors import LinkError, LinkLostError, ModelError
from flexp.export.adapter import write_adapter
from flexp.export.client_folder import ClientModel
from flexp.export.whole import fill, let_go
from flexp.files import write_json
from flexp.links.asking import FetchRequest
from flexp.links.base import Link, ask
from flexp.links.messages import Join
from flexp.links.opening import connected
from flexp.models.anatomy import Part
from flexp.models.fingerprint import fingerprint, read_header
from flexp.models.pooling import pool_before, saved_as
from flexp.models.stage import Stage
from flexp.run.settle import model_folder

if TYPE_CHECKING:
    from flexp.export.live import LiveModel

TRIES = 3
"""How often all shared blocks are fetched when they are updated meanwhile."""
INDEX = "model.safetensors.index.json"
FILE_BYTES = 256 << 20
"""Of one file, at most; a larger tensor has one of its own. Writing takes as much memory again."""


def write_remote(folder: Path, model: ClientModel, form: str, dtype: torch.dtype | None = None) -> None:
    """Write the weights and the configuration of a client's model into ``folder``.

    Args:
        form: ``whole``, adapters merged into the weights; or ``adapter``, without the base model.
        dtype: of the weights; ``None``: as they were trained.

    Raises:
        ConfigError: no server was named, or the model has no adapter.
        LinkError: the server does not give its blocks, or they are updated all the time.
        StorageError: no checkpoint is whole.
    """
    with connected(model.reach()) as link:
        write_with(folder, model, link, form, dtype)


def write_with(
    folder: Path, model: ClientModel | LiveModel, link: Link, form: str, dtype: torch.dtype | None = None
) -> None:
    """The same over a link that is there; raises as :func:`write_remote` does."""
    work = _Export(model, dtype)
    if form == "adapter":
        work.adapter(folder, link)
    else:
        work.whole(folder, link)


class _Export:
    def __init__(self, client: ClientModel | LiveModel, dtype: torch.dtype | None) -> None:
        self.client, self.dtype = client, dtype
        lora = client.config.model.lora
        self.scaling = lora.alpha / lora.rank
        self.blocks, self.shared = client.blocks, range(*client.cut)

    def whole(self, folder: Path, link: Link) -> None:
        """The ends, then every block, each a shard; and their index."""
        stage = self.client.stage(Part(frozenset(), ends=True))
        with closing(Fetched(link, self.client, stage)) as fetched:
            shards = _Shards(folder)
            ends = self._filled(stage, self._own(stage, None))
            if self.client.config.privacy.pool:
                pool_before(ends, stage.anatomy.path, self.client.cut[0])
            shards.write(0, ends, settings=True)
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
        stage = self.client.stage(Part(frozenset([index]), ends=False))
        if fetched is None:
            weights = self._own(stage, index)
        else:
            weights = fetched.block(index)
            check_names(weights, stage.model, index)
        shards.write(index + 1, self._filled(stage, weights))
        let_go(stage.model)

    def _own(self, stage: Stage, block: int | None) -> dict[str, Tensor]:
        return self.client.personal(lambda name: stage.block_of(name) == block)

    def adapter(self, folder: Path, link: Link) -> None:
        """All adapters are one small file; peft tries them block by block."""
        first = self.client.stage(Part(frozenset([0]), ends=True))
        weights = self.client.personal()
        with closing(Fetched(link, self.client, first)) as fetched:

            def middle() -> None:
                for index in self.shared:
                    weights.update(fetched.block(index))

            of_one_version(fetched, middle)
        if self.dtype is not None:
            weights = {name: value.to(self.dtype) for name, value in weights.items()}
        lora, base = self.client.config.model.lora, model_folder(self.client.config)
        write_adapter(folder, first, weights, lora, self.client.kind, base, self._parts())
        first.model.config.save_pretrained(folder)

    def _parts(self) -> Iterator[Stage]:
        for index in range(self.blocks):
            stage = self.client.stage(Part(frozenset([index]), ends=True))
            yield stage
            let_go(stage.model)

    def _filled(self, stage: Stage, weights: Mapping[str, Tensor]) -> Any:
        try:
            return fill(stage.model, weights, self.scaling, self.dtype)
        except (AttributeError, KeyError, RuntimeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{self.client.folder}: weights do not fit this model ({first})") from error


class ChangedError(LinkError):
    """The shared blocks were updated in the middle."""


class Fetched:
    """Joins a server as the client that it is, without a model, and asks for blocks.

    Args:
        stage: any part of the client's model, as it is in the server's eyes.

    Raises:
        LinkError: the server refuses this client.
    """

    def __init__(self, link: Link, client: ClientModel | LiveModel, stage: Stage) -> None:
        self._given = self._link = link
        self._client = client
        config = client.config
        self.version: int | None = None
        self._join = Join(
            client=link.client,
            fingerprint=fingerprint(stage.model.config),
            cut=client.cut,
            dtype=str(stage.model.dtype),
            tuning=config.model.tuning,
            align=config.method.align,
            lora=config.model.lora,
            weights=stage.weights,
            autocast=stage.autocast_name,
            quantization=stage.quantization,
            numbering=client.numbering or 0,
            codec=CodecConfig(),
        )
        self._trained = ask(link, self._join).trained

    def close(self) -> None:
        """Close a link that was made in the middle."""
        if self._link is not self._given:
            self._link.close()

    def begin(self) -> None:
        """Whatever version comes next is the one that all blocks must have."""
        self.version = None

    def block(self, index: int) -> dict[str, Tensor]:
        """The trained weights of one block, by their names in the model; none, if the server trains none.

        Raises:
            ChangedError: they are of another version than the blocks before.
            LinkError: the server does not give them, or does not have what this client has trained with.
        """
        found: dict[str, Tensor] = {}
        for left in reversed(range(TRIES)):
            try:
                for reply in fetched(self._link, FetchRequest(index), found):
                    if self.version is None:
                        self.version = reply.version
                    if reply.version != self.version:
                        raise ChangedError(f"the shared blocks went from version {self.version} to {reply.version}")
                    self._check_trained(reply.version, reply.total)
                    found |= reply.weights
                break
            except LinkLostError:
                if not left or not isinstance(self._client, ClientModel):
                    raise
                self._link.close()
                self._link = self._client.reach()
                before, self._trained = self._trained, ask(self._link, self._join).trained
                if self._trained != before:
                    raise ChangedError("another server answers, which has other weights") from None
                # and go on with what is missing
        return found

    def _check_trained(self, version: int, total: int) -> None:
        server, steps = self._client.config.server, self._client.steps or 0
        sure = 1 if server.update == "every" else server.mean_over
        if version == 0 and total and steps >= sure:
            raise LinkError(
                f"the server's shared blocks were never updated, and this client has done {steps} steps: start the "
                "server with the run's --state"
            )


def check_names(weights: dict[str, Tensor], model: Any, index: int) -> None:
    """Refuse weights that are no parameters of the block, or of another shape.

    Raises:
        ModelError: see above.
    """
    for name, value in weights.items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in plain:
            continue
        try:
            own = model.get_parameter(plain)
        except AttributeError:
            own = None
        if own is None or own.shape != value.shape:
            raise ModelError(f"the server's block {index} does not fit this model: {name} is {tuple(value.shape)}")


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
        saved_as(model).save_pretrained(place, max_shard_size=FILE_BYTES)
        for file in [*place.glob("*.json"), *place.glob("*.py")]:
            if settings and not file.name.endswith(".index.json"):
                file.replace(self.folder / file.name)

    def finish(self) -> None:
        """Give all files their names, and write their index."""
        files = [file for _, place in sorted(self._parts.items()) for file in sorted(place.glob("*.safetensors"))]
        places: dict[str, str] = {}
        size = 0
        for number, old in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            with old.open("rb") as file:
                tensors = read_header(file)
            places |= dict.fromkeys(tensors, name)
            size += sum(entry.stop - entry.start for entry in tensors.values())
            old.replace(self.folder / name)
        for place in self._parts.values():
            shutil.rmtree(place)
        write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


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
