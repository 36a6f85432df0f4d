"""From a configuration to a run whose every question is answered: data divided, cuts written out, model found.

:func:`settle` reads data and the model's configuration, and no weights. :func:`build_world` adds the whole pretrained
model, out of which a simulation carves its parties. :func:`settle_client` takes one client's part of the run, whose
weights that client's machine loads by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from flexp.assets import resolve
from flexp.client.model import SplitModel
from flexp.client.trainer import Trainer
from flexp.config import CodecConfig, DataConfig, RunConfig
from flexp.data import load_federation, pad_id
from flexp.data.columns import rows_of
from flexp.data.split import Identity, identity
from flexp.data.tasks import task_of
from flexp.data.types import ClientData, Federation
from flexp.errors import ConfigError, DataError, StorageError
from flexp.files import read_json
from flexp.kinds import KINDS, ModelKind
from flexp.links.base import Link
from flexp.machine import device_of, imitates_bfloat16
from flexp.methods.base import Cuts, World, as_deployed, deployed, method_of
from flexp.methods.parties import own_config, own_trainer, split_model, tune_own
from flexp.models.anatomy import Part, block_count, check_cut
from flexp.models.batches import max_positions
from flexp.models.heads import trained_classes
from flexp.models.loading import load_config, load_processor, load_stage
from flexp.models.stage import Stage
from flexp.run.belonging import belonging, check_session
from flexp.run.folder import JOINED, JOINED_SCHEMA, is_joined
from flexp.run.meetings import check_masks, with_meetings
from flexp.run.privacy import base_notes, privacy_notes, within_label_bound
from flexp.run.store import Checkpoint

Federate = Callable[[DataConfig, Any, int, int | None, Sequence[str]], Federation]


@dataclass(frozen=True)
class Settled:
    """What all parties of a run agree on before anybody loads weights.

    Attributes:
        config: with planned cuts written out.
        federation: every client's examples; its notes are for the user.
        blocks: of the model, L.
        pad: the padding token that a text model is told.
        plan: the ``plan.json`` that the cuts follow; ``None``: nothing was planned.
    """

    config: RunConfig
    federation: Federation
    model_id: str
    blocks: int
    pad: int | None
    plan: Any = None

    @property
    def cuts(self) -> dict[str, tuple[int, int]]:
        """The cut of each client.

        Raises:
            ConfigError: a cut does not fit the model, or starts below the base depth; or a client that has settings of
                its own is none of the clients.
        """
        clients, base = self.config.data.clients, self.config.model.base_depth
        names = [client.name for client in self.federation.clients]
        odd = [one.name for one in clients.each if one.name not in (None, *names)]
        if odd and len(names) > 1:  # who has its own data alone knows nobody else
            raise ConfigError(f"data.clients.each: there is no client {odd[0]!r}; expected some of {', '.join(names)}")
        cuts = {}
        for name, own in clients.every(names).items():
            assert own.cut is not None, "with_cuts comes first"
            cuts[name] = check_cut(own.cut, self.blocks, where=f"data.clients.cut of client {name}")
        depths = [start for start, _ in cuts.values()] + ([] if base is None else [base])
        if min(depths) == 0 and not self.config.model.expose_embeddings:
            raise ConfigError(
                "with a cut or a base depth of 0 the clients would send their embeddings as they are, from which the "
                "server can read every token; use s >= 1, or set model.expose_embeddings = true if that is acceptable"
            )
        frozen = self.config.method.personal.frozen_head_blocks
        for name, (start, _) in cuts.items():
            if start < frozen:
                raise ConfigError(
                    f"method.personal.frozen_head_blocks = {frozen} is more than client {name} has below its cut, "
                    f"{start}; freeze fewer, or cut deeper"
                )
            if base is not None and start < base:
                raise ConfigError(
                    f"model.base_depth = {base} is deeper than the cut of client {name}, which starts at {start}; "
                    "leave it out to use the smallest cut"
                )
        return cuts

    def deployed(self) -> tuple[RunConfig, Cuts]:
        """The settings and cuts that clients have on a network.

        Raises:
            ConfigError: the method is for simulations.
        """
        return as_deployed(self.config, self.cuts, self.blocks)

    def load(self, part: Part | None = None) -> Stage:
        """A part of the pretrained model (``None``: all of it), not tuned yet.

        Raises:
            ModelError: it cannot be loaded or split.
        """
        task = self.federation.task
        return load_part(self.config, self.model_id, task.model_kind, task.label_names, self.pad, part)


def settle(
    config: RunConfig,
    federate: Federate = load_federation,
    *,
    plan: bool = True,
    cut: tuple[int, int | None] | None = None,
    alone: bool = False,
) -> Settled:
    """Read the data, divide them among clients, and write out the cuts.

    Args:
        federate: what makes the clients out of ``config.data``, the processor, the seed, the longest input and the
            classes that the pretrained model's head knows.
        plan: follow ``data.clients.plan`` and ``cut = "auto"``; or else somebody else says what the cut is.
        cut: where the client cuts, whatever the configuration says.
        alone: for a client whose server is somebody else's, so that it meets others only where both sides say so.

    Raises:
        FlexpError: what is wrong with the model, the data or the configuration.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device_of(config.model.device)  # before anything is read
    model_id = str(resolve(config.model.id))
    model_config = load_config(model_id)
    processor = load_processor(model_id, images=task_of(config.data).images)
    head = trained_classes(model_config, task_of(config.data).model_kind, config.model.pooling)
    federation = federate(config.data, processor, config.seed, max_positions(model_config), head)
    blocks = block_count(model_id, model_config)
    drawn = all(row is None for row in rows_of(head, federation.task.label_names or ()))
    config, met = with_meetings(config, federation, model_config, drawn, alone)
    notes, planned = [*_precision_notes(config), *met], None
    if plan and config.data.clients.planned:  # before anything is loaded
        from flexp.run.planned import with_cuts  # brings the planner

        config, more, planned = with_cuts(config, federation, blocks)
        notes += more
    config, more = within_label_bound(config, federation, blocks, cut)
    notes += more
    notes += privacy_notes(config, federation, int(model_config.get_text_config().hidden_size))
    federation = replace(federation, notes=[*federation.notes, *notes])
    return Settled(config, federation, model_id, blocks, own_pad(federation.task.model_kind, processor), planned)


