"""A profile for the terminal: phases, counters, the longest operators, findings."""

from __future__ import annotations

from collections.abc import Iterable

from fasttrain.measure.profiling.origins import in_order
from fasttrain.measure.profiling.record import PHASES, PROGRAM, Counters, Finding, Profile

__all__ = ["profile_text"]

NUM_OPERATORS = 8

BAR = 30


def profile_text(profile: Profile) -> str:
    """Some 30 lines of text."""
    lines = [
        f"{profile.name}: {_us(profile.step_us)} a step ({_us(profile.traced_step_us)} while traced)",
        "",
        *_phases(profile),
        "",
        *_operators(profile),
        "",
        *_counters(profile.counters),
        f"memory at its peak      {profile.memory.peak_bytes / 2**20:,.1f} MiB",
        "",
        *_findings(profile.findings),
    ]
    return "\n".join(_printable(line) for line in lines)


def _phases(profile: Profile) -> Iterable[str]:
    for phase in PHASES:
        us = profile.phases[phase]
        if us > 0:
            share = us / profile.step_us
            yield f"{phase:<15}{_us(us):>12}  {share:>6.1%}  {'#' * round(BAR * share)}"
            if phase == PROGRAM:
                yield from _program(profile)


def _program(profile: Profile) -> Iterable[str]:
    for origin, us in in_order(profile.program).items():
        yield f"{_us(us):>27}  {us / profile.phases[PROGRAM]:>6.1%} of it: {origin}"


def _operators(profile: Profile) -> Iterable[str]:
    for each in profile.operators[:NUM_OPERATORS]:
        calls = f"{each.calls:g} x" if each.calls else ""
        yield f"{each.phase:<15}{_us(each.self_us):>12}  {calls:>8} {each.name}"


def _counters(counters: Counters) -> Iterable[str]:
    yield f"operators dispatched    {counters.dispatched_operators:g}"
    if counters.kernel_launches is not None:
        yield f"kernels launched        {counters.kernel_launches:g}"
    yield f"host reads              {sum(read.per_step for read in counters.host_reads):g}"
    h2d, d2h = counters.copies.h2d, counters.copies.d2h
    yield f"copies to and from      {h2d.count:g} ({h2d.bytes:g} B), {d2h.count:g} ({d2h.bytes:g} B)"
    yield f"allocations             {counters.allocations:g}"
    if counters.flops is not None:
        yield f"FLOPs                   {counters.flops:.4g} ({len(counters.flops_not_counted)} operators not counted)"
    recompiled = sum(each.count for each in counters.recompilations)
    yield f"in the whole process    {counters.graph_breaks} graph breaks, {recompiled} recompilations, " + (
        f"{counters.programs_loaded} programs loaded"
    )


def _findings(findings: list[Finding]) -> Iterable[str]:
    if not findings:
        yield "findings: none"
    for each in findings:
        place = "" if each.file is None else f" at {each.file}:{each.line}"
        cost = "" if each.cost_us is None else f", at most {_us(each.cost_us)} a step"
        yield f"{each.kind}{place}{cost}"
        yield f"    {each.advice}"


def _us(us: float) -> str:
    return f"{us / 1e3:,.2f} ms" if us >= 10_000 else f"{us:,.1f} us"


def _printable(line: str) -> str:
    """Without what a terminal would obey: names come from the user's code."""
    return "".join(each if each.isprintable() else "?" for each in line)
