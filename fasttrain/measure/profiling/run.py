"""Profiling an arm in fresh processes: one that times and traces nothing, then one that watches, which is slower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from fasttrain.errors import EngineError, FasttrainError
from fasttrain.measure.bench.arms import CORE_ARMS, CheckedSteps
from fasttrain.measure.bench.runner import THREAD_VARIABLES, end
from fasttrain.measure.nvml import MIN_ENERGY_S
from fasttrain.measure.profiling.file import make_folder, profile_path, read_profile
from fasttrain.measure.profiling.record import Profile

if TYPE_CHECKING:
    from fasttrain.measure.bench.arm import Arm, ArmFactory
    from fasttrain.measure.profiling.assemble import Timed
    from fasttrain.measure.profiling.profiler import Session
    from fasttrain.workloads.job import Job

__all__ = ["ProfileTask", "run_profile"]

TIMEOUT_S = 900.0

WARM_UP_CALLS, WARM_UP_S = 25, 1.0
"""Before anything is timed: an arm runs its first 20 steps one by one, and settles on an engine within them."""

CALLS, PASS_S = 6, 0.3
"""Of each pass that times."""

WARM_UP_PARTS, PARTS = 5, 6
WATCHED_STEPS, MOST_WATCHED_STEPS = 6, 400
"""While it is watched, an arm runs in parts of so many steps, whatever they take: what a part does once (reading what
an epoch reads) is then the same share of its steps every time, so that equal code has equal counters. Single steps
would not do: each would read."""

WATCHED_WHOLE = {"reviews", "mlp"}
WATCHED_LONG = CORE_ARMS.keys() - {"textbook"}
"""Workloads and arms of short steps: a whole epoch of theirs is a part. Of others, its trace would be huge."""

ENERGY_S = MIN_ENERGY_S + 0.5
"""On CUDA, the clean pass is long enough for the driver's energy counter."""


@dataclass(frozen=True, kw_only=True)
class ProfileTask:
    """What is to be profiled.

    Attributes:
        source: of the arm, as `find_factory` takes it.
        workload: the name of the job.
        device: "cpu", "cuda" or "cuda:N".
        threads: torch's.
        name: of the profile.
        out: folder of profiles.
        command: that the profile says made it.
    """

    source: str
    workload: str
    device: str
    threads: int
    name: str
    out: str
    command: str

    @property
    def path(self) -> Path:
        """Of the profile's file."""
        return profile_path(Path(self.out), self.workload, self.device.partition(":")[0], self.name)


def run_profile(task: ProfileTask) -> Profile:
    """Profiles, and returns what the profile's file then holds.

    Raises:
        DataError: the profile's folder cannot be made.
        EngineError: the arm cannot run, or ran otherwise while it was watched than while it was timed; its last words
            say so.
    """
    path = task.path
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(prefix="fasttrain-profile-") as scratch:
        task_file, timed_file, output = (Path(scratch, name) for name in ("task.json", "timed.json", "output"))
        task_file.write_text(json.dumps(asdict(task)), encoding="utf-8")
        for kind in ("time", "watch"):
            _run_child([kind, str(task_file), str(timed_file)], task, output)
    return read_profile(path)


def _run_child(arguments: list[str], task: ProfileTask, output: Path) -> None:
    with output.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "fasttrain.measure.profiling.run", *arguments],
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(task.threads))},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            process_group=0,
        )
        try:
            code = child.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise EngineError(f"the profiled process was ended after {TIMEOUT_S:g} s") from None
        finally:
            end(child)  # a compiler that it has started outlives it, and would run beside the next measurement
    if code != 0:
        said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise EngineError(
            f"{task.source} cannot be profiled (exit code {code}): {said[-1][:300] if said else 'no word'}"
        )


def main(kind: str, task_file: Path, timed_file: Path) -> int:
    """A fresh process: "time" leaves what it timed, "watch" takes that up and leaves the profile."""
    import torch

    from fasttrain.measure.bench.sources import find_factory
    from fasttrain.measure.profiling.assemble import Timed
    from fasttrain.measure.profiling.file import write_profile
    from fasttrain.workloads.job import load_job

    task = ProfileTask(**json.loads(task_file.read_text(encoding="utf-8")))
    torch.set_num_threads(task.threads)
    job = load_job(task.workload, torch.device(task.device))
    make_arm = find_factory(task.source)
    if kind == "time":
        timed_file.write_text(json.dumps(asdict(time_arm(job, make_arm))), encoding="utf-8")
        return 0
    timed = Timed.from_dict(json.loads(timed_file.read_text(encoding="utf-8")))
    session, arm = watch_arm(job, make_arm, task.source, task.path.with_suffix(".trace.json.gz"))
    workload = {"name": job.name, **job.describe(), "arm": task.source, "engine": getattr(arm, "engine", None)}
    write_profile(session.profile(timed, name=task.name, workload=workload, command=task.command), task.path)
    return 0


def time_arm(job: Job, make_arm: ArmFactory) -> Timed:
    """Runs an arm through the passes that time."""
    from fasttrain.measure.profiling.profiler import Session, Span

    span = Span(calls=CALLS, seconds=PASS_S)
    session = Session(
        trace=None,
        warm_up=Span(calls=WARM_UP_CALLS, seconds=WARM_UP_S),
        span=span,
        clean=Span(calls=CALLS, seconds=ENERGY_S) if job.device.type == "cuda" else span,
    )
    with session:
        arm = make_arm(job)
        while not session.schedule.is_done:
            session.schedule.step(arm.step() or 1)
    return session.timed(job.batch_size)


def watch_arm(job: Job, make_arm: ArmFactory, source: str, trace: Path) -> tuple[Session, Arm]:
    """Runs an arm through the passes that watch; how many steps that takes does not depend on how fast they are.

    Args:
        job: what it trains.
        make_arm: makes it.
        source: of the arm, as `find_factory` takes it.
        trace: where the raw trace goes.
    """
    from fasttrain.measure.profiling.profiler import Session, Span

    steps = watched_steps(job, source)
    session = Session(
        trace=trace,
        warm_up=Span(calls=WARM_UP_PARTS),
        span=Span(calls=PARTS),
        is_timing=False,
        short=Span(calls=1),
    )
    with session, mock.patch.object(CheckedSteps, "steps_in", return_value=steps):
        arm = make_arm(job)
        while not session.schedule.is_done:
            session.schedule.step(run_steps(arm, steps))
    return session, arm


def watched_steps(job: Job, source: str) -> int:
    """Steps of a part; many where a step is short. What waits in each step, as others' loops do, is not short."""
    if job.name not in WATCHED_WHOLE or source not in WATCHED_LONG:
        return WATCHED_STEPS
    return min(MOST_WATCHED_STEPS, len(job.order(0)) // job.batch_size)


def run_steps(arm: Arm, num_steps: int) -> int:
    """Runs so many steps, or a few more where a call trains many; returns how many."""
    done = 0
    while done < num_steps:
        done += arm.step() or 1
    return done


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
    except FasttrainError as problem:
        sys.exit(f"{problem}")
