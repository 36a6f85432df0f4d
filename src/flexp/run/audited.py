"""A deployed client's own audit: what its server can read of what this device has sent in the first round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flexp.audit import Known, Watch, Watched, attacked, check_watchable
from flexp.client.trainer import Trainer
from flexp.files import read_json, write_json
from flexp.kinds import KINDS
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
    """

    def __init__(self, setup: ClientSetup, folder: Path, note: Callable[[str], None]) -> None:
        kind = setup.run.federation.task.model_kind
        check_watchable(setup.config, images=KINDS[kind].images)
        self._setup, self._folder, self._note = setup, folder, note
        self._trainers: dict[str, Trainer] = {}
        self._watch: Watch | None = Watch(self._trainers, self._known, WATCHED)

    def of(self, trainer: Trainer) -> None:
        """Say whose steps they are."""
        self._trainers[trainer.name] = trainer

    def watched(self, link: Link) -> Link:
        """``link``, seen; as it is when the audit is over."""
        return link if self._watch is None else Watched(link, self._watch)

    def attack(self) -> None:
        """The first round is over: attack, say and keep what was read, and look no more."""
        watch, self._watch = self._watch, None
        if watch is None or not watch.exchanges:
            return
        name, public = self._setup.data.name, self._setup.config.privacy.public
        found = attacked(watch, public=None if public is None else Path(public))
        watch.most = 0  # links that are open still tell it
        watch.exchanges.clear()
        write_json(self._folder / AUDIT, found.as_json())
        self._note(f"{name}: the server can read: {found.line}")

    def _known(self) -> Known:
        setup, blocks = self._setup, self._setup.run.blocks

        def surrogate(depth: int) -> Stage:
            return setup.load(Part.client((depth, blocks), blocks))

        source = setup.run.load(Part.client(setup.cut, blocks))
        return Known(setup.config, setup.run.federation.task, source, surrogate)


def told(folder: Path) -> str:
    """The line of a client's summary."""
    return f"what the server can read: {said(folder) or f'{UNKNOWN} (privacy.audit = true)'}"
