"""Cuts that are planned: by "auto" for classes, profiles or this process, and by files; kept when a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexp.client.trainer import split_model_of
from flexp.config import RunConfig
from flexp.cost.choice import Choice
from flexp.cost.device import this_machine
from flexp.cost.profile import Profile
from flexp.errors import ConfigError, StorageError
from flexp.files import write_json
from flexp.methods import METHODS
from flexp.planner.infeasible import InfeasibleError
from flexp.planner.model import ModelCosts
from flexp.report.metrics import read
from flexp.run import runner
from flexp.run.planned import _task
from flexp.run.settle import build_world
from tests.tiny import CLIENTS, bert_folder, config, each

MB = 10**6
SIZES = {"small": 26 * MB, "large": 2**31}


def planned(home: Path, clients: dict[str, Any], **more: Any) -> RunConfig:
    return config(home, data={"source": str(home / "rows.jsonl"), "max_length": 16, "train_examples": 12,
                              "clients": clients}, **more)  # fmt: skip


def phone(home: Path, name: str, memory_bytes: int, role: str = "client") -> str:
    path = home / f"{name}.json"
    profile = Profile.from_class("phone").model_copy(update={"memory_bytes": memory_bytes, "role": role, "name": name})
    profile.write(path)
    return str(path)


def memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    found = Profile.from_class("laptop").model_copy(update={"memory_bytes": size, "memory_from": "a test"})
    monkeypatch.setattr("flexp.run.planned.this_machine", lambda _: found)


def entry(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "cut": [1, 4], "micro_batch": 4, "accumulation": 1, "codec": "none", **changes}


def plan_file(home: Path, *clients: dict[str, Any], **changes: Any) -> str:
    write_json(home / "plan.json", {"version": 1, "model": "tiny", "blocks": 4, "clients": list(clients), **changes})
    return str(home / "plan.json")


def test_auto_on_the_classes_of_devices(home: Path) -> None:
    devices = {"assign": ["phone", "laptop", "phone"], "server": "server"}
    world = build_world(planned(home, {"cut": "auto", "each": []}, devices=devices))
    assert world.plan is not None
    assert [client["name"] for client in world.plan["clients"]] == list(CLIENTS)
    assert [tuple(client["cut"]) for client in world.plan["clients"]] == list(world.cuts.values())
    assert any(note.startswith("cuts planned from the classes of [devices]: ") for note in world.federation.notes)


def test_auto_knows_what_is_frozen_and_sent_once(home: Path) -> None:
    """12 examples in steps of 4: a third of nine steps brings new ones. No cut is above what is frozen."""
    bert_folder(home / "model")  # without dropout
    more: dict[str, Any] = {
        "devices": {"assign": ["phone"]},
        "train": {"rounds": 3, "steps_per_round": 3, "batch_size": 4},
        "method": {"align": {"kind": "off"}, "personal": {"frozen_head_blocks": 2}},
    }
    bytes_ = {}
    for cache in ("off", "memory"):
        world = build_world(planned(home, {"cut": "auto", "each": []}, link={"cache": cache}, **more))
        assert world.plan is not None
        assert min(start for start, _ in world.cuts.values()) == 2
        task, new = world.plan["task"], 1.0 if cache == "off" else 1 / 3
        assert (task["frozen"], task["anew"]) == (2, pytest.approx(new))
        bytes_[cache] = world.plan["totals"]["bytes"]
    assert bytes_["memory"] < 0.6 * bytes_["off"]


def test_auto_on_profiles_of_the_clients(home: Path) -> None:
    files = [phone(home, name, size) for name, size in SIZES.items()]
    world = build_world(planned(home, {"cut": "auto", **each(profile=files)}))
    assert world.plan is not None
    assert [client["memory_available_bytes"] for client in world.plan["clients"]] == [26 * MB, 2**31, 26 * MB]
    assert any(note.startswith("cuts planned from data.clients.profile: ") for note in world.federation.notes)
    server = phone(home, "rack", 2**31, role="server")
    with pytest.raises(ConfigError, match=r"rack\.json is of a server; expected one of `flexp profile --as client`"):
        build_world(planned(home, {"cut": "auto", "each": [], "profile": server}))
    with pytest.raises(StorageError, match=r"none\.json"):
        build_world(planned(home, {"cut": "auto", "each": [], "profile": str(home / "none.json")}))


def test_auto_on_this_process_says_what_it_assumes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 2**30)
    wanted = planned(home, {"cut": "auto", "each": []}, train={"batch_size": 4, "micro_batch": 4})
    world = build_world(wanted)
    note = next(note for note in world.federation.notes if "planned" in note)
    assert note.startswith("cuts planned from a test, 1.07 GB; speed and network are a laptop's, not measured: ")
    assert this_machine().memory_bytes > 1
    loads: list[int] = []
    monkeypatch.setattr("flexp.run.settle.load_stage", lambda *_, **__: loads.append(1))
    assert world.plan is not None
    assert list(world.cuts.values()) == [(1, 4)] * 3  # the shallowest one: nothing else needs less
    needed = world.plan["clients"][0]["predicted"]["memory_bytes"]
    memory(monkeypatch, int(1.15 * needed) - 2)
    line = (
        r"north and 2 like it: needs .* may use .* of a test \(.* short\); embeddings that .*\(model\.emb.* would fit"
    )
    with pytest.raises(InfeasibleError, match=line) as refused:
        build_world(wanted)
    assert "\n" not in str(refused.value)
    assert not loads  # told before anything is loaded


def test_a_run_goes_on_with_the_cuts_that_it_began_with(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 2**30)
    out = home / "out"
    wanted = planned(home, {"cut": "auto", "each": []}, train={"rounds": 1, "steps_per_round": 1, "batch_size": 4})
    runner.run(wanted, out)
    kept = json.loads((out / "config.json").read_text(encoding="utf-8"))
    plan = (out / "plan.json").read_bytes()
    cuts = [own["cut"] for own in kept["data"]["clients"]["each"]]
    assert cuts == [client["cut"] for client in json.loads(plan)["clients"]]
    kept["train"]["rounds"] = 2
    write_json(out / "config.json", kept)
    memory(monkeypatch, 1)  # with which nothing could be planned
    summary = runner.resume(out)
    assert summary["rounds"] == 2
    assert [client["cut"] for client in summary["clients"]] == cuts
    assert (out / "plan.json").read_bytes() == plan


def test_what_a_plan_says_of_each_client_is_what_it_does(home: Path) -> None:
    clients = (
        entry("north", cut=[1, 3], micro_batch=1, accumulation=4),
        entry("south", cut=[2, 4], checkpointing=True),
        entry("west", codec="int8"),
    )
    world = build_world(planned(home, {"plan": plan_file(home, *clients)}))
    assert list(world.cuts.values()) == [(1, 3), (2, 4), (1, 4)]
    method: Any = METHODS["flexp-sfl"](world)
    trainers = {name: method.clients[name] for name in CLIENTS}
    assert [trainer.micro_batch for trainer in trainers.values()] == [1, 4, 4]
    modules = [trainer.model.stage.model for trainer in trainers.values()]
    assert [model.is_activation_checkpointing for model in modules] == [False, True, False]
    codecs = [trainer.model.codec for trainer in trainers.values()]
    assert [(codec.activation, codec.gradient) for codec in codecs] == [
        ("off", "off"),
        ("off", "off"),
        ("int8-channel", "int8-channel"),
    ]


def test_small_exchanges_and_checkpointing_change_no_loss(home: Path) -> None:
    text = (home / "model/config.json").read_text(encoding="utf-8")
    (home / "model/config.json").write_text(text.replace('"hidden_dropout_prob": 0.2', '"hidden_dropout_prob": 0.0'))
    losses: list[list[float]] = []
    for number, more in enumerate(({}, {"micro_batch": 1, "accumulation": 4, "checkpointing": True})):
        plan = plan_file(home, *(entry(name, **more) for name in CLIENTS))
        train = {"rounds": 1, "steps_per_round": 4, "batch_size": 4}
        runner.run(planned(home, {"plan": plan}, train=train, method={"align": {"kind": "off"}}), home / str(number))
        records = read(home / f"{number}/metrics.jsonl")
        losses.append([record["loss"] for record in records if record["kind"] == "step"])
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("clients", "changes", "message"),
    [
        ([entry("north")], {"blocks": 6}, "plans tiny with 6 blocks, and .* has 4; plan this one"),
        ([entry("north"), entry("south")], {}, "plans some of the clients but not west; name all of them"),
        ([entry("north", cut=[2, 5])], {}, r"client north = \(2, 5\) does not fit a model of 4 blocks"),
        ([entry("north", cut=[3, 3])], {}, r"client north = \(3, 3\) does not fit"),
        ([entry("north", rank=4)], {}, "plans LoRA of rank 4; set model.tuning and model.lora.rank accordingly"),
        ([entry("north", accumulation=3)], {}, "plans steps of 12 examples; set train.batch_size to that"),
        ([entry("north")], {"task": {"embeddings": "file"}}, 'set model.embeddings = "file"'),
        ([entry("north")], {"task": {"blocks": "file"}}, 'set model.blocks = "file"'),
        ([entry("north")], {"privacy": {"max_content_words": 0.2}}, "plans privacy.max_content_words = 0.2; set it"),
        ([], {}, "clients: .*; expected what flexp plan --out wrote"),
        ([entry("north")], {"version": 2}, "version: .*; expected what flexp plan --out wrote"),
        ([{"name": "north"}], {}, r"clients\.0\.cut: .*; expected what flexp plan --out wrote"),
    ],
)
def test_a_bad_plan_is_one_line(
    home: Path, clients: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    # A plan that knows none of the clients is taken in order: names of nobody's are no mistake.
    clients = [client | ({"name": "x"} if len(clients) == 1 else {}) for client in clients]
    with pytest.raises(ConfigError, match=message) as refused:
        build_world(planned(home, {"plan": plan_file(home, *clients, **changes)}))
    assert "\n" not in str(refused.value)


def test_bytes_of_pooled_texts_are_those_that_a_client_sends(home: Path) -> None:
    """One vector of each text, whatever its length, as the plan of ``cut = "auto"`` says."""
    model = {"pooling": "mean", "id": str(home / "model")}
    own = config(home, model=model, privacy={"pool": True}, method={"align": {"kind": "off"}})
    world = build_world(own)
    method = world.method(world)
    name = world.federation.clients[0].name
    method.clients[name].step()
    metered = split_model_of(method.clients[name]).link.meter.training
    shape, choices = _task(own, world.federation, 1)
    server = Profile.from_class("server")
    for pools in (True, False):
        costs = ModelCosts(own.model.id, shape.model_copy(update={"pools": pools}), choices, server)
        planned = costs.predict(Profile.from_class("laptop"), Choice(world.cuts[name], own.train.batch_size))
        equal = (planned.bytes_up, planned.bytes_down) == (metered.bytes_up, metered.bytes_down)
        assert equal == pools, (planned, metered)
