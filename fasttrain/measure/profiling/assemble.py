"""From what the passes saw to a profile: everything per step, scaled to a clean one, so that it adds up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fasttrain.errors import EngineError
from fasttrain.measure.environment import environment, now
from fasttrain.measure.host_reads import Read
from fasttrain.measure.places import Place, shown
from fasttrain.measure.profiling.compile_events import CompileEvents
from fasttrain.measure.profiling.findings import Observations, find
from fasttrain.measure.profiling.origins import NOT_ATTRIBUTED
from fasttrain.measure.profiling.passes import AllocationPass, CountPass, SuspectPass, TracePass, device_type
from fasttrain.measure.profiling.record import (
    PHASES,
    PROGRAM,
    Copies,
    Counters,
    Gpu,
    HostRead,
    Operator,
    Profile,
    Traffic,
)
from fasttrain.measure.profiling.steady import SETTLE
from fasttrain.measure.profiling.suspects import Loaders
from fasttrain.measure.profiling.trace_summary import TraceSummary

__all__ = ["Timed", "Watched", "assemble"]

MAX_OPERATORS = 40
MAX_READS = 40
OTHER_PLACES = "other places"
MAX_UNCOUNTED = 60


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What the passes that time have found; plain data, for it may come from another process.

    Attributes:
        step_us: of a clean step.
        shares: of a step, by phase.
        read_us: (file, line, us) of methods that wait for the device.
        gpu: without the trace's part.
    """

    step_us: float
    shares: dict[str, float]
    read_us: list[tuple[str, int, float]]
    gpu: Gpu | None

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Timed:
        """What `dataclasses.asdict` made, once it went through JSON."""
        gpu = given["gpu"]
        return cls(
            step_us=given["step_us"],
            shares=given["shares"],
            read_us=[(file, line, us) for file, line, us in given["read_us"]],
            gpu=None if gpu is None else Gpu(**gpu),
        )

    @property
    def phases(self) -> dict[str, float]:
        """Us by phase."""
        return {phase: self.step_us * self.shares.get(phase, 0.0) for phase in PHASES}


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The passes that slow the steps down, each run to its end."""

    trace: TracePass
    allocations: AllocationPass
    counts: CountPass
    suspects: SuspectPass


def assemble(
    timed: Timed,
    watched: Watched,
    *,
    loaders: Loaders,
    programs_loaded: int,
    name: str,
    workload: dict[str, Any],
    command: str,
) -> Profile:
    """Puts a profile together.

    Args:
        timed: of this process, or of one that traced nothing.
        watched: of this process.
        loaders: what was loaded from.
        programs_loaded: in this process.
        name: of the profile.
        workload: what is trained.
        command: that profiles.

    Raises:
        EngineError: the steps that were traced ran otherwise than those that were timed.
    """
    summary = watched.trace.summary()
    _check_engines(timed.phases[PROGRAM], sum(summary.program.values()))
    compiled = watched.counts.compiled
    gpu = timed.gpu
    if gpu is not None and summary.idle_us is not None:
        gpu = replace(gpu, idle_us={cause: us / watched.trace.steps for cause, us in summary.idle_us.items()})
    return Profile(
        name=name,
        workload=workload,
        command=command,
        created=now(),
        environment={**environment(torch.device(device_type())), "threads": torch.get_num_threads()},
        step_us=timed.step_us,
        traced_step_us=summary.wall_us / watched.trace.steps,
        phases=timed.phases,
        program=_program(timed.phases[PROGRAM], summary.program),
        operators=_operators(timed.phases, summary, watched.trace.steps),
        counters=_counters(watched, summary, programs_loaded),
        memory=watched.allocations.found.memory,
        gpu=gpu,
        findings=find(_observations(timed, watched, loaders, compiled)),
    )


def _check_engines(timed_us: float, traced_us: float) -> None:
    """Refuses to join figures of a compiled program with those of steps that ran operator by operator."""
    if (timed_us > 0) == (traced_us > 0):
        return
    timed, traced = ("by compiled program" if us > 0 else "operator by operator" for us in (timed_us, traced_us))
    raise EngineError(f"the steps that were timed ran {timed}, those that were traced {traced}: {SETTLE}")


def _program(us: float, traced: Mapping[str, float]) -> dict[str, float]:
    """The parts of the phase in the trace, scaled to its time in clean steps."""
    total = sum(traced.values())
    if total > 0:
        return {origin: part * us / total for origin, part in traced.items()}
    return {NOT_ATTRIBUTED: us} if us > 0 else {}


def _operators(phases: Mapping[str, float], summary: TraceSummary, steps: int) -> list[Operator]:
    """The trace's operators, each phase of them scaled to its time in clean steps; then what is left."""
    traced: defaultdict[str, float] = defaultdict(float)
    for row in summary.operators:
        traced[row.phase] += row.self_us
    rows = [
        replace(row, calls=row.calls / steps, self_us=row.self_us * phases[row.phase] / traced[row.phase])
        for row in summary.operators
        if traced[row.phase] > 0
    ]
    rows += [
        Operator(name="python", phase=phase, calls=0, self_us=us)
        for phase, us in phases.items()
        if us > 0 and not traced[phase] > 0
    ]
    rows.sort(key=lambda row: (-row.self_us, row.name, row.phase))
    rest = sum(row.self_us for row in rows[MAX_OPERATORS:])
    return [*rows[:MAX_OPERATORS], Operator(name="other", phase="", calls=0, self_us=rest)]


