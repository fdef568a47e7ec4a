"""The passes of a profile. Each looks at some steps in one way; those that time come before those that slow down.

A process that has traced is 10 to 20% slower afterwards (pytorch#146604), so the order is part of the method.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from fasttrain.measure.host_reads import HostReads, Read, count_host_reads, without_compiling
from fasttrain.measure.nvml import GpuWatch, open_gpu
from fasttrain.measure.places import Place
from fasttrain.measure.profiling.compile_events import CompileEvents
from fasttrain.measure.profiling.growth import GraphWatch, StayWatch
from fasttrain.measure.profiling.operator_counts import FlopCount
from fasttrain.measure.profiling.phases import Phases
from fasttrain.measure.profiling.program_kernels import loaded_programs
from fasttrain.measure.profiling.record import Gpu
from fasttrain.measure.profiling.suspects import CallWatch, CopyWatch, GrowthWatch, Loaders, Seen, TorchCalls
from fasttrain.measure.profiling.tensor_memory import Allocations, AllocationTrace
from fasttrain.measure.profiling.trace_summary import TraceSummary, summarise_trace
from fasttrain.step.compiler import with_marked_kernels
from fasttrain.step.torch_private import compilations
from fasttrain.step.torch_private.marking import record_empty_events

__all__ = [
    "AllocationPass",
    "CleanPass",
    "CountPass",
    "Pass",
    "PhasePass",
    "SuspectPass",
    "TracePass",
    "WarmUpPass",
    "device_type",
]

NUM_WINDOWS = 5


def device_type() -> str:
    """Where this process trains: "cuda" once it has used CUDA, else "cpu"."""
    return "cuda" if torch.cuda.is_initialized() else "cpu"


def wait() -> None:
    """Waits for the device."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Pass(Protocol):
    """Looks at steps, from `start` to `stop`; `step` is called after every call of the loop's body."""

    def start(self) -> None:
        """Begins, between two steps."""
        ...

    def step(self, count: int) -> None:
        """After so many more steps, at least one."""
        ...

    def stop(self) -> None:
        """Ends, between two steps."""
        ...


class WarmUpPass:
    """Lets the steps get going: nothing is looked at."""

    def start(self) -> None:
        """See `Pass.start`."""

    def step(self, count: int) -> None:
        """See `Pass.step`."""

    def stop(self) -> None:
        """See `Pass.stop`."""


class CleanPass:
    """Times steps with nothing else going on.

    Args:
        clock: seconds.

    Attributes:
        step_us: the median of some windows, each of which ends with the device idle.
        steps: that it timed.
    """

    def __init__(self, calls: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps = 0
        self._gpu: GpuWatch | None = None
        self._calls_in_window = max(1, calls // NUM_WINDOWS)
        self._clock = clock
        self._windows_us: list[float] = []
        self._steps = self._calls = 0
        self._begin = 0.0

    @property
    def step_us(self) -> float:
        """Of one step."""
        return statistics.median(self._windows_us)

    def gpu_result(self, samples: int | None) -> Gpu | None:
        """What the driver told of the GPU meanwhile, None on the CPU.

        Args:
            samples: rows that the pass trained; None: unknown.
        """
        return None if self._gpu is None else self._gpu.result(samples, None)

    def start(self) -> None:
        """See `Pass.start`."""
        self._gpu = open_gpu()
        wait()
        self._begin = self._clock()

    def step(self, count: int) -> None:
        """See `Pass.step`."""
        self.steps += count
        self._steps += count
        self._calls += 1
        if self._calls >= self._calls_in_window:
            self._end_window()

    def stop(self) -> None:
        """See `Pass.stop`."""
        if not self._windows_us and self._steps:
            self._end_window()
        if self._gpu is not None:
            wait()
            self._gpu.stop()

    def _end_window(self) -> None:
        wait()
        self._windows_us.append((self._clock() - self._begin) * 1e6 / self._steps)
        if self._gpu is not None:
            self._gpu.sample()
        self._steps = self._calls = 0
        self._begin = self._clock()


class PhasePass:
    """Times the phases with a stopwatch.

    Attributes:
        steps: that it timed.
    """

    def __init__(self, phases: Phases) -> None:
        self.steps = 0
        self._phases = phases

    @property
    def shares(self) -> dict[str, float]:
        """Of the time, by phase; adds up to 1."""
        total = sum(self._phases.seconds.values())
        return {phase: seconds / total for phase, seconds in self._phases.seconds.items()}

    @property
    def read_us(self) -> dict[Place, float]:
        """Of a step, in methods that wait for the device, by place."""
        return {place: seconds * 1e6 / self.steps for place, seconds in self._phases.read_s.items()}

    def start(self) -> None:
        """See `Pass.start`."""
        self._phases.seconds.clear()
        self._phases.read_s.clear()
        self._phases.start(is_marking=False)

    def step(self, count: int) -> None:
        """See `Pass.step`."""
        self.steps += count
        self._phases.step()

    def stop(self) -> None:
        """See `Pass.stop`."""
        self._phases.stop()


class TracePass:
    """Traces every operator, and every kernel of the compiled programs that are there when it starts.

    For these it waits until they are compiled once more, where the program cache does not have them so. It does not
    wait for the device between steps: that would be idle then, for no fault of the loop's.

    Args:
        phases: marks the phases in the trace.
        path: where the trace goes, .json.gz.

    Attributes:
        steps: that it traced.
    """

    def __init__(self, phases: Phases, path: Path) -> None:
        self.steps = 0
        self._phases = phases
        self._path = path
        self._entered = ExitStack()

    def start(self) -> None:
        """See `Pass.start`.

        Raises:
            EngineError: a program cannot be compiled so that its kernels are seen.
        """
        self._kernels = self._entered.enter_context(with_marked_kernels(loaded_programs()))
        profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device_type() == "cuda"))
        wait()
        profiler.start()
        self._entered.callback(self._end, profiler)
        record_empty_events()
        self._phases.start(is_marking=True)

    def step(self, count: int) -> None:
        """See `Pass.step`."""
        self.steps += count
        self._phases.step()

    def stop(self) -> None:
        """See `Pass.stop`."""
        self._entered.close()

    def _end(self, profiler: profile) -> None:
        self._phases.stop()
        wait()
        profiler.stop()
        profiler.export_chrome_trace(str(self._path))

    def summary(self) -> TraceSummary:
        """What the trace says."""
        return summarise_trace(self._path, self._kernels)


