"""What this machine can do: accelerator, dtypes, compiler, pinned memory.

Nothing here changes a setting.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from fasttrain.errors import ConfigError, DeviceError

__all__ = [
    "Choice",
    "Precision",
    "PrecisionOrAuto",
    "autocast_dtype",
    "choose_precision",
    "cpp_compiler",
    "cpu_features",
    "cpu_name",
    "device_name",
    "free_bytes",
    "good_at_bf16",
    "resolve_device",
    "total_bytes",
    "versions",
]

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionOrAuto = Literal["auto", "fp32", "bf16", "fp16"]

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux tells of the processor."""

MEMINFO = Path("/proc/meminfo")
"""Where it tells of memory."""

_AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Choice:
    """What was chosen for an option left at "auto" (or asked for), and why."""

    value: str
    reason: str


def resolve_device(name: str | torch.device) -> torch.device:
    """Turns "auto", "cpu", "cuda" or "cuda:1" into a device that exists on this machine.

    Raises:
        DeviceError: the device is unknown, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceError(f"device {str(name)!r} is not supported: use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise DeviceError(f"device {str(name)!r} was asked for, but {_why_no_cuda()}; use cpu or auto")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise DeviceError(
            f"device {str(name)!r} was asked for, but this machine has {count}: cuda:0 to cuda:{count - 1}"
        )
    return device


def _why_no_cuda() -> str:
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "torch finds no usable CUDA device on this machine"


def device_name(device: torch.device) -> str:
    """The hardware's own name, such as "NVIDIA H100 80GB HBM3" or the processor's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's model, or its architecture where the system does not tell."""
    return _line_of(CPUINFO, "model name") or platform.processor() or platform.machine()


def cpu_features() -> str:
    """The processor's instruction set, word by word ("avx2 avx512f ..."); empty where the system does not tell.

    A virtual machine may hide some of it: processors of one name then differ, and code for one is illegal on another.
    """
    return _line_of(CPUINFO, "flags") or _line_of(CPUINFO, "Features") or ""  # on x86, on ARM


def _line_of(path: Path, name: str) -> str | None:
    """What stands behind a name in a file in which Linux tells of itself; the first, where there are several."""
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(name):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return None


def total_bytes(device: torch.device) -> int | None:
    """Memory of the device in bytes (of the machine, for the CPU); None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def free_bytes(device: torch.device) -> int | None:
    """Memory in bytes that can be had on the device right now; None where the system does not tell.

    What caches hold that make room counts: the system's of files, torch's of freed CUDA memory.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = _line_of(MEMINFO, "MemAvailable")
    if available is not None:
        return int(available.split()[0]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def good_at_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products run in hardware.

    On a CPU without such units they are 44 to 499 times slower than fp32 (pytorch#146508), on an NVIDIA card
    before Ampere they are emulated.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return _cpu_has("avx512_bf16", "amx_bf16")


def _cpu_has(*features: str) -> bool:
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch >= 2.12; where it is missing we cannot know
    capabilities = ask() if ask is not None else {}
    return any(capabilities.get(feature, False) for feature in features)


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The dtype that autocast runs in, None for fp32 (no autocast)."""
    return _AUTOCAST_DTYPES[precision]


def choose_precision(wanted: str, device: torch.device) -> Choice:
    """Resolves `wanted` ("auto", "fp32", "bf16", "fp16") for a device.

    "auto" is bf16 on CUDA hardware that is good at it, else fp32.

    Raises:
        ConfigError: not one of the four.
        DeviceError: the device would run this precision far slower than fp32.
    """
    if wanted not in get_args(PrecisionOrAuto):
        raise ConfigError(f"precision {wanted!r}: use one of {', '.join(get_args(PrecisionOrAuto))}")
    if wanted == "auto":
        if device.type == "cuda" and good_at_bf16(device):
            return Choice("bf16", f"{device_name(device)} multiplies bf16 matrices in hardware")
        return Choice("fp32", "bf16 is chosen only on CUDA hardware that is good at it")
    if wanted == "bf16" and not good_at_bf16(device):
        raise DeviceError(
            f"precision bf16 on {device_name(device)}: it has no bf16 units, so matrix products would run 44 to 499 "
            "times slower than in fp32 (pytorch#146508); use fp32"
        )
    if wanted == "fp16" and device.type == "cpu" and not _cpu_has("avx512_fp16", "amx_fp16"):
        raise DeviceError(
            f"precision fp16 on {device_name(device)}: it has no fp16 units, so matrix products would run far slower "
            "than in fp32 (pytorch#146508); use fp32"
        )
    return Choice(wanted, "asked for")


def cpp_compiler() -> str | None:
    """The C++ compiler that torch would call on this machine (its path), None where there is none."""
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else ("g++", "clang++", "c++") if sys.platform != "win32" else ("cl",)
    return next((path for name in names if (path := shutil.which(name))), None)


def versions() -> dict[str, str]:
    """Versions that figures depend on: fasttrain, python, torch, numpy, and cuda where torch has it."""
    from importlib.metadata import PackageNotFoundError, version

    import numpy as np

    try:
        own = version("fasttrain")
    except PackageNotFoundError:
        own = "not installed"
    found = {
        "fasttrain": own,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    cuda: str | None = torch.version.cuda
    if cuda is not None:
        found["cuda"] = cuda
    return found
