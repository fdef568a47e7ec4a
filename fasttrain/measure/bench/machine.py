"""What disturbs a measurement: other work, heat, quotas. Asked before and after each block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fasttrain.measure.environment import runnable, swapped_in, throttle_count, usable_cores

__all__ = ["Machine", "gpu_throttled_ns"]

LOOKS = 5
LOOK_S = 0.02
"""So many looks at what else runs, so far apart: one alone often meets a process that is about to sleep."""


class Machine:
    """Watches the machine around one block after the other.

    Args:
        device: whose throttling is looked at, beside the CPU's.
        sleep: waits so many seconds.
    """

    def __init__(self, device: torch.device, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._device = device
        self._sleep = sleep
        self._throttled = self._swapped = 0

    def before(self) -> int | None:
        """To be called before a block; returns the threads of others that run or wait for a core (None: unknown)."""
        self._throttled, self._swapped = self._count(), swapped_in()
        looks: list[int] = []
        for _ in range(LOOKS):
            found = runnable()
            if found is None:
                return None
            looks.append(found)
            self._sleep(LOOK_S)
        return int(statistics.median(looks))

    def flags(self, wanted: int | None) -> tuple[str, ...]:
        """To be called after a block, for each of its arms: what was wrong.

        Args:
            wanted: threads that wanted to run: what `before` returned, and the arm's own; None: unknown.

        Returns:
            Some of "load" (more wanted to run than there are cores), "swapped" (memory came back from the disk) and
            "throttled" (CPU or GPU were slowed down).
        """
        found = {
            "load": wanted is not None and wanted > usable_cores(),
            "swapped": swapped_in() > self._swapped,
            "throttled": self._count() > self._throttled,
        }
        return tuple(name for name, is_so in found.items() if is_so)

    def _count(self) -> int:
        """Grows whenever something is slowed down."""
        return throttle_count() + (gpu_throttled_ns(self._device) if self._device.type == "cuda" else 0)


def gpu_throttled_ns(device: torch.device) -> int:
    """How long a GPU was slowed down by its heat so far; 0: or the driver does not tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        return int(pynvml.nvmlDeviceGetViolationStatus(handle, pynvml.NVML_PERF_POLICY_THERMAL).violationTime)
    except pynvml.NVMLError:
        return 0
