"""A comparison on one page: which is faster, how sure that is, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fasttrain.comparison import Change, Comparison, CounterChange, MemoryUse, Side, Timing, Why
from fasttrain.pages import charts
from fasttrain.pages.panels import Key, Panel
from fasttrain.pages.templates import template
from fasttrain.pages.values import MISSING, as_rate, as_text, written
from fasttrain.printable import printable

__all__ = ["render_comparison"]

MOST_OPERATORS = 20
"""Rows that are shown at once; the rest is behind a fold."""

LOG_RATIO = 20
"""Speedups that spread further than this are drawn on a logarithmic axis."""


class _Headline(NamedTuple):
    value: str
    unit: str
    verdict: str
    tone: str


class _Fact(NamedTuple):
    label: str
    value: str


class _Band(NamedTuple):
    """A stretch of the axis, in percent."""

    role: str
    left: float
    width: float


class _Dot(NamedTuple):
    """A pair: its place on the axis and from the top, in percent."""

    left: float
    top: float
    tone: str
    label: str


class _Pairs(NamedTuple):
    ticks: Sequence[charts.Tick]
    bands: Sequence[_Band]
    dots: Sequence[_Dot]
    even: float
    remark: str


class _Bar(NamedTuple):
    """A row of the waterfall: its bar in percent of the axis, and what stands beside it."""

    name: str
    tone: str
    left: float
    width: float
    times: str
    change: str


class _OperatorRow(NamedTuple):
    name: str
    phase: str
    badge: str
    a: str
    b: str
    change: str
    tone: str


class _CounterRow(NamedTuple):
    name: str
    a: str
    b: str
    is_failure: bool
    details: Sequence[str]


class _Row(NamedTuple):
    name: str
    a: str
    b: str
    is_fatal: bool = False


def render_comparison(found: Comparison) -> str:
    """Return the page of `found`: one HTML document that loads nothing; every text of a file is escaped."""
    operators = [] if found.why is None else _operator_rows(found.why)
    return template("comparison.html").render(
        a=found.a,
        b=found.b,
        workload=as_text(found.b.workload.get("name")),
        headline=_headline(found),
        facts=_facts(found),
        reasons=found.reasons,
        pairs=None if found.timing is None else _pairs(found.timing),
        bars=[] if found.why is None else _waterfall(found.why),
        operators=operators[:MOST_OPERATORS],
        more_operators=operators[MOST_OPERATORS:],
        operators_note="" if found.why is None else _operators_note(found.why),
        counters=[_counter_row(each) for each in found.counters],
        memory=None if found.memory is None else _memory_panel(found.memory),
        kinds=[] if found.memory is None else _memory_rows(found.memory),
        differences=[_Row(each.name, each.a, each.b, each.is_fatal) for each in found.differences],
        conditions=_conditions(found.a, found.b),
        command=printable(found.command),
        commands_of_sides=_commands_of_sides(found),
    )


def _commands_of_sides(found: Comparison) -> list[_Fact]:
    """What the files of A and B say of themselves, which may be anything; not where it is this comparison's own."""
    said = dict.fromkeys((side.source, side.command) for side in (found.a, found.b) if side.command != found.command)
    return [_Fact(f"{printable(source)} says that it was measured by", printable(command)) for source, command in said]


def _headline(found: Comparison) -> _Headline:
    timing = found.timing
    if timing is None:
        return _Headline(found.outcome.lower(), "", "", "none")
    tone = {"FASTER": "good", "SLOWER": "bad"}.get(found.outcome, "even")
    return _Headline(written(timing.speedup, "{:.3g}".format), "×", found.outcome, tone)


def _facts(found: Comparison) -> list[_Fact]:
    facts = [_Fact("A, a step", _step(found.a)), _Fact("B, a step", _step(found.b))]
    timing = found.timing
    if timing is None:
        return facts
    interval = MISSING if timing.low is None else f"{_times(timing.low)}–{_times(timing.high)}"
    return [
        _Fact("95% interval", interval),
        _Fact("pairs", str(len(timing.pairs))),
        _Fact("counts as the same", f"± {timing.margin:.1%}"),
        *facts,
    ]


def _step(side: Side) -> str:
    return _us(side.step_s * 1e6)


def _times(value: float | None) -> str:
    return written(value, lambda number: f"{number:.3f}" if 0.01 <= number < 100 else f"{number:.3g}")


def _pairs(timing: Timing) -> _Pairs:
    """Every pair as a dot on one axis of speedups, with the interval and the margin behind them."""
    margins = (1 / (1 + timing.margin), 1 + timing.margin)
    marks = [value for value in (timing.low, timing.high, timing.speedup, *margins) if value is not None]
    shown = [pair for pair in timing.pairs if charts.is_drawable(pair.speedup) and pair.speedup >= charts.SMALLEST]
    marks = [mark for mark in marks if charts.SMALLEST <= mark <= charts.LARGEST]
    values = [*marks, *(pair.speedup for pair in shown)]
    is_wide = max(values) > LOG_RATIO * min(values)
    axis = charts.log_axis(values) if is_wide else charts.linear_axis(values)
    bands = [_band("margin", axis, *margins)]
    if timing.low is not None and timing.high is not None:
        ends = [min(max(end, min(values)), max(values)) for end in (timing.low, timing.high)]
        bands.append(_band("interval", axis, *ends))
    dots = [
        _Dot(
            100 * axis.at(pair.speedup),
            100 * (number + 0.5) / len(shown),
            _tone(math.log(pair.speedup)),
            f"block {pair.block + 1}: {_times(pair.speedup)}",
        )
        for number, pair in enumerate(shown)
    ]
    hidden = len(timing.pairs) - len(shown)
    return _Pairs(axis.ticks, bands, dots, 100 * axis.at(1.0), f"{hidden} pairs are off any scale." if hidden else "")


