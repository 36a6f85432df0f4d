"""The exported folder: whole or not there, with a card on which names are only names."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from flexp.errors import ConfigError, StorageError
from flexp.export import folder as exporting
from flexp.export.answers import score
from flexp.export.card import card
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.export.saved import RunModel, SavedRun, open_run
from flexp.run.belonging import origin

from .tools import train

HOSTILE = "../../up\n# Head | <b>x</b> `y` ---\t[link](http://a)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return open_run(train(tmp_path_factory.mktemp("folder"), "bert", clients=(HOSTILE, "south")))


def test_a_hostile_name_is_only_a_name(run: SavedRun, tmp_path: Path) -> None:
    facts = export(RunModel(run, HOSTILE.strip()), tmp_path / "sub/out")
    assert [path.name for path in tmp_path.iterdir()] == ["sub"]
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["out"]
    text = (tmp_path / "sub/out/README.md").read_text(encoding="utf-8")
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads[1:] == ["## Use", "## Limits"]
    assert heads[0] == r"# Personal model of ../../up \# Head \| \<b\>x\</b\> \`y\` --- \[link\]\(http://a\)"
    assert text.count("---\n") == 2
    assert json.loads((tmp_path / "sub/out/flexp.json").read_text(encoding="utf-8"))["client"] == facts["client"]


def test_the_card_says_what_the_run_says(run: SavedRun, tmp_path: Path) -> None:
    facts = export(RunModel(run, "south"), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    south = run.client("south")
    after = run.scored[1]["south"]["personal"]
    assert after is not None
    assert f"| private examples | {len(south.train)} to train, {len(south.test)} to test |" in text
    assert f"| {100 * after:.1f} % |" in text
    for part in ("flexp-sfl", "(2, 4)", "after round 1 of 1", "not known to FlexP", "| labels | no, yes |"):
        assert part in text
    for secret in (str(tmp_path), str(run.folder), "rows.jsonl/"):
        assert secret not in json.dumps(facts) + text
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.padding_side == "right"
    assert tokenizer(["the dog", "the"], padding=True)["attention_mask"] == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_scores_with_noise_are_said_to_be(run: SavedRun, tmp_path: Path) -> None:
    """A run scores its covered activations; nothing leaves an exported model, so it computes without."""
    place = train(tmp_path, "bert", privacy={"noise": 1.5, "clip": 0.5}, method={"align": {"kind": "off"}})
    facts = export(open_trained(place, "south"), tmp_path / "out")
    assert facts["noise"] == 1.5
    said = "clipped and covered with noise (privacy.noise = 1.5)"
    assert said in (tmp_path / "out/README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert score(open_trained(place, "south")) != score(open_trained(tmp_path / "out", run=place))
    plain = export(RunModel(run, "south"), tmp_path / "plain")
    assert plain["noise"] is None
    assert "privacy.noise" not in (tmp_path / "plain/README.md").read_text(encoding="utf-8")


def test_licences_come_from_the_registry(run: SavedRun, tmp_path: Path) -> None:
    assert origin("asset:minilm-l6")["licence"] == "Apache-2.0"
    facts = export(RunModel(run, "south"), tmp_path / "out")
    text = card({**facts, "model": origin("asset:minilm-l6"), "source": origin("asset:digits")})
    assert "license: apache-2.0\n" in text
    assert 'base_model: "sentence-transformers/all-MiniLM-L6-v2"' in text
    assert "CC-BY-SA-3.0" in text


def test_a_full_disk_leaves_nothing(run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "write_text", full)  # the card: all else is written by then
    with pytest.raises(StorageError, match="the disk is full"):
        export(RunModel(run, "south"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(run: SavedRun, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ConfigError, match="exists already"):
            export(RunModel(run, "south"), taken)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "adapter"}, "has no adapters .* use --merge"),
        ({"dtype": "int8"}, "--dtype int8: expected one of float32"),
    ],
)
def test_what_cannot_be_exported(run: SavedRun, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(RunModel(run, "south"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_whole_weights_beside_adapters_need_merging(tmp_path: Path) -> None:
    model = {"id": str(tmp_path / "model"), "tuning": "lora"}
    run = open_run(train(tmp_path, "bert", model=model, server={"tuning": "full"}))
    with pytest.raises(ConfigError, match="besides adapters, whole weights of blocks were trained"):
        export(RunModel(run, "north"), tmp_path / "out", form="adapter")


def test_decoders_are_ready_to_generate(tmp_path: Path) -> None:
    export(open_trained(train(tmp_path, "gpt2"), "north"), tmp_path / "out")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "[EOS]")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = tokenizer(["the red dog", "the"], padding=True, return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, 6)
