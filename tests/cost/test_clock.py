"""The virtual clock against times that were worked out by hand, for every schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.cost.clock import ClientWork, Kind, Schedule, simulate
from flexp.cost.profile import Profile

SERVER = Profile(name="server", memory_bytes=1, flops=100.0, uplink_bps=1e12, downlink_bps=1e12, latency_s=0.0)
# 10 operations and 8 bits (a byte) up, 16 bits (two bytes) down a second; half a second on the way.
DEVICE = Profile(name="device", memory_bytes=1, flops=10.0, uplink_bps=8.0, downlink_bps=16.0, latency_s=0.5)
SLOW = DEVICE.model_copy(update={"flops": 1.0})
WHOLE = ClientWork(steps=[2, 2], before=30.0, weights_down=6, weights_up=4)
# before 1 s, up 2 + 0.5, server 1, down 1 + 0.5, between 3, up 2 + 0.5, server 2, down 1 + 0.5, after 2
SPLIT = ClientWork(
    steps=[1, 1],
    before=10.0,
    between=30.0,
    after=20.0,
    server_forward=100.0,
    server_backward=200.0,
    forward_up=2,
    forward_down=2,
    backward_up=2,
    backward_down=2,
)
ALONE_STEP = 1 + 2.5 + 1 + 1.5 + 3 + 2.5 + 2 + 1.5 + 2


def run(
    kind: Kind, work: dict[str, ClientWork], devices: dict[str, Profile], slots: int = 1, seed: int = 0, **how: Any
) -> Any:
    return simulate(Schedule(kind, **how), work, devices, SERVER, slots=slots, seed=seed)


def test_synchronous_rounds_wait_for_the_straggler() -> None:
    # download 0.5 + 3, two steps of 3 s (slow: 30 s), upload 0.5 + 4
    found = run("synchronous", {"a": WHOLE, "b": WHOLE}, {"a": DEVICE, "b": SLOW})
    assert found.rounds == pytest.approx([3.5 + 60 + 4.5, 2 * (3.5 + 60 + 4.5)])
    a, b = found.clients["a"], found.clients["b"]
    assert (a.computing, a.transmitting, a.waiting) == pytest.approx((12.0, 16.0, 2 * 54.0))
    assert (b.computing, b.transmitting, b.waiting) == pytest.approx((120.0, 16.0, 0.0))
    assert a.finished == b.finished == pytest.approx(136.0)


def test_adapting_comes_after_the_last_round() -> None:
    found = run("synchronous", {"a": replace(WHOLE, final=50.0)}, {"a": DEVICE})
    assert found.clients["a"].finished == pytest.approx(28.0 + 5.0)
    assert found.clients["a"].computing == pytest.approx(12.0 + 5.0)


def test_every_round_is_scored_after_the_adaptation_that_its_scores_need() -> None:
    """5 s of adapting, the slow one's 50; fetching the average counts no more than where it is scored as it is."""
    found = run("synchronous", {"a": replace(WHOLE, final=50.0)}, {"a": DEVICE})
    assert found.rounds == pytest.approx([14.0 + 5.0, 28.0 + 5.0])
    work = dict.fromkeys("ab", replace(WHOLE, final=50.0))
    slow = run("synchronous", work, {"a": DEVICE, "b": SLOW})
    assert slow.rounds == pytest.approx([68.0 + 50.0, 136.0 + 50.0])


def test_adapting_may_be_away_too_and_moves_nothing() -> None:
    work = {"a": replace(WHOLE, steps=[2] * 5, final=50.0)}
    found = run("synchronous", work, {"a": COMING_AND_GOING}, seed=2)
    plain = run("synchronous", {"a": replace(work["a"], final=0.0)}, {"a": COMING_AND_GOING}, seed=2)
    late = [scored - end for scored, end in zip(found.rounds, plain.rounds, strict=True)]
    assert min(late) >= 5.0 - 1e-9
    assert max(late) > 5.5  # some of the periods away fall into it
    assert found.rounds[-1] == pytest.approx(found.clients["a"].finished)


def test_alone_nobody_waits() -> None:
    found = run("alone", {"a": WHOLE, "b": WHOLE}, {"a": DEVICE, "b": SLOW})
    assert found.rounds == pytest.approx([60.0, 120.0])
    assert found.clients["a"].finished == pytest.approx(12.0)
    assert found.clients["a"].waiting == found.clients["a"].transmitting == 0.0


def test_a_split_step_of_one_client() -> None:
    found = run("split-async", {"a": SPLIT}, {"a": DEVICE})
    assert found.rounds == pytest.approx([ALONE_STEP, 2 * ALONE_STEP])
    time = found.clients["a"]
    assert (time.computing, time.transmitting, time.waiting, time.offline) == pytest.approx((12.0, 16.0, 6.0, 0.0))


