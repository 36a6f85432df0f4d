from __future__ import annotations

import pytest

from flexp.report import plots
from flexp.report.figures import score_axis

from . import synthetic


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_a_full_run_has_every_plot_with_labelled_axes(metric: str) -> None:
    diary = synthetic.records(metric=metric)
    made = plots.all_plots(synthetic.summary(diary, metric=metric), diary)
    assert [plot.key for plot in made] == ["learning", "change", "loss", "align", "traffic", "time", "depth"]
    for plot in made:
        assert plot.caption
        assert plot.figure.layout.xaxis.title.text
        if plot.key not in ("change", "traffic", "time"):  # there the vertical axis has the names
            assert plot.figure.layout.yaxis.title.text


def test_the_mean_curve_is_the_mean_of_the_thin_lines() -> None:
    diary = synthetic.records(("a", "b"), rounds=3)
    plot = plots.learning_curves(synthetic.summary(diary, ("a", "b")), diary)
    assert plot is not None
    first, second, mean = plot.figure.data[:3]
    assert list(mean.x) == [0, 1, 2, 3]
    assert list(mean.y) == pytest.approx([(x + y) / 2 for x, y in zip(first.y, second.y, strict=True)])


def test_no_data_no_plots() -> None:
    summary = synthetic.summary(diary=[])
    for client in summary["clients"]:
        client.update(bytes_up=0, bytes_down=0, client_seconds=0.0, server_seconds=0.0)
    assert plots.all_plots(summary, []) == []


def test_equal_cuts_have_no_depth_plot() -> None:
    summary = synthetic.summary()
    for client in summary["clients"]:
        client["cut"] = [1, 5]
    assert plots.score_by_depth(summary, []) is None


def test_long_curves_are_thinned() -> None:
    diary = [{"kind": "step", "client": "a", "step": n, "loss": 1.0} for n in range(1, 10_001)]
    plot = plots.training_loss(synthetic.summary(clients=("a",)), diary)
    assert plot is not None
    assert all(len(trace.x) <= plots.MOST_POINTS for trace in plot.figure.data)


def test_smoothing_starts_at_the_first_value_and_skips_what_is_missing() -> None:
    assert plots.smooth([2.0, 2.0, None, 2.0]) == [2.0, 2.0, None, pytest.approx(2.0)]
    assert plots.smooth([1.0, 3.0])[1] == pytest.approx((0.9 * 1 + 3.0) / 1.9)
    assert plots.smooth([]) == []


def test_a_wide_range_of_perplexities_is_logarithmic() -> None:
    diary = synthetic.records(metric="perplexity")
    plot = plots.learning_curves(synthetic.summary(diary, metric="perplexity"), diary)
    assert plot is not None
    assert plot.figure.layout.yaxis.type == "log"


def test_axes_show_possible_values_only() -> None:
    """A wide interval of an accuracy ends at 0 and 100 %, and a distance is never negative."""
    low, high = score_axis("accuracy", [-1.5, 0.6, 3.0])["range"]
    assert (low, high) == (-0.02, 1.02)
    low, high = score_axis("accuracy", [0.5, 0.6])["range"]
    assert 0.45 < low < 0.5 < 0.6 < high < 0.65
    diary = synthetic.records()
    plot = plots.alignment(synthetic.summary(diary), diary)
    assert plot is not None
    assert plot.figure.layout.yaxis.rangemode == "nonnegative"
