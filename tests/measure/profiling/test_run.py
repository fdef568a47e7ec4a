"""An arm is watched over as many steps whatever they take, so that equal code has equal counters."""

from __future__ import annotations

import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize(
    ("workload", "source", "steps"),
    [
        ("mlp", "auto", STEPS_IN_EPOCH),
        ("mlp", "my_code:make_arm", 6),
        ("mlp", "textbook", 6),
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
