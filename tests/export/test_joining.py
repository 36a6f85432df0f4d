"""A newcomer: what it starts from, what it leaves alone, and that its folder is a run like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flexp.config.loading import validate
from flexp.errors import ConfigError, DataError
from flexp.export.answers import predict, score
from flexp.export.backup import back_up
from flexp.export.folder import export
from flexp.export.joining import beginning, join
from flexp.export.opening import open_trained
from flexp.export.saved import SavedRun, open_run
from flexp.export.trained import OWN
from flexp.files import sha256
from flexp.run import runner
from tests.data.tools import jsonl, labelled
from tests.methods.tools import equal
from tests.tiny import checkpoint

from .tools import CUTS, answer, batch_of, train

CLIENTS = ("east", "north", "south")
STILL = ("train.personal.name=sgd", "train.personal.lr=1e-30")
"""Steps that change nothing, so that what was started from can be looked at."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    folder = tmp_path_factory.mktemp("joining")
    clients = {"names": ["north", "south"], "each": [{"cut": cut} for cut in CUTS]}
    data = {"source": str(folder / "rows.jsonl"), "train_examples": 8, "clients": clients}
    jsonl(folder / "new.jsonl", [{"text": f"w{k} the dog", "label": ("no", "yes")[k % 2]} for k in range(20)])
    return open_run(train(folder, "bert", clients=CLIENTS, data=data))


def files(folder: Path) -> dict[Path, str]:
    return {path: sha256(path) for path in folder.rglob("*") if path.is_file()}


def middle(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in checkpoint(folder)["server"].items() if name.startswith("shared/weights/")}


def test_its_folder_is_a_run_like_any_other(run: SavedRun, tmp_path: Path) -> None:
    before = files(run.folder)
    new = str(run.folder.parent / "new.jsonl")
    summary = join(run.folder, "newcomer", tmp_path / "run", data=new, steps=4, every=2, cut=(1, None))
    assert files(run.folder) == before
    assert (summary["name"], summary["rounds"], summary["finished"]) == ("run + newcomer", 2, True)
    assert [(c["name"], c["cut"], c["train_examples"]) for c in summary["clients"]] == [("newcomer", [1, 4], 8)]
    model = open_trained(tmp_path / "run")
    assert score(model)[OWN]["accuracy"] == summary["clients"][0]["last"]["personal"]
    joined = open_run(tmp_path / "run")
    export(model, tmp_path / "out")
    plain: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = batch_of(joined, "newcomer")
    assert torch.equal(answer(plain, batch), answer(joined.method.personal("newcomer"), batch))
    assert score(open_trained(tmp_path / "out", run=tmp_path / "run")) == score(model)
    assert predict(model, new, tmp_path / "labels.csv") == 20
    facts = json.loads((tmp_path / "run/join.json").read_text(encoding="utf-8"))
    assert facts["others"]["personal_mean"] == pytest.approx(
        sum(scores["personal"] or 0 for scores in run.scored[1].values()) / 2
    )
    with pytest.raises(ConfigError, match="is not resumed; run flexp join again"):
        runner.resume(tmp_path / "run")


def test_the_middle_is_the_runs_and_stays(run: SavedRun, tmp_path: Path) -> None:
    trained, pretrained = middle(run.folder), dict(run.world.source.model.named_parameters())
    join(run.folder, "east", tmp_path / "frozen", steps=2)
    join(run.folder, "east", tmp_path / "trained", steps=2, train_shared=True)
    join(run.folder, "east", tmp_path / "none", steps=2, middle="pretrained")
    assert json.loads((tmp_path / "frozen/config.json").read_text())["data"]["clients"]["cut"] == CUTS[0]
    found = middle(tmp_path / "frozen")
    assert equal(found, {name: trained[name] for name in found})
    assert {name.split(".layer.")[1][0] for name in found} == {"1", "2"}
    moved = middle(tmp_path / "trained")
    assert moved.keys() == found.keys()
    assert sum(not torch.equal(value, found[name]) for name, value in moved.items()) > 20
    none = middle(tmp_path / "none")
    assert all(torch.equal(value, pretrained[name.removeprefix("shared/weights/")]) for name, value in none.items())
    assert int(checkpoint(tmp_path / "frozen")["server"]["shared/version"]) == 0
    assert int(checkpoint(tmp_path / "trained")["server"]["shared/version"]) == 2


