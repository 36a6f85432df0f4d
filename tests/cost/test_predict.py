"""Memory, time and bytes of a step: by hand where that can be, and against a process that really trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

from flexp.config import AlignConfig, ModelConfig, OptimizerConfig, Rows
from flexp.cost.choice import Choice, codec_names, codec_share
from flexp.cost.memory import ADAPTERS, CHECKPOINTING, OVERHEAD, memory, server_memory
from flexp.cost.model_cost import ModelCost, model_cost
from flexp.cost.predict import Terms, predict
from flexp.cost.probe import Probe
from flexp.errors import ConfigError
from flexp.models.loading import quietly
from flexp.models.zoo import tiny_model
from tests.planner.tools import cost_of, measured, plain_profile

from .tools import warmly

SERVER = plain_profile(role="server", flops=1e10, uplink_bps=1e9, downlink_bps=1e9, latency_s=0.0)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_deeper_and_larger_needs_more(name: str, rank: int | None, checkpointing: bool) -> None:
    cost = cost_of(name)

    def of(cut: tuple[int, int], examples: int = 4, accumulation: int = 1) -> int:
        return memory(cost, Choice(cut, examples, accumulation, checkpointing, rank))

    deeper = [of((start, 4)) for start in range(4)]
    assert deeper == sorted(set(deeper))
    tails = [of((1, stop)) for stop in (4, 3, 2)]
    assert tails == sorted(set(tails))
    sizes = [of((2, 4), examples) for examples in (1, 2, 4, 8, 32)]
    assert sizes == sorted(set(sizes))
    # For the server it is the other way round.
    serving = [server_memory(cost, Choice((start, 4), 4, rank=rank)) for start in range(4)]
    assert serving == sorted(set(serving), reverse=True)


def test_adapters_of_each_client_count_for_the_server() -> None:
    cost, cut = cost_of("llama"), (1, 3)
    block = tiny_model("llama").model.layers[0]
    sizes = [module.in_features + module.out_features for module in block.modules() if isinstance(module, nn.Linear)]
    shared, own = (predict(cost, SERVER, Choice(cut, 2, rank=4), SERVER, Terms(own=own)) for own in (False, True))
    adam = 3  # A and B, and two numbers of the optimiser for each of theirs
    assert own.server_memory_bytes - shared.server_memory_bytes == 2 * 4 * sum(sizes) * 4 * adam
    assert replace(own, server_memory_bytes=0) == replace(shared, server_memory_bytes=0)


def test_checkpointing_and_adapters_save_memory_where_activations_and_states_do() -> None:
    cost = cost_of("llama")
    plain = memory(cost, Choice((3, 4), 32), overhead_bytes=0)
    assert memory(cost, Choice((3, 4), 32, checkpointing=True), overhead_bytes=0) - CHECKPOINTING < 0.6 * plain
    few = memory(cost, Choice((3, 4), 1), overhead_bytes=0)
    assert memory(cost, Choice((3, 4), 1, rank=1), overhead_bytes=0) - ADAPTERS < 0.75 * few


def test_gathered_gradients_are_held_during_every_forward() -> None:
    """With large activations the peak is where the loss is; there the earlier exchanges' gradients come on top."""
    cost, cut = cost_of("gpt2"), (3, 4)
    shape = cost.at(32)
    trained = shape.head.trained_bytes + sum(piece.trained_bytes for piece in shape.blocks[:3])
    assert memory(cost, Choice(cut, 32, 2)) - memory(cost, Choice(cut, 32, 1)) == trained


def test_measured_overhead_replaces_the_assumed_one() -> None:
    cost, choice = cost_of("bert"), Choice((1, 4), 2)
    assert memory(cost, choice) - memory(cost, choice, overhead_bytes=5) == OVERHEAD - 5
    profile = plain_profile(measured=[measured(cost, overhead_bytes=5)])
    assert predict(cost, profile, choice, SERVER).memory_bytes == memory(cost, choice, overhead_bytes=5)


