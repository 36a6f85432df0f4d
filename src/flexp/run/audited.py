"""The audit of a first round: of a simulation, and of what a deployed client has sent itself. It ends neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flexp.attacks.public import paragraphs
from flexp.audit import Known, Watch, Watched, attacked, check_watchable
from flexp.audit.watching import Exchange
from flexp.client.trainer import Trainer
from flexp.config import RunConfig
from flexp.errors import StorageError
from flexp.files import write_json
from flexp.kinds import KINDS
from flexp.limits import out_of_memory
from flexp.links.base import Link
from flexp.models.anatomy import Part
from flexp.models.stage import Stage
from flexp.report.summary import UNKNOWN
from flexp.run.folder import AUDIT
from flexp.run.settle import ClientSetup

WATCHED = 96
"""Exchanges of a first round that are attacked, of all clients together."""


def public_of(config: RunConfig) -> Path | None:
    """The file of public texts; ``None``: the manual.

    Raises:
        DataError: it cannot be read, which would be missed after a round only.
    """
    public = None if config.privacy.public is None else Path(config.privacy.public)
    if public is not None:
        paragraphs(public, 1)
    return public


def conclude(watch: Watch, folder: Path, public: Path | None, note: Callable[[str], None]) -> None:
    """Attack what was watched, say and keep what was read, and look no more.

    An attack that fails is told and no error: training needs nothing of it, and nothing of the round may be saved yet,
    so whoever it ended would begin again, and end at the same place.
    """
    try:
        found = attacked(watch, public=public)
        kept, line = found.as_json(), f"the server can read: {found.line}"
    except Exception as error:  # of any kind
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        why = out_of_memory(error) or first
        kept, line = {"schema": 1, "line": f"{UNKNOWN} (failed: {why})"}, f"the audit failed: {why}"
    watch.forget()
    note(line)
    try:
        write_json(folder / AUDIT, kept)
    except StorageError as error:
        note(f"{AUDIT} was not written: {error}")


class OwnAudit:
    """Watches a client's links and attacks what went through them.

    Args:
        folder: the client's, for :data:`AUDIT`; the attacks learn from the pretrained model, loaded anew.

    Raises:
        ConfigError: no attack reads what this client sends.
        DataError: the public texts cannot be read.
    """

    def __init__(self, setup: ClientSetup, folder: Path, note: Callable[[str], None]) -> None:
        kind = setup.run.federation.task.model_kind
        check_watchable(images=KINDS[kind].images)
        self._setup, self._folder, self._note = setup, folder, note
        self._trainers: dict[str, Trainer] = {}
        self._public = public_of(setup.config)
        watch: Watch = Watch(self._trainers, lambda: self._known(watch.exchanges), WATCHED)
        self._watch: Watch | None = watch

    def of(self, trainer: Trainer) -> None:
        """Say whose steps they are."""
        self._trainers[trainer.name] = trainer

    def watched(self, link: Link) -> Link:
        """``link``, seen; as it is when the audit is over."""
        return link if self._watch is None else Watched(link, self._watch)

    def attack(self) -> None:
        """The first round is over: :func:`conclude`."""
        watch, self._watch = self._watch, None
        if watch is not None and (watch.exchanges or watch.failed is not None):
            name = self._setup.data.name
            conclude(watch, self._folder, self._public, lambda line: self._note(f"{name}: {line}"))

    def _known(self, exchanges: Sequence[Exchange]) -> Known:
        setup, blocks = self._setup, self._setup.run.blocks

        def surrogate(depth: int) -> Stage:
            return setup.load(Part.client((depth, blocks), blocks))

        cuts = {exchange.cut for exchange in exchanges}  # more than one where it has moved
        needed = frozenset[int]().union(*(Part.client(cut, blocks).blocks for cut in cuts))
        source = setup.run.load(Part(needed, ends=True))
        return Known(setup.config, setup.run.federation.task, source, surrogate)
