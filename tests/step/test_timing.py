"""How long calls take: on the host at once, on CUDA between two events of its stream; several ways timed in turn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttrain.step import timing
from fasttrain.step.timing import CudaClock, HostClock, Trial, Waits, clock_of


def test_the_hosts_clock_runs_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def run() -> str:
        now[0] += 0.25
        return "done"

    assert HostClock().timed(run) == ("done", 0.25)


def test_cudas_clock_waits_for_what_was_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            log.append(f"record on {stream}")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Any) -> float:
            assert end is not self
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    found = clock_of(torch.device("cuda:1")).timed(lambda: log.append("run"))
    assert found == (None, 1.5)
    assert log == ["record on the stream of cuda:1", "run", "record on the stream of cuda:1", "wait"]


def test_each_device_has_its_clock() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    assert isinstance(clock_of(torch.device("cuda:0")), CudaClock)


def test_waits_add_up_and_are_none_before_the_first() -> None:
    waits = Waits()
    assert waits.seconds is None
    waits.add(0.5)
    waits.add(0.25)
    assert waits.seconds == 0.75


def test_rounds_alternate_and_a_slow_start_does_not_mislead() -> None:
    trial, turns = Trial(["first", "second"], steps=2), list[str]()
    while not trial.is_over:
        turns.append(trial.turn)
        is_start = len(turns) <= 4
        trial.add(trial.turn, 9.0 if is_start else {"first": 2.0, "second": 1.0}[trial.turn])
    assert turns[:8] == [*["first"] * 2, *["second"] * 4, *["first"] * 2]
    assert len(turns) == 2 * 2 * (timing.ROUNDS + 1)
    assert trial.step_s() == {"first": 2.0, "second": 1.0}
    assert trial.fastest() == "second"


def test_other_processes_in_most_rounds_of_an_arm_do_not_mislead() -> None:
    trial, number = Trial(["eager", "program"]), 0
    while not trial.is_over:
        number += 1
        is_preempted = trial.turn == "program" and number % 3
        trial.add(trial.turn, 9.0 if is_preempted else {"eager": 2.0, "program": 1.0}[trial.turn])
    assert trial.fastest() == "program"


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ({1: 1.0, 4: 0.97, 16: 0.5}, 16),
        ({1: 1.0, 4: 0.99, 16: 0.985}, 1),
        ({1: 1.0, 4: 0.5, 16: 0.495}, 4),  # as good as the one before, which was found first
        ({1: 1.0}, 1),
    ],
)
def test_an_arm_must_be_clearly_faster_than_those_before_it(seconds: dict[int, float], fastest: int) -> None:
    trial = Trial(seconds)
    while not trial.is_over:
        trial.add(trial.turn, seconds[trial.turn])
    assert trial.fastest() == fastest
