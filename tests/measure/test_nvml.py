"""A GPU's driver is asked, and nothing breaks where it does not answer or is not there."""

from types import SimpleNamespace

import pytest
import torch

from fasttrain.measure.nvml import GpuWatch, open_gpu


class NVMLError(Exception):
    pass


class Driver:
    """Stands in for pynvml: 300 W, half busy, and an energy counter in mJ."""

    NVMLError = NVMLError

    def __init__(self, *, is_dumb: bool = False) -> None:
        self.is_dumb = is_dumb
        self.energy_mj = 1_000_000

    def answer(self, value: object) -> object:
        if self.is_dumb:
            raise NVMLError
        return value

    def nvmlDeviceGetPowerUsage(self, handle: object) -> object:
        return self.answer(300_000)

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> object:
        return self.answer(SimpleNamespace(gpu=50))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> object:
        return self.answer(self.energy_mj)


def watch(driver: Driver, seconds: float) -> GpuWatch:
    times = iter([0.0, seconds])
    found = GpuWatch(driver, object(), lambda: next(times))
    found.sample()
    driver.energy_mj += 3_600_000
    found.stop()
    driver.energy_mj += 9_000_000  # what is used later is of other steps
    return found


def test_energy_is_told_of_long_windows_only() -> None:
    gpu = watch(Driver(), 12.0).result(1000, {"host": 1.0})
    assert (gpu.power_w, gpu.utilisation, gpu.energy_j_per_sample) == (300.0, 0.5, 3.6)
    assert gpu.idle_us == {"host": 1.0}
    assert watch(Driver(), 9.9).result(1000, None).energy_j_per_sample is None
    assert watch(Driver(), 12.0).result(None, None).energy_j_per_sample is None


def test_what_a_driver_does_not_tell_is_unknown() -> None:
    gpu = watch(Driver(is_dumb=True), 12.0).result(1000, None)
    assert (gpu.power_w, gpu.utilisation, gpu.energy_j_per_sample, gpu.idle_us) == (None, None, None, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_nothing_to_watch() -> None:
    assert open_gpu() is None
