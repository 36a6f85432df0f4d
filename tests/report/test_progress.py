from __future__ import annotations

import io

import pytest
from rich.console import Console

from flexp.report import formats
from flexp.report.progress import Progress

SCORES = {"personal_mean": 0.841, "personal_worst": 0.8, "global_mean": 0.702, "global_worst": 0.69}


def play(console: Console) -> str:
    with Progress(total_steps=20, title="sentiment", console=console) as progress:
        progress.round(0, SCORES)
        for step in range(10):
            progress.step(f"client {step % 2}", 1.0, 0.5 if step % 2 else None)
        progress.note("saved [a] checkpoint")
        progress.round(1, SCORES)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_log_has_a_line_a_round_and_none_a_step() -> None:
    lines = play(Console(file=io.StringIO(), width=40)).splitlines()
    assert len(lines) == 5
    assert lines[0] == "sentiment: 20 steps to do"
    assert lines[2] == "saved [a] checkpoint"
    assert lines[3].startswith(
        "round 1  step 10/20 (50 %)  loss 1.000  own test data 84.1 % (worst 80.0 %)  everybody's 70.2 % (worst 69.0 %)"
    )
    assert lines[4].startswith("sentiment: done after")


def test_ci_means_plain_lines_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    text = play(Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None))
    assert len(text.splitlines()) == 5
    assert "\x1b" not in text


def test_a_terminal_gets_a_bar_with_client_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    text = play(console)
    assert "client 1  loss 1.000  align 0.5" in text
    assert "10/20" in text
    assert "saved [a] checkpoint" in text


def test_an_interrupted_run_says_stopped_and_the_exception_passes() -> None:
    console = Console(file=io.StringIO(), width=100)

    def interrupted() -> None:
        with Progress(4, "run", console=console) as progress:
            progress.step("a", float("nan"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "run: stopped after" in console.file.getvalue()  # type: ignore[attr-defined]


def test_resumed_steps_count_as_done() -> None:
    console = Console(file=io.StringIO(), width=100)
    with Progress(100, "run", metric="perplexity", done=90, console=console) as progress:
        progress.step("a", 2.0)
        progress._started -= 10.0
        progress.round(10, {"personal_mean": 24.21})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "run: 10 steps to do" in text
    assert "step 91/100 (91 %)" in text
    assert "own test data perplexity 24.2" in text
    assert "1 min 30 s left" in text


def test_steps_beyond_the_total_have_no_share() -> None:
    console = Console(file=io.StringIO(), width=100)
    with Progress(2, "run", console=console) as progress:
        for _ in range(30):
            progress.step("a", 1.0)
        progress.round(1, {})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "round 1  step 30  loss" in text
    assert "%" not in text


def test_what_a_method_really_steps_is_the_whole() -> None:
    """Where a round has fewer steps than were planned, as with some methods, the end is 100 % all the same."""
    console = Console(file=io.StringIO(), width=100)
    with Progress(30, "run", console=console) as progress:
        for number, steps in ((1, 7), (2, 8), (3, 7)):
            for _ in range(steps):
                progress.step("a", 1.0)
            progress.passed(number, 3)
            progress.round(number, {})
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert ["step 7/21 (33 %)" in lines[1], "step 15/23 (65 %)" in lines[2]] == [True, True]  # 15 · 3 / 2, rounded
    assert "step 22/22 (100 %)" in lines[3]
    assert lines[4].endswith("step 22/22 (100 %)")


def test_the_last_second_is_not_guessed() -> None:
    assert [formats.left(value) for value in (-3.0, 1.1e-13, 0.9, 1.0, 65.0)] == [
        "",
        "",
        "",
        "1.0 s left",
        "1 min 05 s left",
    ]
