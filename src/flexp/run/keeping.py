"""Why ``link.cache`` does nothing, where it is on and its condition does not hold: said before the first step."""

from __future__ import annotations

from collections.abc import Mapping

from flexp.client.model import SplitModel
from flexp.client.once import alone, standing
from flexp.client.trainer import Trainer


def cache_notes(trainers: Mapping[str, Trainer]) -> list[str]:
    """A line for each reason why a server keeps none of a client's examples, though ``link.cache`` is on."""
    clients: dict[str, list[str]] = {}
    for name, trainer in trainers.items():
        if (reason := _reason(trainer)) is not None:
            clients.setdefault(reason, []).append(name)
    whose = {reason: ", ".join(names) for reason, names in clients.items() if len(names) < max(2, len(trainers))}
    return [f"link.cache does nothing for {whose.get(reason, 'all clients')}: {reason}" for reason in clients]


def _reason(trainer: Trainer) -> str | None:
    model = trainer.model
    if not isinstance(model, SplitModel) or model.cache == "off" or model.whole:
        return None
    if model.guard is not None or not model.gradients:
        return "with [privacy] an example's activation is another one each time"
    start, inputs = model.cut[0], trainer.task.collate(trainer.data.train[:1])
    if "input_ids" not in inputs or not model.ignores_padding:
        return "only texts are kept, of models that do not read padding"
    if model.align.has_term and model.align.every == 1 and start != model.base_depth:
        return "alignment is due with every exchange (method.align.every)"
    if model.reuse:  # what is trained or drawn goes up again where it has moved
        return None
    if standing(model.stage, start) is None:
        return "something below the cut is trained (method.personal.frozen_head_blocks, or link.reuse)"
    trains = model.training
    model.train(True)
    try:
        drawn = alone(model.stage, inputs, 0, int(inputs["attention_mask"][0].sum()), start) is None
    finally:
        model.train(trains)
    if drawn:
        return (
            "dropout in the head makes another activation of an example each time; set the dropout rates in the "
            "model's config.json to 0"
        )
    return None
