"""A comparison in a terminal's lines."""

from __future__ import annotations

from collections.abc import Sequence

from fasttrain.comparison import Change, Comparison, CounterChange, Why
from fasttrain.printable import printable

__all__ = ["comparison_lines"]

MOST_OPERATORS = 10

Row = tuple[str, str, str, str]


def comparison_lines(found: Comparison) -> list[str]:
    """The verdict, what it rests on, and why; control characters of names are shown as escapes."""
    lines = [_verdict(found), *(f"  {reason}" for reason in found.reasons)]
    width = max(len(found.a.label), len(found.b.label))
    lines += [
        f"{name}  {side.label:<{width}}  {side.step_s * 1e6:,.1f} us a step  {side.source}"
        for name, side in (("A", found.a), ("B", found.b))
    ]
    harmless = [each for each in found.differences if not each.is_fatal]
    lines += [f"  {each.name}: {each.a} -> {each.b}" for each in harmless]
    if found.why is not None:
        lines += ["", *_why(found.why)]
    if found.counters:
        lines += ["", *_table([("counters", "A", "B", "")], [_counter(each) for each in found.counters])]
    lines += [f"  {each.name}: {detail}" for each in found.risen for detail in each.details]
    return [printable(line) for line in lines]


def _verdict(found: Comparison) -> str:
    timing = found.timing
    if timing is None:
        return found.outcome
    interval = "no interval" if timing.low is None else f"{timing.low:.3f} to {timing.high:.3f}"
    return (
        f"{found.outcome}: B is {timing.speedup:.3f} times as fast as A "
        f"({interval}, {len(timing.pairs)} pairs, margin {timing.margin:.1%})"
    )


def _why(why: Why) -> list[str]:
    operators = why.operators[:MOST_OPERATORS]
    rest = Change(
        name=f"{len(why.operators) - len(operators)} more",
        a_us=sum(each.a_us or 0.0 for each in why.operators[MOST_OPERATORS:]),
        b_us=sum(each.b_us or 0.0 for each in why.operators[MOST_OPERATORS:]),
    )
    phases = [_change(phase.name, phase) for phase in why.phases if phase.a_us or phase.b_us]
    named = [_change(f"{each.name} ({each.phase})", each) for each in operators]
    if len(why.operators) > len(operators):
        named.append(_change(rest.name, rest))
    return [
        *_table(
            [("why, by phase", "A us", "B us", "change")],
            [*phases, _left(why, why.unexplained_by_phases_us), _change("step", why.step)],
        ),
        "",
        *_table(
            [("why, by operator", "A us", "B us", "change")],
            [*named, _left(why, why.unexplained_by_operators_us), _change("step", why.step)],
        ),
    ]


def _left(why: Why, us: float) -> Row:
    share = f" ({abs(us / why.step.us):.0%} of the change)" if why.step.us else ""
    return (f"not explained{share}", "", "", f"{us:+,.1f}")


def _change(name: str, change: Change) -> Row:
    return (name, _us(change.a_us), _us(change.b_us), f"{change.us:+,.1f}")


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _counter(counter: CounterChange) -> Row:
    return (counter.name, _count(counter.a), _count(counter.b), "ROSE" if counter.is_failure else "")


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.6g}"


def _table(head: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    lines = [*head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return [
        "  ".join((line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in (1, 2, 3)))).rstrip() for line in lines
    ]
