"""What NVIDIA's driver tells of a GPU while it trains; nothing where there is no driver."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fasttrain.measure.profiling.record import Gpu

__all__ = ["MIN_ENERGY_S", "GpuWatch", "open_gpu"]

MIN_ENERGY_S = 10.0
"""Over shorter windows the driver's energy counter is too coarse."""


class GpuWatch:
    """Watches one GPU from now on, until `stop`.

    Args:
        library: pynvml, initialised.
        handle: of the device.
        clock: seconds.
    """

    def __init__(self, library: Any, handle: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._library = library
        self._handle = handle
        self._clock = clock
        self._powers_w: list[float] = []
        self._utilisations: list[float] = []
        self._joules: float | None = None
        self._begin = clock()
        self._begin_mj = self._ask(library.nvmlDeviceGetTotalEnergyConsumption)

    def sample(self) -> None:
        """Takes a sample of power and utilisation."""
        power_mw = self._ask(self._library.nvmlDeviceGetPowerUsage)
        rates = self._ask(self._library.nvmlDeviceGetUtilizationRates)
        if power_mw is not None:
            self._powers_w.append(power_mw / 1e3)
        if rates is not None:
            self._utilisations.append(rates.gpu / 100)

    def stop(self) -> None:
        """Ends the window that energy is told of; it is not told of a short one."""
        end_mj = self._ask(self._library.nvmlDeviceGetTotalEnergyConsumption)
        is_long = self._clock() - self._begin >= MIN_ENERGY_S
        if is_long and end_mj is not None and self._begin_mj is not None:
            self._joules = (end_mj - self._begin_mj) / 1e3

    def result(self, samples: int | None, idle_us: dict[str, float] | None) -> Gpu:
        """What was seen.

        Args:
            samples: rows trained until `stop`; None: unknown.
            idle_us: of the trace, per step.
        """
        return Gpu(
            utilisation=_mean(self._utilisations),
            power_w=_mean(self._powers_w),
            energy_j_per_sample=self._joules / samples if self._joules is not None and samples else None,
            idle_us=idle_us,
        )

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """An answer of the driver; None where this GPU has none."""
        try:
            return question(self._handle)
        except self._library.NVMLError:
            return None


def open_gpu() -> GpuWatch | None:
    """Begins to watch the GPU that this process trains on; None where it uses none, or there is no driver to ask."""
    if not torch.cuda.is_initialized():
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        # Not by index: CUDA's order and the driver's differ.
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        return GpuWatch(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
    except pynvml.NVMLError:
        return None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
