"""What a machine is said to be."""

from __future__ import annotations

import pytest

from flexp.machine import imitates_bfloat16, machine, shares


@pytest.mark.parametrize(
    ("facts", "imitates"),
    [
        ({"flags": "fpu sse2 avx2 avx512f avx512_vnni"}, True),
        ({"flags": "fpu avx512f avx512_bf16"}, False),
        ({"flags": "fpu avx512f amx_bf16 amx_tile"}, False),
        ({"Features": "fp asimd"}, True),
        ({"Features": "fp asimd i8mm bf16"}, False),
        ({}, False),  # not Linux: nothing is known, so nothing is claimed
    ],
)
def test_who_has_no_bfloat16_is_told_by_its_flags(facts: dict[str, str], imitates: bool) -> None:
    assert imitates_bfloat16(facts) is imitates


@pytest.mark.parametrize(
    ("sizes", "room", "places"),
    [
        ([5] * 6, [1, 1], [0, 0, 0, 1, 1, 1]),
        ([5] * 3, [7, 7], [0, 0, 1]),
        ([5] * 6, [10, 20], [0, 0, 1, 1, 1, 1]),
        ([9, 1, 1, 1], [1, 1], [0, 1, 1, 1]),
        ([5, 5], [1, 1, 1], [0, 2]),
        ([0, 0], [1, 1], [0, 0]),
    ],
)
def test_each_place_has_its_share_in_order(sizes: list[int], room: list[int], places: list[int]) -> None:
    assert shares(sizes, room) == places


def test_a_machine_has_a_processor_with_a_name() -> None:
    assert machine()["processor"]
