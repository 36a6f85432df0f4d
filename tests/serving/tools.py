"""A model that writes what it is told to, token by token, through the interface of transformers' ``generate``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexp.serving.writer import Writer
from tests.data.tools import tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} : {{ m['content'] }} {% endfor %}"
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}"
    "{% if add_generation_prompt %}Answer :{% endif %}"
)


class Scripted:
    """Writes ``text`` again and again; its ``calls`` are the options of every ``generate``."""

    device = torch.device("cpu")

    def __init__(self, text: str = "the red dog runs fast now", end: bool = True, pause: float = 0.0) -> None:
        self.tokenizer = tokenizer()
        self.script = self.tokenizer(text)["input_ids"] + ([1] if end else [])
        self.pause, self.calls, self.given, self.prompts = pause, [], 0, []  # type: ignore[var-annotated]
        self.generation_config = type("Settings", (), {"eos_token_id": None})()
        self.config = type("Config", (), {"get_text_config": lambda self: self, "max_position_embeddings": 64})()
        self.fails: Callable[[int], None] = lambda number: None

    def generate(self, prompt: Tensor, *, streamer: Any, stopping_criteria: Any, **options: Any) -> None:
        self.calls.append(options)
        self.prompts.append(prompt[0].tolist())
        streamer.put(prompt)
        for number in range(options["max_new_tokens"]):
            self.fails(number)
            token = self.script[number % len(self.script)]
            time.sleep(self.pause)
            self.given += 1
            streamer.put(torch.tensor([token]))
            if token in (options["eos_token_id"] or ()) or bool(stopping_criteria[0](prompt, None).all()):
                break
        streamer.end()


def writer(model: Scripted, chats: bool = True, prompt: str | None = None) -> Writer:
    if chats:
        model.tokenizer.chat_template = TEMPLATE
    return Writer("north", model.tokenizer, model, 64, prompt=prompt, about="scripted")
