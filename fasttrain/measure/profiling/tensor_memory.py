"""What holds memory: the tensors that Python knows of, by kind, and a pass that follows every allocation."""

from __future__ import annotations

import gc
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from fasttrain.measure.profiling.growth import inner_calls
from fasttrain.measure.profiling.phases import MARK, STEP
from fasttrain.measure.profiling.record import Memory, MemoryPoint
from fasttrain.measure.profiling.trace_file import trace_events

__all__ = ["AllocationTrace", "Allocations", "live_bytes"]

MAX_POINTS = 100

_DEVICE_TYPES = {"cpu": 0, "cuda": 1}


def live_bytes(device_type: str) -> dict[str, int]:
    """Memory of the tensors that Python holds now, by kind; each storage once.

    Whose tensors they are is learnt from the modules and optimizers that the garbage collector knows.
    """
    objects = gc.get_objects()
    modules: list[nn.Module] = [each for each in objects if issubclass(type(each), nn.Module)]
    optimizers: list[Any] = [each for each in objects if issubclass(type(each), torch.optim.Optimizer)]
    tensors: list[Tensor] = [each for each in objects if issubclass(type(each), Tensor)]
    parameters = [each for each in tensors if isinstance(each, nn.Parameter)]
    kinds: dict[str, Iterable[Any]] = {
        "parameters": parameters,
        "gradients": [each.grad for each in parameters if each.is_leaf],
        "optimizer": [value for each in optimizers for state in each.state.values() for value in state.values()],
        "buffers": [buffer for each in modules for buffer in each.__dict__.get("_buffers", {}).values()],
        "data": tensors,
    }
    seen: set[int] = set()
    return {kind: _storage_bytes(held, device_type, seen) for kind, held in kinds.items()}


def _storage_bytes(tensors: Iterable[Any], device_type: str, seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != device_type:
            continue  # subclasses (fake tensors and the like) have no memory of their own
        if tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _num_live(device_type: str) -> int:
    """How many storages the tensors have that Python holds now."""
    seen: set[int] = set()
    _storage_bytes((each for each in gc.get_objects() if issubclass(type(each), Tensor)), device_type, seen)
    return len(seen)


class _Change(NamedTuple):
    """An allocation, or (of a negative size) a release."""

    time: float
    num_bytes: int
    address: int


@dataclass(frozen=True, kw_only=True)
class Allocations:
    """What an `AllocationTrace` has seen.

    Attributes:
        memory: what was in use.
        per_step: allocations of a step.
        growing_bytes: that a step leaves behind; None unless it grows: every call, but at the edges of the trace, has
            allocated what is still there at its end, and so many more tensors are there than were at its begin.
    """

    memory: Memory
    per_step: float
    growing_bytes: float | None


class AllocationTrace:
    """Follows every allocation of tensor memory, from `start` to `stop`."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device_type == "cuda")
        self._profiler = profile(activities=activities, profile_memory=True)
        self._steps = [0]
        self._live: dict[str, int] = {}
        self._num_more = 0

    def start(self) -> None:
        """Begins."""
        gc.collect()
        self._num_more = -_num_live(self._device_type)
        self._profiler.start()
        self.step(0)
        self._steps = [0]

    def step(self, count: int) -> None:
        """After so many steps."""
        self._steps.append(self._steps[-1] + count)
        with record_function(MARK + STEP):
            pass

    def stop(self) -> None:
        """Ends, and looks at what is in use."""
        gc.collect()  # before the end: garbage that waits for it does not stay
        self._profiler.stop()
        self._live = live_bytes(self._device_type)
        self._num_more += _num_live(self._device_type)

    def result(self) -> Allocations:
        """What was seen: of at least two calls."""
        with tempfile.TemporaryDirectory(prefix="fasttrain-") as folder:
            path = Path(folder) / "memory.json"
            self._profiler.export_chrome_trace(str(path))
            changes, marks = self._read(path)
        return Allocations(
            memory=self._memory(self._live, changes, marks),
            per_step=self._allocations(changes, marks),
            growing_bytes=self._growing(changes, marks),
        )

    def _read(self, path: Path) -> tuple[list[_Change], list[float]]:
        """Each allocation and release, and the times of the begin and of the steps' ends, in order."""
        changes: list[_Change] = []
        marks: list[float] = []
        for event in trace_events(path):
            if event.get("name") == MARK + STEP and event.get("ph") == "X":
                marks.append(event["ts"])
            elif event.get("name") == "[memory]":
                details = event["args"]
                if details["Device Type"] == _DEVICE_TYPES[self._device_type]:
                    changes.append(_Change(event["ts"], details["Bytes"], details["Addr"]))
        return sorted(changes), sorted(marks)

    def _memory(self, live: dict[str, int], changes: list[_Change], marks: list[float]) -> Memory:
        """Levels, counted back from what is live at the end.

        What was there before the pass is let go unseen: the first call shows it, and is left out.
        """
        times = np.array([change.time for change in changes])
        levels = np.concatenate([[0], np.cumsum([change.num_bytes for change in changes])])
        after = np.searchsorted(times, marks, side="right")
        at_end = sum(live.values())
        levels += at_end - levels[after[-1]]
        peak = max(at_end, int(levels[after[1] : after[-1] + 1].max()))
        timeline = list(_thinned(zip(self._steps[1:], (int(level) for level in levels[after][1:]), strict=True)))
        return Memory(peak_bytes=peak, by_kind={**live, "other": peak - at_end}, timeline=timeline)

    def _allocations(self, changes: list[_Change], marks: list[float]) -> float:
        count = sum(change.num_bytes > 0 and change.time >= marks[0] for change in changes)
        return count / self._steps[-1]

    def _growing(self, changes: list[_Change], marks: list[float]) -> float | None:
        """See `Allocations.growing_bytes`.

        What a ring of tensors takes up stays too, but so many others go: that these go is not seen on the CPU, where
        they were made before the trace, hence the count of tensors.
        """
        alive: dict[int, _Change] = {}
        for change in changes:
            if change.num_bytes > 0:
                alive[change.address] = change
            else:
                alive.pop(change.address, None)
        left = [0] * (len(marks) + 1)
        for change in alive.values():
            left[bisect_right(marks, change.time)] += change.num_bytes
        inner = [call + 1 for call in inner_calls(len(marks) - 1)]  # before the first mark it has not begun
        if not all(left[call] for call in inner) or self._num_more < len(inner):
            return None
        return sum(left[call] for call in inner) / (self._steps[inner[-1]] - self._steps[inner[0] - 1])


def _thinned(points: Iterable[tuple[int, int]]) -> Iterator[MemoryPoint]:
    """At most so many points, the last one kept; a level below nothing is none."""
    kept = [(step, max(0, level)) for step, level in points]
    stride = -(-len(kept) // MAX_POINTS)
    return reversed(kept[::-1][::stride])
