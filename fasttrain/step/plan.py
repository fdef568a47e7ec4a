"""Which engine runs a step, and why."""

from __future__ import annotations

from typing import Literal, get_args

from fasttrain.device import Choice
from fasttrain.errors import ConfigError
from fasttrain.step.compiled import CompiledEngine
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import Engine, StepSpec

__all__ = ["EngineName", "choose_engine", "make_engine"]

EngineName = Literal["auto", "eager", "compiled"]


def choose_engine(wanted: str) -> Choice:
    """Resolves `wanted` ("auto", "eager", "compiled").

    Raises:
        ConfigError: not one of the three.
    """
    if wanted not in get_args(EngineName):
        raise ConfigError(f"engine {wanted!r}: use one of {', '.join(get_args(EngineName))}")
    if wanted == "auto":
        return Choice("eager", "it starts at once; a compiled forward must first be measured faster than it")
    return Choice(wanted, "asked for")


def make_engine(wanted: str, spec: StepSpec) -> Engine:
    """The engine of that name for a step.

    Raises:
        ConfigError: there is no such engine.
        EngineError: it cannot run this step here.
    """
    choice = choose_engine(wanted)
    return CompiledEngine(spec) if choice.value == "compiled" else EagerEngine(spec, choice)
