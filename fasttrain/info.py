"""What `fasttrain info` tells of this machine."""

from __future__ import annotations

import platform
from typing import Any

import torch

from fasttrain.data.kept import describe_folder
from fasttrain.device import (
    choose_precision,
    cpp_compiler,
    device_name,
    free_bytes,
    good_at_bf16,
    total_bytes,
    versions,
)
from fasttrain.errors import EngineError
from fasttrain.step.build import ahead_of
from fasttrain.step.cache import ProgramCache, default_folder
from fasttrain.step.timing import candidates
from fasttrain.step.train_step import explain_auto

__all__ = ["describe_machine"]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Plain facts about a device and this machine, and what "auto" chooses there, with reasons."""
    precision, engine = choose_precision("auto", device), explain_auto(device)
    return {
        "device": f"{device} ({device_name(device)})",
        "memory": _memory(device),
        "bf16": "in hardware" if good_at_bf16(device) else "not in hardware: slower than fp32",
        "compiler": cpp_compiler() or "none: compiled engines cannot run, and auto stays eager; install g++ or set CXX",
        "cuda": _cuda(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "precision auto": f"{precision.value}: {precision.reason}",
        "engine auto": f"{engine.value}: {engine.reason}",
        "threads auto": _threads(device),
        "compiling for later runs": _ahead(),
        "recorded rows": describe_folder(),
    }


def _ahead() -> str:
    try:
        found = ahead_of(ProgramCache(default_folder()))
    except EngineError as error:
        return str(error)
    if found is None:
        return "no process (the second run of a job that is too short to compile for starts one)"
    return f"process {found[0]}, a step of {found[1]} (`python -m fasttrain cache stop` ends it)"


def _threads(device: torch.device) -> str:
    if device.type != "cpu":
        return f"{torch.get_num_threads()}: torch's own; steps on {device.type} are not measured"
    counts = ", ".join(map(str, candidates(torch.get_num_threads())))
    return f"the fastest of {counts}: a copy of the job is timed before training, where it is long enough"


def _memory(device: torch.device) -> str:
    total, free = total_bytes(device), free_bytes(device)
    if total is None or free is None:
        return "unknown"
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"


def _cuda() -> str:
    if torch.cuda.is_available():
        return f"{torch.version.cuda}, {torch.cuda.device_count()} device(s)"
    return "none" if torch.version.cuda is None else f"built for {torch.version.cuda}, no usable device"
