"""``[privacy]`` of a run that begins: what its bounds ask for, and what its users are told."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flexp.client.meeting import Meets
from flexp.client.noise import ledger, told
from flexp.client.random_labels import RandomLabels, epsilon_within
from flexp.config import RunConfig
from flexp.data.types import Federation
from flexp.errors import ConfigError
from flexp.gaussian import DELTA, epsilon
from flexp.kinds import KINDS
from flexp.methods.base import base_depth, method_of

SENDING_NOTHING = 0.05
"""Of accuracy, as a share, what ``privacy.gradients = false`` is expected to cost where clients have tails to train:
2.3 points on CLINC150, 3.5 to 5 on sentiment (docs/security.md)."""
WRONG_ANSWERS = 0.65
"""What answers for labels are expected to cost where all of them are wrong: of two classes with ε = 0.4, 40 % of them
are, and cost 26 points (the demo); a line through that one measurement, no more."""


def within_label_bound(
    config: RunConfig, federation: Federation, blocks: int, cut: tuple[int, int | None] | None = None
) -> tuple[RunConfig, list[str]]:
    """With what ``privacy.max_label_auc`` asks for, and what to tell of it: no gradients where neither these nor ε are
    named, every client has a tail of blocks to learn with, nothing else of the configuration is against it and it is
    expected to cost less; or else the ε that keeps the bound.

    With ``cut = "auto"`` it is ε: these cuts leave a client no blocks after the server's (e = L), where a drawn
    classifier by itself learns next to nothing without gradients; and a plan's seconds and bytes, which choose its
    cuts, have a way back in them.

    Args:
        blocks: of the model, L.
        cut: of a client that is started by itself, whatever the configuration says.

    Raises:
        ConfigError: the labels are no classes, or ``privacy.label_epsilon`` tells more.
    """
    privacy, kind = config.privacy, federation.task.model_kind
    if privacy.of_labels and KINDS[kind].answers != "class":
        raise ConfigError(f"privacy.label_epsilon is for one class of an example, and the task is {kind}")
    bound, classes = privacy.max_label_auc, len(federation.task.label_names or ())
    if bound is None or not privacy.gradients:
        return config, []
    enough = epsilon_within(bound, classes)
    if privacy.label_epsilon is not None and privacy.label_epsilon > enough:
        auc = RandomLabels(privacy.label_epsilon, classes, 0).auc
        raise ConfigError(
            f"privacy.label_epsilon = {privacy.label_epsilon:g} tells labels with an AUC of {auc:.2f}, and "
            f"privacy.max_label_auc is {bound:g}: lower it to {math.floor(1e3 * enough) / 1e3:g} or leave it out"
        )
    answers = WRONG_ANSWERS * (1 - RandomLabels(enough, classes, 0).kept)
    if not privacy.model_fields_set & {"gradients", "label_epsilon"} and answers > SENDING_NOTHING:
        silent = config.model_copy(update={"privacy": privacy.model_copy(update={"gradients": False})})
        against = _against(silent, federation, blocks, cut)
        asked = f"privacy.max_label_auc = {bound:g}"
        if against is None:
            return silent, [
                f"{asked} is kept by sending no gradients, which is expected to cost {100 * SENDING_NOTHING:.0f} "
                f"points of accuracy, and random answers (privacy.label_epsilon = {enough:.3g}) {100 * answers:.0f}; "
                "to choose, name privacy.gradients or privacy.label_epsilon"
            ]
        note = [f"{asked}: privacy.gradients = false is expected to cost less, but {against}"]
    else:
        note = []
    own = {"label_epsilon": enough if privacy.label_epsilon is None else privacy.label_epsilon}
    return config.model_copy(update={"privacy": privacy.model_copy(update=own)}), note


def _against(silent: RunConfig, federation: Federation, blocks: int, cut: tuple[int, int | None] | None) -> str | None:
    """Why a run cannot go without gradients; ``None``: it can."""
    names = [client.name for client in federation.clients]
    for name, own in silent.data.clients.every(names).items():
        stop = (cut or own.cut or (0, None))[1]
        if stop is None or not stop < blocks:
            return f"client {name} has no blocks in its tail to learn with: cut at an earlier e"
    try:
        silent.check_without_gradients()
    except ValueError as error:
        return str(error)
    return None


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
