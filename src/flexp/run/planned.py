"""Cuts that are planned instead of written down: ``data.clients.cut = "auto"`` and ``data.clients.plan``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexp.assets import resolve
from flexp.config import LoraConfig, PrivacyConfig, RunConfig
from flexp.config.loading import override, read
from flexp.cost.choice import Choice, form
from flexp.cost.device import this_machine
from flexp.cost.profile import Profile
from flexp.data.types import Federation
from flexp.errors import ConfigError
from flexp.files import read_json
from flexp.kinds import IGNORED, KINDS
from flexp.limits import maps_count
from flexp.methods.base import method_of
from flexp.models.anatomy import block_count
from flexp.models.heads import trained_classes
from flexp.models.loading import load_config, load_processor
from flexp.planner.accuracy import AccuracyCurve
from flexp.planner.document import PlannedClient, SavedPlan, document, read_plan
from flexp.planner.fleet import Choices, Fleet, TaskShape, of_run, parse_fleet
from flexp.planner.infeasible import InfeasibleError
from flexp.planner.model import ModelCosts
from flexp.planner.plan import Plan, make_plan
from flexp.report.formats import cut, size
from flexp.run.defending import Defended, defended
from flexp.run.public_texts import Texts


def load_fleet(path: Path, overrides: Iterable[str] = ()) -> Fleet:
    """Read a ``fleet.toml`` and apply ``key=value`` overrides; profiles that it names are found beside it.

    Raises:
        ConfigError: it cannot be read, or see :func:`flexp.planner.fleet.parse_fleet`.
    """
    content = read(path)
    for text in overrides:
        override(content, text)
    return parse_fleet(content, str(path), path.parent)


def _own_exchanges(config: RunConfig) -> bool:
    """Whether the method's clients may have exchanges, checkpointing and codecs of their own."""
    return method_of(config).held.part == "ends"


def with_cuts(config: RunConfig, federation: Federation, blocks: int) -> tuple[RunConfig, list[str], Any]:
    """The configuration with its cuts written out, and with the defence that keeps ``privacy.max_content_words``;
    unchanged where they are.

    Returns:
        It, what to tell the user in a line, and the ``plan.json`` that it follows (``None``: nothing was planned).

    Raises:
        InfeasibleError: a device lacks something.
        PrivacyError: nothing that may be chosen keeps the bound.
        ConfigError: the plan's file is about another model or other clients.
        DataError: the public texts are too few to plan a bound by.
    """
    clients, names = config.data.clients, [client.name for client in federation.clients]
    if clients.plan is not None:
        path = Path(clients.plan)
        saved = read_plan(path)
        chosen = _of_file(config, saved, names, blocks, path)
        return _written(config, names, chosen), [f"cuts of {path.name}: {_told(names, chosen)}"], read_json(path)
    if clients.cut != "auto":
        return config, [], None
    kept: Defended | None = None
    if config.privacy.max_content_words is None:
        made = auto_plan(config, federation)
    else:
        texts = _texts(config, federation, blocks)
        base = config
        least = max(1, config.model.base_depth or 0)
        kept = defended(
            config.privacy, texts, lambda own, from_s: auto_plan(_with(base, own), federation, from_s), least
        )
        config, made = _with(config, kept.privacy), kept.plan
    chosen_now = [made.choice(name) for name in names]
    if any(own.profile is not None for own in clients.every(names).values()):
        where = "data.clients.profile"
    elif config.on_devices:
        where = "the classes of [devices]"
    else:
        here = made.fleet.devices[0].profile
        where = f"{here.memory_from}, {size(here.memory_bytes)}; speed and network are a laptop's, not measured"
    notes = [f"cuts planned from {where}: {_told(names, chosen_now)}"]
    if kept is None:
        return _written(config, names, chosen_now), notes, document(made)
    return _written(config, names, chosen_now), [kept.line, *notes], kept.document(document(made))


