"""Writing a split model that is in memory: ``model.save_pretrained(DIR)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from flexp.client.joined import JoinedModel
from flexp.config import PrivacyConfig, ServerConfig
from flexp.errors import ConfigError
from flexp.export.folder import check_target, refuse_adapter
from flexp.export.remote import write_with
from flexp.files import replacing
from flexp.links.base import Link
from flexp.models.anatomy import Part
from flexp.models.loading import quietly
from flexp.models.stage import Stage


class LiveModel:
    """A split model as :mod:`flexp.export.remote` reads one: pretrained parts, loaded anew, and what was trained."""

    def __init__(self, model: Any) -> None:
        if model.source is None:
            raise ConfigError(
                "save_pretrained needs a model that from_pretrained made: where its middle is from is lost"
            )
        self._model, self._source = model, model.source
        self.config: Any = SimpleNamespace(
            model=self._source.model, method=SimpleNamespace(align=model.align), server=ServerConfig(),
            privacy=PrivacyConfig(pool=model.pools),
        )  # fmt: skip
        self.folder, self.kind, self.cut = Path(self._source.model.id), model.kind, model.cut
        self.blocks: int = model.stage.anatomy.blocks
        self.numbering: int | None = model.steps.numbering
        self.steps: int | None = None  # a server whose blocks were never updated may be frozen, or wait for its mean

    def stage(self, part: Part) -> Stage:
        """A part of the pretrained model; nothing of it is trained."""
        stage: Stage = self._source.load(self.kind, part)
        return stage

    def personal(self, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
        """The personal weights with a ``wanted`` name in the whole model."""
        return {name: value for name, value in self._model.personal_state().items() if wanted(name)}


def save(model: JoinedModel, folder: Path, *, adapter: bool) -> None:
    """Write a folder that transformers loads, or peft with ``adapter``; the middle comes from the server.

    Raises:
        ConfigError: ``folder`` is taken, ``from_pretrained`` did not make the model, or it has no adapter.
        LinkError: the server does not give its blocks, or others train them all the time.
    """
    live, form = LiveModel(model), "adapter" if adapter else "whole"
    check_target(folder, None)
    refuse_adapter(live.config, form)
    with replacing(folder) as part, quietly(), _rejoining(model) as link:
        part.mkdir()
        write_with(part, live, link, form)


@contextmanager
def _rejoining(model: JoinedModel) -> Iterator[Link]:
    """Weights are fetched in a session of their own, where they cross as they are; training goes on in a new one."""
    model.abort()
    try:
        yield model.link
    finally:
        model.rejoin()
