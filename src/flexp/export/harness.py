"""A personal language model under EleutherAI's lm-evaluation-harness (the extra ``flexp[lm-eval]``).

Split or exported, it answers what the harness asks of any causal model. Texts become tokens as the harness's own
Hugging Face adapter makes them, so that an exported folder scores the same under ``lm_eval --model hf``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from flexp.data.scores import unanswered
from flexp.data.types import Forward
from flexp.errors import ConfigError, ModelError
from flexp.export.trained import Trained

MOST_NEW = 256  # tokens of a generated answer, where a task says nothing, as in the harness
NO_LIMIT = 2048  # tokens that a model without a limit of its own is shown, as in the harness


def run_harness(
    model: Trained,
    tasks: Sequence[str],
    folder: Path | None = None,
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int | None = None,
    pretrained: bool = False,
) -> dict[str, Any]:
    """The harness's results of ``tasks`` by name: a metric's name with its filter → its value.

    Args:
        folder: with YAML files of tasks of one's own; then the harness's own, which may fetch data, are not looked at.
        limit: only so many examples of each task.
        shots: examples shown before each question; as the task says without.
        pretrained: the model as it was before training; only of a run.

    Raises:
        ConfigError: the model is no language model, or there is no such task.
    """
    adapter = HarnessModel(model, batch_size, pretrained=pretrained)
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)[:8]) if folder else "see lm_eval ls tasks"
        raise ConfigError(f"--harness {unknown[0]}: there is no such task in {folder or 'the harness'} ({known})")
    quiet = logging.getLogger("lm_eval")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        found = simple_evaluate(
            model=adapter,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,  # no standard errors: they take longer than a small model's answers
        )
    finally:
        quiet.setLevel(level)
    assert found is not None
    results: dict[str, Any] = found["results"]
    return {
        name: {key: value for key, value in own.items() if "," in key and _is_score(value)}
        for name, own in results.items()
    }


def _is_score(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks, answered by a personal model.

    Raises:
        ConfigError: it is no language model, or its tokenizer knows no end of a text.
    """

    def __init__(self, model: Trained, batch_size: int | None = None, *, pretrained: bool = False) -> None:
        super().__init__()
        if model.kind != "causal-lm":
            raise ConfigError(f"the harness is for language models; this model's task is {model.task.name}")
        self.tokenizer = model.processor
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("the harness needs a tokenizer with an end-of-text token, and this model's has none")
        self.forward: Forward = model.pretrained if pretrained else model.forward
        self.batch_size = batch_size or model.config.evaluation.batch_size
        self.max_length = model.positions or NO_LIMIT

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with the tokenizer's own special tokens unless said otherwise, or they are there already."""
        if add_special_tokens is None and not string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            return list(self.tokenizer.encode(string))
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text; longer ones in windows, of which each token is in one."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += value
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The most likely tokens, one after the other, until a stop sequence; without a cache, so for short answers.

        Raises:
            ConfigError: a task asks for samples.
        """
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample"):
            raise ConfigError("this adapter generates greedily, and the task asks for do_sample: true")
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = next((int(settings[name]) for name in names if settings.get(name)), MOST_NEW)
        ids = self.tok_encode(context)[-max(1, self.max_length - most) :]
        answer: list[int] = []
        while len(answer) < most and len(ids) + len(answer) < self.max_length:
            logits_TV = self._logits([ids + answer])[0]
            token = int(logits_TV[-1].argmax())
            if token == self.eot_token_id:
                break
            answer.append(token)
            if any(stop in self.tokenizer.decode(answer) for stop in stops):
                break
        text: str = self.tokenizer.decode(answer, skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Of each (…, context, continuation): the continuation's log-probability, and whether it is the greedy one."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]  # of like length, so that there is little padding
            inputs = [[*requests[index][1], *requests[index][2]][-self.max_length - 1 : -1] for index in chosen]
            for index, ids, logits_TV in zip(chosen, inputs, self._logits(inputs), strict=True):
                wanted = torch.tensor(requests[index][2][-len(ids) :])
                scores_TV = torch.log_softmax(logits_TV[len(ids) - len(wanted) : len(ids)].float(), dim=-1)
                value = float(scores_TV.gather(1, wanted.unsqueeze(1)).sum())
                found[index] = (value, bool((scores_TV.argmax(-1) == wanted).all()))
        return [found[index] for index in range(len(requests))]

    def _logits(self, rows: list[list[int]]) -> Tensor:
        """Logits (B, T, V) of token ids, padded on the right."""
        length = max(len(ids) for ids in rows)
        pad = self.tokenizer.pad_token_id
        ids_BT = torch.full((len(rows), length), self.eot_token_id if pad is None else int(pad))
        mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
        for row, ids in enumerate(rows):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
        with torch.no_grad():
            logits_BTV: Tensor = self.forward({"input_ids": ids_BT, "attention_mask": mask_BT}).logits
        if any(unanswered(logits_BTV, {"attention_mask": mask_BT})):
            raise ModelError("the model answers with numbers that are not finite, so that it has no score")
        return logits_BTV
