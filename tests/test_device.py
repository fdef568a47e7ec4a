from pathlib import Path

import pytest
import torch
from torch import nn

from fasttrain import TrainStep
from fasttrain import device as module
from fasttrain.device import (
    choose_precision,
    cpp_compiler,
    cpu_features,
    cpu_name,
    free_bytes,
    resolve_device,
    versions,
)
from fasttrain.errors import ConfigError, DeviceError

CPU = torch.device("cpu")


def test_auto_is_cuda_where_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(DeviceError, match="unknown device"):
        resolve_device(name)


def test_other_accelerators_are_refused() -> None:
    with pytest.raises(DeviceError, match="not supported"):
        resolve_device("mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_one() -> None:
    with pytest.raises(DeviceError, match="'cuda:1' was asked for, but"):
        resolve_device("cuda:1")


def test_a_device_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="has 2: cuda:0 to cuda:1"):
        resolve_device("cuda:2")


def test_auto_precision_on_the_cpu_is_fp32() -> None:
    assert choose_precision("auto", CPU).value == "fp32"


@pytest.mark.parametrize(("major", "value"), [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_auto_precision_on_cuda(monkeypatch: pytest.MonkeyPatch, major: int, value: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    assert choose_precision("auto", torch.device("cuda")).value == value


@pytest.mark.parametrize(("precision", "unit"), [("bf16", "amx_bf16"), ("fp16", "avx512_fp16")])
def test_a_cpu_without_the_units_refuses(monkeypatch: pytest.MonkeyPatch, precision: str, unit: str) -> None:
    monkeypatch.setattr(module, "_cpu_has", lambda *features: unit in features)
    assert choose_precision(precision, CPU).value == precision
    monkeypatch.setattr(module, "_cpu_has", lambda *_: False)
    with pytest.raises(DeviceError, match=f"no {precision} units"):
        choose_precision(precision, CPU)


@pytest.mark.parametrize(
    ("lines", "features"),
    [
        ("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2\nvmx flags\t: vnmi\n", "fpu avx2"),
        ("processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd sve\n", "fp asimd sve"),
        ("processor\t: 0\n", ""),
    ],
)
def test_the_instruction_set_as_linux_tells_it(
    lines: str, features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(lines)
    monkeypatch.setattr(module, "CPUINFO", told)
    assert cpu_features() == features
    assert (cpu_name() == "A CPU") == ("model name" in lines)
    told.unlink()
    assert cpu_features() == ""
    assert cpu_name()


def test_unknown_precision() -> None:
    with pytest.raises(ConfigError, match="use one of auto, fp32, bf16, fp16"):
        choose_precision("fp8", CPU)


def test_a_missing_compiler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert cpp_compiler() is None


def test_versions_name_what_figures_depend_on() -> None:
    assert set(versions()) >= {"fasttrain", "python", "torch", "numpy"}


def test_memory_that_files_are_cached_in_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:  70 kB\n")
    monkeypatch.setattr(module, "MEMINFO", told)
    assert free_bytes(torch.device("cpu")) == 70 * 1024
    told.write_text("MemTotal:  100 kB\nMemFree:  10 kB\n")
    assert (free_bytes(torch.device("cpu")) or 1e9) > 1e6  # what the system tells besides


def test_a_model_on_another_kind_of_device_is_refused() -> None:
    model = nn.Linear(2, 1, device="meta")
    with pytest.raises(DeviceError, match="device 'meta' is not supported: use auto, cpu, cuda or cuda:N"):
        TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=nn.MSELoss())
