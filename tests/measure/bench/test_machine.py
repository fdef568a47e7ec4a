"""What disturbs a measurement is noticed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttrain.measure import environment
from fasttrain.measure.bench import machine
from fasttrain.measure.bench.machine import Machine

CPU = torch.device("cpu")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine of 4 cores whose facts are in the dict that the test gets."""
    facts: dict[str, Any] = {"runnable": [1], "throttled": 0, "swapped": 0, "looks": 0}

    def runnable() -> int | None:
        facts["looks"] += 1
        return facts["runnable"][(facts["looks"] - 1) % len(facts["runnable"])]

    monkeypatch.setattr(machine, "runnable", runnable)
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "throttle_count", lambda: facts["throttled"])
    monkeypatch.setattr(machine, "swapped_in", lambda: facts["swapped"])
    return facts


@pytest.mark.parametrize(
    ("runnable", "others"),
    [
        ([1], 1),
        ([5], 5),
        ([0, 9, 9, 0, 0], 0),  # a process that is about to sleep
        ([None], None),
    ],
)
def test_other_work_is_noticed(runnable: list[int | None], others: int | None, quiet: dict[str, Any]) -> None:
    quiet["runnable"] = runnable
    assert Machine(CPU, sleep=lambda _: None).before() == others


@pytest.mark.parametrize(("wanted", "flags"), [(1, ()), (4, ()), (5, ("load",)), (None, ())])
def test_more_threads_than_cores_are_a_flag(wanted: int | None, flags: tuple[str, ...], quiet: dict[str, Any]) -> None:
    watcher = Machine(CPU, sleep=lambda _: None)
    watcher.before()
    assert watcher.flags(wanted) == flags


@pytest.mark.parametrize("what", ["throttled", "swapped"])
def test_what_slows_a_block_down_is_noticed_in_that_block(what: str, quiet: dict[str, Any]) -> None:
    watcher = Machine(CPU, sleep=lambda _: None)
    others = watcher.before()
    quiet[what] = 3
    assert watcher.flags(others) == (what,)
    assert watcher.flags(watcher.before()) == ()


def test_a_gpu_that_gets_too_hot_is_noticed(quiet: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    hot = SimpleNamespace(violationTime=0)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetViolationStatus", lambda handle, _: hot if handle == b"GPU-7" else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=7))
    watcher = Machine(torch.device("cuda"), sleep=lambda _: None)
    others = watcher.before()
    hot.violationTime = 10**6
    assert watcher.flags(others) == ("throttled",)


def test_a_machine_without_a_driver_is_not_throttled() -> None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert machine.gpu_throttled_ns(torch.device("cuda")) == 0
    else:
        pytest.skip("this machine has NVIDIA's driver")


def test_the_environment_tells_what_figures_depend_on() -> None:
    found = environment.environment(CPU)
    assert found["device"] == found["cpu"]
    assert found["cores"] >= 1
    assert found["torch"] == torch.__version__
    assert environment.runnable() is None or environment.runnable() >= -1
    clock = environment.clock_mhz()
    assert clock is None or 100 < clock < 10_000


def test_waiting_for_a_core_adds_up() -> None:
    waited = environment.core_wait_s()
    assert 0 <= waited <= environment.core_wait_s() < 1e6


def test_an_installed_package_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)
    found = environment.environment(CPU)
    assert (found["commit"], found["has_uncommitted_changes"]) == (None, None)