def plan_within(fleet: Fleet, model: str, curve: AccuracyCurve, said: Callable[[str], None] | None = None) -> Defended:
    """A plan for ``fleet`` that keeps ``privacy.max_content_words`` of its ``[privacy]``; ``said`` is told each attack.

    Raises:
        InfeasibleError: a device or the server lacks something.
        PrivacyError: nothing that may be chosen keeps the bound.
        ConfigError: ``choices.starts`` has none of the model's.
        DataError: the public texts are too few.
        ModelError: the model has no tokenizer.
    """
    task, starts = fleet.task, fleet.choices.starts
    known: dict[bool, ModelCosts] = {}

    def plan(own: PrivacyConfig, least: int) -> Plan:
        shape = task.model_copy(update={"pools": own.pool})
        if own.pool not in known:
            known[own.pool] = ModelCosts(model, shape, fleet.choices, fleet.server)
        deep = [s for s in starts or range(1, known[own.pool].blocks) if s >= least]
        if not deep:
            raise InfeasibleError((), f"{fleet.name}: choices.starts has no s of {least} or more")
        choices = fleet.choices.model_copy(update={"starts": deep})
        return make_plan(replace(fleet, task=shape, choices=choices), known[own.pool], curve)

    place = str(resolve(model))
    blocks = block_count(model, load_config(place))
    if beyond := [s for s in starts or () if s >= blocks]:
        raise ConfigError(
            f"{fleet.name}: choices.starts = {beyond[0]} leaves the server no block of {blocks}; expected {blocks - 1} "
            "at most"
        )
    texts = Texts(
        model=task.model(place).model_copy(update={"tuning": task.tuning, "lora": LoraConfig(rank=task.rank)}),
        kind=task.kind,
        blocks=blocks,
        processor=load_processor(place, images=KINDS[task.kind].images),
        longest=task.length,
        labels=[str(number) for number in range(task.labels)],
        pools=task.kind == "sequence-classification",
        frozen=task.frozen,
    )
    return defended(fleet.privacy, texts, plan, min(starts or [1]), said)


def _texts(config: RunConfig, federation: Federation, blocks: int) -> Texts:
    task, model = federation.task, config.model
    place = str(resolve(model.id))
    head = trained_classes(load_config(place), task.model_kind, model.pooling)
    free = "pooling" not in model.model_fields_set and not head
    return Texts(
        model=model.at(place),
        kind=task.model_kind,
        blocks=blocks,
        processor=task.processor,
        longest=_longest(federation),
        labels=task.label_names,
        pools=task.model_kind == "sequence-classification" and (model.pooling == "mean" or free),
        frozen=config.method.personal.frozen_head_blocks if _own_exchanges(config) else 0,
        seed=config.seed,
    )


def _with(config: RunConfig, privacy: PrivacyConfig) -> RunConfig:
    """``config`` with a defence; a pooled text's classifier reads the mean."""
    model = config.model.model_copy(update={"pooling": "mean"}) if privacy.pool else config.model
    return config.model_copy(update={"privacy": privacy, "model": model})


def _longest(federation: Federation) -> int:
    """Tokens of the clients' longest example."""
    lengths = (len(each.get("input_ids", ())) for client in federation.clients for each in client.train)
    return max(1, max(lengths, default=1))


def auto_plan(config: RunConfig, federation: Federation, least: int = 1) -> Plan:
    """What ``cut = "auto"`` plans for the run's clients on the devices of :func:`auto_fleet`, with s of ``least`` or
    more.

    Raises:
        InfeasibleError: a device lacks something.
        ConfigError: see :func:`auto_fleet`.
    """
    shape, choices = _task(config, federation, least)
    server = of_run(config.devices if config.on_devices else None, {}, shape, choices).server
    costs = ModelCosts(str(resolve(config.model.id)), shape, choices, server)
    # Counting takes memory that stays: it is done before this machine's is measured.
    costs.block_bytes(config.model.lora.rank if config.model.tuning == "lora" else None)
    return make_plan(auto_fleet(config, federation, least=least), costs)


