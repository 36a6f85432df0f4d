"""What a machine is said to be."""

from __future__ import annotations

import pytest
from torch import nn

from flexp.machine import device_map, imitates_bfloat16, machine


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
    ("sizes", "room", "places"),  # in numbers of 4 bytes
    [
        ([5] * 6, [None, None], [0, 0, 0, 1, 1, 1]),
        ([5] * 4, [1000, 1000], [0, 0, 1, 1]),
        ([5] * 6, [16, 1000], [0, 0, 1, 1, 1, 1]),  # room for one more stays free
        ([5] * 4, [None], [0, 0, 0, 0]),
        ([5] * 4, [9, 9], None),
    ],
)
def test_blocks_are_balanced_within_what_is_free(
    sizes: list[int], room: list[int | None], places: list[int] | None
) -> None:
    blocks = [nn.Linear(size, 1, bias=False) for size in sizes]
    assert device_map(blocks, [None if free is None else 4 * free for free in room]) == places


def test_a_machine_has_a_processor_with_a_name() -> None:
    assert machine()["processor"]
