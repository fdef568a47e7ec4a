"""Benchmarks' records and profiles with chosen times, for the tests of comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasttrain.comparison import Comparison
from fasttrain.measure.bench.record import ArmRecord, BenchRecord, BlockFigures, Design, write_record
from fasttrain.measure.profiling.file import write_profile
from fasttrain.measure.profiling.record import (
    PHASES,
    Copies,
    Counters,
    Memory,
    Operator,
    Profile,
    Traffic,
)
from fasttrain.measure.verdict.compare import compare
from fasttrain.measure.verdict.stats import Noise

WORKLOAD = {"name": "reviews", "batch_size": 128, "optimizer": "Adam, learning rate 0.001", "precision": "fp32"}
ENVIRONMENT = {
    "cpu": "A CPU",
    "cores": 4,
    "device": "A CPU",
    "python": "3.12.1",
    "torch": "2.13.0",
    "fasttrain": "0.1.0",
    "load_average": 0.5,
    "load_average_after": 0.6,
}
# Of ten blocks: a quiet machine's spread of 1%, in no order.
SPREAD = (0.0, 0.004, -0.006, 0.002, -0.001, 0.007, -0.004, 0.001, 0.005, -0.008)


def arm(
    step_us: float, spread: Sequence[float] = SPREAD, excess: float | Sequence[float] = 0.0, **changes: Any
) -> ArmRecord:
    """An arm whose blocks take `step_us`, each of them longer by its part of `spread`, and by `excess` in all."""
    excesses = [excess] * len(spread) if isinstance(excess, float) else excess
    blocks = tuple(
        BlockFigures(
            block=number,
            position=0,
            step_s=step_us * 1e-6 * (1 + each),
            steps=1000,
            seconds=step_us * 1e-3 * (1 + each) * (1 + more),
            rounds=20,
            samples_per_step=128,
            import_s=2.0,
            compile_s=None,
            first_step_s=0.01,
            peak_bytes=1 << 20,
        )
        for number, (each, more) in enumerate(zip(spread, excesses, strict=True))
    )
    return replace(ArmRecord(description="an arm", agreement=3e-7, tolerance=1e-5, blocks=blocks), **changes)


def record(arms: Mapping[str, ArmRecord], **changes: Any) -> BenchRecord:
    made = BenchRecord(
        workload=WORKLOAD,
        command="python -m fasttrain bench --workload reviews",
        created="2026-01-02T03:04:05+00:00",
        environment=ENVIRONMENT,
        design=Design(blocks=10, extended=False, warmup_s=0.5, timed_s=1.0, slice_s=0.05, threads=1, seed=0),
        arms=dict(arms),
        refused={},
        noise=Noise(floor=0.008, smallest_effect=0.015, pairs=10),
    )
    return replace(made, **changes)


def stored(path: Path, arms: Mapping[str, ArmRecord], **changes: Any) -> Path:
    """Writes a record and returns where."""
    write_record(record(arms, **changes), path)
    return path


def profile(
    operators: Mapping[tuple[str, str], float],
    *,
    name: str = "auto",
    other_us: float = 3.0,
    program: Mapping[str, float] | None = None,
    **counters: Any,
) -> Profile:
    """A profile whose phases are the sums of its operators, by (name, phase), beside `other_us` of the phase other."""
    phases = {each: sum(us for (_, phase), us in operators.items() if phase == each) for each in PHASES}
    phases["other"] += other_us
    counted: dict[str, Any] = {
        "dispatched_operators": 40.0,
        "kernel_launches": None,
        "host_reads": [],
        "copies": Copies(h2d=Traffic(count=0, bytes=0), d2h=Traffic(count=0, bytes=0)),
        "allocations": 12.0,
        "graph_breaks": 0,
        "recompilations": [],
        "programs_loaded": 0,
        "flops": 1e6,
        "flops_not_counted": [],
    }
    rows = [Operator(name=op, phase=phase, calls=1, self_us=us) for (op, phase), us in operators.items()]
    rest = Operator(name="other", phase="", calls=0, self_us=other_us)
    step_us = sum(phases.values())
    return Profile(
        name=name,
        workload=WORKLOAD,
        command=f"python -m fasttrain profile --engine {name}",
        created="2026-01-02T03:04:05+00:00",
        environment=ENVIRONMENT,
        step_us=step_us,
        traced_step_us=1.3 * step_us,
        phases=phases,
        program=dict(program or {}),
        operators=[*rows, rest] if other_us else rows,
        counters=Counters(**{**counted, **counters}),
        memory=Memory(
            peak_bytes=3_000_000,
            by_kind={"parameters": 40_000, "gradients": 40_000, "optimizer": 80_000, "buffers": 0}
            | {"data": 2_000_000, "other": 840_000},
            timeline=[[step, 2_000_000 + 1000 * step] for step in range(5)],
        ),
        gpu=None,
        findings=[],
    )


def stored_profile(path: Path, made: Profile) -> Path:
    """Writes a profile and returns where."""
    write_profile(made, path)
    return path


OPERATORS = {("aten::mm", "forward"): 100.0, ("aten::mm", "backward"): 200.0, ("aten::add_", "optimizer"): 50.0}


def compared(a: Path | str, b: Path | str, **options: Any) -> Comparison:
    return compare(str(a), str(b), command="python -m fasttrain compare A B", **options)
