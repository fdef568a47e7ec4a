"""A trace summed up: operators by phase, counts, and what a GPU waits for. In arrays, so that 500 MB are no burden."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.measure.profiling.origins import split_program
from fasttrain.measure.profiling.phases import MARK, STEP, gap_phase
from fasttrain.measure.profiling.program_kernels import kernel_namer, without_graph
from fasttrain.measure.profiling.record import PHASES, PROGRAM, Operator
from fasttrain.measure.profiling.trace_file import trace_events
from fasttrain.step.compiler import KernelCall
from fasttrain.step.torch_private.marking import EMPTY_EVENT

__all__ = ["TraceSummary", "summarise_trace"]

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
SYNCHRONISERS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
LAUNCH_GAP_US = 5.0
"""Shorter gaps between two kernels are what launching costs by itself."""

_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """What a trace says; times in us, all over the whole trace.

    Attributes:
        wall_us: from its first mark of a step to its last, and on until the device has done what was queued by then;
            without marks, from the first event to the last.
        phases: wall time of the marked thread; without marks, all is "other".
        operators: over the whole trace, by time. Of a phase, they add up to it: "python" (or what its marks name) has
            the rest.
        program: wall time of the phase `program` by where it comes from; adds up to it.
        num_operators: that the dispatcher ran.
        launches: of kernels and graphs; None where no event is of CUDA.
        copies: (count, bytes) by "h2d" and "d2h".
        idle_us: the device's idle time by cause; None where no event is of CUDA.
    """

    wall_us: float
    phases: dict[str, float]
    operators: list[Operator]
    program: dict[str, float]
    num_operators: int
    launches: int | None
    copies: dict[str, tuple[int, int]]
    idle_us: dict[str, float] | None


def summarise_trace(path: Path, programs: Sequence[Sequence[KernelCall]] = ()) -> TraceSummary:
    """Reads a Chrome trace and sums it up; takes some 40 bytes of memory an event.

    Args:
        path: of the trace.
        programs: the kernels of each compiled program that may have run, in the order in which a run calls them.

    Raises:
        DataError: it is no trace.
    """
    events = _Events(programs)
    for event in trace_events(path):
        events.add(event)
    return events.summary()


class _Events:
    """The events of a trace, in columns."""

    def __init__(self, programs: Sequence[Sequence[KernelCall]]) -> None:
        self._programs = programs
        self._names: dict[str, int] = {}
        self._kernels: dict[int, str] = {}
        self._empty = array("d")
        self._host = {kind: array(code) for kind, code in (("ts", "d"), ("dur", "d"), ("name", "i"), ("thread", "q"))}
        self._device = {kind: array("d") for kind in ("ts", "dur")}
        self._marks: list[tuple[float, float, str, int]] = []
        self._waits: list[tuple[float, float]] = []
        self._counts: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def add(self, event: dict[str, Any]) -> None:
        """Takes an event; what is no complete one, or has no figures where they must be, is left out."""
        begin, duration, name, thread = event.get("ts"), event.get("dur"), event.get("name"), event.get("tid")
        if event.get("ph") != "X" or not isinstance(begin, int | float) or not isinstance(duration, int | float):
            return
        if not isinstance(name, str) or not math.isfinite(begin) or not 0 <= duration < math.inf:
            return
        category = event.get("cat")
        if category == "user_annotation" and name.startswith(MARK) and isinstance(thread, int):
            self._marks.append((begin, duration, name.removeprefix(MARK), thread))
        elif name == EMPTY_EVENT:
            self._empty.append(begin)
        elif category in _HOST and isinstance(thread, int):
            self._add_host(category, name, begin, duration, thread)
        elif category in _DEVICE:
            self._device["ts"].append(begin)
            self._device["dur"].append(duration)
            self._add_copy(name, event.get("args"))

    def _add_host(self, category: str, name: str, begin: float, duration: float, thread: int) -> None:
        kernel = without_graph(name) if category == "cpu_op" else None
        name = name[:200] if kernel is None else name
        number = self._names.setdefault(name, len(self._names))
        for column, value in zip(self._host.values(), (begin, duration, number, thread), strict=True):
            column.append(value)
        if kernel is not None:
            self._kernels[number] = kernel
        elif category == "cpu_op":
            self._counts["operators"] += 1
        elif name.startswith(LAUNCHES):
            self._counts["launches"] += 1
        elif name in SYNCHRONISERS:
            self._waits.append((begin, begin + duration))

    def _add_copy(self, name: str, details: Any) -> None:
        way = "h2d" if "HtoD" in name else "d2h" if "DtoH" in name else None
        if way is not None:
            self._counts[way] += 1
            size = details.get("bytes") if isinstance(details, dict) else 0
            self._bytes[way] += size if isinstance(size, int) else 0

    def summary(self) -> TraceSummary:
        host = {kind: np.asarray(column) for kind, column in self._host.items()}
        timeline = _Timeline(self._marks) if self._marks else _Timeline.unmarked(host["ts"], host["ts"] + host["dur"])
        phases = timeline.phases()
        has_device = len(self._device["ts"]) > 0
        operators = self._operators(self._with_kernels(host, timeline), timeline)
        return TraceSummary(
            wall_us=max(timeline.end, self._device_end) - timeline.begin,
            phases=phases,
            operators=operators,
            program=split_program({row.name: row.self_us for row in operators if row.phase == PROGRAM}),
            num_operators=self._counts["operators"],
            launches=self._counts["launches"] if has_device else None,
            copies={way: (self._counts[way], self._bytes[way]) for way in ("h2d", "d2h")},
            idle_us=self._idle(timeline) if has_device else None,
        )

    @property
    def _device_end(self) -> float:
        """When the last kernel or copy ended; before all time where there was none."""
        ends = np.asarray(self._device["ts"]) + np.asarray(self._device["dur"])
        return float(ends.max(initial=-math.inf))

    @property
    def _event_us(self) -> float:
        """What an event costs: it is paid outside of the event itself, by what holds it."""
        return float(np.median(np.diff(np.sort(self._empty)))) if len(self._empty) > 1 else 0.0

    def _with_kernels(self, host: dict[str, Any], timeline: _Timeline) -> dict[str, Any]:
        """The host's events with a program's kernels as wholes, by what they are; `cost` is what recording has cost.

        What ran within a kernel is left out, and what it has cost to record that is taken off the kernel's time.
        """
        host = {**host, "cost": np.zeros(len(host["ts"]))}
        kernels = np.flatnonzero(np.isin(host["name"], list(self._kernels)))
        if not len(kernels):
            return host
        kernels = kernels[np.argsort(host["ts"][kernels], kind="stable")]
        namer, names = kernel_namer(self._programs), host["name"].copy()
        spans = timeline.spans_at(host["ts"][kernels])
        for run in np.split(kernels, np.flatnonzero(np.diff(spans)) + 1):
            called = namer(tuple(self._kernels[number] for number in host["name"][run].tolist()))
            names[run] = [self._names.setdefault(name, len(self._names)) for name in called]
        holder = _holders(host, kernels)
        held = self._event_us * np.bincount(holder[holder >= 0], minlength=len(host["ts"]))[kernels]
        durations = host["dur"].copy()
        durations[kernels] = np.maximum(durations[kernels] - held, 0.0)
        host["cost"][kernels] = self._event_us + host["dur"][kernels] - durations[kernels]
        return {kind: column[holder < 0] for kind, column in {**host, "name": names, "dur": durations}.items()}

    def _operators(self, host: dict[str, Any], timeline: _Timeline) -> list[Operator]:
        """By (name, phase): calls and own time, and for each span the rest of it, which no operator covers."""
        self_us = _self_times(host["ts"], host["dur"], host["thread"])
        spans = timeline.spans_at(host["ts"])
        inside = spans >= 0
        spans, names, self_us, cost = (column[inside] for column in (spans, host["name"], self_us, host["cost"]))
        phase_of_span = np.array([PHASES.index(span.phase) for span in timeline.spans])
        keys = phase_of_span[spans] * len(self._names) + names
        calls, times = np.bincount(keys), np.bincount(keys, weights=self_us)
        known = list(self._names)
        found: defaultdict[tuple[str, str], float] = defaultdict(float)
        called = Counter[tuple[str, str]]()
        for key in np.flatnonzero(calls).tolist():
            place = known[key % len(known)], PHASES[key // len(known)]
            called[place], found[place] = int(calls[key]), float(times[key])
        covered = np.bincount(spans, weights=self_us + cost, minlength=len(timeline.spans)).tolist()
        for span, taken in zip(timeline.spans, covered, strict=True):
            found[span.inner, span.phase] += max(0.0, span.us - taken)
        return _fitted(found, called, timeline.phases())

    def _idle(self, timeline: _Timeline) -> dict[str, float]:
        """The device's idle time by what the host did when it began."""
        order = np.argsort(np.asarray(self._device["ts"]), kind="stable")
        begins = np.asarray(self._device["ts"])[order]
        ends = np.maximum.accumulate(begins + np.asarray(self._device["dur"])[order])
        idle = {"host": 0.0, "launch gaps": 0.0, "data wait": 0.0, "synchronisation": 0.0}
        waits = sorted(self._waits)
        for begin, end in zip(ends[:-1].tolist(), begins[1:].tolist(), strict=True):
            gap = end - begin
            if gap > 0:
                idle[_cause(gap, begin, timeline, waits)] += gap
        return idle


