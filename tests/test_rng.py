"""Streams of random numbers belong to one party each, whoever else computes."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flexp.rng import CPU, RandomStream, current_turn, derived_seed, drawing_from, resting
from tests.harness import world

GPU = torch.device("cuda", 0)
DEVICES = [
    CPU,
    pytest.param(GPU, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def draw(device: torch.device = CPU) -> list[float]:
    values: Tensor = torch.rand(3, device=device)
    return values.tolist()


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_stream_goes_on_where_it_was_and_leaves_the_generator_alone(device: torch.device) -> None:
    torch.manual_seed(1)
    outside = [draw(device), draw(device)]
    expected = torch.rand(6, generator=torch.Generator(device).manual_seed(5), device=device).tolist()
    torch.manual_seed(1)
    stream = RandomStream(5, device)
    with stream.active():
        first = draw(device)
    assert draw(device) == outside[0]
    again = RandomStream(0, device)
    again.state = stream.state.clone()
    with again.active():
        second = draw(device)
    assert draw(device) == outside[1]
    if device is CPU:  # a GPU draws in blocks of its own
        assert first + second == expected
    assert first != second


def test_a_stream_has_the_generators_of_all_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices whose generators are the processor's kind."""
    real, devices = torch.Generator, [torch.device("meta", 1), torch.device("meta", 2)]
    own = {device: real().manual_seed(10 + device.index) for device in devices}
    module = SimpleNamespace(
        get_rng_state=lambda device: own[device].get_state(),
        set_rng_state=lambda state, device: own[device].set_state(state),
    )
    monkeypatch.setattr("flexp.rng._draws", lambda device: device in devices)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(torch, "Generator", lambda _: real())

    def drawn_there() -> list[list[float]]:
        return [torch.rand(3, generator=own[device]).tolist() for device in devices]

    outside = [drawn_there(), drawn_there()]
    for device in devices:
        own[device].manual_seed(10 + device.index)
    stream, found = RandomStream(5, *devices), list[list[list[float]]]()
    for expected in outside:
        with stream.active():
            found.append(drawn_there())
        assert drawn_there() == expected
    fives = torch.rand(6, generator=real().manual_seed(5)).tolist()
    assert [first + second for first, second in zip(*found, strict=True)] == [fives, fives]


def test_a_turn_within_a_turn() -> None:
    one, two = RandomStream(1), RandomStream(2)
    expected = []
    for seed in (1, 2):
        with RandomStream(seed).active():
            expected.append([draw(), draw()])
    with one.active():
        first = draw()
        with two.active():
            other = [draw()]
            with resting(current_turn()), drawing_from(one.state):
                draw()
            other.append(draw())
        assert [first, draw()] == expected[0]
    assert other == expected[1]
    assert current_turn() is None


def test_an_error_ends_the_turn() -> None:
    before = torch.get_rng_state()

    def fail() -> None:
        with RandomStream(3).active():
            draw()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)
    assert current_turn() is None


def test_threads_do_not_draw_from_each_other() -> None:
    """Four parties, drawing a little at a time as fast as they can; with a rest in between, as when one waits."""

    def party(seed: int, found: dict[int, list[float]]) -> None:
        stream, values = RandomStream(seed), []
        for _ in range(40):
            with stream.active():
                values += draw()
                with resting(current_turn()):
                    pass
                values += draw()
        found[seed] = values

    alone: dict[int, list[float]] = {}
    together: dict[int, list[float]] = {}
    for seed in range(4):
        party(seed, alone)
    threads = [threading.Thread(target=party, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert together == alone


def test_clients_in_threads_of_one_process_train_as_one_after_the_other() -> None:
    """Dropout on both sides: the gradients of a thread's client are those that it has alone."""

    def gradients(names: str, threaded: bool) -> dict[str, list[Tensor]]:
        here = world("bert", dropout=0.3)
        here.server.shared.add = lambda *_, **__: False  # type: ignore[method-assign]  # weights stand still
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        models = {name: here.client(name, (2, 4)) for name in names}

        def train(name: str) -> None:
            stream = RandomStream(derived_seed(0, name))
            for step in range(6):
                with stream.active():
                    models[name](**here.batch(seed=step)).loss.backward()
                grads = [value.grad for value in models[name].stage.trainable().values()]
                found[name].append(torch.cat([grad.flatten() for grad in grads if grad is not None]).clone())

        jobs = [threading.Thread(target=train, args=(name,)) for name in names]
        for job in jobs:
            if threaded:
                job.start()
            else:
                job.run()
        for job in jobs:
            if threaded:
                job.join(timeout=60)
        return found

    alone, together = gradients("abc", threaded=False), gradients("abc", threaded=True)
    for name, expected in alone.items():
        assert len(together[name]) == 6
        assert all(torch.equal(left, right) for left, right in zip(expected, together[name], strict=True))


def test_seeds_of_different_purposes_are_independent() -> None:
    seeds = {
        derived_seed(seed, side, name) for seed in range(50) for side in ("client", "server") for name in ("a", "b")
    }
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, "ab", "c") != derived_seed(0, "a", "bc")


def test_a_clients_dropout_is_not_the_servers_for_it() -> None:
    """With seed 0 both sides once drew from the same state."""
    from flexp.methods.parties import client_seed

    for seed in (0, 1, 7):
        here = world("bert", seed=seed)
        here.client("north", (2, 4))
        with RandomStream(derived_seed(here.server.clients.seed_of("north"), "1", "2")).active():
            server = draw()
        with RandomStream(derived_seed(client_seed(seed, "north"), "client")).active():
            client = draw()
        with RandomStream(client_seed(seed, "north")).active():
            order = draw()
        assert server != client != order != server
