"""What one could answer with in place of a meeting's classifier, on features alone: no training, so that it is cheap.

    python experiments/meet_alternatives.py experiments/clinc150-meet.toml [KEY=VALUE …]     the pretrained model's
    python experiments/meet_alternatives.py RUN                                              a finished run's

Features φ of each client's private examples and of its own test examples are taken once (in a run: of its personal
model), then every way below answers the test examples. Printed: mean accuracy of clients on own test data, the worst
client, the mean test loss, and accuracy on everybody's data (pretrained features only), in percent. Whatever has a
setting chooses it on own private examples.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.client.closed_form import Discriminant, LinearHead, Statistics
from flexp.client.meeting import LAST, Rounds, Seat, classifier_of, together
from flexp.client.personal_head import Common, choose, log_prior, mean_head, personal_head
from flexp.client.trainer import BatchOrder
from flexp.config.loading import load
from flexp.export.saved import open_run
from flexp.links.sums import InOnePlace
from flexp.methods.parties import seat_of
from flexp.optim import Updater
from flexp.registry import METHODS
from flexp.run.settle import build_world

Answer = Callable[[Tensor], Tensor]
"""Features (N, H) → log-probabilities or logits (N, C)."""
SPLITS = 4


@dataclass
class Client:
    """Features and labels of one client: private, own test."""

    seat: Seat
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    head: LinearHead
    own: Statistics


def clients_of(given: str, changes: list[str]) -> tuple[dict[str, Client], bool]:
    """The clients with their features; and whether features are everybody's alike."""
    torch.set_num_threads(1)
    if Path(given).is_dir():
        method: Any = open_run(Path(given)).method
    else:
        config = load(Path(given), [*changes, "method.name=flexp-sfl"])
        method = METHODS["flexp-sfl"](build_world(config))
    world, found = method.world, {}
    names = world.federation.task.label_names
    for data in world.federation.clients:
        seat = seat_of(method.clients[data.name], world.config)
        x, y = seat.features()
        test_x, test_y = replace(seat, examples=data.test).features()
        _, layer = classifier_of(seat.model)
        head = LinearHead(layer.weight.detach().double(), layer.bias.detach().double())
        found[data.name] = Client(seat, x, y, test_x, test_y, head, Statistics.of(x, y, len(names)))
    return found, not Path(given).is_dir()


def met(clients: Mapping[str, Client], **meet: Any) -> dict[str, tuple[Common, LinearHead]]:
    """What clients agree on, and each one's own head, at a meeting with these settings."""

    def at(client: Client) -> Rounds[tuple[Common, LinearHead]]:
        config = client.seat.config
        table = config.method.meet.model_copy(update=meet)
        own = config.model_copy(update={"method": config.method.model_copy(update={"meet": table})})
        common: Any = yield from replace(client.seat, config=own)._agree(client.x, client.y, with_own=True)
        return common, personal_head(common, common.of(client.x, client.y), client.x, client.y)

    table = InOnePlace(list(clients))
    return together({name: at(c) for name, c in clients.items()}, dict.fromkeys(clients, table), LAST)


def trained(client: Client, begin: LinearHead, balance: bool = False) -> LinearHead:
    """The head after a run's steps on the client's features; ``balance``: softmax balanced by own class counts."""
    train = client.seat.config.train
    weights = {"weight": nn.Parameter(begin.weight.float()), "bias": nn.Parameter(begin.bias.float())}
    updater, x = Updater(weights, train.personal, train.total_steps, weights), client.x.float()
    order = BatchOrder(len(client.y), train.batch_size, client.seat.seed)
    prior = torch.log(client.own.counts.float() + 1e-2) if balance else torch.zeros(len(begin.bias))
    for step in range(train.total_steps):
        batch = order.indices(step)
        F.cross_entropy(F.linear(x[batch], *weights.values()) + prior, client.y[batch]).backward()  # type: ignore[no-untyped-call]
        updater.step()
    return LinearHead(weights["weight"].detach().double(), weights["bias"].detach().double())


def neighbours(client: Client, common: Common, head: LinearHead, scale: float) -> Answer:
    """kNN-Per (Marfoq et al., 2022): the model's and the neighbours' probabilities, mixed as own examples ask for."""
    classes = len(client.own.counts)

    def near(x: Tensor, of: Tensor, labels: Tensor, without: bool) -> Tensor:
        far = torch.cdist(x, of).square() / scale
        if without:
            far.fill_diagonal_(torch.inf)
        nearest = far.topk(min(10, len(of) - 1), largest=False)
        weight = torch.softmax(-nearest.values, 1)
        return torch.zeros(len(x), classes, dtype=torch.float64).scatter_add_(1, labels[nearest.indices], weight)

    left = near(client.x, client.x, client.y, True)
    model = torch.softmax(left_out(client, common), 1)
    rows = torch.arange(len(client.y))
    mix = max(
        (m / 10 for m in range(11)),
        key=lambda m: float((m * left + (1 - m) * model + 1e-12)[rows, client.y].log().sum()),
    )
    return lambda x: mix * near(x, client.x, client.y, False) + (1 - mix) * torch.softmax(head(x), 1)


def left_out(client: Client, common: Common) -> Tensor:
    """Own examples' log-probabilities from the sums of all others."""
    logits, _ = Discriminant(common.total).left_out(client.x, client.y, common.gamma)
    return common.temperature * logits + log_prior(client.own.counts, common.total.counts)[0]


