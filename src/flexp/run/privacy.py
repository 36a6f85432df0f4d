"""``[privacy]`` of a run that begins: what its bounds ask for, and what its users are told."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from flexp.assets import resolve
from flexp.assets.store import root
from flexp.attacks.public import encoded, paragraphs
from flexp.client.guarding import PUBLIC, Guard
from flexp.client.meeting import Meets
from flexp.client.noise import ledger, told
from flexp.client.random_labels import RandomLabels, epsilon_within
from flexp.config import RunConfig
from flexp.data.types import Federation
from flexp.errors import ConfigError, PrivacyError
from flexp.files import read_json, write_json
from flexp.gaussian import DELTA, epsilon
from flexp.kinds import KINDS
from flexp.methods.base import base_depth, method_of
from flexp.methods.parties import tune_own
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage


def within_label_bound(config: RunConfig, federation: Federation) -> RunConfig:
    """With the ε that ``privacy.max_label_auc`` asks for.

    Raises:
        ConfigError: the labels are no classes, or ``privacy.label_epsilon`` tells more.
    """
    privacy, kind = config.privacy, federation.task.model_kind
    if privacy.of_labels and KINDS[kind].answers != "class":
        raise ConfigError(f"privacy.label_epsilon is for one class of an example, and the task is {kind}")
    bound, classes = privacy.max_label_auc, len(federation.task.label_names or ())
    if bound is None or not privacy.gradients:
        return config
    enough = epsilon_within(bound, classes)
    if privacy.label_epsilon is not None and privacy.label_epsilon > enough:
        auc = RandomLabels(privacy.label_epsilon, classes, 0).auc
        raise ConfigError(
            f"privacy.label_epsilon = {privacy.label_epsilon:g} tells labels with an AUC of {auc:.2f}, and "
            f"privacy.max_label_auc is {bound:g}: lower it to {math.floor(1e3 * enough) / 1e3:g} or leave it out"
        )
    own = {"label_epsilon": enough if privacy.label_epsilon is None else privacy.label_epsilon}
    return config.model_copy(update={"privacy": privacy.model_copy(update=own)})


def deep_enough(config: RunConfig, federation: Federation, blocks: int) -> int:
    """The smallest s that keeps ``privacy.max_content_words`` with the run's defences; 1 where there is no bound.

    On public texts as if they were private: heads are taught and attacked as clients do before they send anything
    (:class:`flexp.client.guarding.Guard`), from the shallowest on; that deeper cuts tell less is taken for granted.
    Clients check their own texts all the same. What was found is kept for the next run, one file a model, cut and
    defence, in ``$FLEXP_HOME/audits``.

    Raises:
        PrivacyError: no cut keeps it.
    """
    bound = config.privacy.max_content_words
    if bound is None:
        return 1
    read: list[float] = []
    for depth in range(1, blocks):
        read.append(_public_read(config, federation, depth, blocks))
        if read[-1] <= bound:
            return depth
    raise PrivacyError(
        f"privacy.max_content_words = {bound:g} is kept by no cut: of public texts, with these defences, "
        + ", ".join(f"{100 * share:.0f} % at s = {depth}" for depth, share in enumerate(read, 1))
        + "; raise privacy.warm_up.steps, .weight or privacy.noise, or the bound"
    )


def _public_read(config: RunConfig, federation: Federation, depth: int, blocks: int) -> float:
    """The share of public content words that is read at ``depth``, as it was found earlier, or now."""
    task, model, privacy = federation.task, config.model.at(str(resolve(config.model.id))), config.privacy
    stage = load_stage(model, task.model_kind, Part.client((depth, blocks), blocks), labels=task.label_names)
    longest = max(len(example["input_ids"]) for client in federation.clients for example in client.train)
    said = [stage.weights, depth, longest, config.model.model_copy(update={"id": ""}), privacy, config.seed]
    key = hashlib.sha256("|".join(map(str, said)).encode()).hexdigest()[:32]
    kept = root().parent / "audits" / f"{key}.json"
    if kept.is_file() and stage.weights is not None:
        return float(read_json(kept)["content"])
    tune_own(stage, config)
    texts = paragraphs(None if privacy.public is None else Path(privacy.public), 2 * PUBLIC)
    held = encoded(task.processor, texts[PUBLIC:] or texts, passes=0)
    guard = Guard(privacy, [{"input_ids": each["input_ids"][:longest]} for each in held], task.processor, config.seed)
    with suppress(PrivacyError):
        guard.teach(stage, depth)
    assert guard.read is not None
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, {"model": config.model.id, "s": depth, "content": guard.read})
    return guard.read


def privacy_notes(config: RunConfig, federation: Federation, hidden: int) -> list[str]:
    labels, notes = config.privacy.label_epsilon, []
    if config.privacy.noise:
        notes.append(f"privacy.noise = {config.privacy.noise:g}: {told(ledger(config, federation, hidden))}")
    if config.server.noise:
        once = epsilon(2 * math.sqrt(config.train.total_steps) / config.server.noise)
        sums = method_of(config).meets and Meets.of(config)
        notes.append(
            f"server.noise = {config.server.noise:g}: the shared blocks tell other clients of all steps of one no more "
            f"than ε = {once:.3g} (δ = {DELTA:g}) if no two of them are in one update; more than about 10 is no "
            "guarantee" + ("; class sums of meetings it does not cover" if sums else "")
        )
    if not config.privacy.gradients:
        notes.append(
            "privacy.gradients = false: nothing that labels tell is sent; what is below the cuts and the shared blocks "
            "stay as they are"
        )
    if labels is not None:
        classes = len(federation.task.label_names or ())
        answers = RandomLabels(labels, classes, 0)
        notes.append(
            f"privacy.label_epsilon = {labels:.3g}: training knows {100 * answers.kept:.0f} % of its labels as they "
            f"are, the others as another of {classes}; that is ε = {labels:.3g} for each label, over the whole run, "
            f"and an AUC of at most {answers.auc:.2f}"
            + ("" if config.method.meet.on else ". With method.meet the last classifier is made of the labels as they "
               "are, on the device")
        )  # fmt: skip
    return notes


def base_notes(config: RunConfig, cuts: Mapping[str, tuple[int, int]]) -> list[str]:
    align, method = config.method.align, method_of(config)
    if not method.aligns or not (align.has_term or align.teach) or not cuts:
        return []
    base = base_depth(config, cuts)
    deeper = sum(start > base for start, _ in cuts.values())
    if not deeper:
        return []
    return [
        f"alignment sends z_base, the activation of depth {base}, of {deeper} clients with deeper cuts, from which the "
        "server reads their texts as from a shallow cut; method.align.kind = 'off' sends none"
    ]
