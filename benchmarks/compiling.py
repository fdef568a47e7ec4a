"""CPU seconds to a program, by part: what a compiling child and its C++ compilers take for one step of a workload.

In each repeat, with each workload first and an empty cache: a child compiles its program (cold), makes what serves
further programs (idle), and compiles that of the other workload (stayed); then a fresh child compiles the latter once
more, with what the first has kept (warm).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.compiling_child import PARTS
from benchmarks.places import REPOSITORY, RESULTS, log
from benchmarks.records import record_node
from fasttrain import FastLoop
from fasttrain.errors import DataError, FasttrainError
from fasttrain.measure.bench.record import write_record
from fasttrain.measure.bench.summary import command, conditions_of, table, text
from fasttrain.measure.environment import environment, load_average, now
from fasttrain.step.build import GraphJob
from fasttrain.step.trace import trace_step
from fasttrain.workloads.job import load_job

KIND = "compiling"

SCHEMA_VERSION = 1
"""Raise it when a field changes its meaning, appears or goes; files of another version are refused."""

WORKLOADS = ("reviews", "mlp")

COLD, IDLE, WARM, STAYED = "cold", "idle", "warm", "stayed"
MANNERS = (COLD, IDLE, WARM, STAYED)


SHOWN_S = 0.005
"""What took less is left out of the table."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One program made in one manner, one entry a repeat.

    Attributes:
        workload, manner: what and how.
        parts: CPU seconds by part, user and system, of the child and of what it started.
        wall_s: from the job's start to its package.
    """

    workload: str
    manner: str
    parts: dict[str, tuple[float, ...]]
    wall_s: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks that each part has a value a repeat.

        Raises:
            DataError: it has not.
        """
        lengths = {len(values) for values in (*self.parts.values(), self.wall_s)}
        if set(self.parts) != set(PARTS) or len(lengths) != 1 or lengths == {0}:
            raise DataError(f"{self.workload}, {self.manner}: needs all parts, as many values each: measure again")

    @property
    def totals(self) -> list[float]:
        """CPU seconds in all, one a repeat."""
        return [sum(values) for values in zip(*self.parts.values(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class CompilingRecord:
    """All cases.

    Attributes:
        command: what measures it again.
        created: when, ISO 8601 in UTC.
        environment: machine, versions, commit, load.
        cases: all of them.
    """

    command: str
    created: str
    environment: dict[str, Any]
    cases: tuple[Case, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}


def read_record(path: Path) -> CompilingRecord:
    """Reads a record.

    Raises:
        DataError: the file is not one; it is named.
    """
    with record_node(path, KIND, SCHEMA_VERSION) as node:
        return CompilingRecord(
            command=node.text("command"),
            created=node.text("created"),
            environment=node.plain("environment"),
            cases=tuple(
                Case(
                    workload=each.text("workload"),
                    manner=each.text("manner"),
                    parts={name: each.node("parts").numbers(name) for name in each.node("parts").names()},
                    wall_s=each.numbers("wall_s"),
                )
                for each in node.nodes("cases")
            ),
        )


def section_of(path: Path) -> str:
    """The section of benchmarks/README.md that a record's file gives; raises `DataError`."""
    return markdown(read_record(path))


def markdown(record: CompilingRecord) -> str:
    """The section of benchmarks/README.md."""
    heads = [f"{case.workload}, {case.manner}" for case in record.cases]
    rows = [[part, *(_cell(case.parts[part]) for case in record.cases)] for part in PARTS]
    rows.append(["in all", *(_ranged(case.totals) for case in record.cases)])
    rows.append(["seconds of waiting", *(_ranged(case.wall_s) for case in record.cases)])
    counts = sorted({len(case.wall_s) for case in record.cases})
    return (
        "## CPU seconds to a program, by part, cpu\n\n"
        "User and system seconds of a compiling child and of what it starts, for the program of one step; "
        "cold: with an empty cache; idle: what it makes for further programs after that, where it is let; warm: a "
        "fresh child, after another program was compiled; stayed: the child that has compiled another program. "
        f"Medians over {' or '.join(map(str, counts))} repeats, with the range; "
        "probes are what the child asks the C++ compiler about itself.\n\n"
        f"{table(['', *map(text, heads)], rows)}\n"
        f"{text(conditions_of(record.environment, record.created))}. Measured by {command(record.command)}.\n"
    )


def _cell(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return "" if middle < SHOWN_S else f"{middle:.2f}"


def _ranged(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiling", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of each program and manner (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{KIND}-cpu.json", help="the record")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be 1 or more")
    try:
        started_at = environment(torch.device("cpu"))
        cases = measure(options.repeats)
        record = CompilingRecord(
            command=shlex.join(["python", "-m", "benchmarks.compiling", *arguments]),
            created=now(),
            environment={**started_at, "load_average_after": load_average()},
            cases=cases,
        )
        write_record(record, options.out)
    except FasttrainError as error:
        log(f"benchmarks.compiling: {error}")
        return 2
    log(markdown(record))
    return 0


def measure(repeats: int) -> tuple[Case, ...]:
    """Compiles every program in every manner, so many times."""
    torch.set_num_threads(1)
    jobs = {name: pickle.dumps(job_of(name)) for name in WORKLOADS}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for repeat in range(1, repeats + 1):
        for first, second in (WORKLOADS, WORKLOADS[::-1]):
            with tempfile.TemporaryDirectory(prefix="fasttrain-compiling-") as scratch:
                kept = Path(scratch, "kept")
                cold, idle, stayed, _ = compiled([jobs[first], jobs[second]], kept, Path(scratch))
                warm, _ = compiled([jobs[second]], kept, Path(scratch))
            seen_as = {(first, COLD): cold, (first, IDLE): idle, (second, STAYED): stayed, (second, WARM): warm}
            for key, seen in seen_as.items():
                found.setdefault(key, []).append(seen)
                log(f"{repeat}/{repeats}: {', '.join(key)}: {sum(seen['parts'].values()):.1f} s")
    return tuple(
        Case(
            workload=workload,
            manner=manner,
            parts={part: tuple(seen["parts"][part] for seen in found[workload, manner]) for part in PARTS},
            wall_s=tuple(seen["wall_s"] for seen in found[workload, manner]),
        )
        for workload in WORKLOADS
        for manner in MANNERS
    )


def job_of(workload: str) -> GraphJob:
    """The compiling child's job for one step of a workload."""
    job = load_job(workload, torch.device("cpu"))
    model = job.model()
    loop = FastLoop(model, job.optimizer(model), job.forward, engine="eager")
    return GraphJob.of(trace_step(loop.step.spec, next(iter(job.batches()))).parts[0])


def compiled(jobs: Sequence[bytes], kept: Path, scratch: Path) -> list[dict[str, Any]]:
    """What a child that compiles some jobs, one after the other, has seen of each, and of the time after each.

    Raises:
        FasttrainError: it failed.
    """
    (kept / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
    folders: list[Path] = []
    for job in jobs:
        folders.append(Path(tempfile.mkdtemp(dir=scratch)))
        (folders[-1] / "job").write_bytes(job)
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(kept),
        "TMPDIR": str(kept / "tmp"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]),
    }
    arguments = [sys.executable, "-m", "benchmarks.compiling_child", str(kept), *map(str, folders)]
    # It ends when its input does.
    with subprocess.Popen(
        arguments, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as ended:
        assert ended.stdout is not None
        told = ended.stdout.read()
        if ended.wait():
            raise FasttrainError(f"the compiling child exited with {ended.returncode}")
    return [json.loads(line) for line in told.splitlines()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
