"""Masked sums: equal to plain ones bit for bit, and noise to whoever has no key of the group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from flexp.errors import ConfigError, LinkError, TrainingError
from flexp.masking import NONCE_BYTES, SUMS, Group, Identity, Numbers, add, fingerprint, from_ring, to_ring

SECRET = b"sixteen bytes or more"


def nonce(number: int) -> bytes:
    return number.to_bytes(NONCE_BYTES, "big")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=5, max_size=5), min_size=1, max_size=6), st.randoms())
def test_masked_sums_equal_plain_ones_in_any_order(values: list[list[float]], random: object) -> None:
    group = Group.from_secret(SECRET, "run")
    parts = [np.array(each) for each in values]
    hidden = [group.hide(part, f"c{k}", "meet 1", nonce(k)) for k, part in enumerate(parts)]
    random.shuffle(hidden)  # type: ignore[attr-defined]
    told = group.reveal(add(hidden), {f"c{k}": nonce(k) for k in range(len(parts))}, "meet 1")
    assert (told == from_ring(add([to_ring(part) for part in parts]))).all()
    np.testing.assert_allclose(told, np.sum(parts, axis=0), atol=len(parts) * 2.0**-25, rtol=1e-15)


def test_who_is_lost_is_just_not_in_the_sum() -> None:
    group = Group.from_secret(SECRET, "run")
    hidden = {f"c{k}": group.hide(np.array([float(k)]), f"c{k}", "meet", nonce(k)) for k in range(4)}
    there = ["c1", "c3"]
    assert group.reveal(add([hidden[c] for c in there]), {c: nonce(int(c[1])) for c in there}, "meet") == 4.0


@pytest.mark.parametrize(
    "other",
    [
        Group.from_secret(SECRET, "another run"),
        Group.from_secret(b"what a server may guess", "run"),
    ],
)
def test_another_key_reads_noise(other: Group) -> None:
    """Uniform in the ring, whatever was added: what the server holds says nothing (a test of 4,096 numbers)."""
    group = Group.from_secret(SECRET, "run")
    hidden = add([group.hide(np.full(4096, 3.0), f"c{k}", "meet", nonce(k)) for k in range(3)])
    nonces = {f"c{k}": nonce(k) for k in range(3)}
    assert (group.reveal(hidden, nonces, "meet") == 9.0).all()
    for read in (from_ring(hidden), other.reveal(hidden, nonces, "meet"), group.reveal(hidden, nonces, "meet 2")):
        assert kstest((read / 2.0**39 + 1) / 2, "uniform").pvalue > 1e-3


def test_a_list_of_clients_that_is_not_the_sums_reads_noise() -> None:
    """A server that says "this sum is of c0 alone" gives nobody the numbers of c0."""
    group = Group.from_secret(SECRET, "run")
    hidden = add([group.hide(np.full(8, 1.0), f"c{k}", "meet", nonce(k)) for k in range(2)])
    assert np.abs(group.reveal(hidden, {"c0": nonce(0)}, "meet")).min() > 1e3


def test_a_key_sealed_through_the_server() -> None:
    clients = {name: Identity() for name in ("a", "b", "c")}
    publics = {name: each.public for name, each in clients.items()}
    sealed = clients["a"].deal(publics)
    group = clients["a"].open(sealed["a"], "a", publics["a"], publics)
    numbers: Numbers = np.array([1.5, -2.0])
    for name in "bc":
        again = Identity(clients[name].private)  # as kept with the client's state
        theirs = again.open(sealed[name], name, publics["a"], publics)
        assert (theirs.hide(numbers, name, "meet", nonce(1)) == group.hide(numbers, name, "meet", nonce(1))).all()
    with pytest.raises(LinkError, match="'b': the group's key was not sealed for it"):
        clients["b"].open(sealed["c"], "b", publics["a"], publics)
    with pytest.raises(LinkError, match="compare the group's fingerprints"):  # a list with one more than the dealer saw
        clients["b"].open(sealed["b"], "b", publics["a"], publics | {"d": Identity().public})
    with pytest.raises(LinkError, match="was not sealed"):
        clients["b"].open(sealed["b"][:5], "b", publics["a"], publics)


@pytest.mark.parametrize("key", [b"short", bytes(32)])
def test_what_is_no_key_is_refused_by_who_deals(key: bytes) -> None:
    """Of another length, or zero, with which everybody has the same in common."""
    own = Identity()
    with pytest.raises(LinkError, match="the public key that the server names for client 'b' is none"):
        own.deal({"a": own.public, "b": key})


def test_the_fingerprint_changes_with_every_name_and_key() -> None:
    one, two, other = (Identity().public for _ in range(3))
    said = fingerprint({"a": one, "b": two})
    assert said == fingerprint({"b": two, "a": one})
    assert len(said.split()) == 8
    assert (
        len({said, *map(fingerprint, [{"a": two, "b": one}, {"a": one}, {"a": one, "c": two}, {"a": one, "b": other}])})
        == 5
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), SUMS.largest])
def test_numbers_that_do_not_fit_are_refused(value: float) -> None:
    with pytest.raises(TrainingError, match="finite numbers below"):
        to_ring(np.array([1.0, value]))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        Group.from_secret(b"short", "run")