def test_a_straggler_delays_nobody_in_split_async() -> None:
    found = run("split-async", {"a": SPLIT, "b": SPLIT}, {"a": DEVICE, "b": SLOW}, slots=2)
    assert found.clients["a"].finished == pytest.approx(2 * ALONE_STEP)
    slow_step = ALONE_STEP + 9 + 27 + 18
    assert found.rounds == pytest.approx([slow_step, 2 * slow_step])


def test_clients_queue_for_the_server() -> None:
    work = {name: replace(SPLIT, steps=[1]) for name in "abc"}
    devices = dict.fromkeys("abc", DEVICE)
    found = run("split-async", work, devices)
    # All arrive at 3.5. Forwards end at 4.5, 5.5, 6.5; backwards arrive at 11.5, 12.5, 13.5 and take two seconds each:
    # they end at 13.5, 15.5, 17.5, and 1.5 + 2 later the steps are done.
    assert [found.clients[name].finished for name in "abc"] == pytest.approx([17.0, 19.0, 21.0])
    assert [found.clients[name].waiting for name in "abc"] == pytest.approx([3.0, 5.0, 7.0])
    free = run("split-async", work, devices, slots=3)
    assert [free.clients[name].finished for name in "abc"] == pytest.approx([17.0] * 3)


def test_micro_batches_are_exchanges_one_after_the_other() -> None:
    found = run("split-async", {"a": replace(SPLIT, steps=[1], exchanges=3)}, {"a": DEVICE})
    assert found.rounds == pytest.approx([3 * ALONE_STEP])


def test_pulled_weights_are_one_more_message_each_way() -> None:
    found = run("split-async", {"a": replace(SPLIT, steps=[3], pull_every=2, pull_down=8)}, {"a": DEVICE})
    assert found.rounds == pytest.approx([3 * ALONE_STEP + 0.5 + 0.5 + 4.0])


def test_a_combined_exchange_visits_the_server_once() -> None:
    work = replace(SPLIT, steps=[1], between=0.0, combined=True)
    found = run("split-async", {"a": work}, {"a": DEVICE})
    assert found.rounds == pytest.approx([1 + 2.5 + 3 + 1.5 + 2])


def test_split_sync_shares_the_end_of_a_round() -> None:
    work = replace(SPLIT, weights_down=6, weights_up=4)
    found = run("split-sync", {"a": work, "b": work}, {"a": DEVICE, "b": SLOW}, slots=2)
    slow_round = 3.5 + ALONE_STEP + 54 + 4.5
    assert found.rounds == pytest.approx([slow_round, 2 * slow_round])
    assert found.clients["a"].finished == pytest.approx(2 * slow_round)
    assert found.clients["a"].waiting == pytest.approx(2 * (3 + 54))


def test_one_client_at_a_time_takes_its_whole_turn() -> None:
    """Both have their weights at 3.5; then two steps of one, and two of the other, whatever the slots."""
    work = dict.fromkeys("ab", replace(SPLIT, steps=[2], weights_down=6, weights_up=4))
    devices = dict.fromkeys("ab", DEVICE)
    found = run("split-sync", work, devices, slots=2, one_at_a_time=True)
    assert found.rounds == pytest.approx([3.5 + 4 * ALONE_STEP + 4.5])
    # The server's 3 s a step are waiting as well; the first waits for the second's turn at the end of the round.
    assert found.clients["a"].waiting == pytest.approx(2 * 3 + 2 * ALONE_STEP)
    assert found.clients["b"].waiting == pytest.approx(2 * ALONE_STEP + 2 * 3)
    together = run("split-sync", work, devices, slots=2)
    assert together.rounds == pytest.approx([3.5 + 2 * ALONE_STEP + 4.5])


def test_a_common_step_begins_when_all_are_there() -> None:
    """Up at 1 + 2.5 and at 10 + 2.5; the server takes 3 s for each, down 1.5, and back 2 s or 20."""
    work = dict.fromkeys("ab", replace(SPLIT, steps=[2], between=0.0, combined=True))
    found = run("split-sync", work, {"a": DEVICE, "b": SLOW}, slots=2, together=True)
    # Weights of nothing take 0.5 s each way.
    slow_step = 10 + 2.5 + 3 + 1.5 + 20
    assert found.rounds == pytest.approx([0.5 + 2 * slow_step + 0.5])
    # The quick one waits at each step until the slow one has sent, also through the slow one's way back.
    first, second = 12.5 - 3.5, slow_step + 12.5 - (12.5 + 3 + 1.5 + 2 + 3.5)
    end = found.rounds[0] - (0.5 + slow_step + 12.5 + 3 + 1.5 + 2 + 0.5)
    assert found.clients["a"].waiting == pytest.approx(first + second + 2 * 3 + end)


def test_rare_averages_are_rare_messages() -> None:
    work = {"a": replace(SPLIT, steps=[1] * 3, weights_down=6, weights_up=4, weights_every=2)}
    found = run("split-sync", work, {"a": DEVICE})
    one, two, three = 3.5 + ALONE_STEP, ALONE_STEP + 4.5, 3.5 + ALONE_STEP
    assert found.rounds == pytest.approx([one, one + two, one + two + three])


