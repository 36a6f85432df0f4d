"""A deployed client's own audit: what its server can read of what this device has sent in the first round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flexp.attacks.public import paragraphs
from flexp.audit import Known, Watch, Watched, attacked, check_watchable
from flexp.audit.watching import Exchange
from flexp.client.trainer import Trainer
from flexp.errors import StorageError
from flexp.files import read_json, write_json
from flexp.kinds import KINDS
from flexp.limits import out_of_memory
from flexp.links.base import Link
from flexp.models.anatomy import Part
from flexp.models.stage import Stage
from flexp.report.summary import UNKNOWN
from flexp.run.settle import ClientSetup

AUDIT = "audit.json"
"""What an audit found, in the folder of a run or of a client."""
WATCHED = 96
"""Exchanges of a first round that are attacked, of all clients together."""


def said(folder: Path) -> str | None:
    """What the server can read, as an audit in ``folder`` says; ``None``: there was none."""
    return str(read_json(folder / AUDIT)["line"]) if (folder / AUDIT).is_file() else None


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
        check_watchable(setup.config, images=KINDS[kind].images)
        self._setup, self._folder, self._note = setup, folder, note
        self._trainers: dict[str, Trainer] = {}
        public = setup.config.privacy.public
        self._public = None if public is None else Path(public)
        if self._public is not None:
            paragraphs(self._public, 1)  # or it would be missed after a round only
        watch: Watch = Watch(self._trainers, lambda: self._known(watch.exchanges), WATCHED)
        self._watch: Watch | None = watch

    def of(self, trainer: Trainer) -> None:
        """Say whose steps they are."""
        self._trainers[trainer.name] = trainer

    def watched(self, link: Link) -> Link:
        """``link``, seen; as it is when the audit is over."""
        return link if self._watch is None else Watched(link, self._watch)

    def attack(self) -> None:
        """The first round is over: attack, say and keep what was read, and look no more.

        An attack that fails is told and no error: nothing of the round is saved yet, so a client that it ended would
        begin again, and end at the same place.
        """
        watch, self._watch = self._watch, None
        if watch is None or not watch.exchanges:
            return
        name = self._setup.data.name
        try:
            found = attacked(watch, public=self._public)
            kept, line = found.as_json(), f"the server can read: {found.line}"
        except Exception as error:  # of any kind: training needs nothing of it
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            why = out_of_memory(error) or first
            kept, line = {"schema": 1, "line": f"{UNKNOWN} (failed: {why})"}, f"the audit failed: {why}"
        watch.forget()
        self._note(f"{name}: {line}")
        try:
            write_json(self._folder / AUDIT, kept)
        except StorageError as error:
            self._note(f"{name}: {AUDIT} was not written: {error}")

    def _known(self, exchanges: Sequence[Exchange]) -> Known:
        setup, blocks = self._setup, self._setup.run.blocks

        def surrogate(depth: int) -> Stage:
            return setup.load(Part.client((depth, blocks), blocks))

        cuts = {exchange.cut for exchange in exchanges}  # more than one where it has moved
        needed = frozenset[int]().union(*(Part.client(cut, blocks).blocks for cut in cuts))
        source = setup.run.load(Part(needed, ends=True))
        return Known(setup.config, setup.run.federation.task, source, surrogate)


def told(folder: Path) -> str:
    """The line of a client's summary."""
    return f"what the server can read: {said(folder) or f'{UNKNOWN} (privacy.audit = true)'}"
