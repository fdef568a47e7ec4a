"""Which engine runs a step, and why."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from fasttrain.device import Choice
from fasttrain.errors import ConfigError, EngineError
from fasttrain.step.auto import AutoEngine
from fasttrain.step.clock import Waits
from fasttrain.step.compiled import CompiledEngine
from fasttrain.step.eager import EagerEngine
from fasttrain.step.graphed import GraphRung
from fasttrain.step.rung import ProgramRung, Rung
from fasttrain.step.spec import Engine, StepSpec
from fasttrain.step.toolkit import cuda_home
from fasttrain.step.torch_compile import TorchCompileEngine, require_compiler

__all__ = ["EngineName", "explain_auto", "make_engine"]

EngineName = Literal["auto", "eager", "compiled", "torch-compile", "graphed"]


def explain_auto(device: torch.device) -> Choice:
    """What "auto" does on a device, before any step has run."""
    try:
        _require_compiler(device)
    except EngineError as error:
        return Choice("eager", str(error))
    best = "compiled" if device.type == "cpu" else "graphed"
    return Choice(
        f"eager, then {best}",
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
    choice = Choice(wanted, "asked for")
    if spec.needs_closure and wanted in ("compiled", "graphed"):
        raise EngineError(f"engine {wanted!r} cannot run this step: {spec.why_closure}; use engine 'eager' or 'auto'")
    if wanted == "auto" and spec.needs_closure:
        return EagerEngine(spec, Choice("eager", spec.why_closure))
    if wanted == "eager":
        return EagerEngine(spec, choice)
    if wanted == "torch-compile":
        return TorchCompileEngine(spec, choice)
    if wanted == "auto" and (planned := explain_auto(spec.device)).value == "eager":
        return EagerEngine(spec, planned)
    waits = Waits()
    rung = _rung(wanted, spec, waits)
    if wanted == "auto":
        return AutoEngine(spec, rung, waits)
    _require_compiler(spec.device)
    return CompiledEngine(spec, choice, rung, waits)


def _require_compiler(device: torch.device) -> None:
    """Raises EngineError where this machine cannot compile a step for a device."""
    require_compiler()
    if device.type == "cuda":
        cuda_home()


def _rung(wanted: str, spec: StepSpec, waits: Waits) -> Rung:
    """What an engine's compiled steps run by."""
    if wanted == "graphed" or (wanted == "auto" and spec.device.type == "cuda"):
        return GraphRung(spec, waits, is_required=wanted == "graphed")
    return ProgramRung(spec)
