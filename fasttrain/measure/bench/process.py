"""One arm in one fresh process: `python -m fasttrain.measure.bench.process DESCRIPTOR STARTED`.

It imports, makes the job and the arm, checks the losses of the first steps and warms up. Then it runs a slice of steps
whenever the parent asks for one, and sleeps between: the arms of a block take turns. DESCRIPTOR is that of a connection
to the parent, STARTED the time at which the parent started it. See `messages.py` for what goes over the connection.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from fasttrain.device import resolve_device
from fasttrain.errors import EngineError, FasttrainError
from fasttrain.measure.bench.arm import CHECKED_STEPS, Arm
from fasttrain.measure.bench.losses import check_losses, running_means
from fasttrain.measure.bench.messages import ArmState, ArmTask, Slice, Started
from fasttrain.measure.bench.sources import find_factory
from fasttrain.measure.environment import core_wait_s
from fasttrain.workloads.job import load_job

__all__ = ["ReadyArm", "Stopwatch", "main", "move_to", "start"]

LEAD_IN = 0.1
"""Before a slice, so much of it is run untimed: the caches are full of what others had in theirs. Calls that take
longer than a slice need none."""


def main(arguments: Sequence[str]) -> int:
    """Serves the parent until it hangs up; returns the exit code."""
    descriptor, started = arguments
    with Connection(int(descriptor)) as parent:

        def tell(message: Started | Slice | ArmState) -> None:
            parent.send_bytes(json.dumps(asdict(message), allow_nan=False).encode())

        requests = _requests(parent)
        task = ArmTask.from_dict(next(requests))
        try:
            about, arm = start(task, float(started))
        except FasttrainError as error:
            tell(Started(refused=str(error)))
            return 0
        tell(about)
        for request in requests:
            if request is None:
                tell(arm.state())
                continue
            seconds, core = request
            if task.threads == 1:  # several threads are on several cores, and the others would stay where they are
                move_to(core)
            tell(arm.slice(seconds))
    return 0


def _requests(parent: Connection) -> Iterator[Any]:
    """The task, then seconds and core of each slice (None: the arm's state), until the parent hangs up."""
    while True:
        try:
            request = parent.recv_bytes()
        except EOFError:
            return
        yield json.loads(request)


def move_to(core: int) -> None:
    """Has this thread go on on one of the cores that it may use, by number, round and round; it may leave it again.

    It is not bound to it: threads that the arm starts in its turn would be, too.
    """
    if hasattr(os, "sched_setaffinity"):  # it is there on Linux alone
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {sorted(cores)[core % len(cores)]})
        os.sched_setaffinity(0, cores)


def start(task: ArmTask, started: float) -> tuple[Started, ReadyArm]:
    """Makes the arm, checks it and warms it up; without reference losses it gives its own.

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
    ready = ReadyArm(arm, EventWatch() if device.type == "cuda" else HostWatch(), device)
    first_step_s = _first_steps(arm)
    losses = arm.losses()
    means: list[float] = []
    agreement = None
    if task.reference is not None:
        agreement = None if losses is None else check_losses(running_means(losses), task.reference, job.tolerance)
        gc.collect()  # the arm does not pay for what was made before it
        ready.warm_up(task.warmup_s)
    elif losses is None:
        raise EngineError(f"arm {task.source!r} gives no losses: it cannot be the reference")
    else:
        means = running_means(losses)[:CHECKED_STEPS]
    about = Started(
        workload={"name": job.name, **job.describe()},
        tolerance=job.tolerance,
        running_losses=tuple(means),
        description=getattr(arm, "description", f"an arm of {task.source}"),
        agreement=agreement,
        samples_per_step=job.batch_size,
        import_s=import_s,
        first_step_s=first_step_s,
    )
    return about, ready


def _first_steps(arm: Arm) -> float:
    """Runs the steps whose losses are checked; returns the seconds of the first call of `step`."""
    begin = time.perf_counter()
    steps = arm.step() or 1
    arm.sync()
    first_step_s = time.perf_counter() - begin
    while steps < CHECKED_STEPS:
        steps += arm.step() or 1
    return first_step_s


class Stopwatch(Protocol):
    """Seconds between two moments at which the device has nothing left to do."""

    def start(self) -> None:
        """The first moment."""
        ...

    def stop(self) -> float:
        """The seconds since."""
        ...


class ReadyArm:
    """An arm that runs steps when it is asked to.

    Args:
        arm: whose losses are right.
        stopwatch: times its steps.
        device: where it trains.
        clock: says when a slice has taken long enough.
    """

    def __init__(
        self, arm: Arm, stopwatch: Stopwatch, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._arm = arm
        self._stopwatch = stopwatch
        self._device = device
        self._clock = clock
        self._call_s = 0.0
        self._ended = self._times()

    def warm_up(self, seconds: float) -> None:
        """Runs steps that nobody times, one call of `step` at least."""
        begin, calls = self._clock(), 1
        self._run(calls)
        while self._clock() - begin < seconds:
            calls = min(2 * calls, math.ceil(seconds / 4 / self._call_s))
            self._run(calls)
        self._ended = self._times()

    def slice(self, seconds: float) -> Slice:
        """Runs steps for about so long, one call of `step` at least, and waits for the device."""
        others_s, awake_s = (now - then for now, then in zip(self._times(), self._ended, strict=True))
        # By what calls took last: a clock would see how soon they return, not how soon the device has done them.
        calls = max(1, round(seconds / self._call_s)) if self._call_s else 1
        if calls > 1:
            self._run(math.ceil(LEAD_IN * calls))
        waited_s = core_wait_s()
        self._stopwatch.start()
        steps = self._run(calls)
        taken_s = self._stopwatch.stop()
        waited_s = core_wait_s() - waited_s
        self._ended = self._times()
        return Slice(seconds=taken_s, steps=steps, waited_s=waited_s, others_s=others_s, awake_s=awake_s)

    def state(self) -> ArmState:
        """What is known by now."""
        return ArmState(
            compile_s=getattr(self._arm, "compile_s", None),
            peak_bytes=peak_bytes(self._device),
            engine=getattr(self._arm, "engine", None),
        )

    def _run(self, calls: int) -> int:
        """Runs so many calls of `step` and waits for the device; returns the steps."""
        begin = self._clock()
        steps = sum(self._arm.step() or 1 for _ in range(calls))
        self._arm.sync()
        self._call_s = (self._clock() - begin) / calls
        return steps

    def _times(self) -> tuple[float, float]:
        """By now: seconds, and CPU seconds of all threads of this process."""
        return self._clock(), time.process_time()


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