def build_world(config: RunConfig, federate: Federate = load_federation) -> World:
    """:func:`settle`, with the whole model: everything that a method starts from.

    Raises:
        FlexpError: what is wrong with the model, the data or the configuration.
    """
    found = settle(config, federate)
    source = found.load()
    found = replace(found, blocks=source.anatomy.blocks)
    cuts = method_of(found.config).cuts(found.config, found.cuts, found.blocks)
    notes = [*found.federation.notes, *base_notes(found.config, cuts)]
    return World(found.config, replace(found.federation, notes=notes), source, cuts, plan=found.plan)


def world_of(folder: Path, config: RunConfig) -> World:
    """What the run in ``folder`` started from, be it a federation or one client that joined it.

    Raises:
        FlexpError: model or data are not what they were.
    """
    if is_joined(folder):
        return joined_world(config, read_json(folder / JOINED))
    # Its weights are in the order of the labels that it had, whatever order they would be given today.
    summary = folder / "summary.json"
    labels = read_json(summary)["model"]["labels"] if summary.is_file() else None
    return build_world(config, partial(load_federation, labels=labels))


def joined_world(config: RunConfig, facts: Mapping[str, Any]) -> World:
    """The world of one client that joined later, as ``join.json`` names it and its labels.

    Raises:
        StorageError: the facts are not those of such a client.
        FlexpError: model or data are not what they were.
    """
    try:
        if facts["schema"] != JOINED_SCHEMA:
            raise StorageError(f"{JOINED} is of another version of FlexP; run flexp join again")
        name, labels = str(facts["client"]), facts["labels"]
    except (KeyError, TypeError) as error:
        raise StorageError(f"{JOINED} is not what flexp join wrote ({error}); run flexp join again") from error
    return build_world(config, partial(_alone, name=name, labels=labels or []))


def _alone(
    data: DataConfig,
    processor: Any,
    seed: int,
    longest: int | None,
    head: Sequence[str],
    *,
    name: str,
    labels: list[str],
) -> Federation:
    found = load_federation(data, processor, seed, longest, head, labels)
    (client,) = found.clients
    return replace(found, clients=[replace(client, name=name)])


@dataclass(frozen=True)
class ClientSetup:
    """What one client's machine has of the run.

    Attributes:
        data: its examples.
        config: the run's configuration with what is the client's own (exchange, checkpointing, codec).
        cut_is_given: by the user, who then wants no other one.
    """

    run: Settled
    data: ClientData
    config: RunConfig
    cut: tuple[int, int]
    cut_is_given: bool = False

    @cached_property
    def identity(self) -> Identity:
        """Of its examples, as its snapshots know them."""
        return identity([self.data], self.run.federation.task.label_names)

    def load(self, part: Part) -> Stage:
        """A part of the pretrained model, tuned as this client's.

        Raises:
            ModelError: the model cannot be loaded or split.
        """
        stage = self.run.load(part)
        tune_own(stage, self.config)
        return stage

    def belonging(self, stage: Stage) -> dict[str, Any]:
        """What the client's state belongs to, JSON-ready; ``stage``: its part of the model."""
        task = self.run.federation.task
        return belonging(self.config, stage, task.model_kind, task.label_names)

    def join(
        self,
        link: Link,
        newest: Checkpoint | None = None,
        codec: CodecConfig | None = None,
        key: int | None = None,
    ) -> tuple[Trainer, SplitModel]:
        """The client that a simulation of the run would have, loaded by itself and joined over ``link``.

        Args:
            newest: its own snapshot, from which it is to go on.
            key: of its noise and of its labels' answers; ``None``: a secret one.

        Raises:
            ModelError: the model cannot be loaded or split.
            LinkError: the server refuses.
        """
        task, stage = self.run.federation.task, self.load(Part.client(self.cut, self.run.blocks))
        numbering = None
        if newest is not None:
            check_session(newest.facts, self.belonging(stage), newest.place.parent)
            numbering = newest.facts["numbering"]
        split = split_model(self.config, stage, self.cut, link, task.model_kind, codec=codec, numbering=numbering)
        return own_trainer(self.config, self.data, task, split, stage, key), split