def _counters(watched: Watched, summary: TraceSummary, programs_loaded: int) -> Counters:
    compiled = watched.counts.compiled
    steps = watched.trace.steps
    flops = watched.counts.flops
    h2d, d2h = (summary.copies[way] for way in ("h2d", "d2h"))
    return Counters(
        dispatched_operators=summary.num_operators / steps,
        kernel_launches=None if summary.launches is None else summary.launches / steps,
        host_reads=_host_reads(watched.counts.reads, watched.counts.steps),
        copies=Copies(
            h2d=Traffic(count=h2d[0] / steps, bytes=h2d[1] / steps),
            d2h=Traffic(count=d2h[0] / steps, bytes=d2h[1] / steps),
        ),
        allocations=watched.allocations.found.per_step,
        graph_breaks=len(compiled.breaks),
        recompilations=compiled.recompilations(),
        programs_loaded=programs_loaded,
        flops=flops.flops / watched.counts.steps,
        flops_not_counted=sorted(flops.not_counted)[:MAX_UNCOUNTED],
    )


def _host_reads(reads: Sequence[Read], steps: int) -> list[HostRead]:
    """By place; the last one is of all places that the list has no room for, so that they add up to all reads."""
    rows = [
        HostRead(file=shown(read.file), line=read.line, what=read.what, per_step=read.count / steps) for read in reads
    ]
    if len(rows) <= MAX_READS:
        return rows
    rest = sum(read.count for read in reads[MAX_READS - 1 :]) / steps
    return [*rows[: MAX_READS - 1], HostRead(file=OTHER_PLACES, line=0, what="any", per_step=rest)]


def _observations(timed: Timed, watched: Watched, loaders: Loaders, compiled: CompileEvents) -> Observations:
    suspects = watched.suspects
    read_us: dict[Place, float] = {(file, line): us for file, line, us in timed.read_us}
    return Observations(
        step_us=timed.step_us,
        data_wait_us=timed.phases["data wait"],
        reads=watched.counts.reads,
        read_steps=watched.counts.steps,
        read_us=read_us,
        outputs=suspects.outputs,
        copies=suspects.copies,
        watched_steps=suspects.steps,
        grown=suspects.grown,
        grown_steps=suspects.grown_steps,
        growing_bytes=watched.allocations.found.growing_bytes,
        staying=suspects.staying,
        joining=suspects.joining,
        item_us=suspects.item_us,
        loops=loaders.loops,
        is_recordable=loaders.is_recordable,
        compiled=compiled,
    )
