"""One arm in one fresh process: `python -m fasttrain.measure.bench.block TASK RESULT STARTED`.

It imports, makes the job and the arm, checks the losses of the first steps, warms up and times. TASK and RESULT are
JSON files (see `task.py`), STARTED is the time at which the parent started it.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from fasttrain.device import resolve_device
from fasttrain.errors import DataError, EngineError, FasttrainError
from fasttrain.measure.bench.arm import CHECKED_STEPS, Arm
from fasttrain.measure.bench.record import BlockFigures
from fasttrain.measure.bench.sources import find_factory
from fasttrain.measure.bench.task import BlockResult, BlockTask
from fasttrain.measure.environment import core_wait_s
from fasttrain.workloads.job import load_job

__all__ = ["Stopwatch", "check_losses", "main", "run_task", "running_means", "step_seconds"]

PARTS = 20
LEAST_PARTS = 3
"""The timed steps are cut into about 20 parts, at least 3; the median part tells what a step takes."""

MOST_WAITED = 0.05
"""A process that waits for a core for more than this share of its time is flagged."""


def main(arguments: Sequence[str]) -> int:
    """Runs the task; returns the exit code."""
    task_file, result_file, started = arguments
    task = BlockTask.from_dict(json.loads(Path(task_file).read_text(encoding="utf-8")))
    try:
        result = run_task(task, float(started))
    except FasttrainError as error:
        result = BlockResult(refused=str(error))
    Path(result_file).write_text(json.dumps(result.to_dict(), allow_nan=False), encoding="utf-8")
    return 0


def run_task(task: BlockTask, started: float) -> BlockResult:
    """Checks the arm and times it; without reference losses it gives its own.

    Args:
        task: what to run.
        started: time at which this process was started.

    Raises:
        FasttrainError: the arm cannot run here, or its losses leave the reference's.
    """
    torch.set_num_threads(task.threads)
    make_arm = find_factory(task.source)
    import_s = time.time() - started
    device = resolve_device(task.device)
    job = load_job(task.workload, device)
    arm = make_arm(job)
    first_step_s = _first_steps(arm)
    losses = arm.losses()
    about = {"name": job.name, **job.describe()}
    if task.reference is None:
        if losses is None:
            raise EngineError(f"arm {task.source!r} gives no losses: it cannot be the reference")
        means = tuple(running_means(losses)[:CHECKED_STEPS])
        return BlockResult(workload=about, tolerance=job.tolerance, running_losses=means)
    agreement = None if losses is None else check_losses(running_means(losses), task.reference, job.tolerance)
    gc.collect()  # the arm does not pay for what was made before it
    stopwatch = EventWatch() if device.type == "cuda" else HostWatch()
    begin, waited_s = time.perf_counter(), core_wait_s()
    step_s, steps = step_seconds(arm, stopwatch, warmup_s=task.warmup_s, timed_s=task.timed_s)
    has_waited = core_wait_s() - waited_s > MOST_WAITED * (time.perf_counter() - begin)
    figures = BlockFigures(
        block=task.block,
        position=task.position,
        step_s=step_s,
        steps=steps,
        samples_per_step=job.batch_size,
        import_s=import_s,
        compile_s=getattr(arm, "compile_s", None),
        first_step_s=first_step_s,
        peak_bytes=peak_bytes(device),
        flags=("waited",) if has_waited else (),
        engine=getattr(arm, "engine", None),
    )
    return BlockResult(
        workload=about,
        tolerance=job.tolerance,
        description=getattr(arm, "description", f"an arm of {task.source}"),
        agreement=agreement,
        figures=figures,
    )


def _first_steps(arm: Arm) -> float:
    """Runs the steps whose losses are checked; returns the seconds of the first call of `step`."""
    begin = time.perf_counter()
    steps = arm.step() or 1
    arm.sync()
    first_step_s = time.perf_counter() - begin
    while steps < CHECKED_STEPS:
        steps += arm.step() or 1
    return first_step_s


def running_means(losses: Sequence[float]) -> list[float]:
    """The mean of the first loss, of the first two, and so on."""
    return [total / number for number, total in enumerate(accumulate(losses), start=1)]


def check_losses(found: Sequence[float], wanted: Sequence[float], tolerance: float) -> float:
    """The largest relative difference between an arm's running losses and the reference's.

    Args:
        found: as many as `wanted`, or more.
        wanted: of the reference.
        tolerance: what the difference may be.

    Raises:
        DataError: it is beyond the tolerance, or there are too few losses.
    """
    if len(found) < len(wanted):
        raise DataError(f"{len(found)} losses where the reference has {len(wanted)}: losses() gives one for each step")
    differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(found, wanted, strict=False)]
    largest = max(differences)
    if not all(difference <= tolerance for difference in differences):  # so that what is no number is refused too
        at = next(number for number, each in enumerate(differences, start=1) if not each <= tolerance)
        raise DataError(
            f"its losses leave the reference's: by {differences[at - 1]:.2g} relative at step {at}, "
            f"allowed is {tolerance:g}"
        )
    return largest


class Stopwatch(Protocol):
    """Seconds between two moments at which the device has nothing left to do."""

    def start(self) -> None:
        """The first moment."""
        ...

    def stop(self) -> float:
        """The seconds since."""
        ...


class HostWatch:
    """By the host's clock."""

    _begin = 0.0

    def start(self) -> None:
        """See `Stopwatch.start`."""
        self._begin = time.perf_counter()

    def stop(self) -> float:
        """See `Stopwatch.stop`."""
        return time.perf_counter() - self._begin


class EventWatch:
    """By CUDA events. The last one is recorded when the arm has waited for its streams, which may be others."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        """See `Stopwatch.start`."""
        self._begin.record()

    def stop(self) -> float:
        """See `Stopwatch.stop`."""
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3


def step_seconds(
    arm: Arm,
    stopwatch: Stopwatch,
    *,
    warmup_s: float,
    timed_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, int]:
    """Warms an arm up and times it; one call of `step` at least of each.

    Returns:
        The median seconds of a step, over parts that end when the device is done; how many steps were timed.
    """
    _steps_for(arm, warmup_s, clock)
    seconds: list[float] = []
    parts: list[float] = []
    num_steps = 0
    while sum(seconds) < timed_s or len(parts) < LEAST_PARTS:
        stopwatch.start()
        steps = _steps_for(arm, timed_s / PARTS, clock)
        seconds.append(stopwatch.stop())
        parts.append(seconds[-1] / steps)
        num_steps += steps
    return statistics.median(parts), num_steps


def _steps_for(arm: Arm, seconds: float, clock: Callable[[], float]) -> int:
    """Runs steps until so long has passed, and waits for them; returns how many."""
    steps, begin = 0, clock()
    while steps == 0 or clock() - begin < seconds:
        steps += arm.step() or 1
    arm.sync()
    return steps


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory: of this process on the CPU, of torch's allocator on CUDA; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) or None
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, this does not begin at what the parent had
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
