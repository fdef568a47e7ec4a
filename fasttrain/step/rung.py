"""The rungs of the ladder above eager: what a compiled step runs by on a device."""

from __future__ import annotations

from typing import Any, Protocol

from fasttrain.device import Choice
from fasttrain.step.clock import Clock, clock_of
from fasttrain.step.compiler import Compiler, Pending
from fasttrain.step.launch import Launcher, ProgramLauncher
from fasttrain.step.replay import Program
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import TracedStep

__all__ = ["ProgramRung", "Rung"]

Batch = Any


class Rung(Protocol):
    """How a traced step runs once it is compiled.

    Attributes:
        name: as an engine's choice says it, at its best.
        clock: times steps on the device.
        launcher: runs several steps as one.
    """

    name: str
    clock: Clock
    launcher: Launcher

    def explain(self, traced: TracedStep) -> Choice:
        """What single steps run by, and what the reason of a choice is to say of that; mostly nothing."""
        ...

    def begin(self, compiler: Compiler, batch: Batch) -> Pending[TracedStep]:
        """Traces the step, which takes a while, and has it compiled if the cache does not have it.

        Raises:
            EngineError: the step cannot be traced or run so, or no child be started.
        """
        ...

    def program(self, pending: Pending[TracedStep]) -> Program:
        """What runs the step, once the child is done.

        Raises:
            EngineError: it cannot be loaded.
        """
        ...


class ProgramRung:
    """The compiled program itself, one call a step; on the CPU several steps a call.

    Args:
        spec: the step.
    """

    name = "compiled"

    def __init__(self, spec: StepSpec) -> None:
        self.clock = clock_of(spec.device)
        self.launcher: Launcher = ProgramLauncher()

    def explain(self, traced: TracedStep) -> Choice:
        """See `Rung.explain`."""
        return Choice(self.name, traced.remark)

    def begin(self, compiler: Compiler, batch: Batch) -> Pending[TracedStep]:
        """See `Rung.begin`."""
        return compiler.begin(batch)

    def program(self, pending: Pending[TracedStep]) -> Program:
        """See `Rung.program`."""
        return pending.load()
