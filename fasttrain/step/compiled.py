"""The engine that waits for the compiler: the whole step as one program, by the rung that was asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.step.clock import Waits
from fasttrain.step.compiler import Compiler
from fasttrain.step.eager import EagerEngine, eager_meanwhile
from fasttrain.step.launch import FROM_STEPS, Launches
from fasttrain.step.replay import MAX_PROGRAMS, Programs
from fasttrain.step.rung import Rung
from fasttrain.step.span import may_have_spans
from fasttrain.step.spec import StepSpec, run_passes
from fasttrain.step.trace import TracedStep

__all__ = ["CompiledEngine"]

Batch = Any

SETTLING_STEPS = 1_000
"""In so many, the programs are made, and launches of several sizes measured."""


class CompiledEngine:
    """Runs steps eagerly until the optimizer has stepped once, then as one program for each shape that is frequent.

    Args:
        spec: the step.
        choice: why it is this engine.
        rung: how compiled steps run.
        waits: of the rung.

    Raises:
        EngineError: (from a step) the step cannot be compiled, or gives other numbers.
    """

    def __init__(self, spec: StepSpec, choice: Choice, rung: Rung, waits: Waits) -> None:
        self._choice = choice
        self._rung = rung
        self._waits = waits
        self._eager = EagerEngine(spec, choice)
        self._programs = Programs(spec, self._eager, self._refuse)
        self._launches = Launches(spec, self._programs, rung.launcher, rung.clock, waits)
        self._compiler = Compiler(spec)
        self._expected = 0
        self._refused = ""

    @property
    def compile_s(self) -> float | None:
        """See `Engine.compile_s`: for traces, compilers and captures."""
        return self._waits.seconds

    @property
    def choice(self) -> Choice:
        """What runs, and why; with the number of steps that ran eagerly because no program held for them."""
        meanwhile = eager_meanwhile()
        if meanwhile is not None:
            return Choice("eager", meanwhile)
        programs, launches = self._programs, self._launches
        single = self._rung.explain(programs.first) if len(programs) else Choice(self._choice.value, "")
        value = self._rung.name if launches.is_running else single.value
        return programs.told(Choice(value, self._choice.reason + single.reason + launches.reason))

    def step(self, batch: Batch) -> Tensor:
        """See `Engine.step`."""
        if self._refused:
            raise EngineError(self._refused)
        if eager_meanwhile() is not None:
            return self._eager.step(batch)
        if self._programs.added < MAX_PROGRAMS and self._programs.wants_one(batch):
            self._compile(batch)
        loss = self._programs.step(batch)
        if not self._launches.is_considered and len(self._programs) and self._programs.are_proven:
            self._launches.consider(batch)
        return loss

    @property
    def span(self) -> int:
        """See `Engine.span`: several, once single steps run by program, where enough are to come."""
        if eager_meanwhile() is not None:
            return 1
        if self._expected < FROM_STEPS and not self._launches.is_made:
            return 1
        return self._launches.size

    @property
    def calls(self) -> int:
        """See `Engine.calls`."""
        return self._launches.calls

    def steps(self, span: Span) -> Tensor:
        """See `Engine.steps`."""
        if eager_meanwhile() is not None:
            return torch.stack([self.step(batch) for batch in span.batches()])
        launches = self._launches
        if len(self._programs) and not launches.is_made:
            launches.begin(self._compiler, span)
        if not launches.is_made:  # single steps first, for which a program may have to be made anew
            return torch.stack([self.step(batch) for batch in span.batches()])
        launches.take_up(waits=True, on_trial=False)
        return launches.run(span)

    def flush(self) -> None:
        """See `Engine.flush`."""
        self._eager.flush()

    def expect(self, steps: int) -> None:
        """See `Engine.expect`: the step is compiled whether that pays or not, several as one where there are many."""
        self._expected = steps

    def settle(self, batches: Iterable[Batch]) -> None:
        """See `Engine.settle`: the program is made with the step after the optimizer's first, launches after that."""
        self._expected = FROM_STEPS
        launches, has_spans = self._launches, may_have_spans(batches)
        for _ in run_passes(self, batches, SETTLING_STEPS):
            if launches.is_settled or (launches.is_considered and not has_spans):
                return

    def close(self) -> None:
        """See `Engine.close`: after Ctrl-C, a child may run that was waited for."""
        self._launches.close()

    def _compile(self, batch: Batch) -> None:
        begin = time.perf_counter()
        pending = self._rung.begin(self._compiler, batch)
        try:
            pending.wait()
            self._programs.add(pending.traced, self._rung.program(pending))
        finally:
            pending.close()
        self._waits.add(time.perf_counter() - begin)

    def _refuse(self, reason: str, traced: TracedStep, *, is_wrong: bool) -> None:  # noqa: ARG002
        self._refused = f"engine {self._rung.name!r} cannot run this step: {reason}"
        raise EngineError(self._refused)
