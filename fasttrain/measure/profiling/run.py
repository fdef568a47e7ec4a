"""Profiling an arm in fresh processes: one that times and traces nothing, then one that watches, which is slower."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from fasttrain.errors import EngineError, FasttrainError
from fasttrain.measure.bench.runner import THREAD_VARIABLES
from fasttrain.measure.profiling.file import profile_path, read_profile
from fasttrain.measure.profiling.record import Profile

__all__ = ["ProfileTask", "run_profile"]

TIMEOUT_S = 900.0

WARM_UP_CALLS, WARM_UP_S = 25, 1.0
"""An arm runs its first 20 steps one by one, and then settles on an engine."""

CALLS, PASS_S = 6, 0.3
"""Of each pass; one call is of many steps, and enough to trace and to count."""

CALL_S, CALL_STEPS = 0.15, 6
"""While it is watched, an arm's calls take so long, and those of slow steps are of so many: less than when they are
timed, for a trace of half a second is huge, but no single steps, each of which would read what an epoch reads once."""


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
        EngineError: the arm cannot run; its last words say why.
    """
    path = task.path
    path.parent.mkdir(parents=True, exist_ok=True)
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
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with what it has started, such as a compiler
                child.wait()
    if code != 0:
        said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise EngineError(
            f"{task.source} cannot be profiled (exit code {code}): {said[-1][:300] if said else 'no word'}"
        )


def main(kind: str, task_file: Path, timed_file: Path) -> int:
    """A fresh process: "time" leaves what it timed, "watch" takes that up and leaves the profile."""
    import torch

    from fasttrain.measure.bench import arms
    from fasttrain.measure.bench.sources import find_factory
    from fasttrain.measure.profiling.assemble import Timed
    from fasttrain.measure.profiling.file import write_profile
    from fasttrain.measure.profiling.profiler import Session, Span
    from fasttrain.workloads.job import load_job

    task = ProfileTask(**json.loads(task_file.read_text(encoding="utf-8")))
    torch.set_num_threads(task.threads)
    job = load_job(task.workload, torch.device(task.device))
    if kind == "time":
        timed, call_s = None, arms.PASS_S
    else:
        timed = Timed.from_dict(json.loads(timed_file.read_text(encoding="utf-8")))
        call_s = max(CALL_S, CALL_STEPS * timed.step_us / 1e6)
    session = Session(
        trace=None if timed is None else task.path.with_suffix(".trace.json.gz"),
        warm_up=Span(calls=WARM_UP_CALLS, seconds=WARM_UP_S),
        span=Span(calls=CALLS, seconds=PASS_S),
        is_timing=timed is None,
        short=Span(calls=1),
    )
    with session, mock.patch.object(arms, "PASS_S", call_s):
        arm = find_factory(task.source)(job)
        while not session.schedule.is_done:
            session.schedule.step(arm.step() or 1)
    if timed is None:
        timed_file.write_text(json.dumps(asdict(session.timed(job.batch_size))), encoding="utf-8")
        return 0
    workload = {"name": job.name, **job.describe(), "arm": task.source, "engine": getattr(arm, "engine", None)}
    write_profile(session.profile(timed, name=task.name, workload=workload, command=task.command), task.path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
    except FasttrainError as problem:
        sys.exit(f"{problem}")