def settle_client(config: RunConfig, name: str | None, cut: tuple[int, int | None] | None) -> ClientSetup:
    """Read the data, and take the part that is the client's.

    With a single client in the data (``flexp client --data``) all of it is, whatever its name.

    Args:
        cut: where it cuts, whatever the configuration says; ``None``: as that says.

    Raises:
        FlexpError: what is wrong with data or model; or there is no such client.
    """

    single = name is not None and (config.data.clients.by, config.data.clients.count) == ("iid", 1)

    def called(text: str) -> str:  # its examples are drawn under the name that the only client of a file has
        return re.sub(r"(?<![\w/.-])client-1(?![\w/.-])", lambda _: str(name), text) if single else text

    def federate(*of: Any) -> Federation:
        try:
            found = load_federation(*of)
        except DataError as error:
            raise DataError(called(str(error))) from error
        if name is None or len(found.clients) > 1:
            return found
        notes, warnings = map(called, found.notes), map(called, found.warnings)
        return replace(found, clients=[replace(found.clients[0], name=name)], notes=[*notes], warnings=[*warnings])

    check_masks(config)
    run = settle(config, federate, plan=cut is None, cut=cut, alone=True)
    own_settings, cuts = run.deployed()
    run = replace(run, config=own_settings)
    clients = {client.name: client for client in run.federation.clients}
    wanted = next(iter(clients)) if name is None and len(clients) == 1 else name
    if wanted not in clients:
        raise DataError(f"the data have no client {wanted}; expected one of {', '.join(clients)} (--name)")
    whole = not deployed(config).middle
    if whole and cut is not None and tuple(cut) != cuts[wanted]:
        raise ConfigError(f"--cut: clients of {config.method.name!r} have all of the model; leave it out")
    chosen = cuts[wanted] if cut is None or whole else check_cut(cut, run.blocks, where="--cut")
    own = run.config.data.clients.every(list(clients))[wanted]
    return ClientSetup(run, clients[wanted], own_config(run.config, own), chosen, cut is not None)


def load_part(
    config: RunConfig,
    model_id: str,
    kind: ModelKind,
    labels: Sequence[str] | None,
    pad: int | None,
    part: Part | None = None,
) -> Stage:
    """A part of the pretrained model (``None``: all of it), as ``config`` wants it loaded, not tuned yet.

    Raises:
        ModelError: it cannot be loaded or split.
    """
    return load_stage(config.model.at(model_id), kind, part, labels=labels, pad_token_id=pad, seed=config.seed)


def own_pad(kind: ModelKind, processor: Any) -> int | None:
    """The padding token that a text model is told; images have none."""
    return None if KINDS[kind].images else pad_id(processor)


def _precision_notes(config: RunConfig) -> list[str]:
    notes = []
    if config.model.dtype == "bfloat16" and "full" in (config.model.tuning, config.server.tuning):
        # It has 8 significant bits: next to a weight of 0.02, a step of 1e-5 rounds to nothing.
        notes.append(
            "full tuning in bfloat16 loses the steps that are small beside their weights (at a rate of 1e-5, nearly "
            'all): use model.dtype = "float32" (as fast with model.autocast = "bfloat16"), or LoRA, with float32 '
            "adapters"
        )
    here = device_of(config.model.device).type == "cpu" and imitates_bfloat16()
    for key, instead in (("dtype", "float32"), ("autocast", "off")):
        if here and getattr(config.model, key) == "bfloat16":
            notes.append(
                f'model.{key} = "bfloat16", but this processor has no instructions for it: a step may take 2 to 22 '
                f'times as long as in float32 (MiniLM, on two processors); model.{key} = "{instead}" is faster here'
            )
    return notes


def model_folder(config: RunConfig) -> str:
    """Where the configured model is: a local folder, or the id as it stands."""
    found = resolve(config.model.id)
    return str(Path(found).resolve()) if Path(found).exists() else str(found)
