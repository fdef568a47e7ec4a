"""The phases of a step, by stopwatch: methods of torch and fasttrain are wrapped while a profile is taken.

The code of a step holds nothing of this, so it costs nothing where nobody profiles.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from fasttrain.data.resident import ResidentEpoch, Span
from fasttrain.data.stream import Prefetcher
from fasttrain.measure.places import Place, user_place
from fasttrain.metrics import RunningMetrics
from fasttrain.step import eager
from fasttrain.step.capture import TIMED
from fasttrain.step.cudagraph import CapturedStep, CapturedWalk
from fasttrain.step.program import StepProgram
from fasttrain.step.trace import TracedStep
from fasttrain.step.walk import TracedWalk, WalkingProgram

__all__ = ["MARK", "STEP", "Phases", "gap_phase"]

STEP = "step"
"""Stands for the boundary between two steps, beside the phases, in `gap_phase`."""

MARK = "fasttrain: "
"""Ranges of a trace are named MARK, the phase, ": " and what runs where no operator does; MARK and STEP: a boundary."""

Clock = Callable[[], float]

_READS = (
    *("item", "tolist", "numpy", "cpu", "nonzero"),
    *("__bool__", "__int__", "__float__", "__repr__", "__format__"),
)
_RANGES = {
    "Optimizer.step#": "optimizer",
    "Optimizer.zero_grad#": "optimizer",
    "enumerate(DataLoader)#": "data wait",
}
"""Ranges that torch itself reports to profilers, by what their names begin with."""


def gap_phase(before: str, after: str) -> str:
    """The phase of the Python between two ranges: that of its neighbours where they agree, else by these rules.

    What leads to the backward pass, or from the forward pass to the optimizer (`zero_grad` after the loss), belongs
    to the forward pass, for a loss that is a function is no module; what leads from a batch to the program to the
    program (choosing it), what lies between backward and optimizer to the optimizer (clipping), what follows the
    optimizer, the program or a read to the metrics.
    """
    if before == after != STEP:
        return before
    if before == "metrics" or (after == "metrics" and before != STEP):
        return "metrics"
    if after == "backward" or (before, after) == ("forward", "optimizer"):
        return "forward"
    if after == "program" and before in ("data wait", STEP):
        return "program"
    if (before, after) == ("backward", "optimizer"):
        return "optimizer"
    if before in ("optimizer", "program") and after in ("data wait", STEP):
        return "metrics"
    return "other"


class Phases:
    """Sees a thread's time in phases, between `start` and `stop`. A context: methods are wrapped in it.

    Args:
        clock: seconds.

    Attributes:
        seconds: by phase; all of the time between `start` and `stop`.
        read_s: seconds in methods that wait for the device, by place.
        programs_loaded: since the context was entered.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.read_s: defaultdict[Place, float] = defaultdict(float)
        self.programs_loaded = 0
        self._clock = clock
        self._thread = threading.get_ident()
        self._is_on = False
        self._is_marking = False
        self._depth = 0
        self._before = STEP
        self._last = 0.0
        self._always = ExitStack()
        self._now = ExitStack()

    def __enter__(self) -> Phases:
        """Wraps `Prefetcher`: its iterators live longer than a pass."""
        make = Prefetcher.__iter__
        self._always.enter_context(mock.patch.object(Prefetcher, "__iter__", self._timed_source(make)))
        for kind in (StepProgram, WalkingProgram):
            self._always.enter_context(mock.patch.object(kind, "__init__", self._counted(kind.__init__)))
        return self

    def __exit__(self, *error: object) -> None:
        """Unwraps all."""
        self._now.close()
        self._always.close()

    def start(self, *, is_marking: bool) -> None:
        """Begins to watch.

        Args:
            is_marking: report the phases as ranges to torch's profiler too.
        """
        for owner, name, phase, inner in _METHODS:
            self._now.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), phase, inner)))
        for name in _READS:
            self._now.enter_context(
                mock.patch.object(torch.Tensor, name, self._timed_read(getattr(torch.Tensor, name)))
            )
        if torch.cuda.is_initialized():
            self._now.enter_context(mock.patch.object(torch.Tensor, "to", self._timed_move(torch.Tensor.to)))
            self._now.enter_context(mock.patch.object(torch.Tensor, "cuda", self._timed_move(torch.Tensor.cuda)))
        self._now.enter_context(
            mock.patch.object(torch.autograd.profiler, "record_function", self._timed_range(_record_function))
        )
        self._is_on, self._is_marking = True, is_marking
        self._depth, self._before = 0, STEP
        self._mark_step()
        self._last = self._clock()

    def step(self) -> None:
        """Between two steps."""
        now = self._clock()
        self.seconds[gap_phase(self._before, STEP)] += now - self._last
        self._before = STEP
        self._mark_step()
        self._last = self._clock()

    def stop(self) -> None:
        """Ends the watch, after a `step`."""
        self._is_on = False
        self._now.close()

    def _mark_step(self) -> None:
        if self._is_marking:
            with _record_function(MARK + STEP):
                pass

    @contextmanager
    def range(self, phase: str, inner: str = "python") -> Generator[None]:
        """A block of a phase; within another one it belongs to that.

        Args:
            phase: one of the profile's phases.
            inner: what runs in it where no operator does, for the trace.
        """
        if not self._is_on or threading.get_ident() != self._thread:
            yield
            return
        self._depth += 1
        if self._depth > 1:
            try:
                yield
            finally:
                self._depth -= 1
            return
        begin = self._clock()
        self.seconds[gap_phase(self._before, phase)] += begin - self._last
        try:
            if self._is_marking:
                with _record_function(f"{MARK}{phase}: {inner}"):
                    yield
            else:
                yield
        finally:
            self._depth -= 1
            end = self._clock()
            self.seconds[phase] += end - begin
            self._before, self._last = phase, end

    def _timed(self, function: Callable[..., Any], phase: str, inner: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:  # the innermost wrapper is on every module's way
                return function(*args, **kwargs)
            with self.range(phase, inner):
                return function(*args, **kwargs)

        vars(timed)[TIMED] = function  # compiled steps check that modules are called as ever
        return timed

    def _counted(self, function: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any, **kwargs: Any) -> None:
            self.programs_loaded += 1
            function(*args, **kwargs)

        return counted

    def _timed_read(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            place = user_place()
            with self.range("metrics"):
                begin = self._clock()
                try:
                    return function(*args, **kwargs)
                finally:
                    self.read_s[place] += self._clock() - begin

        return timed

    def _timed_move(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(arg, torch.device | str | int) for arg in (*args, kwargs.get("device"))):
                return function(tensor, *args, **kwargs)
            with self.range("host to device"):
                return function(tensor, *args, **kwargs)

        return timed

    def _timed_range(self, record_function: type[Any]) -> Callable[..., Any]:
        @contextmanager
        def timed(name: str, *args: Any) -> Generator[Any]:
            phase = next((phase for begin, phase in _RANGES.items() if name.startswith(begin)), None)
            with self.range(phase) if phase is not None else nullcontext(), record_function(name, *args) as inner:
                yield inner

        return timed

    def _timed_source(self, make: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        def iterate(source: Any) -> Iterator[Any]:
            return self._timed_batches(make(source))

        return iterate

    def _timed_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A generator, so that what closes an iterator of batches closes this one and the one in it."""
        try:
            while True:
                if not self._is_on:
                    batch = next(batches, _END)
                else:
                    with self.range("data wait"):
                        batch = next(batches, _END)
                if batch is _END:
                    return
                yield batch
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()


_END = object()
_record_function = torch.autograd.profiler.record_function

_METHODS: tuple[tuple[Any, str, str, str], ...] = (
    (torch.nn.Module, "__call__", "forward", "python"),
    (torch.Tensor, "backward", "backward", "python"),
    (torch.autograd, "backward", "backward", "python"),
    (torch.autograd, "grad", "backward", "python"),
    (eager, "run_forward", "forward", "python"),
    (eager, "run_backward", "backward", "python"),
    (eager.EagerEngine, "apply_if_due", "optimizer", "python"),
    (RunningMetrics, "update", "metrics", "python"),
    (ResidentEpoch, "__next__", "data wait", "python"),
    (ResidentEpoch, "take", "data wait", "python"),
    (Span, "batches", "data wait", "python"),
    (TracedStep, "inputs", "program", "guards and inputs"),
    (TracedWalk, "inputs", "program", "guards and inputs"),
    (StepProgram, "run", "program", "generated code"),
    (WalkingProgram, "run", "program", "generated code"),
    (CapturedStep, "run", "program", "copies and launch"),
    (CapturedWalk, "run", "program", "copies and launch"),
)
"""What is wrapped while the watch is on: (owner, name, phase, what runs in it where no operator does)."""
