"""Running steps by program where one holds, and eagerly where none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fasttrain.step.program import StepProgram
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["Programs"]

MAX_PROGRAMS = 4
"""Programs kept at a time, one a shape; the one that was not used for longest goes."""

Batch = Any


class Programs:
    """The programs of a step, the last used first.

    Args:
        eager: runs a step that no program holds for.
        count: tells the running metrics that a program has counted a batch.

    Attributes:
        missed: steps that no program held for; whoever looks at it may set it back.
        why_missed: the reason of the last of them.
    """

    def __init__(self, eager: Callable[[Batch], Tensor], count: Callable[[float], None]) -> None:
        self.missed = 0
        self.why_missed = ""
        self._eager = eager
        self._count = count
        self._programs: list[tuple[TracedStep, StepProgram]] = []

    def __len__(self) -> int:
        """How many programs there are."""
        return len(self._programs)

    @property
    def first(self) -> TracedStep:
        """The step whose program was used last."""
        return self._programs[0][0]

    @property
    def _may_rebind(self) -> bool:
        """Rebinding looks at every tensor: not before each of many steps that it does not help."""
        return self.missed < 8 or self.missed % 64 == 0

    def add(self, traced: TracedStep, program: StepProgram) -> None:
        """Takes a program up; it is tried first."""
        self._programs.insert(0, (traced, program))
        del self._programs[MAX_PROGRAMS:]

    def first_holds(self, batch: Batch) -> bool:
        """True where the first program holds for a batch, and the user's objects are as it knows them."""
        return not isinstance(self.first.inputs(batch), Mismatch)

    def hold(self, batch: Batch) -> bool:
        """True where any of the programs holds for a batch, and the user's objects are as it knows them."""
        return any(not isinstance(traced.inputs(batch), Mismatch) for traced, _ in self._programs)

    def run_first(self, batch: Batch) -> Tensor:
        """One step by the first program, which must hold; the running metrics are not told."""
        traced, program = self._programs[0]
        inputs = traced.inputs(batch)
        assert not isinstance(inputs, Mismatch)
        return program.run(inputs)

    def drop_first(self) -> None:
        """Drops the program that was used last."""
        del self._programs[0]

    def clear(self) -> None:
        """Drops all programs."""
        self._programs.clear()

    def step(self, batch: Batch) -> Tensor:
        """One step, by the first program that holds for the batch and the user's objects as they are, else eagerly."""
        for index, (traced, program) in enumerate(self._programs):
            inputs = traced.inputs(batch)
            if isinstance(inputs, Mismatch) and self._may_rebind and traced.rebind():
                inputs = traced.inputs(batch)
            if isinstance(inputs, Mismatch):
                self.why_missed = inputs.reason
                continue
            if index:
                self._programs.insert(0, self._programs.pop(index))
            loss = program.run(inputs)
            self._count(1.0)
            return loss
        self.missed += len(self._programs) > 0
        return self._eager(batch)
