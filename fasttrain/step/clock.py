"""How long a call takes on a device, and how long steps have waited in all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

__all__ = ["Clock", "CudaClock", "HostClock", "Waits", "clock_of"]

T = TypeVar("T")


class Clock(Protocol):
    """Times calls, in seconds. In tests something else stands in for it."""

    def timed(self, run: Callable[[], T]) -> tuple[T, float]:
        """What `run` returns, and how long it took."""
        ...


class HostClock:
    """For what is over when the call returns."""

    def timed(self, run: Callable[[], T]) -> tuple[T, float]:
        """See `Clock.timed`."""
        begin = time.perf_counter()
        result = run()
        return result, time.perf_counter() - begin


class CudaClock:
    """For what a call has queued on a CUDA device: from when the device could begin until it is done. Waits for it.

    Args:
        device: whose current stream is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def timed(self, run: Callable[[], T]) -> tuple[T, float]:
        """See `Clock.timed`."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        result = run()
        end.record(stream)
        end.synchronize()  # HOST READ: in a measurement or a trial, some hundred times an engine
        return result, begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock for what runs on a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Waits:
    """What steps have waited for: traces, compilers, captures.

    Attributes:
        seconds: in all; None where there was no wait yet.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None

    def add(self, seconds: float) -> None:
        """Notes one more."""
        self.seconds = (self.seconds or 0.0) + seconds