def test_without_the_runs_training_it_is_a_client_of_a_frozen_server(run: SavedRun, tmp_path: Path) -> None:
    join(run.folder, "east", tmp_path / "joined", steps=4, middle="pretrained")
    content = run.config.resolved()
    content["data"]["clients"] |= {"names": ["east"], "each": [{"cut": cut} for cut in [CUTS[0]]]}
    content["train"] |= {"rounds": 1, "steps_per_round": 4}
    content["server"]["tuning"] = "frozen"
    runner.run(validate(content, "frozen"), tmp_path / "alone")
    left, right = (checkpoint(tmp_path / name)["client-east"] for name in ("joined", "alone"))
    assert equal(*({n: v for n, v in side.items() if n.startswith(("personal/", "optim"))} for side in (left, right)))
    assert int(left["steps"]) == 4


def test_what_its_own_parts_start_from(run: SavedRun, tmp_path: Path) -> None:
    pretrained = dict(run.world.source.model.named_parameters())
    shared = {name.removeprefix("shared/weights/"): value for name, value in middle(run.folder).items()}
    north, south = (run.method.trained_weights(name) for name in ("north", "south"))
    back_up(run.folder, "south", tmp_path / "south.safetensors", "words")
    file = str(tmp_path / "south.safetensors")
    mean = {name: (north[name] + south[name]) / 2 for name in north}
    for number, (start, first, second, head) in enumerate(
        [  # block 0 and the classifier are nobody's but the client's; of block 1 the server has a copy
            (("pretrained",), pretrained, pretrained, pretrained),
            (("shared",), pretrained, shared, pretrained),
            (("north",), north, shared, north),
            (("south",), south, south, south),
            ((file,), south, south, south),
            (("north", "south"), mean, mean, mean),
        ]
    ):
        out = tmp_path / str(number)
        join(run.folder, "east", out, start=start, cut=(2, None), steps=1, settings=STILL, passphrase="words")
        own = {
            n.removeprefix("personal/"): v
            for n, v in checkpoint(out)["client-east"].items()
            if n.startswith("personal")
        }
        for name, value in own.items():
            where = first if ".layer.0." in name else second if ".layer.1." in name else head
            assert torch.allclose(value, where[name], rtol=0.0, atol=1e-25), (start, name)
    assert not equal(north, south)
    assert beginning(run, ["pretrained"]) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "north"}, "'north' is a client of .* already"),
        ({"name": "nobody"}, "client 'nobody' of data.clients.names is empty"),
        ({"start": ["nobody"]}, r"--start nobody: is neither pretrained, shared, a client of the run \(north, south\)"),
        ({"start": ["shared", "north"]}, "only clients and files are averaged"),
        ({"cut": (0, None)}, r"--cut 0:4 does not fit: the run's server has the blocks \[1, 4\)"),
        ({"steps": 5, "every": 2}, "--steps 5 must be a multiple of --every 2"),
        ({"settings": ["model.id=x"]}, "a newcomer takes this from the run; it may set train"),
        ({"settings": ["data.label=x"]}, "a newcomer takes this from the run"),
        ({"settings": ["train.rate=1"]}, "unknown key train.rate"),
    ],
)
def test_what_does_not_fit(run: SavedRun, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        join(run.folder, **{"name": "east", **options}, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", " ", "../x", "a/b", "a\\b", "..", "server", "a\nb", "x" * 201])
def test_what_cannot_be_a_name(run: SavedRun, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a newcomer; expected 1 to 200 bytes") as caught:
        join(run.folder, name, tmp_path / "out", data=str(run.folder.parent / "new.jsonl"), steps=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("clients", "cut"),
    [
        ({"cut": [2, None]}, [2, 4]),
        ({"each": [{"cut": [1, 3]}, {"cut": [2, None]}, {"cut": [2, 3]}]}, [2, 3]),  # it is the third
        ({"cut": [2, None], "each": [{"name": "north", "cut": [1, 3]}]}, [2, 4]),
        ({"each": [{"name": "north", "cut": [1, 3]}, {"name": "south", "cut": [2, None]}]}, [1, 3]),  # as planned
    ],
)
def test_without_a_cut_it_has_the_next_in_turn(
    run: SavedRun, tmp_path: Path, clients: dict[str, Any], cut: list[int]
) -> None:
    """What it would have had as one more client of the run."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    content = run.config.resolved()
    content["data"]["clients"] |= {"each": [], **clients}
    content["model"]["base_depth"] = 1
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    join(folder, "east", tmp_path / "out", steps=1, middle="pretrained")
    assert json.loads((tmp_path / "out/config.json").read_text())["data"]["clients"]["cut"] == cut


def test_labels_are_the_runs(run: SavedRun, tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", [{"text": f"the w{k} dog", "label": "yes"} for k in range(10)])
    join(run.folder, "new", tmp_path / "out", data=str(one), steps=1)
    assert open_run(tmp_path / "out").world.federation.task.label_names == ["no", "yes"]
    odd = jsonl(tmp_path / "odd.jsonl", labelled(10, labels=("yes", "perhaps")))
    with pytest.raises(DataError, match=r"odd.jsonl, line \d+: the label 'perhaps' is none of those .* no, yes"):
        join(run.folder, "new", tmp_path / "other", data=str(odd))


def test_methods_without_shared_blocks_are_refused(tmp_path: Path) -> None:
    place = train(tmp_path, "bert", method={"name": "local"})
    with pytest.raises(ConfigError, match=r"the method local has no server .* flexp join needs a method that splits"):
        join(place, "new", tmp_path / "out", data=str(tmp_path / "rows.jsonl"))


def test_language_models_with_adapters_and_weights_pulled_from_a_frozen_server(tmp_path: Path) -> None:
    align = {"align": {"kind": "weights", "pull": 1.0, "every": 1, "teach": True}}
    place = train(tmp_path, "gpt2", model={"id": str(tmp_path / "model"), "tuning": "lora"}, method=align)
    join(place, "new", tmp_path / "out", data=str(tmp_path / "rows.jsonl"), cut=(2, None), steps=2)
    shared = {name.removeprefix("shared/weights/"): value for name, value in middle(place).items()}
    own = {
        n.removeprefix("personal/"): v
        for n, v in checkpoint(tmp_path / "out")["client-new"].items()
        if n[:9] == "personal/"
    }
    pulled = {name: value for name, value in own.items() if ".h.1." in name}
    assert pulled
    assert all(torch.equal(value, shared[name]) for name, value in pulled.items())


def test_who_follows_takes_over_what_the_run_has_taught(tmp_path: Path) -> None:
    align = {"kind": "weights", "teach": True, "follow": True, "pull": 1.0, "every": 100}
    clients = {"names": ["north", "south"], "each": [{"cut": [1, 4]}, {"cut": [3, 4]}]}
    data = {"train_examples": 8, "clients": clients}
    folder = train(tmp_path, "bert", clients=CLIENTS, data=data, method={"align": align})
    for start in ((), ("south",)):
        out = tmp_path / f"joined{len(start)}"
        join(folder, "east", out, steps=3, cut=(3, 4), start=start)
        shared = {f"personal/{key.removeprefix('shared/weights/')}": value for key, value in middle(folder).items()}
        own = checkpoint(out)["client-east"]
        followed = own.keys() & shared.keys()
        assert followed
        assert all(torch.equal(own[key], shared[key]) for key in followed)
