"""What benches compare and count, on tiny models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import codec, embeddings, house, leakage, link, recut, scale, slow_link, timing
from benchmarks.tools import paired as module
from benchmarks.tools.one_client import without_dropout
from benchmarks.tools.paired import WARM_UP, paired
from benchmarks.tools.tiny_run import tiny_run
from flexp.errors import ConfigError
from flexp.models.loading import load_config
from tests.cli.test_commands import toml
from tests.cost.tools import warmly
from tests.data.tools import jsonl, labelled
from tests.tiny import bert_folder


def test_both_run_equally_often_and_take_turns_at_being_first() -> None:
    seen: list[str] = []
    paired(lambda: seen.append("a"), lambda: seen.append("b"), 4)
    assert "".join(seen) == "ab" * WARM_UP + "ba" + "ab" + "ba" + "ab"


def test_ratios_are_of_the_pairs_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    durations = {"a": [100.0] * WARM_UP + [1.0, 2.0, 4.0, 8.0], "b": [1.0] * WARM_UP + [2.0, 6.0, 16.0, 40.0]}
    steps = {name: iter(values) for name, values in durations.items()}

    def step(name: str) -> None:
        now[0] += next(steps[name])

    timed = paired(lambda: step("a"), lambda: step("b"), 4)  # second ÷ first: 2, 3, 4, 5
    assert (timed.ratio, timed.first, timed.second) == (3.5, 3.0, 11.0)
    assert timed.quartiles == [2.25, 4.75]


def test_both_links_train_and_bytes_are_counted() -> None:
    result = link.measure("arch:llama", "causal-lm", "1:3", examples=2, length=8, pairs=4)
    activation = 4 * 2 * 8 * result["hidden"]
    assert result["ratio"] > 0.2
    assert result["ratio_quartiles"][0] <= result["ratio"] <= result["ratio_quartiles"][1]
    assert 4 * activation <= result["tensor_bytes"] <= 4 * activation + 2 * 8  # the mask, if there is one
    assert 0 < result["header_bytes"] < 1000  # protocol 3 names its tensors in JSON: 903; before, 324


def test_what_leaks_is_a_row_for_each_defence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert_folder(tmp_path / "model", dropout=True)
    monkeypatch.setattr("flexp.audit.auditing.paragraphs", lambda _, most: ["good bad fine poor words people use"] * 20)
    monkeypatch.setitem(leakage.ROWS, "tail", ("data.clients.each=[{cut=[2,3]}]",))
    monkeypatch.setitem(leakage.ROWS, "deep", ("privacy.penalty=nopeek", "privacy.max_content_words=0.0",
                                               "privacy.warm_up.steps=0", *leakage.ROWS["tail"]))  # fmt: skip
    page = tmp_path / "front.html"
    some, keep, run = "as it is; tail; local; deep", tmp_path / "rows", str(toml(tmp_path))
    result = leakage.measure(run, steps=1, rounds=1, only=some, draw=page, keep=keep)
    assert [row[0] for row in result.rows] == ["as it is", "tail", "local", "deep"]
    assert result.rows[2][1:4] == ["not sent"] * 3
    assert result["rows"]["local"]["bytes"] == 0 < result["rows"]["as it is"]["bytes"]
    assert result["rows"]["local"]["line"].startswith("sends no activations")
    assert result.rows[3][1].startswith("refused: after 0 steps of the warm-up")
    assert "as it is" in page.read_text(encoding="utf-8")
    assert result["rows"]["tail"]["cuts"] == {name: [2, 3] for name in ("north", "south", "west")}
    assert result.rows[1][1].startswith("2: ")
    assert result.rows[1][3] == "not sent"
    monkeypatch.setattr(leakage, "run", lambda *_, **__: pytest.fail("it was made before"))
    again = leakage.measure(run, steps=1, rounds=1, only=some, keep=keep)
    assert again.rows == result.rows
    with pytest.raises(ConfigError, match="--only depth: expected some of as it is; kl"):
        leakage.measure(only="depth")


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
    result = codec.measure(*place, list(variants), steps=3, batch_size=4, max_length=12, test_examples=12)
    off, fp32, bf16, int4 = result["rows"]
    assert [row["codec"] for row in result["rows"]] == list(variants)
    assert (fp32["loss"], fp32["bytes"]) == (off["loss"], off["bytes"])  # float32 already: nothing is rounded
    assert 0 < abs(bf16["loss_change"]) < 0.05
    assert 0.48 < bf16["ratio"] < 0.53  # masks are not halved
    assert int4["ratio"] < 0.25
    assert int4["encode_ms"] > 0 < int4["decode_ms"]


def test_both_runs_of_the_slow_link_train_the_same(place: tuple[str, str]) -> None:
    options = {
        "round_trip": 20.0,
        "bandwidth": 10.0,
        "blocks": 3,
        "steps": 6,
        "timed": 4,
        "batch_size": 8,
        "max_length": 12,
        "test_examples": 12,
    }
    same = slow_link.measure(*place, codec="fp32", in_flight=4, **options)
    assert abs(same["loss_change"]) < 1e-5  # in pieces: other sums, the same step
    rounded = slow_link.measure(*place, codec="int8-row", in_flight=4, **options)
    assert 0 < abs(rounded["loss_change"]) < 0.05
    assert rounded["plain_loss"] == same["plain_loss"]
    assert rounded["fast_bytes"] < 0.4 * rounded["plain_bytes"]  # H = 32: scales weigh more than in real models
    assert rounded["plain_seconds"] > 4 * 0.01


def test_the_file_saves_the_table_on_either_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "peak", warmly)
    sizes = {"vocab_size": 60_000, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path)
    found = embeddings.measure(str(tmp_path), examples=2, length=8, pairs=4)
    assert found["table_bytes"] == 60_000 * 128 * 4
    assert found["cut"] == [1, 2]
    for who in ("client", "whole"):
        assert found[who]["memory"] - found[who]["file"] == pytest.approx(found["table_bytes"], rel=0.15)
    assert found["ratio"] > 0


@pytest.mark.slow
def test_moves_are_timed_and_their_losses_set_beside_a_twins(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, rounds=1, steps_per_round=1, dropout=0.0)
    found = recut.compare(config, [(1, 4), (3, 4), (1, 4), (3, 4)], "north")
    there, back, again = found["rows"]
    assert (there["came"], there["restored"], back["went"], again["restored"]) == ([1, 2], [], [1, 2], [1, 2])
    assert all(row["seconds"] > 0 and row["steps"] == row["seconds"] / row["step_seconds"] for row in found["rows"])
    assert all(row["jump"] == row["loss_change"] - row["twin_change"] for row in found["rows"])
    same = recut.compare(config, [(1, 4), (3, 4)], "north")
    assert same["rows"][0]["loss_before"] == there["loss_before"]


def test_a_cut_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, rounds=1, steps_per_round=1)
    with pytest.raises(ConfigError, match="--cuts"):
        recut.compare(config, [(1, 4), (7, 9)], "north")


def test_a_step_stays_within_few_files(tmp_path: Path) -> None:
    """A reader should not have to open more than these; whoever makes it more raises the figure knowingly."""
    config = tiny_run(tmp_path, rounds=1, steps_per_round=1)
    config = config.model_copy(update={"method": type(config.method)()})  # as the bench does
    walk = house.walk_of_step(config)
    assert {"client/trainer.py", "client/model.py", "server/exchanges.py", "server/session.py"} <= set(walk.files)
    assert len(walk.files) <= 19
    assert len(walk.files) < walk.moves <= 174


def test_circles_are_all_that_reach_themselves() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": {"e"}}
    assert house.circles_of(arrows) == [["b", "c"], ["e"]]


def test_queues_of_a_server_as_by_hand() -> None:
    fleet = scale.Fleet(0.0, 0.25, 0.5, message=1000, bandwidth=80_000.0, latency=0.1)  # a message takes 0.2 s
    alone = scale.simulate(fleet, 1, 100)
    assert alone.rate == pytest.approx(1 / (0.75 + 4 * 0.2))
    assert alone.waits == pytest.approx([0.75 + 4 * 0.2] * 100)
    assert (alone.versions, alone.busy) == (1, pytest.approx(0.75 / 1.55))
    full = scale.simulate(fleet, 40, 400)
    assert full.rate == pytest.approx(1 / 0.75, rel=0.05)  # the server never rests
    assert sum(full.waits) / 400 == pytest.approx(40 * 0.75, rel=0.1)  # Little's law


def test_scale(tmp_path: Path) -> None:
    found = scale.measure(str(bert_folder(tmp_path / "model")), counts="2", seconds=0.5, own=0.01)
    (row,) = found["rows"]
    assert row["measured"]["steps"] > 0
    assert row["measured"].keys() == row["predicted"].keys()


def test_fleets_make_no_more_steps_than_their_clients_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate, known = scale.simulate, scale.KNOWN["service"]
    monkeypatch.setattr(scale, "simulate", lambda *of: simulate(*of, steps=2000))
    monkeypatch.setattr(scale, "KNOWN", {"service": known})
    found = scale.measure(str(bert_folder(tmp_path / "model")), predict=True, service=0.0045)
    own, bandwidth, latency, _ = known
    cycle = scale.Fleet(own, 0.0018, 0.0027, found["message_bytes"], bandwidth, latency).cycle
    for row in found["fleets"]:
        assert row["steps"] < 1.02 * row["awake"] / cycle
        assert row["busy"] < 1.02 * scale.BUSY


@pytest.mark.parametrize("label", [0.0, 1e-3])
def test_seconds_beyond_lengths(label: float) -> None:
    """A label that takes a thousandth of a second is read whole; where none does, nothing is."""
    draw = np.random.default_rng(0)
    lengths, labels = np.arange(96) % 12 + 4, draw.integers(0, 2, 96)
    seconds = lengths * 1e-2 + label * labels + 1e-5 * draw.standard_normal((6, 96))
    found = timing._told(seconds, lengths, labels)
    assert found["by_length"] > 0.99
    assert (found["again"] > found["again_by_chance"]) is bool(label)
    assert (found["auc"] > 0.99) is bool(label)
    assert found["auc"] == 1.0 if label else found["auc"] <= found["auc_by_chance"]


def test_seconds_of_a_client(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    found = timing.measure(str(toml(tmp_path)), client="north", passes=4)
    assert found["texts"] > 0
