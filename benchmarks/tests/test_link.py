"""What `python -m benchmarks link` compares."""

from __future__ import annotations

from benchmarks.link import link_overhead


def test_both_links_train_and_bytes_are_counted() -> None:
    result = link_overhead("arch:llama", "causal-lm", cut=(1, 3), examples=2, length=8, pairs=4)
    activation = 4 * 2 * 8 * result["hidden"]
    assert result["ratio"] > 0.2
    assert result["ratio_quartiles"][0] <= result["ratio"] <= result["ratio_quartiles"][1]
    assert 4 * activation <= result["tensor_bytes"] <= 4 * activation + 2 * 8  # the mask, if there is one
    assert 0 < result["header_bytes"] < 400
