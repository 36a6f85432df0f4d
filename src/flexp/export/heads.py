"""An audit of a trained client without its middle: what its head alone tells of texts.

Of what ``flexp client`` left, or of a client in a run's folder. What the client would send for each text is recorded
where it leaves, pooled and covered with noise as in training, and read by the attacks that need nothing but that. What
needs the server's side (labels by its activations or by gradients, membership) is said to be not attacked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch

from flexp.audit import Audit, Known, Watch, attacked, check_watchable, unread
from flexp.audit.watching import Exchange
from flexp.client.guarding import Guard
from flexp.config import RunConfig
from flexp.cost.echo import EchoLink
from flexp.data.columns import check_present
from flexp.data.sources import read_rows
from flexp.data.tasks import limit_of, task_of
from flexp.data.tasks.base import Limit
from flexp.data.tasks.text import encode_texts, pad
from flexp.data.types import Batch, Example
from flexp.errors import ConfigError, DataError
from flexp.export.answers import read_examples
from flexp.export.client_folder import ClientModel
from flexp.export.opening import open_trained
from flexp.export.saved import is_run, run_config
from flexp.kinds import KINDS, take_targets
from flexp.links.base import Link
from flexp.links.declaring import Request
from flexp.links.messages import ForwardRequest
from flexp.links.packing import arrived
from flexp.methods.base import method_of
from flexp.models.anatomy import Part
from flexp.models.loading import load_config
from flexp.run.folder import is_client
from flexp.run.settle import model_folder, settle_client

R = TypeVar("R")
MOST = 1000
"""Texts that are read, the first ones."""
TEXT = "text"
"""The column of a file of texts that are no rows of the client's task."""


def audit_head(
    folder: Path,
    client: str | None = None,
    source: str | None = None,
    *,
    public: Path | None = None,
    full: bool = False,
    only: Collection[str] = (),
) -> Audit:
    """Attack what a trained client would send.

    Args:
        folder: what ``flexp client`` left, or a run's.
        client: whose; may be left out where there is only one.
        source: a file of texts (or whatever ``data.source`` may name); ``None``: the client's own training data.
        public, full, only: see :func:`flexp.audit.audit`.

    Raises:
        ConfigError: there is no such client, or its head says nothing that an attack here reads.
        StorageError: nothing of the kind is there, or it is damaged.
        DataError: the texts cannot be read.
    """
    model, link = _opened(folder, client)
    batches = _batches(model, source)
    split = model.split.eval()
    privacy, start = model.config.privacy, split.cut[0]
    if privacy.of_texts:
        guard = Guard(privacy, [], model.processor, 0, classes=len(model.labels or ()))
        guard.load(model.state())
        if guard.taught != start:
            raise ConfigError(f"{folder}: the head of {model.client!r} was not taught yet, so nothing was sent")
        guard.checked = split.steps.done  # it is looked at, and not taught again
        split.guard_with(guard)
    exchanges = []
    for batch in batches:
        with torch.no_grad():
            split.head(batch)
        whole, kept = arrived(link.heard, model.client)
        sent = Exchange(model.client, max(model.steps or 0, 1), batch, split.cut, whole.hidden_BTH, start, None, kept)
        sent.z_BTH = sent.of_tokens(whole.hidden_BTH.float().cpu())
        exchanges.append(sent)
    align, deeper = model.config.method.align, start > split.base_depth
    unheard = ["z_base, which alignment sends besides"] if deeper and (align.has_term or align.teach) else []
    known = Known(
        model.config,
        model.task,
        model.stage(Part(frozenset(range(start)), ends=True)),
        lambda depth: model.own_stage((depth, model.blocks)),
        unheard=["texts by gradients", *unheard],
    )
    watch = Watch({}, lambda: known)
    watch.exchanges += exchanges
    return attacked(watch, public=public, full=full, only=only)


class _Heard(EchoLink):
    """Keeps the last forward that was sent."""

    heard: ForwardRequest

    def call(self, request: Request[R]) -> Future[R]:
        if isinstance(request, ForwardRequest):
            self.heard = request
        return super().call(request)


def _opened(folder: Path, client: str | None) -> tuple[ClientModel, _Heard]:
    if not (is_client(folder) or is_run(folder)):
        raise ConfigError(
            f"{folder}: --client and --data go with a trained client, so with the folder of a run or what flexp client "
            "left (an exported model does not hold the pretrained one, which an attacker learns from)"
        )
    if is_run(folder):
        _refuse_whole(run_config(folder), split=method_of(run_config(folder)).recuts)
    links: list[_Heard] = []

    def reach(_: str) -> Link:
        hidden = load_config(model_folder(model.config)).get_text_config().hidden_size
        base = model.config.model.base_depth
        links.append(_Heard(model.blocks, hidden, model.cut[0] if base is None else base))
        return links[-1]

    found = open_trained(folder, client, connect=reach)
    assert isinstance(found, ClientModel)
    model = found
    _refuse_whole(model.config, split=model.cut[0] < model.blocks)
    check_watchable(images=KINDS[model.kind].images)
    assert model.split  # it joins here
    return model, links[-1]


def _refuse_whole(config: RunConfig, *, split: bool) -> None:
    if not split:
        said = unread(method_of(config), config)
        raise ConfigError(f"{said}; the audit of a client's head needs a split model, of which activations are sent")


def _batches(model: ClientModel, source: str | None) -> Iterator[Batch]:
    """The texts as the client would feed them, without labels."""
    size, task = model.config.evaluation.batch_size, model.task
    if source is None:
        examples, rows = settle_client(model.config, model.client, model.cut).data.train, True
    else:
        examples, rows = _read(model, source)
    if not examples:
        raise DataError(f"{source or model.folder}: there are no texts to read")
    for at in range(0, min(len(examples), MOST), size):
        some = examples[at : min(at + size, MOST)]
        batch: dict[str, Any] = dict(task.collate(some) if rows else pad(some, model.processor))
        if rows:
            take_targets(batch)
        yield batch


def _read(model: ClientModel, source: str) -> tuple[list[Example], bool]:
    """Rows of the client's task, and ``True``; or else the texts of a column of that name (lines of a ``.txt``)."""
    data, rows = model.config.data, read_rows(source, None, model.config.data.config)
    names, kind = rows.dataset.column_names, task_of(data)
    needed = set(kind.needed_columns(data)) - (set(kind.right_columns(data)) if kind.answers else set())
    if TEXT not in names or needed <= set(names):
        return read_examples(source, data, model.task, labelled=False)[0], True
    texts = rows.values(TEXT)
    check_present(texts, TEXT, rows.place)
    limit = Limit(limit_of(data, model.positions).tokens)
    places = [rows.place(index) for index in range(len(rows))]
    return encode_texts(model.processor, texts, None, places, limit), False
