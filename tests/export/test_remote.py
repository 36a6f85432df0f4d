"""A client away from the server's machine: train over gRPC → fetch → plain transformers or peft, the same logits."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from flexp.errors import ConfigError, LinkError, LinkLostError, StorageError
from flexp.export import remote as exporting
from flexp.export.folder import Form, export
from flexp.export.opening import open_trained
from flexp.links.asking import FetchReply, FetchRequest
from flexp.links.base import Link
from tests.harness import RecordingLink

from .remote_tools import Remote, remote
from .test_round_trips import ATTENTION, AUTO
from .tools import answer

FULL = [
    ("bert", {}),
    ("bert", {"embeddings": "file"}),
    ("vit", {}),
    ("gpt2", {"train_embeddings": True}),  # tied
    ("llama-tied", {}),
    ("qwen3_moe", {}),
    ("llama", {"dtype": "bfloat16"}),
]
LORA = [("bert", {}), ("gpt2", {}), ("llama", {"dtype": "bfloat16"}), ("qwen3_moe", {"lora": ATTENTION})]


def load(arch: str, folder: Path) -> Any:
    return AUTO.get(arch, AutoModelForCausalLM).from_pretrained(folder)


@pytest.mark.parametrize(("arch", "model"), FULL)
def test_full(tmp_path: Path, arch: str, model: dict[str, Any]) -> None:
    with remote(tmp_path, arch, model={"id": str(tmp_path / "model"), **model}) as here:
        facts = export(here.opened, tmp_path / "out")
        expected = here.expected()
    loaded = load(arch, tmp_path / "out")
    assert str(loaded.dtype) == f"torch.{model.get('dtype', 'float32')}"
    assert torch.equal(answer(loaded, here.batch()), expected)
    pretrained = answer(here.opened.stage(exporting.Part.whole(4)).model, here.batch())
    assert not torch.allclose(pretrained, expected, atol=1e-3)
    labels = here.setup.run.federation.task.label_names
    assert labels is None or list(loaded.config.id2label.values()) == labels
    assert (facts["steps"], facts["cut"]) == (3, [1, 3])
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    index = json.loads((tmp_path / "out" / exporting.INDEX).read_text(encoding="utf-8"))
    found = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == found
    sizes = [value.nbytes for file in files for value in load_file(tmp_path / "out" / file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize(("arch", "model"), LORA)
def test_lora(tmp_path: Path, arch: str, model: dict[str, Any]) -> None:
    settings = {"tuning": "lora", "lora": {"rank": 4, "alpha": 12.0}, **model}
    links: list[RecordingLink] = []
    with remote(tmp_path, arch, model={"id": str(tmp_path / "model"), **settings}) as here:

        def reach(name: str) -> Link:
            links.append(RecordingLink(here.reach(name)))
            return links[-1]  # type: ignore[return-value]

        export(open_trained(here.state, connect=reach), tmp_path / "whole")
        export(here.opened, tmp_path / "adapter", "adapter")
        expected = here.expected()
    sent = {name for reply in links[0].sent(FetchReply) for name in reply.weights}
    assert sent
    assert all(re.search(r"\.[12]\..*\.lora_[AB]\.default\.weight$", name) for name in sent)
    merged = answer(load(arch, tmp_path / "whole"), here.batch())
    rounding = 0.05 if "dtype" in model else 2e-5
    assert float((merged - expected).abs().max()) <= rounding * max(1.0, float(expected.abs().max()))
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    auto = AUTO.get(arch, AutoModelForCausalLM)
    base = auto.from_pretrained(tmp_path / "model", config=config, dtype=config.dtype, ignore_mismatched_sizes=True)
    assert torch.equal(answer(PeftModel.from_pretrained(base, tmp_path / "adapter"), here.batch()), expected)


def test_it_equals_what_a_run_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor for tensor, the shards are the file that ``save_pretrained`` writes of the whole model."""
    monkeypatch.setattr(exporting, "FILE_BYTES", 4096)
    with remote(tmp_path, "llama") as here:
        export(here.opened, tmp_path / "out", dtype="bfloat16")
        weights = {**here.server.shared.updater.parameters, **here.opened.personal()}
    whole = exporting.fill(here.opened.stage(exporting.Part.whole(4)).model, weights, 2.0, torch.bfloat16)
    whole.save_pretrained(tmp_path / "whole")
    expected = load_file(tmp_path / "whole/model.safetensors")
    found: dict[str, torch.Tensor] = {}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5  # a block has several files
    for file in files:
        found |= load_file(file)
    assert not list((tmp_path / "out").glob("part-*"))
    loaded = answer(load("llama", tmp_path / "out"), here.batch())
    assert torch.equal(loaded, answer(load("llama", tmp_path / "whole"), here.batch()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with remote(tmp_path_factory.mktemp("remote"), "llama") as made:
        yield made


def test_without_permission_nothing_is_given(here: Remote, tmp_path: Path) -> None:
    here.server.allow_export = False
    try:
        with pytest.raises(LinkError, match=r"gives no shared blocks away; .*--allow-export") as caught:
            export(here.opened, tmp_path / "out")
    finally:
        here.server.allow_export = True
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("block", "first", "most"), [(0, 0, 1), (4, 0, 1), (-1, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_only_the_clients_own_blocks_of_the_server(here: Remote, block: int, first: int, most: int) -> None:
    link = here.opened.split.link
    with pytest.raises(
        LinkError, match=rf"block {block} from tensor {first} on.*expected one of the shared blocks \[1, 4\)"
    ):
        link.call(FetchRequest(block, first, most)).result()
    link.close()


def test_a_block_comes_in_parts_that_are_bounded(here: Remote) -> None:
    link = here.opened.split.link
    parameters = here.server.shared.updater.parameters
    own = {name: value for name, value in parameters.items() if here.server.shared.stage.block_of(name) == 2}
    most = max(value.nbytes for value in own.values())
    found: dict[str, torch.Tensor] = {}
    while len(found) < len(own):
        reply = link.call(FetchRequest(2, len(found), most)).result()
        assert 0 < sum(value.nbytes for value in reply.weights.values()) <= most
        assert (reply.version, reply.total) == (here.server.shared.version, len(own))
        found |= reply.weights
    assert list(found) == sorted(own)
    assert all(torch.equal(found[name], value) for name, value in own.items())
    assert link.meter.evaluation.bytes_down == sum(value.nbytes for value in own.values())
    assert link.meter.training.bytes_down == 0
    alone = link.call(FetchRequest(2, 0, 1)).result()
    assert list(alone.weights) == sorted(own)[:1]
    link.close()


class Disturbed:
    """A link behind which another client's updates come, the first ``times`` that the last block is asked for."""

    def __init__(self, here: Remote, times: int) -> None:
        self.here, self.times, self.asked = here, times, 0

    def __call__(self, name: str) -> Any:
        link = self.here.reach(name)
        plain = link.call

        def call(request: Any) -> Any:
            self.asked += isinstance(request, FetchRequest)
            if isinstance(request, FetchRequest) and request.block == 2 and self.times:
                self.times -= 1
                self.here.server.shared.version += 1
            return plain(request)

        link.call = call  # type: ignore[method-assign]
        return link


def test_blocks_of_two_versions_are_never_mixed(here: Remote, tmp_path: Path) -> None:
    once = Disturbed(here, 1)
    export(open_trained(here.state, connect=once), tmp_path / "once")
    assert once.asked == 4  # both blocks twice
    assert torch.equal(answer(load("llama", tmp_path / "once"), here.batch()), here.expected())
    with pytest.raises(LinkError, match=r"updated each of the 3 times .* export when the run rests"):
        export(open_trained(here.state, connect=Disturbed(here, 3)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_who_is_cut_off_goes_on_with_what_is_missing(
    here: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexp.client.taking.MOST", 1)  # each tensor alone
    links: list[Link] = []

    def reach(name: str) -> Any:
        link = here.reach(name)
        links.append(link)
        plain, left = link.call, [5]

        def call(request: Any) -> Any:
            left[0] -= isinstance(request, FetchRequest)
            if not left[0]:
                raise LinkLostError("the cable")
            return plain(request)

        link.call = call  # type: ignore[method-assign]
        return link

    export(open_trained(here.state, connect=reach), tmp_path / "out")
    assert torch.equal(answer(load("llama", tmp_path / "out"), here.batch()), here.expected())
    shared = here.server.shared
    blocks = [
        value.nbytes for name, value in shared.updater.parameters.items() if shared.stage.block_of(name) in (1, 2)
    ]
    assert len(links) > 3
    assert sum(link.meter.evaluation.bytes_down for link in links) == sum(blocks)  # each tensor once


def test_a_server_without_its_state_is_noticed(here: Remote, tmp_path: Path) -> None:
    version, here.server.shared.version = here.server.shared.version, 0
    try:
        with pytest.raises(LinkError, match=r"never updated, and this client has done 3 steps: .* --state"):
            export(here.opened, tmp_path / "out")
    finally:
        here.server.shared.version = version
    assert not list(tmp_path.iterdir())


def test_no_more_than_a_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live tensors, counted whenever a shard is about to be written and whenever a block is asked for."""
    counted: list[int] = []

    def live() -> int:
        storages = {}
        for item in gc.get_objects():  # what nobody uses any more, but is still there, among them
            if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type == "cpu":
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    with remote(tmp_path, "llama", cut=(2, 3), model={"id": str(tmp_path / "model")}) as here:
        write = exporting._Shards.write

        def counting(self: Any, number: int, model: Any, settings: bool = False) -> None:
            counted.append(live())
            write(self, number, model, settings)

        monkeypatch.setattr(exporting._Shards, "write", counting)
        gc.collect()
        before = live()
        export(here.opened, tmp_path / "out")
    assert len(counted) == 5
    shards = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    whole = sum(shards)
    most = max(counted) - before
    assert 0.9 * max(shards) < most <= max(shards)
    assert most < 0.5 * whole


def test_which_snapshot(here: Remote, tmp_path: Path) -> None:
    for which, error, message in (
        ("best", ConfigError, "expected a number or last"),
        ("7", StorageError, "has no checkpoint 7; it has 4"),
    ):
        with pytest.raises(error, match=message):
            export(open_trained(here.state, None, which, here.reach), tmp_path / "out")
    with pytest.raises(ConfigError, match="is of the client 'north', not of 'south'"):
        open_trained(here.state, "south", connect=here.reach)
    with pytest.raises(ConfigError, match="the middle of its model is on a server: say where with --server"):
        export(open_trained(here.state), tmp_path / "out")
    form: Form = "adapter"
    with pytest.raises(ConfigError, match=r"has no adapters .* use --merge"):
        export(here.opened, tmp_path / "out", form)
    newer = here.state / "snapshots/checkpoint-00000009"
    newer.mkdir()
    (newer / "checkpoint.json").write_text("{}", encoding="utf-8")
    half = here.state / "snapshots/.checkpoint-00000010.part"
    half.mkdir()
    assert here.opened.checkpoint.number == 4  # nothing is changed there, not even what is damaged or being written
    assert newer.is_dir()
    assert half.is_dir()
    newer.joinpath("checkpoint.json").unlink()
    newer.rmdir()
    half.rmdir()
    with safe_open(here.opened.checkpoint.checked("client-north"), framework="pt") as file:
        assert any(name.startswith("optimizer/") for name in file.keys())  # noqa: SIM118