def _band(role: str, axis: charts.Axis, low: float, high: float) -> _Band:
    return _Band(role, 100 * axis.at(low), 100 * (axis.at(high) - axis.at(low)))


def _tone(change: float) -> str:
    """Of a speedup's logarithm, or of a time that was saved."""
    return "good" if change > 0 else "bad" if change < 0 else "even"


def _waterfall(why: Why) -> list[_Bar]:
    """From A's step to B's: a bar a phase, each from where the one before it ended, then what is left over."""
    begin, end = why.step.a_us or 0.0, why.step.b_us or 0.0
    steps = [phase for phase in why.phases if phase.a_us or phase.b_us]
    edges = [begin]
    for phase in steps:
        edges.append(edges[-1] + phase.us)
    scale = 100 / max(*edges, end, charts.SMALLEST)
    bars = [_Bar("A", "a", 0.0, begin * scale, _us(begin), "")]
    for phase, edge in zip(steps, edges, strict=False):
        bars.append(_bar(phase.name, edge, phase.us, scale, f"{_us(phase.a_us)} → {_us(phase.b_us)}"))
    bars.append(_bar("not explained", edges[-1], why.unexplained_by_phases_us, scale, ""))
    return [*bars, _Bar("B", "b", 0.0, end * scale, _us(end), "")]


def _bar(name: str, edge: float, us: float, scale: float, times: str) -> _Bar:
    left = max(0.0, min(edge, edge + us))
    return _Bar(name, _tone(-us), left * scale, min(abs(us), 100 / scale) * scale, times, _signed(us))


def _operator_rows(why: Why) -> list[_OperatorRow]:
    return [_operator_row(each, why) for each in why.operators]


def _operator_row(change: Change, why: Why) -> _OperatorRow:
    """A list that leaves some out cannot tell that one did not run; it can tell that it was none of the largest."""
    badge = ""
    if change.a_us is None:
        badge = "gained" if why.is_complete else "not listed in A"
    elif change.b_us is None:
        badge = "lost" if why.is_complete else "not listed in B"
    times = (_us(change.a_us), _us(change.b_us))
    return _OperatorRow(change.name, change.phase, badge, *times, _signed(change.us), _tone(-change.us))


def _operators_note(why: Why) -> str:
    left = _signed(why.unexplained_by_operators_us)
    return f"Not explained: {left}, of operators in the phase other and of those that a profile does not list."


def _us(value: float | None) -> str:
    """Microseconds in the unit that a reader would choose."""
    if value is None:
        return MISSING
    scale, unit = next(each for each in ((1e6, "s"), (1e3, "ms"), (1.0, "µs")) if value >= each[0] or each[0] == 1)
    return f"{as_rate(value / scale)} {unit}"


def _signed(us: float) -> str:
    sign = "−" if us < 0 else "+" if us > 0 else ""
    return f"{sign}{_us(abs(us))}"


def _counter_row(counter: CounterChange) -> _CounterRow:
    a, b = (written(value, "{:,.6g}".format) for value in (counter.a, counter.b))
    return _CounterRow(counter.name, a, b, counter.is_failure, counter.details)


def _memory_panel(memory: tuple[MemoryUse, MemoryUse]) -> Panel:
    curves = [sorted(use.timeline) for use in memory]
    keys = [Key(role, f"{name}, peak", _bytes(use.peak_bytes)) for role, name, use in _sides(memory)]
    points = [float(num_bytes) for curve in curves for _, num_bytes in curve]
    if not points:
        return Panel("Memory of tensors", keys=keys, remarks=["Its course was not recorded."])
    series = [
        charts.Series(role, [(step, num_bytes) for step, num_bytes in curve])
        for role, curve in zip(("train", "val"), curves, strict=True)
    ]
    chart = charts.draw(series, charts.linear_axis(points, from_zero=True), x_name="step")
    return Panel("Memory of tensors", "bytes after a step", "", keys, chart)


def _sides(memory: tuple[MemoryUse, MemoryUse]) -> list[tuple[str, str, MemoryUse]]:
    return [("train", "A", memory[0]), ("val", "B", memory[1])]


def _memory_rows(memory: tuple[MemoryUse, MemoryUse]) -> list[_Row]:
    a, b = memory
    kinds = {**a.by_kind, **b.by_kind}
    rows = [_Row(kind, _bytes(a.by_kind.get(kind)), _bytes(b.by_kind.get(kind))) for kind in kinds]
    return [*rows, _Row("peak", _bytes(a.peak_bytes), _bytes(b.peak_bytes))]


def _bytes(value: int | None) -> str:
    if value is None:
        return MISSING
    number = as_rate(value) if value >= 1000 else str(value)
    return f"{number[:-1]} {number[-1]}B" if number[-1:].isalpha() else f"{number} B"


def _conditions(a: Side, b: Side) -> list[_Row]:
    rows = [_Row("measured", a.created, b.created)]
    for ours, theirs in ((a.workload, b.workload), (a.environment, b.environment)):
        rows += [_Row(name, as_text(ours.get(name)), as_text(theirs.get(name))) for name in {**ours, **theirs}]
    return rows
