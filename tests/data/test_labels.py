"""Classes for a head that was trained already: which they are, in which order, and what the user is told."""

from __future__ import annotations

import re

import pytest

from flexp.data.columns import lists_of_labels, settled, sort_labels
from flexp.errors import DataError


@pytest.mark.parametrize(
    ("labels", "head", "names", "note"),
    [
        (["no", "yes"], [], ["no", "yes"], None),
        (["no", "yes"], ["yes", "no"], ["yes", "no"], None),
        (["no", "yes"], ["yes", "maybe", "no"], ["yes", "maybe", "no"], "do not have: maybe"),
        (["no", "so", "yes"], ["yes", "no"], ["yes", "no", "so"], r"keeps what it knows \(yes, no\); new in it: so"),
        (["0", "1"], ["bad", "good"], ["0", "1"], "numbers of the checkpoint's classes: 0 = bad, 1 = good"),
        (["0", "1"], ["1", "0"], ["1", "0"], None),
        (["0", "1"], ["bad", "so", "good"], ["0", "1"], "begins anew"),
        (["1", "2"], ["bad", "good"], ["1", "2"], "begins anew"),
        (["cat", "dog"], ["LABEL_0", "LABEL_1"], ["cat", "dog"], "knows LABEL_0, LABEL_1, and not cat, dog"),
    ],
)
def test_the_order_is_the_heads(labels: list[str], head: list[str], names: list[str], note: str | None) -> None:
    found, remarks = settled(labels, head)
    assert found == names
    assert remarks == [] if note is None else re.search(note, remarks[0])


def test_odd_labels_are_a_line_or_a_class() -> None:
    assert sort_labels(["2", "--1"]) == ["--1", "2"]
    with pytest.raises(DataError, match="row 1: the label 'None' in column 'tags' is not a class"):
        lists_of_labels([[0], [1, None]], ["a", "b"], "tags", None, lambda index: f"row {index}")
