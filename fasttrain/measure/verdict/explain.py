"""Why a step takes another time: two profiles, part by part."""

from __future__ import annotations

from fasttrain.comparison import OTHER, Change, CounterChange, MemoryUse, Why
from fasttrain.measure.profiling.origins import in_order
from fasttrain.measure.profiling.record import PHASES, PROGRAM, Counters, Operator, Profile

__all__ = ["compare_counters", "explain", "memory_use"]


def explain(a: Profile, b: Profile) -> Why:
    """Takes the change of a step's time apart by phase and by operator; "other" explains nothing of it."""
    operators_a, operators_b = _by_place(a), _by_place(b)
    operators = [
        Change(name=name, phase=phase, a_us=operators_a.get((name, phase)), b_us=operators_b.get((name, phase)))
        for name, phase in {**operators_a, **operators_b}
    ]
    return Why(
        step=Change(name="step", a_us=a.step_us, b_us=b.step_us),
        phases=tuple(change for name in PHASES if name != OTHER for change in _changes(name, a, b)),
        operators=tuple(sorted(operators, key=lambda change: (-abs(change.us), change.name, change.phase))),
        is_complete=not any(_is_rest(operator) for profile in (a, b) for operator in profile.operators),
    )


def _changes(phase: str, a: Profile, b: Profile) -> list[Change]:
    """Of a phase; of each part of the phase `program` where both profiles know them."""
    are_split = all(side.program or not side.phases[PROGRAM] for side in (a, b))
    if phase != PROGRAM or not are_split or not {**a.program, **b.program}:
        return [Change(name=phase, a_us=a.phases[phase], b_us=b.phases[phase])]
    return [
        Change(name=f"{PROGRAM}: {origin}", a_us=a.program.get(origin, 0.0), b_us=b.program.get(origin, 0.0))
        for origin in in_order({**a.program, **b.program})
    ]


def compare_counters(a: Profile, b: Profile) -> tuple[CounterChange, ...]:
    """Every counter of two profiles; host reads, recompilations, graph breaks and launches must not rise.

    Launches are kernels where both ran on a GPU, and calls of torch's dispatcher where both ran on the CPU.
    """
    ours, theirs = a.counters, b.counters
    on_gpu = ours.kernel_launches is not None and theirs.kernel_launches is not None
    gates = {
        "host reads a step": (_num_reads(ours), _num_reads(theirs), _new_reads(ours, theirs)),
        "recompilations": (_num_recompilations(ours), _num_recompilations(theirs), _new_reasons(ours, theirs)),
        "graph breaks": (ours.graph_breaks, theirs.graph_breaks, ()),
        "kernel launches a step": (ours.kernel_launches, theirs.kernel_launches, ()),
    }
    told = {
        "copies to the device a step": (ours.copies.h2d.count, theirs.copies.h2d.count),
        "bytes to the device a step": (ours.copies.h2d.bytes, theirs.copies.h2d.bytes),
        "copies to the host a step": (ours.copies.d2h.count, theirs.copies.d2h.count),
        "bytes to the host a step": (ours.copies.d2h.bytes, theirs.copies.d2h.bytes),
        "allocations a step": (ours.allocations, theirs.allocations),
        "programs loaded": (ours.programs_loaded, theirs.programs_loaded),
        "floating-point operations a step": (ours.flops, theirs.flops),
    }
    dispatched = CounterChange(
        name="dispatched operators a step",
        a=ours.dispatched_operators,
        b=theirs.dispatched_operators,
        is_gate=not on_gpu,
    )
    return (
        *(CounterChange(name=name, a=x, b=y, is_gate=True, details=where) for name, (x, y, where) in gates.items()),
        dispatched,
        *(CounterChange(name=name, a=x, b=y, is_gate=False) for name, (x, y) in told.items()),
    )


def memory_use(profile: Profile) -> MemoryUse:
    """A profile's memory, as a comparison keeps it."""
    memory = profile.memory
    timeline = tuple((step, num_bytes) for step, num_bytes in memory.timeline)
    return MemoryUse(peak_bytes=memory.peak_bytes, by_kind=memory.by_kind, timeline=timeline)


def _by_place(profile: Profile) -> dict[tuple[str, str], float]:
    """Self time by operator and phase, without the row of the rest; rows of one place are added up."""
    found: dict[tuple[str, str], float] = {}
    for operator in profile.operators:
        if not _is_rest(operator):
            place = (operator.name, operator.phase)
            found[place] = found.get(place, 0.0) + operator.self_us
    return found


def _is_rest(operator: Operator) -> bool:
    return operator.name == OTHER and not operator.phase


def _num_reads(counters: Counters) -> float:
    return sum(read.per_step for read in counters.host_reads)


def _new_reads(a: Counters, b: Counters) -> tuple[str, ...]:
    """Places where B reads more often than A."""
    before = {(read.file, read.line, read.what): read.per_step for read in a.host_reads}
    return tuple(
        f"{read.file}:{read.line} {read.what}, {read.per_step:.4g} a step"
        for read in b.host_reads
        if read.per_step > before.get((read.file, read.line, read.what), 0.0)
    )


def _num_recompilations(counters: Counters) -> int:
    return sum(each.count for each in counters.recompilations)


def _new_reasons(a: Counters, b: Counters) -> tuple[str, ...]:
    before = {each.reason: each.count for each in a.recompilations}
    return tuple(
        f"{each.count} times: {each.reason}" for each in b.recompilations if each.count > before.get(each.reason, 0)
    )
