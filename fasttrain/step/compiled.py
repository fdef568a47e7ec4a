"""The compiled engine: the whole step as one program, compiled ahead of time. It waits for the compiler."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.step.compiler import Compiler
from fasttrain.step.eager import EagerEngine
from fasttrain.step.replay import MAX_PROGRAMS, Programs
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_compile import require_compiler

__all__ = ["CompiledEngine"]

Batch = Any

ENOUGH_STEPS = 16
"""Steps of a shape that no program holds for run eagerly until there were so many; then the shape gets one too."""


class CompiledEngine:
    """Runs steps eagerly until the optimizer has stepped once, then as one program for each shape that is frequent.

    Args:
        spec: the step.
        choice: why it is this engine.

    Attributes:
        compile_s: seconds that steps have waited for traces and compilers; None where there was no wait yet.

    Raises:
        EngineError: this machine has no compiler, or (from a step) the step cannot be compiled or gives other numbers.
    """

    def __init__(self, spec: StepSpec, choice: Choice) -> None:
        require_compiler(spec)
        self.compile_s: float | None = None
        self._choice = choice
        self._eager = EagerEngine(spec, choice)
        self._programs = Programs(spec, self._eager, _refuse)
        self._compiler = Compiler(spec)
        self._compiled = 0
        self._missed_before = 0

    @property
    def choice(self) -> Choice:
        """What runs, and why; with the number of steps that ran eagerly because no program held for them."""
        programs = self._programs
        reason = self._choice.reason + (programs.first.remark if len(programs) else "")
        if not programs.missed:
            return Choice(self._choice.value, reason)
        reason += f"; {programs.missed:,} steps ran eagerly, the last because this differed: {programs.why_missed}"
        return Choice("eager" if programs.missed_in_a_row >= ENOUGH_STEPS else self._choice.value, reason)

    def step(self, batch: Batch) -> Tensor:
        """See `Engine.step`."""
        if not self._eager.has_stepped:  # optimizers make their state in their first step
            return self._eager.step(batch)
        is_wanted = self._compiled == 0 or self._programs.missed - self._missed_before >= ENOUGH_STEPS
        if is_wanted and self._compiled < MAX_PROGRAMS and not self._programs.hold(batch):
            self._compile(batch)
        return self._programs.step(batch)

    def flush(self) -> None:
        """See `Engine.flush`."""
        self._eager.flush()

    def expect(self, steps: int) -> None:
        """See `Engine.expect`: what was asked for is compiled, whether it pays or not."""

    def settle(self, batches: Iterable[Batch]) -> None:
        """See `Engine.settle`: the program is made with the step after the optimizer's first."""
        for batch in batches:
            self.step(batch)
            if len(self._programs) and self._programs.are_proven:
                return

    def close(self) -> None:
        """See `Engine.close`: nothing runs beside the training."""

    def _compile(self, batch: Batch) -> None:
        begin = time.perf_counter()
        pending = self._compiler.begin(batch)
        try:
            pending.wait()
            self._programs.add(pending.traced, pending.load())
        finally:
            pending.close()
        self._compiled += 1
        self._missed_before = self._programs.missed
        self.compile_s = (self.compile_s or 0.0) + time.perf_counter() - begin


def _refuse(difference: str) -> None:
    raise EngineError(f"engine 'compiled' gives other numbers than eager on this step: {difference}")