def mixed(client: Client, common: LinearHead, own: Callable[[Client], LinearHead]) -> Answer:
    """As FedALA mixes weights: common and own heads, by a share that examples outside of the fold choose."""
    cost = torch.zeros(11, dtype=torch.float64)
    for fold in range(SPLITS):
        out = torch.arange(len(client.y)) % SPLITS == fold
        part = replace(client, x=client.x[~out], y=client.y[~out])
        head = own(part)
        for place in range(11):
            cost[place] += F.cross_entropy(
                blend(common, head, place / 10)(client.x[out]), client.y[out], reduction="sum"
            )
    return blend(common, own(client), int(cost.argmin()) / 10)


def blend(one: LinearHead, other: LinearHead, share: float) -> LinearHead:
    """(1 − share) · one + share · other."""
    return LinearHead((1 - share) * one.weight + share * other.weight, (1 - share) * one.bias + share * other.bias)


def shifted(clients: Mapping[str, Client]) -> dict[str, Client]:
    """As FedDBE takes a client's own mean out of its features and puts everybody's in its place."""
    mean = torch.cat([client.x for client in clients.values()]).mean(0)
    found = {}
    for name, c in clients.items():
        move = mean - c.x.mean(0)
        found[name] = replace(c, x=c.x + move, test_x=c.test_x + move)
        found[name].own = Statistics.of(found[name].x, c.y, len(c.own.counts))
    return found


def score(name: str, clients: Mapping[str, Client], answers: Mapping[str, Answer], everybody: bool) -> None:
    """Print a line."""
    own = [100 * float((answers[key](c.test_x).argmax(1) == c.test_y).double().mean()) for key, c in clients.items()]
    losses = [float(F.cross_entropy(answers[key](c.test_x), c.test_y)) for key, c in clients.items()]
    line = f"{name:44} own {sum(own) / len(own):5.1f}  worst {min(own):5.1f}  loss {sum(losses) / len(losses):6.3f}"
    if everybody:
        x = torch.cat([c.test_x for c in clients.values()])
        y = torch.cat([c.test_y for c in clients.values()])
        hits = [float((answer(x).argmax(1) == y).double().mean()) for answer in answers.values()]
        line += f"  everybody's {100 * sum(hits) / len(hits):5.1f}"
    print(line, flush=True)


def main(given: str, *changes: str) -> None:
    """Print a line for each way to answer."""
    clients, alike = clients_of(given, list(changes))
    lengths = torch.cat([c.x for c in clients.values()]).norm(dim=1)
    print(f"{given} {' '.join(changes)}: {len(clients)} clients; median length of φ {float(lengths.median()):.2f}")
    found = met(clients)
    common = {name: each[0].head() for name, each in found.items()}
    personal = {name: each[1] for name, each in found.items()}
    score("closed form of all sums", clients, common, alike)
    score("… with own prior and class means", clients, personal, alike)
    alone = {n: met({n: c}, min_examples=1)[n][1] for n, c in clients.items()}
    score("closed form of own examples alone", clients, alone, alike)
    if not alike:
        score("as the run left it", clients, {n: c.head for n, c in clients.items()}, alike)
        modest = {n: found[n][0].no_surer(personal[n], c.head, c.x, c.y) for n, c in clients.items()}
        score("own closed form, no surer than that", clients, modest, alike)
        score("the last two together", clients, {n: mean_head(modest[n], c.head) for n, c in clients.items()}, alike)
    heads = {n: trained(c, common[n]) for n, c in clients.items()}
    score("trained from the common one", clients, heads, alike)
    score("both", clients, {n: mean_head(personal[n], heads[n]) for n in clients}, alike)
    chosen = {
        n: choose(found[n][0], c.own, c.x, c.y, heads[n], lambda head, x, y, c=c: trained(replace(c, x=x, y=y), head))
        for n, c in clients.items()
    }
    said = Counter(choice for _, choice in chosen.values())
    score(f"chosen of these {dict(said)}", clients, {n: head for n, (head, _) in chosen.items()}, alike)
    score("balanced softmax", clients, {n: trained(c, common[n], balance=True) for n, c in clients.items()}, alike)
    first = next(iter(clients.values())).x
    scale = float(torch.cdist(first, first).square().median()) / 10
    near = {n: neighbours(c, found[n][0], personal[n], scale) for n, c in clients.items()}
    score("kNN-Per on the closed form", clients, near, alike)
    mix = {n: mixed(c, common[n], lambda part, n=n: trained(part, common[n])) for n, c in clients.items()}
    score("common and trained head mixed (as FedALA)", clients, mix, alike)
    moved = shifted(clients)
    again = {name: each[1] for name, each in met(moved).items()}
    score("own mean taken out (as FedDBE)", moved, again, False)
    if alike:
        for settings in ({"min_examples": 1}, {"min_examples": 5}, {"gram": False}):
            heads = {name: each[1] for name, each in met(clients, **settings).items()}
            score(f"own closed form, {settings}", clients, heads, alike)
        clip = float(lengths.median())
        for noise in (0.03, 0.1, 0.3, 1.0):
            heads = {name: each[1] for name, each in met(clients, noise=noise, clip=clip, gram=False).items()}
            score(f"own closed form, noise {noise}", clients, heads, alike)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
