"""The compiled engine: the whole step as one program, compiled ahead of time. It waits for the compiler."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.step.compiler import Compiler
from fasttrain.step.eager import EagerEngine
from fasttrain.step.parity import compare_steps
from fasttrain.step.replay import MAX_PROGRAMS, Programs
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_compile import require_compiler

__all__ = ["CompiledEngine"]

Batch = Any

ENOUGH_STEPS = 16
"""Steps of a shape that no program holds for run eagerly until there were so many; then the shape gets one too."""


class CompiledEngine:
    """Runs the step eagerly once, then as one program for each shape that comes often enough.

    Args:
        spec: the step.
        choice: why it is this engine.

    Attributes:
        choice: what runs, and why.
        compile_s: seconds that steps have waited for traces and compilers; None where there was no wait yet.

    Raises:
        EngineError: this machine has no compiler, or (from a step) the step cannot be compiled or gives other numbers.
    """

    def __init__(self, spec: StepSpec, choice: Choice) -> None:
        require_compiler(spec)
        self.choice = choice
        self.compile_s: float | None = None
        self._spec = spec
        self._eager = EagerEngine(spec, choice)
        self._programs = Programs(self._eager.step, spec.metrics.count)
        self._compiler = Compiler(spec)
        self._is_first = True
        self._compiled = 0

    def step(self, batch: Batch) -> Tensor:
        """See `Engine.step`."""
        if self._is_first:  # optimizers make their state in it
            self._is_first = False
            return self._eager.step(batch)
        is_wanted = self._compiled == 0 or self._programs.missed >= ENOUGH_STEPS
        if is_wanted and self._compiled < MAX_PROGRAMS and not self._programs.hold(batch):
            return self._compile(batch)
        return self._programs.step(batch)

    def flush(self) -> None:
        """See `Engine.flush`."""
        self._eager.flush()

    def expect(self, steps: int) -> None:
        """See `Engine.expect`: what was asked for is compiled, whether it pays or not."""

    def settle(self, batches: Iterable[Batch]) -> None:
        """See `Engine.settle`: the program is made in the second step."""
        for batch in itertools.islice(batches, 2):
            self.step(batch)

    def close(self) -> None:
        """See `Engine.close`: nothing runs beside the training."""

    def _compile(self, batch: Batch) -> Tensor:
        begin = time.perf_counter()
        pending = self._compiler.begin(batch)
        try:
            pending.wait()
            self._programs.add(pending.traced, pending.load())
        finally:
            pending.close()
        self._compiled += 1
        self._programs.missed = 0
        self.compile_s = (self.compile_s or 0.0) + time.perf_counter() - begin
        traced = self._programs.first
        loss, difference = compare_steps(
            traced.tensors, traced.kinds, self._spec.device, self._eager.step, self._programs.run_first, batch
        )
        if difference is not None:
            raise EngineError(f"engine 'compiled' gives other numbers than eager on this step: {difference}")
        return loss