def _fitted(
    times: Mapping[tuple[str, str], float], calls: Counter[tuple[str, str]], phases: dict[str, float]
) -> list[Operator]:
    """Scales a phase's operators to add up to it: those of another thread (backward, on CUDA) may take longer."""
    totals: defaultdict[str, float] = defaultdict(float)
    for (_, phase), time in times.items():
        totals[phase] += time
    rows = [
        Operator(name=name, phase=phase, calls=calls[name, phase], self_us=time * phases[phase] / totals[phase])
        for (name, phase), time in times.items()
        if totals[phase] > 0
    ]
    return sorted(rows, key=lambda row: (-row.self_us, row.name, row.phase))


def _cause(gap: float, begin: float, timeline: _Timeline, waits: list[tuple[float, float]]) -> str:
    """After the last step all is queued, and the host does nothing but wait for the end of the trace."""
    if gap < LAUNCH_GAP_US or begin >= timeline.end:
        return "launch gaps"
    at = bisect_right(waits, (begin, float("inf"))) - 1
    if at >= 0 and waits[at][1] >= begin:
        return "synchronisation"
    span = int(timeline.spans_at(np.array([begin]))[0])
    return "data wait" if span >= 0 and timeline.spans[span].phase == "data wait" else "host"


@dataclass(frozen=True)
class _Span:
    begin: float
    us: float
    phase: str
    inner: str