def test_the_slower_end_of_a_link_and_both_latencies_count() -> None:
    server = SERVER.model_copy(update={"downlink_bps": 4.0, "uplink_bps": 2.0, "latency_s": 0.25})
    found = simulate(Schedule("synchronous"), {"a": replace(WHOLE, steps=[0])}, {"a": DEVICE}, server)
    assert found.rounds == pytest.approx([0.75 + 6 * 8 / 2 + 0.75 + 4 * 8 / 4])


COMING_AND_GOING = DEVICE.model_copy(update={"mean_on_s": 20.0, "mean_off_s": 30.0})


def test_equal_seeds_give_equal_times_and_other_seeds_others() -> None:
    work = dict.fromkeys("abc", SPLIT)
    devices = {"a": COMING_AND_GOING, "b": COMING_AND_GOING, "c": DEVICE}
    one, two, other = (run("split-async", work, devices, seed=seed) for seed in (3, 3, 4))
    assert one == two
    assert one.rounds != other.rounds
    assert one.clients["a"].offline != one.clients["b"].offline
    assert one.clients["c"].offline == 0.0


def test_absence_pauses_work_in_proportion() -> None:
    work = ClientWork(steps=[400], before=100.0)  # 4,000 s of work, and 30 s away for every 20 s there
    found = run("alone", {"a": work}, {"a": COMING_AND_GOING}).clients["a"]
    assert found.computing == pytest.approx(4000.0)
    assert found.finished == pytest.approx(found.computing + found.offline)
    assert 1.2 < found.offline / found.computing < 1.8  # 200 periods: a standard error of a tenth


def test_a_synchronous_round_waits_for_who_is_away() -> None:
    devices = {"a": DEVICE, "b": COMING_AND_GOING}
    found = run("synchronous", {"a": WHOLE, "b": WHOLE}, devices, seed=1)
    assert found.clients["b"].offline > 0.0
    assert found.clients["a"].waiting == pytest.approx(found.clients["b"].offline)
    assert found.rounds[-1] == pytest.approx(28.0 + found.clients["b"].offline)


rates = st.floats(1.0, 1e4)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(["synchronous", "split-async", "split-sync"]),
    links=st.lists(st.tuples(rates, rates, st.floats(0.0, 2.0), rates), min_size=1, max_size=3),
    more=st.floats(1.0, 10.0),
    who=st.integers(0, 2),
)
def test_more_bandwidth_is_never_slower(
    schedule: Kind, links: list[tuple[float, float, float, float]], more: float, who: int
) -> None:
    """With a place at the server for each: in a queue, one client's haste can be another's delay."""
    work = {str(i): replace(SPLIT, weights_down=50, weights_up=40) for i in range(len(links))}
    devices = {
        str(i): DEVICE.model_copy(update={"uplink_bps": up, "downlink_bps": down, "latency_s": late, "flops": flops})
        for i, (up, down, late, flops) in enumerate(links)
    }
    before = run(schedule, work, devices, slots=3)
    name = str(who % len(links))
    old = devices[name]
    devices[name] = old.model_copy(
        update={"uplink_bps": more * old.uplink_bps, "downlink_bps": more * old.downlink_bps}
    )
    after = run(schedule, work, devices, slots=3)
    assert all(late <= early * (1 + 1e-9) for early, late in zip(before.rounds, after.rounds, strict=True))
    assert all(after.clients[key].finished <= before.clients[key].finished * (1 + 1e-9) for key in before.clients)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), schedule=st.sampled_from(["synchronous", "alone", "split-async", "split-sync"]))
def test_every_second_is_accounted_for(seed: int, schedule: Kind) -> None:
    work = {name: replace(SPLIT, weights_down=5, weights_up=4) for name in "abc"}
    devices = {"a": COMING_AND_GOING, "b": SLOW, "c": DEVICE}
    for time in run(schedule, work, devices, seed=seed).clients.values():
        spent = time.computing + time.transmitting + time.waiting + time.offline
        assert spent == pytest.approx(time.finished)


def test_examples_that_are_kept_go_up_once() -> None:
    """After the first epoch's two steps nothing is computed below the cut, and a byte goes up in place of two."""
    work = replace(SPLIT, steps=[1, 1, 1], epoch=2, later_up=1)
    saved = 1 + 1
    assert run("split-async", {"a": work}, {"a": DEVICE}).rounds == [
        ALONE_STEP,
        2 * ALONE_STEP,
        3 * ALONE_STEP - saved,
    ]


def test_pulls_and_kept_examples_go_on_where_another_phase_ended() -> None:
    """Steps that were done before count: the second of every two fetches, wherever a phase ends."""
    whole = replace(SPLIT, steps=[1, 1, 1], pull_every=2, pull_down=3)
    rounds = run("split-async", {"a": whole}, {"a": DEVICE}).rounds
    later = run("split-async", {"a": replace(whole, steps=[1, 1], begun=1)}, {"a": DEVICE}).rounds
    assert later == [rounds[1] - rounds[0], rounds[2] - rounds[0]]