def test_bytes_and_link_by_hand() -> None:
    cost = cost_of("bert")
    message, mask, rows = 4 * 10 * 32 * 4, 4 * 10, 4 * 32 * 4  # of h one row a text, and flags that say which
    found = predict(cost, plain_profile(), Choice((1, 4), 4, 3), SERVER)
    assert found.bytes_up == 3 * (message + rows + 2 * mask)
    assert found.bytes_down == 3 * (message + rows)
    whole = predict(cost, plain_profile(), Choice((1, 4), 4, 3), SERVER, Terms(rows="all"))
    assert (whole.bytes_up, whole.bytes_down) == (3 * (2 * message + mask), 3 * 2 * message)
    assert predict(cost, plain_profile(), Choice((1, 3), 4, 3), SERVER).bytes_up == whole.bytes_up
    link = 12 * 0.01 + 8 * found.bytes_up / 1e6 + 8 * found.bytes_down / 4e6
    assert found.link_seconds == pytest.approx(link)
    assert found.step_seconds == pytest.approx(found.client_seconds + found.server_seconds + link)
    assert found.energy_joules == pytest.approx(10.0 * found.client_seconds + 1.0 * link)
    aligned = predict(cost, plain_profile(), Choice((2, 4), 4, 3), SERVER, Terms(base_depth=1))
    assert aligned.bytes_up == 3 * (2 * message + rows + 2 * mask)
    same_depth = predict(cost, plain_profile(), Choice((1, 4), 4, 3), SERVER, Terms(base_depth=1))
    assert same_depth.bytes_up == found.bytes_up
    slower = predict(cost, plain_profile(uplink_bps=1e12), Choice((1, 4), 4), SERVER)
    assert slower.link_seconds == pytest.approx(0.04 + 8 * slower.bytes_up / 1e9 + 8 * slower.bytes_down / 4e6)


def test_one_vector_of_a_text_by_hand() -> None:
    """The head works on all ten tokens; one row of each text crosses, with its mask, and goes on."""
    model = ModelConfig.of("arch:bert", pooling="mean")
    apart = model_cost(model, "sequence-classification", length=10)
    pooled = model_cost(model, "sequence-classification", length=10, pools=True)
    choice, row = Choice((2, 4), 4, 3), 4 * apart.hidden * 4
    whole, one = (predict(each, plain_profile(), choice, SERVER) for each in (apart, pooled))
    assert (one.bytes_up, one.bytes_down) == (3 * (2 * row + 4), 3 * 2 * row)
    few = model_cost(model, "sequence-classification", length=1).at(4)
    middle = few.blocks[2:4]
    assert one.server_seconds == pytest.approx(3 * sum(p.forward_flops + p.backward_flops for p in middle) / 1e10)
    assert one.server_seconds < 0.2 * whole.server_seconds
    assert one.client_seconds == whole.client_seconds  # its tail is the classifier alone
    kept = predict(pooled, plain_profile(), choice, SERVER, Terms(frozen=2, anew=0.5))
    assert kept.bytes_up == one.bytes_up  # means do not cross once
    tails = [predict(each, plain_profile(), Choice((2, 3), 4, 3), SERVER).client_seconds for each in (pooled, apart)]
    assert tails[0] < tails[1]
    assert one.memory_bytes < whole.memory_bytes
    short = predict(model_cost(model, "sequence-classification", length=1), plain_profile(), choice, SERVER)
    assert one.server_memory_bytes == short.server_memory_bytes < whole.server_memory_bytes


def test_a_frozen_head_and_one_that_is_sent_once_by_hand(tmp_path: Path) -> None:
    """Numbers are int64, flags bytes: as :class:`flexp.links.messages.KeptForwardRequest` has them."""
    cost, choice, message, rows, mask = cost_of("bert"), Choice((2, 4), 4, 3), 4 * 10 * 32 * 4, 4 * 32 * 4, 4 * 10
    plain, frozen, half, kept = (
        predict(cost, plain_profile(), choice, SERVER, Terms(frozen=first, anew=anew))
        for first, anew in ((0, 1.0), (2, 1.0), (2, 0.5), (2, 0.0))
    )
    assert (frozen.bytes_up, frozen.bytes_down) == (plain.bytes_up, 3 * rows)
    assert (kept.bytes_up, kept.bytes_down) == (3 * (rows + 2 * mask + 4 * (8 + 1)), 3 * rows)
    assert half.bytes_up == kept.bytes_up + 3 * message // 2
    shape = cost.at(4)
    head = shape.head.forward_flops + shape.head.backward_flops
    assert frozen.client_seconds == pytest.approx(3 * (2 * shape.blocks[1].forward_flops + head) / 1e9)
    assert kept.client_seconds == pytest.approx(3 * head / 1e9)
    assert kept.memory_bytes == frozen.memory_bytes < plain.memory_bytes
    # What is not the same each time, or asks for a gradient, is sent each time.
    assert predict(cost, plain_profile(), choice, SERVER, Terms(frozen=1, anew=0.5)) == predict(
        cost, plain_profile(), choice, SERVER, Terms(frozen=1)
    )
    aligned = predict(cost, plain_profile(), choice, SERVER, Terms(frozen=2, anew=0.5, base_depth=1))
    assert aligned.bytes_up == plain.bytes_up + 3 * message
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}
    for name, value in (("hidden_dropout_prob", 0.1), ("classifier_dropout", 0.2)):
        others = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 4}
        transformers.BertConfig(**sizes, **{**others, name: value}).save_pretrained(tmp_path)
        drawn = model_cost(ModelConfig.of(tmp_path), "sequence-classification", length=10)
        assert drawn.draws == (name == "hidden_dropout_prob")
    trained = predict(
        cost_of("bert", train_embeddings=True), plain_profile(), choice, SERVER, Terms(frozen=2, anew=0.5)
    )
    assert (trained.bytes_up, trained.bytes_down) == (plain.bytes_up, plain.bytes_down)


