"""Under a real limit of the kernel's: the whole model runs out of memory, and a client with a planned cut does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification

from flexp.config import DeploymentConfig
from flexp.config.loading import validate
from flexp.report.metrics import read
from tests import warm
from tests.data.tools import tokenizer
from tests.tiny import content

from .tools import Server

BLOCKS = 8

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is enforced by Linux")


def wide_bert(folder: Path) -> None:
    """57 MB of blocks, so that tuning all of them takes 227 MB and more."""
    words = tokenizer(bert=True)
    config = BertConfig(
        num_hidden_layers=BLOCKS, hidden_size=384, intermediate_size=1536, num_attention_heads=6,
        max_position_embeddings=64, vocab_size=len(words),
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)


def child(address: str, tables: dict[str, Any], state: Path, mib: int) -> subprocess.CompletedProcess[str]:
    command = ["-m", "tests.run.limited", address, json.dumps(tables), str(state), str(mib)]
    return warm.run(command, cwd=Path(__file__).parents[2])


def test_a_planned_client_trains_where_the_whole_model_does_not(tmp_path: Path) -> None:
    wide_bert(tmp_path / "model")
    tables = content(tmp_path, train={"rounds": 1, "steps_per_round": 2}, method={"align": {"kind": "off"}})
    tables["data"]["clients"] = {"each": [{"cut": [1, None]}]}
    server = Server(validate(tables, "server"), DeploymentConfig(clients=["north"]), tmp_path / "server")
    tables["data"]["clients"] = {"cut": "auto", "each": []}
    try:
        done = child(server.address, tables, tmp_path / "north", 110)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.strip().splitlines()[-1])
        # Every deeper cut leaves a block less room: 28 MB each.
        assert found["over"] is True
        assert found["cut"] == [1, BLOCKS]
        assert "RLIMIT_DATA" in found["notes"][-1]
        steps = [record for record in read(tmp_path / "north/metrics.jsonl") if record["kind"] == "step"]
        assert [record["step"] for record in steps] == [1, 2]
        assert "memory ran out under RLIMIT_DATA" in found["under"]
        assert found["free"] is None
    finally:
        server.end()