@dataclass
class _Timeline:
    """The marked thread's time, without holes: each span is of one phase."""

    marks: Iterable[tuple[float, float, str, int]]
    spans: list[_Span] = field(default_factory=list[_Span], init=False)
    begin: float = field(default=0.0, init=False)
    end: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Fills the gaps between the marks; ranges lie within the first and the last mark of a step."""
        ordered = sorted(self.marks, key=lambda mark: (mark[0], -mark[1]))
        steps = [begin for begin, _, name, _ in ordered if name == STEP]
        self.begin, self.end = (steps[0], steps[-1]) if steps else (ordered[0][0], ordered[-1][0] + ordered[-1][1])
        at, before = self.begin, STEP
        for begin, duration, name, _ in ordered:
            phase, _, inner = name.partition(": ")
            if phase != STEP and phase not in PHASES:
                continue  # somebody else's mark
            if not self.begin <= begin <= self.end or begin < at:
                continue
            if begin > at:
                self.spans.append(_Span(at, begin - at, gap_phase(before, phase), "python"))
            if phase != STEP:
                self.spans.append(_Span(begin, duration, phase, inner or "python"))
                at = begin + duration
            else:
                at = begin
            before = phase

    @classmethod
    def unmarked(cls, begins: Any, ends: Any) -> _Timeline:
        """All of a trace in which nothing is marked."""
        begin, end = (float(begins.min()), float(ends.max())) if len(begins) else (0.0, 0.0)
        timeline = cls([(begin, 0.0, STEP, 0), (end, 0.0, STEP, 0)])
        timeline.spans = [_Span(begin, end - begin, "other", "python")]
        return timeline

    def phases(self) -> dict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for span in self.spans:
            found[span.phase] += span.us
        return dict(found)

    def spans_at(self, times: Any) -> Any:
        """For each time the number of its span, -1 outside of all."""
        begins = np.array([span.begin for span in self.spans])
        found = np.searchsorted(begins, times, side="right") - 1
        return np.where((times < self.begin) | (times >= self.end), -1, found)


def _holders(host: dict[str, Any], outer: Any) -> Any:
    """For each event in which of those numbered `outer`, in the order of time and not nested, it ran; -1: in none."""
    last = np.searchsorted(host["ts"][outer], host["ts"], side="right") - 1
    of = outer[np.maximum(last, 0)]
    is_within = (last >= 0) & (host["ts"] < host["ts"][of] + host["dur"][of]) & (host["thread"] == host["thread"][of])
    is_within[outer] = False
    return np.where(is_within, of, -1)


def _self_times(begins: Any, durations: Any, threads: Any) -> Any:
    """Each event's time without the events in it: of a thread, events are nested or apart."""
    order = np.lexsort((-durations, begins, threads))
    self_us = durations.astype(float).copy()
    stack: list[tuple[int, float, int]] = []
    rows = zip(order, begins[order], durations[order], threads[order], strict=True)
    for event, begin, duration, thread in rows:
        while stack and (stack[-1][2] != thread or stack[-1][1] <= begin):
            stack.pop()
        if stack:
            self_us[stack[-1][0]] -= min(duration, stack[-1][1] - begin)
        stack.append((event, begin + duration, thread))
    return np.maximum(self_us, 0.0)
