"""What holds memory: the tensors that Python knows of, by kind, and a pass that follows every allocation."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from fasttrain.measure.profiling.phases import MARK, STEP
from fasttrain.measure.profiling.record import Memory, MemoryPoint
from fasttrain.measure.profiling.trace_file import trace_events

__all__ = ["AllocationTrace", "live_bytes"]

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


class AllocationTrace:
    """Follows every allocation of tensor memory, from `start` to `stop`."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device_type == "cuda")
        self._profiler = profile(activities=activities, profile_memory=True)
        self._steps = [0]
        self._live: dict[str, int] = {}

    def start(self) -> None:
        """Begins."""
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
        self._profiler.stop()
        gc.collect()
        self._live = live_bytes(self._device_type)

    def result(self) -> tuple[Memory, float]:
        """What was in use, and the allocations of a step; at least two calls must have been seen."""
        with tempfile.TemporaryDirectory(prefix="fasttrain-") as folder:
            path = Path(folder) / "memory.json"
            self._profiler.export_chrome_trace(str(path))
            changes, marks = self._read(path)
        return self._memory(self._live, changes, marks), self._allocations(changes, marks)

    def _read(self, path: Path) -> tuple[list[tuple[float, int]], list[float]]:
        """(time, bytes) of each allocation and release, and the times of the steps' ends, in order."""
        changes: list[tuple[float, int]] = []
        marks: list[float] = []
        for event in trace_events(path):
            if event.get("name") == MARK + STEP and event.get("ph") == "X":
                marks.append(event["ts"])
            elif event.get("name") == "[memory]":
                details = event["args"]
                if details["Device Type"] == _DEVICE_TYPES[self._device_type]:
                    changes.append((event["ts"], details["Bytes"]))
        return sorted(changes), sorted(marks)

    def _memory(self, live: dict[str, int], changes: list[tuple[float, int]], marks: list[float]) -> Memory:
        """Levels, counted back from what is live at the end.

        What was there before the pass is let go unseen: the first call shows it, and is left out.
        """
        times = np.array([time for time, _ in changes])
        levels = np.concatenate([[0], np.cumsum([size for _, size in changes])])
        after = np.searchsorted(times, marks, side="right")
        at_end = sum(live.values())
        levels += at_end - levels[after[-1]]
        peak = max(at_end, int(levels[after[1] : after[-1] + 1].max()))
        timeline = list(_thinned(zip(self._steps[1:], (int(level) for level in levels[after][1:]), strict=True)))
        return Memory(peak_bytes=peak, by_kind={**live, "other": peak - at_end}, timeline=timeline)

    def _allocations(self, changes: list[tuple[float, int]], marks: list[float]) -> float:
        count = sum(size > 0 and time >= marks[0] for time, size in changes)
        return count / self._steps[-1]


def _thinned(points: Iterable[tuple[int, int]]) -> Iterator[MemoryPoint]:
    """At most so many points, the last one kept; a level below nothing is none."""
    kept = [(step, max(0, level)) for step, level in points]
    stride = -(-len(kept) // MAX_POINTS)
    return reversed(kept[::-1][::stride])
