from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexp.comparison.report import curves, dots
from flexp.comparison.report.styles import spread, styles
from flexp.comparison.report.write import all_plots

from . import synthetic

KEYS = [
    "differences",
    "learning-personal",
    "learning-global",
    "against-bytes",
    "against-time",
    "against-memory",
    "clients",
    "trials",
]


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_a_full_comparison_has_every_plot_with_labelled_axes(metric: str) -> None:
    made = all_plots(synthetic.comparison(metric=metric, devices=True))
    assert [plot.key for plot in made] == KEYS
    for plot in made:
        assert plot.caption
        assert plot.figure.layout.xaxis.title.text
        if plot.key not in ("differences", "clients", "trials"):  # there the vertical axis has the names
            assert plot.figure.layout.yaxis.title.text


def test_thirty_methods_differ_by_more_than_their_dash() -> None:
    made = synthetic.comparison(methods=tuple(f"m{place}" for place in range(30)), seeds=(0,), clients=("a",))
    looks = [(style.colour, style.symbol) for style in styles(made).values()]
    assert len(set(looks)) == 30
    heavy = [style for style in styles(made).values() if style.heavy]
    assert [style.dash for style in heavy] == ["solid"]


def test_a_curve_is_the_mean_over_seeds_of_the_mean_over_clients() -> None:
    method = synthetic.tiny({"mine": [[0.8, 0.9], [0.7, 0.8]]})["methods"][0]
    points = curves.curve(method, "personal")
    assert points[0].mean == pytest.approx(0.1)
    assert points[1].mean == pytest.approx(0.8)
    assert points[1].half == pytest.approx(12.7062047 * 0.05)


def test_only_rounds_that_every_run_evaluated_are_drawn() -> None:
    method = synthetic.comparison(seeds=(0, 1))["methods"][0]
    del method["runs"][1]["rounds"][3:]
    assert list(curves.curve(method, "personal")) == [0, 1, 2, 3]


def test_the_path_against_bytes_starts_at_nothing_spent() -> None:
    plot = curves.against_cost(synthetic.comparison(), "bytes")
    assert plot is not None
    assert plot.figure.data[-1].name == "flexp-sfl"  # drawn last, on top
    assert list(plot.figure.data[-1].x) == pytest.approx([0.0268 * round for round in range(7)])  # GB


def test_very_different_costs_are_logarithmic_and_free_methods_level_lines() -> None:
    made = synthetic.comparison(methods=("flexp-sfl", "local", "fedavg"))
    for run in made["methods"][2]["runs"]:
        for entry in run["rounds"]:
            entry.update(bytes_up=100 * entry["bytes_up"])
    plot = curves.against_cost(made, "bytes")
    assert plot is not None
    assert plot.figure.layout.xaxis.type == "log"
    traces = {trace.name: trace for trace in plot.figure.data}
    level = traces["local (costs nothing)"]
    assert level.y[0] == level.y[1] == traces["local (costs nothing)"].y[-1]
    assert all(value > 0 for trace in plot.figure.data for value in trace.x)


def test_differences_are_drawn_with_their_intervals_and_hollow_when_they_reach_zero() -> None:
    made = synthetic.tiny({"mine": [[0.8], [0.7]], "sure": [[0.60], [0.501]], "unsure": [[0.7], [0.8]]})
    plot = dots.differences(made)
    assert plot is not None
    traces = {trace.name: trace for trace in plot.figure.data}
    assert traces["sure"].x[0] == pytest.approx(19.95)
    assert traces["sure"].error_x.array[0] == pytest.approx(12.7062047 * 0.05)
    assert traces["sure"].marker.symbol == "square"
    assert traces["unsure"].marker.symbol == "square-open"


def test_clients_are_sorted_by_the_reference_best_on_top() -> None:
    for metric in ("accuracy", "perplexity"):
        plot = dots.clients(synthetic.comparison(metric=metric))
        assert plot is not None
        values = list(plot.figure.data[0].x)  # from the bottom upwards
        assert values == sorted(values, reverse=metric == "perplexity")


def test_labels_beside_points_keep_their_distance() -> None:
    made = synthetic.comparison(methods=tuple(f"m{place}" for place in range(16)), seeds=(0,))
    plot = curves.against_memory(made)
    assert plot is not None
    layout = plot.figure.layout
    height = layout.height - layout.margin.t - layout.margin.b
    bottom, top = layout.yaxis.range
    places = sorted((top - label.y) / (top - bottom) * height + label.ay for label in layout.annotations)
    assert len(places) == 14  # the memory of two is not known
    assert all(after - before > 14 for before, after in pairwise(places))


@given(st.lists(st.floats(0, 300), min_size=1, max_size=15))
def test_spread_keeps_order_gap_and_bounds(wished: list[float]) -> None:
    places = spread(sorted(wished), 17.0, 300.0)
    assert len(places) == len(wished)
    assert min(places) >= -1e-6
    assert max(places) <= 300 + 1e-6
    assert all(after - before >= 17 - 1e-6 for before, after in pairwise(places))


def test_what_has_room_is_not_moved() -> None:
    assert spread([10.0, 50.0, 100.0], 17.0, 300.0) == [10.0, 50.0, 100.0]
    assert spread([50.0, 50.0], 20.0, 300.0) == [40.0, 60.0]


def test_without_data_no_plots() -> None:
    made = synthetic.comparison()
    for method in made["methods"]:
        method.update(runs=[], trials=[])
    assert all_plots(made) == []
