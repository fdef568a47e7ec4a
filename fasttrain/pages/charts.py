"""The geometry of a page's charts: numbers in, positions and SVG path data out.

Everything is a value; nothing here knows HTML. A chart is drawn in a square of 1000 x 1000 units that the
template stretches to the width at hand; labels are placed by percentages, so that text is never stretched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fasttrain.pages.values import number_label, ten_power

__all__ = [
    "SMALLEST",
    "Axis",
    "Chart",
    "Dot",
    "Gap",
    "Line",
    "Series",
    "Tick",
    "draw",
    "is_drawable",
    "linear_axis",
    "log_axis",
    "runs_of",
]

SIZE = 1000
# Between these two, spans and round numbers beyond both ends of an axis are still ordinary floats.
LARGEST = 1e150
SMALLEST = 1e-150
MOST_DOTS = 40


@dataclass(frozen=True)
class Tick:
    """A label at `at` percent of the axis, counted from the left or from the bottom."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A vertical axis from `low` to `high`."""

    low: float
    high: float
    ticks: tuple[Tick, ...]
    is_log: bool = False

    def at(self, value: float) -> float:
        """Return the place of `value` as a fraction: 0 at the bottom, 1 at the top."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Series:
    """One curve before it is drawn.

    `points` are (epoch, value) in order of epoch; a value that is None or not finite leaves a gap. `shape` is
    "line", or "step" for a value that holds over the whole epoch. `is_filled` fills the area below.
    """

    role: str
    points: Sequence[tuple[int, float | None]]
    shape: Literal["line", "step"] = "line"
    is_filled: bool = False


@dataclass(frozen=True)
class Dot:
    """A point with its tooltip, in chart units."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """A drawn curve: SVG path data of the line and of the area below it (empty where there is none)."""

    role: str
    path: str
    area: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Gap:
    """Epochs without a finite value, in chart units."""

    x: float
    width: float


@dataclass(frozen=True)
class Chart:
    """Everything that a template needs to draw one chart."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    gaps: tuple[Gap, ...]
    best: Tick | None
    best_dot: Dot | None
    x_name: str


@dataclass(frozen=True)
class _Plane:
    """Places (epoch, value) in the square: every epoch is equally wide, with its value in the middle."""

    first: int
    last: int
    y_axis: Axis

    def x(self, epoch: float) -> float:
        return SIZE * (epoch - self.first + 0.5) / (self.last - self.first + 1)

    def y(self, value: float) -> float:
        return SIZE * (1 - self.y_axis.at(value))


def is_drawable(value: float | None) -> bool:
    """Tell whether a chart can show `value`: a finite number, and one that is not absurdly large."""
    return value is not None and math.isfinite(value) and abs(value) <= LARGEST


def linear_axis(values: Iterable[float], *, from_zero: bool = False, ceiling: float | None = None) -> Axis:
    """Return a linear axis around `values` (drawable, at least one) that begins and ends on round numbers.

    Args:
        values: what the axis must show.
        from_zero: begin at zero where no value is below it.
        ceiling: the largest value that makes sense; the room above the values does not pass it.
    """
    shown = [*values, 0.0] if from_zero else list(values)
    low, high = min(shown), max(shown)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size < SMALLEST:
        pad = 0.1 * size if size >= SMALLEST else 1.0
        low, high = low - pad, high + pad
    if ceiling is not None:
        high = max(max(shown), min(high, ceiling))
    step, exponent = _round_step((high - low) / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    low, high = first * step, last * step
    ticks = tuple(
        Tick(100 * (i - first) / (last - first), number_label(i * step, exponent)) for i in range(first, last + 1)
    )
    return Axis(low, high, ticks)


def log_axis(values: Iterable[float]) -> Axis:
    """Return a logarithmic axis around `values`: drawable, at least `SMALLEST`, and not all the same."""
    shown = list(values)
    low, high = min(shown), max(shown)
    first, last = ten_power(low), ten_power(high) + 1
    stride = max(1, math.ceil((last - first) / 6))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    rounds = [(float(f"{f}e{e}"), e) for e in range(first, last + stride, stride) for f in factors]
    low = max(value for value, _ in rounds if value <= low)
    high = min(value for value, _ in rounds if value >= high)
    axis = Axis(low, high, (), is_log=True)
    ticks = tuple(Tick(100 * axis.at(v), number_label(v, e)) for v, e in rounds if low <= v <= high)
    return Axis(low, high, ticks, is_log=True)


def draw(series: Sequence[Series], y_axis: Axis, *, best_epoch: int | None = None, x_name: str = "epoch") -> Chart:
    """Draw `series`, which have at least one point between them, over one axis of epochs.

    Args:
        series: the curves, the one in front last.
        y_axis: an axis around all their drawable values.
        best_epoch: the epoch to mark, on the curve in front; None, or one outside the chart, marks none.
        x_name: what is counted along the axis, where it is not epochs.
    """
    epochs = [epoch for one in series for epoch, _ in one.points]
    plane = _Plane(min(epochs), max(epochs), y_axis)
    best = best_dot = None
    if best_epoch is not None and plane.first <= best_epoch <= plane.last:
        best = Tick(plane.x(best_epoch) / SIZE * 100, f"best: {best_epoch}")
        value = dict(series[-1].points).get(best_epoch)
        if value is not None and is_drawable(value):
            best_dot = Dot(plane.x(best_epoch), plane.y(value), "")
    return Chart(
        x_ticks=_epoch_ticks(plane),
        y_ticks=y_axis.ticks,
        lines=tuple(_draw_line(one, plane, x_name) for one in series),
        gaps=_gaps(series, plane),
        best=best,
        best_dot=best_dot,
        x_name=x_name,
    )


def runs_of(epochs: Iterable[int]) -> list[tuple[int, int]]:
    """Return the runs of neighbours in sorted `epochs` as (first, last): 3, 4, 5, 9 gives (3, 5), (9, 9)."""
    runs: list[tuple[int, int]] = []
    for epoch in epochs:
        if runs and epoch <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], epoch)
        else:
            runs.append((epoch, epoch))
    return runs


