"""What labels alone tell of words, by hand."""

from __future__ import annotations

import pytest
import torch

from flexp.attacks.base import Sent
from flexp.audit.guessing import by_labels
from flexp.audit.truth import Truth

DULL = 1


def truth(texts: list[list[int]]) -> Truth:
    """Texts that were sent once each, of tokens of which :data:`DULL` is no content word."""
    ids_N = torch.tensor([token for text in texts for token in text])
    texts_N = torch.tensor([number for number, text in enumerate(texts) for _ in text])
    positions_N = torch.tensor([place for text in texts for place in range(len(text))])
    sent = Sent(torch.zeros(len(ids_N), 2), positions_N, texts_N)
    return Truth(sent, ids_N, torch.ones_like(ids_N) > 0, ids_N != DULL, torch.ones_like(ids_N), texts_N)


def test_labels_tell_the_words_of_their_class() -> None:
    """Every fourth text is known: of class 0 they say 5 and 6, of class 1 8 and 9."""
    known = [[1, 5, 6], [1, 8, 9]]
    others = [[1, 5, 7], [6, 5, 1], [1, 9, 8], [2, 3, 4]]
    texts = [known[0], *others[:3], known[1], *others[3:], [1, 5, 6], [1, 5, 6]]
    labels_U = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0])
    found = by_labels(truth(texts), labels_U)
    # of [1, 5, 7] two, of [6, 5, 1] three, of [1, 9, 8] three, of [2, 3, 4] none, of the last two three each
    assert found["labelled"] == pytest.approx(14 / 18)
    assert found["labelled_content"] == pytest.approx(9 / 13)


def test_a_class_that_nobody_knows_is_guessed_by_what_is_usual() -> None:
    texts = [[1, 5], [1, 5], [1, 9], [1, 5], [1, 5]]
    found = by_labels(truth(texts), torch.tensor([0, 0, 1, 0, 0]))
    assert found == {"labelled": pytest.approx(5 / 6), "labelled_content": pytest.approx(2 / 3)}


@pytest.mark.parametrize("texts", [[[1, 5]], [[1, 5], [1, 5], [1, 5], [1, 5]]])
def test_of_too_few_texts_nothing_is_said(texts: list[list[int]]) -> None:
    assert by_labels(truth(texts), torch.zeros(len(texts), dtype=torch.long)) == {}
