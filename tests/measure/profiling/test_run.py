"""An arm is watched over as many steps whatever they take, so that equal code has equal counters."""

from __future__ import annotations

import sys
import time
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.errors import EngineError
from fasttrain.measure.bench import arms
from fasttrain.measure.bench.arms import LoopArm, TextbookArm, TunedArm
from fasttrain.measure.nvml import MIN_ENERGY_S
from fasttrain.measure.profiling import profiler, run
from fasttrain.measure.profiling.assemble import Timed
from fasttrain.measure.profiling.record import Counters
from fasttrain.workloads.mlp import mlp_job

CPU = torch.device("cpu")
TIMED = Timed(step_us=100.0, shares={}, read_us=[], gpu=None)
STEPS_IN_EPOCH = 12


class Clock:
    """A step takes `step_s` by it: it is looked at before and after each."""

    def __init__(self, step_s: float) -> None:
        self.now = 0.0
        self._step_s = step_s

    def perf_counter(self) -> float:
        self.now += self._step_s
        return self.now


def counters(make_arm: Any, source: str, step_s: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counters:
    """Of a profile of an arm whose checked steps take so long."""
    monkeypatch.setattr(arms, "time", Clock(step_s))
    job = mlp_job(CPU, STEPS_IN_EPOCH * 128)
    session, _ = run.watch_arm(job, make_arm, source, folder / "trace.json.gz")
    return session.profile(TIMED, name="x", workload={}, command="profile").counters


@pytest.mark.parametrize(
    ("make_arm", "source", "reads"),
    [
        (partial(LoopArm, engine="eager"), "eager", 1 / STEPS_IN_EPOCH),
        (TunedArm, "tuned", 1 / STEPS_IN_EPOCH),
        (TextbookArm, "textbook", 2),
    ],
    ids=["eager", "tuned", "textbook"],
)
def test_counters_do_not_depend_on_how_fast_a_step_is(
    make_arm: Any, source: str, reads: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = (counters(make_arm, source, step_s, tmp_path, monkeypatch) for step_s in (1e-6, 0.05))
    assert fast == slow
    assert sum(read.per_step for read in fast.host_reads) == pytest.approx(reads)


def test_figures_of_two_engines_are_not_joined(tmp_path: Path) -> None:
    """One process was timed, another watched: `auto` may decide otherwise in the second."""
    job = mlp_job(CPU, STEPS_IN_EPOCH * 128)
    session, _ = run.watch_arm(job, partial(LoopArm, engine="eager"), "eager", tmp_path / "trace.json.gz")
    timed = replace(TIMED, shares={"program": 0.8, "other": 0.2})
    with pytest.raises(EngineError, match="timed ran by compiled program, those that were traced operator by operator"):
        session.profile(timed, name="x", workload={}, command="profile")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_failed_process_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a compiler would run beside the next measurement."""
    compiler = tmp_path / "compiler"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 30 &\necho $! >{compiler}\necho too bad >&2\nexit 3\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    given: dict[str, Any] = {
        "source": "auto",
        "workload": "mlp",
        "device": "cpu",
        "threads": 1,
        "name": "x",
        "command": "profile",
    }
    with pytest.raises(EngineError, match=r"auto cannot be profiled \(exit code 3\): too bad"):
        run.run_profile(run.ProfileTask(**given, out=str(tmp_path)))
    assert not is_running(int(compiler.read_text()))


def is_running(process: int, within_s: float = 5.0) -> bool:
    """Whether it still runs; it is given a moment to die of a signal that was sent."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":  # nobody has asked for its exit code yet
            return False
    return True


@pytest.mark.parametrize(
    ("workload", "source", "steps"),
    [
        ("mlp", "auto", STEPS_IN_EPOCH),
        ("mlp", "my_code:make_arm", 6),
        ("mlp", "textbook", 6),
        ("mlp", "tuned", STEPS_IN_EPOCH),
        ("cnn", "auto", 6),
    ],
)
def test_long_steps_are_watched_for_less(workload: str, source: str, steps: int) -> None:
    job = replace(mlp_job(CPU, STEPS_IN_EPOCH * 128), name=workload)
    assert run.watched_steps(job, source) == steps


@pytest.mark.parametrize(("device", "seconds"), [("cpu", run.PASS_S), ("cuda", run.ENERGY_S)])
def test_energy_is_given_the_time_that_it_needs(device: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[Any] = []

    class Ended(Exception):
        pass

    def session(**given: Any) -> None:
        spans.append(given["clean"])
        raise Ended

    monkeypatch.setattr(profiler, "Session", session)
    job: Any = types.SimpleNamespace(device=torch.device(device), batch_size=128)
    with pytest.raises(Ended):
        run.time_arm(job, TextbookArm)
    assert spans[0].seconds == seconds
    assert run.ENERGY_S > MIN_ENERGY_S > run.PASS_S
