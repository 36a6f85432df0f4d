"""A short fuzzing, with both engines where they are there; the long one is ``python -m benchmarks fuzz``."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import measure
from benchmarks.tools.fuzz_inputs import CODECS, HANDSHAKE, RAW, mutated
from benchmarks.tools.fuzz_target import Target, target
from flexp.errors import ConfigError
from flexp.links import frames
from flexp.links.frames import CHUNK, parse, signed
from tests import warm


@pytest.fixture(scope="module")
def made() -> Iterator[Target]:
    with target() as there:
        yield there
    assert frames.CHUNK == CHUNK


def test_honest_inputs_are_answered_in_every_state(made: Target) -> None:
    """Else the mutated ones would all be refused at the door, and nothing would have been tried."""
    assert {data[0] & 7 for data in made.seeds} == {0, HANDSHAKE, *CODECS}
    made.counts.clear()
    for data in made.seeds:
        made.feed(data)
    assert not made.findings
    assert made.counts["answered"] >= 40
    assert made.counts["handshake"] == 3
    assert made.server.shared.version == 0


def test_a_gradient_that_would_train_is_stopped_by_the_bounds_alone(made: Target) -> None:
    ours = (data for data in made.seeds if data[0] & 7 == max(CODECS))
    backward = next(data for data in ours if parse(data[1:]).message == "BackwardRequest")
    before, bad = made.digest, made.server.guard.bad()
    made.feed(backward)
    assert made.server.guard.bad() == bad + 1
    assert made.digest == before
    made.server.bounds.config = made.server.bounds.config.model_copy(update={"max_norm": None})
    try:
        made.feed(backward)
        assert made.digest != before  # so the digest does see what reaches the weights
    finally:
        made.server.bounds.config = made.server.config.guard


def test_a_failure_behind_the_decoder_is_a_finding(made: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(made.server, "answer", lambda *_: 1 / 0)
        for data in made.seeds:
            made.feed(data)
        assert any("ZeroDivisionError" in what for what in made.findings)
    made.findings.clear()
    with monkeypatch.context() as patch:
        patch.setattr(made._gate._tokens, "accept", lambda *_: True)
        made.feed(made.seeds[1])
        assert "AssertionError: a stranger was let in" in made.findings
    made.findings.clear()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_spoilt_frames_have_no_effect(made: Target, data: st.DataObject) -> None:
    before = made.digest
    chosen = data.draw(st.sampled_from(made.seeds))
    made.feed(mutated(chosen, random.Random(data.draw(st.integers(0, 2**32))), made.seeds))
    made.feed(data.draw(st.binary(max_size=200)))
    assert not made.findings
    assert made.digest == before


@given(st.binary(max_size=300))
def test_signing_changes_check_sums_alone(content: bytes) -> None:
    made = signed(content)
    assert len(made) == len(content)
    assert signed(made) == made
    assert sum(left != right for left, right in zip(made, content, strict=True)) <= 8


@pytest.mark.parametrize("engine", ["blind", "coverage"])
def test_hundreds_of_inputs(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "blind":  # the other one must instrument what is imported
        monkeypatch.setattr("subprocess.run", lambda command, **_: warm.run(command[1:]))
    if engine == "coverage" and importlib.util.find_spec("atheris") is None:
        with pytest.raises(ConfigError, match="needs pip install atheris"):
            measure(100, engine=engine)
        return
    result = measure(500, engine=engine)
    assert result["frames"] == 500
    assert sum(result["counts"].values()) == 500 - (engine == "coverage")  # libFuzzer begins with nothing at all
    assert result["findings"] == {}
    assert result["weights_unchanged"]
    assert result["updates"] == 0
    assert result["counts"]["answered"] > 20
    assert (result["branches"] or 0) > (500 if engine == "coverage" else -1)
    assert RAW