@pytest.mark.parametrize(("rows", "read", "share"), [("loss", 0.25, 0.225), ("loss", 1.0, 0.9), ("logits", 0.25, 1.0)])
def test_rows_that_a_language_models_loss_reads(rows: Rows, read: float, share: float) -> None:
    """Of ten tokens nine predict one."""
    cost, message = cost_of("llama"), 4 * 10 * 32 * 4
    found = predict(cost, plain_profile(), Choice((1, 4), 4), SERVER, Terms(rows=rows, read=read))
    assert found.bytes_down == message + share * message
    assert found.bytes_up == found.bytes_down + 4 * 10 * (1 if rows == "logits" else 2)


@pytest.mark.parametrize("codec", codec_names())
def test_codecs_change_what_crosses_alone(codec: str) -> None:
    cost, mask = cost_of("bert"), 2 * 4 * 10
    plain, coded = (predict(cost, plain_profile(), Choice((1, 4), 4, codec=name), SERVER) for name in ("none", codec))
    assert coded.bytes_down == pytest.approx(codec_share(codec) * plain.bytes_down, abs=1)
    assert coded.bytes_up == pytest.approx(codec_share(codec) * (plain.bytes_up - mask) + mask, abs=1)
    assert coded.memory_bytes == plain.memory_bytes
    half = cost_of("bert", dtype="bfloat16")
    assert predict(half, plain_profile(), Choice((1, 4), 4, codec="bf16"), SERVER).bytes_down == plain.bytes_down // 2


def test_seconds_of_a_device_that_was_not_measured() -> None:
    cost = cost_of("gpt2")
    shape = cost.at(4)
    found = predict(cost, plain_profile(), Choice((1, 3), 4, 2), SERVER)
    own = [shape.first, shape.blocks[3], shape.head]
    flops = sum(piece.forward_flops + piece.backward_flops for piece in own)
    assert found.client_seconds == pytest.approx(2 * flops / 1e9)
    middle = sum(piece.forward_flops + piece.backward_flops for piece in shape.blocks[1:3])
    assert found.server_seconds == pytest.approx(2 * middle / 1e10)


def test_seconds_of_a_device_that_was_measured() -> None:
    """A block takes 1 + 2 s an example, so four examples and two own blocks take 24 s, and computing again 4 s each."""
    cost = cost_of("gpt2")
    profile = plain_profile(measured=[measured(cost, update=1e-3)])
    shape = cost.at(4)
    trained = shape.head.trained + 2 * shape.blocks[0].trained
    update = 1e-3 * trained
    found = predict(cost, profile, Choice((1, 3), 4), SERVER)
    assert found.client_seconds == pytest.approx(2 * 4 * 3.0 + update)
    twice = predict(cost, profile, Choice((1, 3), 4, 2), SERVER)
    assert twice.client_seconds == pytest.approx(2 * 2 * 4 * 3.0 + update)
    again = predict(cost, profile, Choice((1, 3), 4, checkpointing=True), SERVER)
    assert again.client_seconds - found.client_seconds == pytest.approx(2 * 4 * 1.0)
    larger = predict(cost, profile, Choice((1, 3), 16), SERVER)
    assert larger.client_seconds == pytest.approx(2 * 16 * 3.0 + update)
    # Adapters were not measured: fewer operations, so less time.
    lora = predict(cost, profile, Choice((1, 3), 4, rank=4), SERVER)
    small = cost.at(4, 4)
    scale = small.blocks[0].backward_flops / shape.blocks[0].backward_flops
    assert 8.0 * small.blocks[0].forward_flops / shape.blocks[0].forward_flops < lora.client_seconds
    assert lora.client_seconds < found.client_seconds
    assert scale < 0.7