def auto_fleet(
    config: RunConfig, federation: Federation, classes: Mapping[str, str] | None = None, least: int = 1
) -> Fleet:
    """The run's clients, each on the device of its profile, else of its class, else on this machine.

    Args:
        classes: of clients; ``None``: as configured.

    Raises:
        ConfigError: a profile is none, or of no client; a class is not known.
    """
    names = [client.name for client in federation.clients]
    if classes is None:
        classes = config.data.clients.devices(names) if config.on_devices else {}
    known: dict[str, Profile] = {}  # this machine, say, is measured once
    profiles = {}
    for name, own in config.data.clients.every(names).items():
        key = own.profile or classes.get(name, "")
        if key not in known:
            if own.profile is not None:
                known[key] = _client_profile(Path(own.profile))
            else:
                known[key] = (
                    Profile.from_class(key, config.devices.classes) if key else this_machine(config.model.device)
                )
        profiles[name] = known[key]
    return of_run(config.devices if classes else None, profiles, *_task(config, federation, least))


def _client_profile(path: Path) -> Profile:
    found = Profile.read(path)
    if found.role != "client":
        raise ConfigError(f"data.clients.profile: {path} is of a server; expected one of `flexp profile --as client`")
    return found


def _labelled(federation: Federation) -> float:
    """The share of all texts' predicted tokens that have a label."""
    listed = [
        labels
        for client in federation.clients
        for example in client.train
        if isinstance(labels := example.get("labels"), list)
    ]
    predicted = sum(len(labels) - 1 for labels in listed)
    return sum(label != IGNORED for labels in listed for label in labels[1:]) / predicted if predicted else 1.0