def _round_step(least: float) -> tuple[float, int]:
    """Return the smallest of 1, 2 or 5 times 10**exponent that is not below `least`, and that exponent."""
    exponent = ten_power(least)
    candidates = ((1, exponent), (2, exponent), (5, exponent), (1, exponent + 1))
    return next((step, e) for step, e in ((float(f"{f}e{e}"), e) for f, e in candidates) if step >= least)


def _epoch_ticks(plane: _Plane) -> tuple[Tick, ...]:
    step = max(1, round(_round_step((plane.last - plane.first + 1) / 6)[0]))
    epochs = range(-(-plane.first // step) * step, plane.last + 1, step)
    return tuple(Tick(plane.x(epoch) / SIZE * 100, str(epoch)) for epoch in epochs)


def _gaps(series: Sequence[Series], plane: _Plane) -> tuple[Gap, ...]:
    missing = sorted({epoch for one in series for epoch, value in one.points if not is_drawable(value)})
    return tuple(
        Gap(plane.x(first - 0.5), plane.x(last + 0.5) - plane.x(first - 0.5)) for first, last in runs_of(missing)
    )


def _draw_line(series: Series, plane: _Plane, x_name: str) -> Line:
    pieces = _pieces(series)
    corners = [_corners(piece, plane, series.shape) for piece in pieces]
    areas = [f"M{_xy(c[0][0], SIZE)}L{_path(c)}L{_xy(c[-1][0], SIZE)}Z" for c in corners] if series.is_filled else []
    num_points = sum(len(piece) for piece in pieces)
    dots = [
        Dot(plane.x(epoch), plane.y(value), f"{x_name} {epoch}: {value:.6g}")
        for piece in pieces
        for epoch, value in piece
    ]
    return Line(
        role=series.role,
        # "h0" makes a piece of a single point a dot, by way of the round caps of the line.
        path="".join(f"M{_path(c)}h0" for c in corners),
        area="".join(areas),
        dots=tuple(dots) if num_points <= MOST_DOTS and series.shape == "line" else (),
    )


def _pieces(series: Series) -> list[list[tuple[int, float]]]:
    """Split the points where one of them cannot be drawn."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for epoch, value in series.points:
        if value is not None and is_drawable(value):
            pieces[-1].append((epoch, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _corners(piece: Sequence[tuple[int, float]], plane: _Plane, shape: str) -> list[tuple[float, float]]:
    sides = (-0.5, 0.5) if shape == "step" else (0.0,)
    return [(plane.x(epoch + side), plane.y(value)) for epoch, value in piece for side in sides]


def _path(corners: Iterable[tuple[float, float]]) -> str:
    return "L".join(_xy(x, y) for x, y in corners)


def _xy(x: float, y: float) -> str:
    return f"{x:.1f} {y:.1f}"