def test_another_models_measurements_are_not_used() -> None:
    other = plain_profile(measured=[measured(cost_of("bert"))])
    cost, choice = cost_of("gpt2"), Choice((1, 3), 4)
    assert predict(cost, other, choice, SERVER) == predict(cost, plain_profile(), choice, SERVER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cut": (3, 3), "micro_batch": 1}, "0 <= s < e"),
        ({"cut": (1, 2), "micro_batch": 0}, "at least 1"),
        ({"cut": (1, 2), "micro_batch": 1, "codec": "zip"}, "'zip' is not known"),
    ],
)
def test_impossible_choices(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Choice(**settings)  # type: ignore[arg-type]


def test_a_cut_outside_of_the_model() -> None:
    with pytest.raises(ConfigError, match="4 blocks"):
        memory(cost_of("bert"), Choice((1, 9), 1))


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, ModelCost]:
    """A model of some size, with a large table of embeddings where that stays in its file; and what it costs."""
    folder: Path = tmp_path_factory.mktemp("saved")
    config = tiny_model("bert").config
    config.update({"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4})
    config.update({"vocab_size": 20_000} if request.param else {})
    with quietly():
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    model = ModelConfig.of(folder, embeddings="file" if request.param else "memory")
    return model, model_cost(model, "sequence-classification", length=48)


@pytest.mark.parametrize(
    ("saved", "how"),
    [(False, "trains"), (False, "follows"), (True, "trains"), (False, "sends once"), (False, "pools"), (True, "pages")],
    ids=["trains", "follows", "in its file", "sends once", "pools", "blocks in their file"],
    indirect=["saved"],
)
def test_a_process_needs_what_was_predicted(saved: tuple[ModelConfig, ModelCost], how: str) -> None:
    """Within 15 %, of about 100 MB, with what is no tensor assumed and not measured."""
    (model, cost), cut, examples = saved, (5, 6), 8
    probe = Probe(
        model=model.id,
        kind=cost.kind,
        cut=cut,
        examples=examples,
        length=cost.length,
        labels=["a", "b"],
        model_config=model.model_dump(mode="json"),
        optimizer=OptimizerConfig().model_dump(mode="json"),
        steps=2,
    )
    trains = memory(cost, Choice(cut, examples))
    predicted = trains
    if how == "follows":
        align = AlignConfig(kind="weights", teach=True, follow=True, every=100)
        probe = replace(probe, align=align.model_dump(mode="json"), base_depth=1)
        predicted = memory(cost, Choice(cut, examples), base=True, followed=1)
    if how == "sends once":
        probe = replace(probe, frozen=5, cache="memory")
        predicted = memory(cost, Choice(cut, examples), frozen=5)
    if how == "pools":
        mean = model.model_copy(update={"pooling": "mean"})
        probe = replace(probe, cut=(2, 3), pools=True, model_config=mean.model_dump(mode="json"))
        apart, pooled = (model_cost(mean, cost.kind, length=cost.length, pools=pools) for pools in (False, True))
        trains, predicted = (memory(each, Choice(probe.cut, examples)) for each in (apart, pooled))
        assert predicted < trains - 10e6
    if how == "pages":
        pages = model.model_copy(update={"tuning": "lora", "blocks": "file"})
        probe = replace(probe, model_config=pages.model_dump(mode="json"))
        cost, adapters = model_cost(pages, cost.kind, length=cost.length), Choice(cut, examples, rank=8)
        trains, predicted = memory(model_cost(model, cost.kind, length=cost.length), adapters), memory(cost, adapters)
        assert predicted < trains - 12e6  # four of five blocks
    peak = warmly(probe).peak
    assert peak > 40e6
    assert predicted == pytest.approx(peak, rel=0.15)
    assert (
        how in ("trains", "pools", "pages") or predicted < 0.8 * trains
    )  # no gradient and no optimiser for four or all of five blocks


def test_a_table_in_its_file_takes_no_memory(tmp_path: Path) -> None:
    config = tiny_model("bert").config
    with quietly():
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    held, stored = (
        memory(
            model_cost(ModelConfig.of(tmp_path, embeddings=where), "sequence-classification", length=10),
            Choice((3, 4), 8),
        )
        for where in ("memory", "file")
    )
    assert held - stored == 4 * config.vocab_size * config.hidden_size