def _anew(config: RunConfig, federation: Federation) -> float:
    """The share of all clients' steps in which z of an example may go up for the first time."""
    train, clients = config.train, federation.clients
    if config.link.cache == "off" or config.privacy.on:
        return 1.0
    total = train.total_steps
    first = [min(total, -(-len(client.train) // train.batch_size)) for client in clients]
    return sum(first) / max(1, total * len(first))


def _task(config: RunConfig, federation: Federation, least: int) -> tuple[TaskShape, Choices]:
    """What the run trains, as far as it costs, and what may be chosen for it."""
    task, model, method = federation.task, config.model, config.method
    names = [client.name for client in federation.clients]
    frozen = method.personal.frozen_head_blocks if _own_exchanges(config) else 0
    here = any(own.profile is None and own.device is None for own in config.data.clients.every(names).values())
    shape = TaskShape.of_model(
        model,
        kind=task.model_kind,
        length=_longest(federation),
        labels=len(task.label_names or ("", "")),
        batch_size=config.train.batch_size,
        optimizer=config.train.personal.name,
        aligned=method_of(config).aligns and (method.align.has_term or method.align.teach),
        follow=method_of(config).aligns and method.align.follow,
        rows=config.link.rows,
        read=_labelled(federation),
        frozen=frozen,
        anew=_anew(config, federation),
        server_quantization=config.server.quantization,
        own=config.server.adapters == "own" and model.tuning == "lora",
        pools=config.privacy.pool,
    )
    if here and maps_count():
        shape = shape.model_copy(update={"embeddings": "memory"})
    micro = config.train.micro_batch
    own = _own_exchanges(config)
    if micro is None and (not own or config.train.in_flight > 1):
        micro = config.train.batch_size  # several under way hold together what one of them all would
    again = [True] if model.gradient_checkpointing else [False, True] if own else [False]
    least = max(least, model.base_depth or 0, frozen)
    choices = Choices(
        starts=None if least == 1 else list(range(least, 10_000)),
        micro_batches=None if micro is None else [micro],
        checkpointing=again,
        codecs=[config.link.codec.activation],
    )
    return shape, choices


def _of_file(config: RunConfig, saved: SavedPlan, names: Sequence[str], blocks: int, path: Path) -> list[PlannedClient]:
    """Each client's part of the plan: by its name, or in order and repeated where the plan knows none of them."""
    if saved.blocks != blocks:
        raise ConfigError(
            f"{path} plans {saved.model} with {saved.blocks} blocks, and {config.model.id} has {blocks}; plan this one"
        )
    known = {client.name: client for client in saved.clients}
    missing = [name for name in names if name not in known]
    if missing and len(missing) < len(names):
        raise ConfigError(
            f"{path} plans some of the clients but not {', '.join(missing)}; name all of them in the fleet, or none"
        )
    chosen = [saved.clients[i % len(saved.clients)] if missing else known[name] for i, name in enumerate(names)]
    for name in ("embeddings", "blocks"):
        if getattr(saved.task, name) == "file" != getattr(config.model, name):
            raise ConfigError(f'{path} plans with {name} that stay in their file; set model.{name} = "file"')
    for name, wanted in {} if saved.privacy is None else saved.privacy.model_dump(exclude_none=True).items():
        if getattr(config.privacy, name) != wanted:
            raise ConfigError(f"{path} plans privacy.{name} = {json.dumps(wanted)}; set it to that")
    rank = config.model.lora.rank if config.model.tuning == "lora" else None
    for client in chosen:
        if client.rank != rank:
            wanted = "full tuning" if client.rank is None else f"LoRA of rank {client.rank}"
            raise ConfigError(f"{path} plans {wanted}; set model.tuning and model.lora.rank accordingly")
        if client.micro_batch * client.accumulation != config.train.batch_size:
            raise ConfigError(
                f"{path} plans steps of {client.micro_batch * client.accumulation} examples; set train.batch_size to "
                "that, or plan with task.batch_size"
            )
        if not _own_exchanges(config) and form(client.codec) != form(config.link.codec.activation):
            raise ConfigError(f"{path} plans the codec {client.codec}; set link.codec.activation and .gradient to it")
    return chosen


def _written(config: RunConfig, names: Sequence[str], chosen: Sequence[PlannedClient | Choice]) -> RunConfig:
    """``config`` with the choices as keys, so that whoever reads it plans nothing any more."""
    update: dict[str, list[Any]] = {"cut": [tuple(choice.cut) for choice in chosen]}
    if _own_exchanges(config) and config.train.in_flight == 1:
        update["micro_batch"] = [choice.micro_batch for choice in chosen]
        update["checkpointing"] = [choice.checkpointing for choice in chosen]
    codecs = [form(choice.codec) for choice in chosen]
    if _own_exchanges(config) and set(codecs) != {form(config.link.codec.activation)}:
        update["codec"] = codecs  # or else the run's own word stays, with all that it says of directions and kinds
    method, model = config.method, config.model
    if method_of(config).aligns and method.align.follow and model.base_depth is None:
        # Planned was that all of a deep head but its first block is followed, however shallow the others cut.
        config = config.model_copy(update={"model": model.model_copy(update={"base_depth": 1})})
    return config.with_clients(config.data.clients.written(names, **update))


def _told(names: Sequence[str], chosen: Sequence[PlannedClient | Choice], most: int = 8) -> str:
    """Who got what, each choice once: ``(1, 6) for north, south, (3, 6) (4 at a time) for west``."""
    who: dict[str, list[str]] = {}
    for name, choice in zip(names, chosen, strict=True):
        who.setdefault(f"{cut(choice.cut)}{_extra(choice)}", []).append(name)
    if len(who) == 1:
        return f"{next(iter(who))} for everybody"
    return ", ".join(
        f"{words} for {', '.join(own[:most])}{f' and {len(own) - most} more' if len(own) > most else ''}"
        for words, own in who.items()
    )


def _extra(choice: PlannedClient | Choice) -> str:
    extra = [f"{choice.micro_batch} at a time"] if choice.accumulation > 1 else []
    extra += ["checkpointing"] if choice.checkpointing else []
    return f" ({', '.join(extra)})" if extra else ""
