"""Federated LoRA in Flower's own way: its FedAvg strategy averages adapters and classifier, and each client tunes a
whole model with plain transformers and peft. Data, batches and rates are those of the FlexP configuration beside it.
``against.py`` puts this file into an app."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForSequenceClassification

from flexp.client.trainer import BatchOrder
from flexp.config.loading import OTHERS, validate
from flexp.data.scores import evaluate as score
from flexp.methods.parties import client_seed
from flexp.run.settle import settle

server = ServerApp()
client = ClientApp()


@cache
def settled() -> Any:
    """The data divided among clients, and what the configuration says."""
    file = Path(__file__).parent / "flexp.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    return settle(validate({table: keys for table, keys in content.items() if table not in OTHERS}, str(file)))


@cache
def model() -> Any:
    """A whole model with adapters in the linear layers of its blocks; they and the classifier are trained."""
    run = settled()
    torch.manual_seed(run.config.seed)
    whole = AutoModelForSequenceClassification.from_pretrained(run.model_id, num_labels=2)
    lora = run.config.model.lora
    layers = r".*encoder\.layer\..*\.(query|key|value|dense)"
    return get_peft_model(
        whole, LoraConfig(task_type="SEQ_CLS", r=lora.rank, lora_alpha=lora.alpha, target_modules=layers)
    )


def given(message: Message, context: Context) -> tuple[Any, Any, Any]:
    """The node's examples, and the model with the weights that came."""
    run, net = settled(), model()
    set_peft_model_state_dict(net, message.content["arrays"].to_torch_state_dict())
    return run, run.federation.clients[int(context.node_config["partition-id"])], net


@client.train()
def train(message: Message, context: Context) -> Message:
    run, data, net = given(message, context)
    config, rates = run.config.train, run.config.train.personal
    first = (int(message.content["config"]["server-round"]) - 1) * config.steps_per_round
    trained = {name: value for name, value in net.named_parameters() if value.requires_grad}
    head = [value for name, value in trained.items() if "classifier" in name]
    rest = [value for name, value in trained.items() if "classifier" not in name]
    groups = [{"params": rest, "peak": rates.lr}, {"params": head, "peak": rates.new_lr or rates.lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=rates.weight_decay)
    seed = client_seed(run.config.seed, data.name)
    order = BatchOrder(len(data.train), config.batch_size, seed)
    torch.manual_seed(seed + first)
    net.train()
    for step in range(first, first + config.steps_per_round):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * (1 - step / config.total_steps)
        batch = run.federation.task.collate([data.train[index] for index in order.indices(step)])
        net(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), rates.clip)
        optimiser.step()
        optimiser.zero_grad()
    arrays = ArrayRecord(get_peft_model_state_dict(net))
    told = MetricRecord({"num-examples": len(data.train), "bytes": 2 * arrays.count_bytes()})
    return Message(RecordDict({"arrays": arrays, "metrics": told}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    run, data, net = given(message, context)
    net.eval()
    size = run.config.evaluation.batch_size
    accuracy = score(lambda batch: net(**batch), run.federation.task, data.test, size, extras=False)["accuracy"]
    came = message.content["arrays"].count_bytes()
    told = MetricRecord({"num-examples": len(data.test), "accuracy": float(accuracy), "bytes": came})
    return Message(RecordDict({"metrics": told}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    run = settled()
    nodes = len(run.federation.clients)
    strategy = FedAvg(min_train_nodes=nodes, min_evaluate_nodes=nodes, min_available_nodes=nodes)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model())),
        num_rounds=run.config.train.rounds,
        train_config=ConfigRecord(),
    )
    every = result.evaluate_metrics_clientapp
    trained = sum(nodes * told["bytes"] for told in result.train_metrics_clientapp.values())
    said = {
        "accuracy": {number: told["accuracy"] for number, told in every.items()},
        "bytes_trained": trained,
        "bytes": trained + sum(nodes * told["bytes"] for told in every.values()),
    }
    state = Path(str(context.run_config["state"]))
    state.mkdir(parents=True, exist_ok=True)
    state.joinpath("fedavg.json").write_text(json.dumps(said), encoding="utf-8")