class AllocationPass:
    """Follows the memory."""

    def start(self) -> None:
        """See `Pass.start`."""
        self._trace = AllocationTrace(device_type())
        self._trace.start()

    def step(self, count: int) -> None:
        """See `Pass.step`."""
        self._trace.step(count)

    def stop(self) -> None:
        """See `Pass.stop`."""
        self._trace.stop()

    @cached_property
    def found(self) -> Allocations:
        """What was seen, once the pass is done; at least two steps must have been."""
        return self._trace.result()


class CountPass:
    """Counts host reads and FLOPs.

    Args:
        begin_s: `time.time` from which on compilations count.

    Attributes:
        steps: that it counted in.
        flops: what was counted.
        compiled: what `torch.compile` did until this pass, which makes it compile anew.
    """

    compiled: CompileEvents

    def __init__(self, begin_s: float) -> None:
        self._begin_s = begin_s
        self.steps = 0
        self.flops = FlopCount()
        self._reads: HostReads = count_host_reads()

    @property
    def reads(self) -> list[Read]:
        """Over all of its steps."""
        return self._reads.reads

    def start(self) -> None:
        """See `Pass.start`."""
        self.compiled = CompileEvents.of(compilations(self._begin_s))
        self._reads.__enter__()
        self.flops.__enter__()

    def step(self, count: int) -> None:
        """See `Pass.step`."""
        self.steps += count

    def stop(self) -> None:
        """See `Pass.stop`."""
        self.flops.__exit__()
        self._reads.__exit__()


@dataclass(frozen=True, kw_only=True)
class _Watches:
    calls: CallWatch
    copies: CopyWatch
    growth: GrowthWatch
    graphs: GraphWatch
    staying: StayWatch | None


class SuspectPass:
    """Looks for what clean loops do not do. In its first half it looks which containers grow, in its second where.

    Args:
        loaders: what was loaded from so far.
        allocations: an earlier pass; where its memory grows, this one looks which line makes what stays.
        calls: how often `step` will be called, at least 4 times.

    Attributes:
        steps: that it watched.
        grown: entries that each line has added to containers of tensors, over `grown_steps` steps.
        staying: bytes of tensors that each line has made and that stay; see `StayWatch`.
        joining: lines that join every step's graph to that of the step before; see `GraphWatch`.
    """

    def __init__(self, loaders: Loaders, allocations: AllocationPass, calls: int) -> None:
        self.steps = 0
        self.grown: dict[Place, int] = {}
        self.grown_steps = 0
        self.staying: dict[Place, int] = {}
        self.joining: list[Place] = []
        self._loaders = loaders
        self._allocations = allocations
        self._half = calls // 2
        self._calls = 0

    def start(self) -> None:
        """See `Pass.start`."""
        self._watches = _Watches(
            calls=CallWatch(set(self._loaders.items)),
            copies=CopyWatch(),
            growth=GrowthWatch(),
            graphs=GraphWatch(),
            staying=None if self._allocations.found.growing_bytes is None else StayWatch(),
        )
        self._watches.growth.look()
        self._uncompiled = without_compiling()
        self._uncompiled.__enter__()
        self._torch_calls = TorchCalls(self._watches.copies, self._watches.graphs, self._watches.staying)
        self._torch_calls.__enter__()
        self._watches.calls.start()

    def step(self, count: int) -> None:
        """See `Pass.step`."""
        self.steps += count
        self._calls += 1
        self._watches.copies.step()
        self._watches.graphs.step()
        if self._watches.staying is not None:
            self._watches.staying.step()
        if self._calls > self._half:
            self.grown_steps += count
        if self._calls == self._half:
            self._watches.growth.follow(self._half)

    def stop(self) -> None:
        """See `Pass.stop`."""
        self.grown = self._watches.growth.lines()
        self._watches.calls.stop()
        self._torch_calls.__exit__(None, None, None)
        self._uncompiled.__exit__(None, None, None)
        self.joining = self._watches.graphs.joining()
        if self._watches.staying is not None:
            self.staying = self._watches.staying.staying()

    @property
    def outputs(self) -> dict[Place, Seen]:
        """What writes, by place."""
        return self._watches.calls.outputs

    @property
    def copies(self) -> dict[Place, Seen]:
        """Needless copies, by place."""
        return self._watches.copies.copies

    @property
    def item_us(self) -> dict[Place, float]:
        """Of a step, in the `__getitem__` of datasets, by where that begins."""
        return {
            (code.co_filename, code.co_firstlineno): seen.seconds * 1e6 / self.steps
            for code, seen in self._watches.calls.items.items()
        }
