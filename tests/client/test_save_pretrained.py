"""``model.save_pretrained(DIR)``: what plain transformers, or peft, makes of the folder answers as the split model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import flexp
from flexp.errors import ConfigError, LinkError
from flexp.links.opening import loopback
from flexp.models.zoo import save_tiny
from tests.harness import KINDS, world

AUTO: dict[str, Any] = {
    "llama": (flexp.SplitModelForCausalLM, transformers.AutoModelForCausalLM),
    "bert": (flexp.SplitModelForSequenceClassification, transformers.AutoModelForSequenceClassification),
}


def trained(folder: Path, server: flexp.Server, link: Any, name: str, **settings: Any) -> tuple[Any, Any]:
    """A client after a step, and a batch."""
    model = AUTO[name][0].from_pretrained(folder, cut=(2, 3), link=link, **settings)
    batch = world(name).batch()
    step(model, batch)
    assert server.shared.version == 1
    return model, batch


def step(model: Any, batch: Any) -> None:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    model.train()(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model.eval()(**batch).logits
        return answer


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_transformers_loads_what_was_trained(tmp_path: Path, name: str) -> None:
    folder = save_tiny(name, tmp_path / "model")
    server = flexp.Server.from_pretrained(folder, KINDS[name], allow_export=True)  # type: ignore[arg-type]
    with loopback(server, "a") as link:
        model, batch = trained(folder, server, link, name)
        model.save_pretrained(tmp_path / "out")
        assert torch.equal(logits(AUTO[name][1].from_pretrained(tmp_path / "out"), batch), logits(model, batch))
        with pytest.raises(ConfigError, match="exists already"):
            model.save_pretrained(tmp_path / "out")
        with pytest.raises(ConfigError, match="adapter"):
            model.save_pretrained(tmp_path / "other", adapter=True)
        step(model, batch)  # training goes on
    assert server.shared.version == 2


def test_peft_loads_an_adapter(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    server = flexp.Server.from_pretrained(folder, tuning="lora", allow_export=True)
    model, batch = trained(folder, server, server.connect("a"), "llama", tuning="lora")
    model.save_pretrained(tmp_path / "out", adapter=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out"), batch), logits(model, batch))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    server = flexp.Server.from_pretrained(folder)
    model, batch = trained(folder, server, server.connect("a"), "llama")
    with pytest.raises(LinkError, match="gives no shared blocks away"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    step(model, batch)
    kept = flexp.SplitModelForCausalLM(model.stage, (2, 3), server.connect("a"))
    with pytest.raises(ConfigError, match="from_pretrained"):
        kept.save_pretrained(tmp_path / "out")
