"""How long calls take: on the host at once, on CUDA between two events of its stream."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttrain.step import clock
from fasttrain.step.clock import CudaClock, HostClock, Waits, clock_of


def test_the_hosts_clock_runs_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

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
