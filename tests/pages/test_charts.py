from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.pages.charts import SMALLEST, Axis, Series, draw, linear_axis, log_axis, runs_of

drawable = st.floats(min_value=-1e150, max_value=1e150)


def labels(axis: Axis) -> list[str]:
    return [tick.label for tick in axis.ticks]


@settings(deadline=None)
@given(st.lists(drawable, min_size=1), st.booleans())
def test_linear_axis_encloses_its_values(values: list[float], from_zero: bool) -> None:
    axis = linear_axis(values, from_zero=from_zero)
    assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in values)
    assert not from_zero or axis.low <= 0 <= axis.high
    places = [tick.at for tick in axis.ticks]
    assert (places[0], places[-1]) == (0, 100)
    assert 2 <= len(places) <= 8
    assert len(set(labels(axis))) == len(places), "two ticks share a label"


@settings(deadline=None)
@given(st.lists(st.floats(min_value=SMALLEST, max_value=1e150), min_size=2).filter(lambda v: min(v) < max(v)))
def test_log_axis_encloses_its_values(values: list[float]) -> None:
    axis = log_axis(values)
    assert axis.low <= min(values)
    assert max(values) <= axis.high
    assert all(-1e-9 <= axis.at(value) <= 1 + 1e-9 for value in values)
    places = [tick.at for tick in axis.ticks]
    assert places == sorted(places)
    assert 2 <= len(places) <= 8
    assert len(set(labels(axis))) == len(places), "two ticks share a label"


def test_ticks_are_round_numbers() -> None:
    assert labels(linear_axis([0.08, 0.47])) == ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]
    assert labels(linear_axis([610_000, 1_290_000], from_zero=True)) == ["0", "500k", "1.0M", "1.5M"]
    assert labels(linear_axis([100, 100], ceiling=100))[-1] == "100"
    assert labels(log_axis([1e-3, 1.25e-4])) == ["0.0001", "0.0002", "0.0005", "0.001"]
    assert labels(log_axis([0.4, 9e4])) == ["0.1", "1", "10", "100", "1k", "10k", "100k"]


def test_a_curve_breaks_where_it_cannot_be_drawn() -> None:
    values = [1.0, math.nan, 3.0, math.inf, None, 5.0, 5.0]
    series = Series("val", list(enumerate(values, 1)))
    chart = draw([series], linear_axis([0.0, 10.0]))
    path = chart.lines[0].path
    assert path.count("M") == 3
    assert set(re.findall("[a-z]", path)) == {"h"}, "only numbers and commands"
    assert [dot.label for dot in chart.lines[0].dots] == [
        f"epoch {e}: {v}" for e, v in ((1, 1), (3, 3), (6, 5), (7, 5))
    ]
    # Seven epochs: each is 1000/7 wide, and epochs 2 and 4-5 are missing.
    assert [(gap.x, gap.width) for gap in chart.gaps] == [
        pytest.approx((1000 / 7, 1000 / 7)),
        pytest.approx((3000 / 7, 2000 / 7)),
    ]


def test_points_lie_in_the_middle_of_their_epochs() -> None:
    chart = draw([Series("train", [(1, 0.0), (2, 10.0)])], linear_axis([0.0, 10.0]))
    assert chart.lines[0].path == "M250.0 1000.0L750.0 0.0h0"


def test_a_filled_step_spans_its_epochs_down_to_the_bottom() -> None:
    series = Series("single", [(1, 10.0), (2, 5.0)], "step", is_filled=True)
    line = draw([series], linear_axis([10.0, 5.0], from_zero=True)).lines[0]
    assert line.path == "M0.0 0.0L500.0 0.0L500.0 500.0L1000.0 500.0h0"
    assert line.area == "M0.0 1000.0L0.0 0.0L500.0 0.0L500.0 500.0L1000.0 500.0L1000.0 1000.0Z"
    assert line.dots == ()


def test_the_best_epoch_is_marked_on_the_curve_in_front() -> None:
    train, val = Series("train", [(1, 4.0), (2, 2.0)]), Series("val", [(1, 8.0), (2, 6.0)])
    chart = draw([train, val], linear_axis([0.0, 10.0]), best_epoch=2)
    assert chart.best is not None
    assert chart.best_dot is not None
    assert (chart.best.at, chart.best.label) == (75, "best: 2")
    assert (chart.best_dot.x, chart.best_dot.y) == pytest.approx((750, 400))
    outside = draw([train, val], linear_axis([0.0, 10.0]), best_epoch=3)
    assert (outside.best, outside.best_dot) == (None, None)


@pytest.mark.parametrize(
    ("last", "expected"),
    [(1, ["1"]), (6, list("123456")), (19, ["5", "10", "15"]), (800, ["200", "400", "600", "800"])],
)
def test_epochs_are_labelled_with_whole_numbers(last: int, expected: list[str]) -> None:
    chart = draw([Series("train", [(1, 0.0), (last, 1.0)])], linear_axis([0.0, 1.0]))
    assert [tick.label for tick in chart.x_ticks] == expected


def test_many_points_get_no_dots() -> None:
    chart = draw([Series("train", [(epoch, 1.0) for epoch in range(1, 401)])], linear_axis([1.0]))
    assert chart.lines[0].dots == ()


def test_runs_of_neighbours() -> None:
    assert runs_of([3, 4, 5, 9]) == [(3, 5), (9, 9)]
    assert runs_of([]) == []
