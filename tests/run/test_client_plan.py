"""A client process takes its own part of a plan: cut, exchange, checkpointing and codec."""

from __future__ import annotations

from pathlib import Path

from flexp.config.loading import validate
from flexp.files import write_json
from flexp.run.settle import settle_client
from tests.tiny import bert_folder, content


def test_each_client_has_its_own_part(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    clients = [
        {"name": "north", "cut": [1, 4], "micro_batch": 2, "accumulation": 2, "checkpointing": True},
        {"name": "south", "cut": [2, 3], "micro_batch": 4, "codec": "int8"},
        {"name": "west", "cut": [3, 4], "micro_batch": 4},
    ]
    write_json(tmp_path / "plan.json", {"version": 1, "model": "tiny", "blocks": 4, "clients": clients})
    tables = content(tmp_path)
    tables["data"]["clients"] = {"plan": str(tmp_path / "plan.json")}
    found = {}
    for name in ("north", "south", "west"):
        place = settle_client(validate(tables, "tiny"), name, None)
        own = place.config
        found[name] = (
            place.cut, own.train.micro_batch, own.model.gradient_checkpointing, own.link.codec.activation,
            own.link.codec.gradient,
        )  # fmt: skip
        assert place.run.federation.notes[-1].startswith("cuts of plan.json: ")
    assert found == {
        "north": ((1, 4), 2, True, "off", "off"),
        "south": ((2, 3), 4, False, "int8-channel", "int8-channel"),
        "west": ((3, 4), 4, False, "off", "off"),
    }
