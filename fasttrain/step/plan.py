"""Which engine runs a step, and why."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from fasttrain.device import Choice, cpp_compiler
from fasttrain.errors import ConfigError
from fasttrain.step.auto import AutoEngine
from fasttrain.step.compiled import CompiledEngine
from fasttrain.step.eager import EagerEngine
from fasttrain.step.graphed import GraphedEngine
from fasttrain.step.spec import Engine, StepSpec
from fasttrain.step.torch_compile import TorchCompileEngine

__all__ = ["EngineName", "explain_auto", "make_engine"]

EngineName = Literal["auto", "eager", "compiled", "torch-compile", "graphed"]


def explain_auto(device: torch.device) -> Choice:
    """What "auto" does on a device, before any step has run."""
    if device.type != "cpu":
        return Choice("eager", "auto compiles on the CPU only for now; ask for 'graphed' by name")
    if cpp_compiler() is None:
        return Choice("eager", "no C++ compiler is on the PATH (set CXX or install g++)")
    return Choice(
        "eager, then compiled",
        "a child process compiles the whole step where the steps that are left can repay it; the program is kept if it "
        "gives the same numbers and is measured faster",
    )


def make_engine(wanted: str, spec: StepSpec) -> Engine:
    """The engine of that name for a step.

    Raises:
        ConfigError: there is no such engine.
        EngineError: it cannot run this step here.
    """
    if wanted not in get_args(EngineName):
        raise ConfigError(f"engine {wanted!r}: use one of {', '.join(get_args(EngineName))}")
    choice = Choice("eager" if wanted == "auto" else wanted, "asked for")
    if wanted == "eager":
        return EagerEngine(spec, choice)
    if wanted == "torch-compile":
        return TorchCompileEngine(spec, choice)
    if wanted == "graphed":
        return GraphedEngine(spec, choice)
    if spec.device.type != "cpu":
        # Programs ahead of time have not been measured on CUDA yet.
        if wanted == "compiled":
            return TorchCompileEngine(spec, Choice("torch-compile", "what 'compiled' is on CUDA for now"))
        return EagerEngine(spec, explain_auto(spec.device))
    if wanted == "compiled":
        return CompiledEngine(spec, choice)
    return AutoEngine(spec) if cpp_compiler() is not None else EagerEngine(spec, explain_auto(spec.device))
