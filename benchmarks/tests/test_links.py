"""What `python -m benchmarks codec` and `python -m benchmarks slow-link` compare, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.codec import codec_costs
from benchmarks.one_client import without_dropout
from benchmarks.slow_link import slow_link
from flexp.links.emulated import Network
from flexp.models.loading import load_config
from tests.data.tools import jsonl, labelled
from tests.tiny import bert_folder


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, str]:
    """Folder of a model and file of texts."""
    rows = jsonl(tmp_path / "rows.jsonl", labelled(120, ("a", "b")))
    return str(bert_folder(tmp_path / "model", dropout=True)), str(rows)


def test_copies_have_no_dropout_and_as_many_blocks_as_asked_for(place: tuple[str, str]) -> None:
    for blocks in (None, 2):
        with without_dropout(place[0], blocks) as (folder, count):
            config = load_config(folder)
            assert count == config.num_hidden_layers == (blocks or 4)
            assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.0
        assert not Path(folder).exists()


def test_codecs_start_equal_and_differ_by_rounding_alone(place: tuple[str, str]) -> None:
    variants = ("off", "fp32", "bf16", "int4+feedback")
    result = codec_costs(
        *place, variants=variants, steps=3, batch_size=4, max_length=12, test_examples=12
    )  # fmt: skip
    off, fp32, bf16, int4 = result["rows"]
    assert [row["codec"] for row in result["rows"]] == list(variants)
    assert (fp32["loss"], fp32["bytes"]) == (off["loss"], off["bytes"])  # float32 already: nothing is rounded
    assert 0 < abs(bf16["loss_change"]) < 0.05
    assert 0.48 < bf16["ratio"] < 0.53  # masks are not halved
    assert int4["ratio"] < 0.25
    assert int4["encode_ms"] > 0 < int4["decode_ms"]


def test_both_runs_of_the_slow_link_train_the_same(place: tuple[str, str]) -> None:
    network = Network(latency_s=0.01, uplink_bps=1e7, downlink_bps=1e7)
    options = {"blocks": 3, "steps": 6, "timed": 4, "batch_size": 8, "max_length": 12, "test_examples": 12}
    same = slow_link(*place, network=network, codec="fp32", in_flight=4, **options)
    assert abs(same["loss_change"]) < 1e-5  # in pieces: other sums, the same step
    rounded = slow_link(*place, network=network, codec="int8-row", in_flight=4, **options)
    assert 0 < abs(rounded["loss_change"]) < 0.05
    assert rounded["plain_loss"] == same["plain_loss"]
    assert rounded["fast_bytes"] < 0.4 * rounded["plain_bytes"]  # H = 32: scales weigh more than in real models
    assert rounded["plain_seconds"] > 4 * network.latency_s
