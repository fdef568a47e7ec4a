"""What NVIDIA's driver tells of a GPU while it trains; nothing where there is no driver."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fasttrain.measure.profiling.record import Gpu

__all__ = ["GpuWatch", "open_gpu"]

MIN_ENERGY_S = 10.0
"""Over shorter windows the driver's energy counter is too coarse."""


class GpuWatch:
    """Watches one GPU from now on.

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
        self._begin = clock()
        self._energy_mj = self._ask(library.nvmlDeviceGetTotalEnergyConsumption)

    def sample(self) -> None:
        """Takes a sample of power and utilisation."""
        power_mw = self._ask(self._library.nvmlDeviceGetPowerUsage)
        rates = self._ask(self._library.nvmlDeviceGetUtilizationRates)
        if power_mw is not None:
            self._powers_w.append(power_mw / 1e3)
        if rates is not None:
            self._utilisations.append(rates.gpu / 100)

    def result(self, samples: int | None, idle_us: dict[str, float] | None) -> Gpu:
        """What was seen.

        Args:
            samples: rows trained since the start; None: unknown.
            idle_us: of the trace, per step.
        """
        energy_mj = self._ask(self._library.nvmlDeviceGetTotalEnergyConsumption)
        is_long = self._clock() - self._begin >= MIN_ENERGY_S
        joules = (energy_mj - self._energy_mj) / 1e3 if energy_mj is not None and self._energy_mj is not None else None
        return Gpu(
            utilisation=_mean(self._utilisations),
            power_w=_mean(self._powers_w),
            energy_j_per_sample=joules / samples if joules is not None and samples and is_long else None,
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
