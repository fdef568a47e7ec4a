"""Several steps in one call of a program: made once single steps run by program, kept if measured faster than these."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.errors import EngineError
from fasttrain.step.compiler import Compiler, Pending
from fasttrain.step.parity import compare_steps, fits_in_memory
from fasttrain.step.program import StepProgram
from fasttrain.step.replay import Programs
from fasttrain.step.span import TracedSpan, span_steps
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch

__all__ = ["Launches"]

FROM_STEPS = 2_000
"""Fewer steps than these gain nothing that shows."""

TRIAL_ROUNDS = 10
"""A trial runs so many spans step by step and as many as one, in turn."""

MARGIN = 0.98
"""A program of several steps is kept if it takes less than this share of what they take one by one."""


MISSED_SPANS, MAX_MADE = 64, 4
"""After so many spans in a row that a program did not hold for, another is made: of other data, or of the step as it is
now. So often at most."""


class Launches:
    """Runs spans of steps, by one program where there is one that holds, else one by one.

    Args:
        spec: the step.
        programs: of single steps.

    Attributes:
        is_uncached: whether the cache was found to be without the spans' program.
        stalled_s: seconds that steps have waited for the graph and, where that is asked for, for the compiler.
    """

    def __init__(self, spec: StepSpec, programs: Programs) -> None:
        self.is_uncached = False
        self.stalled_s = 0.0
        self._reason = self._why_missed = ""
        self._spec = spec
        self._programs = programs
        self._size = 0  # not known yet
        self._pending: Pending[TracedSpan] | None = None
        self._program: StepProgram | None = None
        self._traced: TracedSpan | None = None
        self._is_proven = False
        self._made = self._missed = 0
        self._trial: dict[bool, list[float]] = {}

    @property
    def reason(self) -> str:
        """What is to be said of the spans' program in the reason of a choice; mostly nothing."""
        if self._missed < MISSED_SPANS:
            return self._reason
        return f"; several steps run one by one, since this keeps changing: {self._why_missed}"

    @property
    def size(self) -> int:
        """Steps of the spans that `run` wants: 1 where single steps are to go on, or where it is not known yet."""
        return max(1, self._size)

    @property
    def is_considered(self) -> bool:
        """Whether it is known."""
        return self._size > 0

    @property
    def is_settled(self) -> bool:
        """Whether it is decided, for now, how spans are run."""
        return self._size == 1 or (self._is_proven and not self._trial)

    def consider(self, batch: object) -> None:
        """Finds out, once, how many of the steps whose program was used last are worth a launch."""
        if self._size == 0:
            traced = self._programs.first
            leaves = traced.leaves(batch)
            self._size = 1 if leaves is None else span_steps(traced, leaves)

    def drop(self, reason: str = "") -> None:
        """Goes on with single steps for good."""
        self.close()
        self._size, self._program, self._traced = 1, None, None
        self._is_proven, self._trial, self._missed = True, {}, 0
        self._reason = reason and f"; {reason}"

    def close(self) -> None:
        """Ends a compiling child; without a program, single steps go on until it is considered again."""
        if self._pending is not None:
            self._pending.close()
            self._pending = None
        if self._program is None and self._size > 1:
            self._size = 0

    def begin(self, compiler: Compiler, span: Span, *, only_from_cache: bool = False) -> None:
        """Has a program made for spans like this one, beside the training; not yet if the step does not hold for it.

        Args:
            compiler: makes it.
            span: like those to come.
            only_from_cache: whether it is to be made only if that needs no child.
        """
        step, batch = self._programs.first, span.first()
        if isinstance(step.inputs(batch), Mismatch):
            return  # the steps that follow take up what was loaded, or use the program of another size
        begin = time.perf_counter()
        try:
            traced = TracedSpan(step, batch, span.source, span.steps)
            self.is_uncached = only_from_cache and not compiler.has(traced)
            if not self.is_uncached:
                self._pending = compiler.pending(traced)
                self._made += 1
        except EngineError as error:
            self.drop(f"several steps cannot be one program: {error}")
        self.stalled_s += time.perf_counter() - begin

    def take_up(self, *, waits: bool, on_trial: bool) -> None:
        """Takes the program up that is under way, if it is ready.

        Args:
            waits: whether to wait for it.
            on_trial: whether it is to be measured against single steps before it is kept.
        """
        if self._pending is None:
            return
        begin = time.perf_counter()
        try:
            if waits:
                self._pending.wait()
            if self._pending.is_ready():
                self._program, self._traced = self._pending.load(), self._pending.traced
                self._trial = {True: [], False: []} if on_trial else {}
                self._pending.close()
                self._pending = None
        except EngineError as error:
            self.drop(f"several steps are no program: {error}")
        if waits:
            self.stalled_s += time.perf_counter() - begin

    @property
    def is_made(self) -> bool:
        """Whether there is a program, or was to be one."""
        return self._program is not None or self._pending is not None or self._size == 1

    @property
    def is_pending(self) -> bool:
        """Whether a program is under way."""
        return self._pending is not None

    def audit(self) -> None:
        """Has the next span compared with single steps again."""
        if self._program is not None:
            self._is_proven = False

    def run(self, span: Span) -> Tensor:
        """The steps of a span; returns the losses, [steps]."""
        if self._program is None or self._traced is None:
            return self._one_by_one(span)
        inputs = self._traced.inputs(span)
        if isinstance(inputs, Mismatch):
            self._miss(inputs.reason)
            return self._one_by_one(span)
        self._missed = 0
        if not self._is_proven:
            return self._prove(span)
        if self._trial:
            return self._try_out(span)
        losses = self._program.run(inputs)
        self._spec.metrics.count(float(span.steps))
        return losses

    def _miss(self, reason: str) -> None:
        self._missed += 1
        self._why_missed = reason
        if self._missed == MISSED_SPANS and self._made < MAX_MADE:
            self._program, self._traced, self._size = None, None, 0
            self._is_proven, self._trial = False, {}
            self._missed, self._reason = 0, ""

    def _one_by_one(self, span: Span) -> Tensor:
        return torch.stack([self._programs.step(batch) for batch in span.batches()])

    def _as_one(self, span: Span) -> Tensor:
        assert self._program is not None
        assert self._traced is not None
        inputs = self._traced.inputs(span)
        assert not isinstance(inputs, Mismatch)  # it was looked at just before
        return self._program.run(inputs)

    def _prove(self, span: Span) -> Tensor:
        """One span both ways; what differs from single steps, which have been compared with eager, is dropped."""
        assert self._traced is not None
        step, device = self._traced.step, self._spec.device
        if not fits_in_memory(step.tensors, device):
            self.drop("two copies of the step's state, to check a program of several steps with, do not fit in memory")
            return self._one_by_one(span)
        losses = torch.zeros(0)

        def one_by_one(span: Span) -> Tensor:
            nonlocal losses
            losses = self._one_by_one(span)
            return losses.sum()

        def as_one(span: Span) -> Tensor:
            return self._as_one(span).sum()

        _, difference = compare_steps(
            step.tensors, step.kinds, device, one_by_one, as_one, span, current=lambda: step.tensors
        )
        if difference is not None:
            self.drop(f"a program of {span.steps} steps gives other numbers than single steps: {difference}")
        self._is_proven = True
        return losses

    def _try_out(self, span: Span) -> Tensor:
        """One span of the trial, by the arm whose turn it is; both train."""
        is_as_one = len(self._trial[True]) < len(self._trial[False])
        begin = time.perf_counter()
        if is_as_one:
            losses = self._as_one(span)
            self._spec.metrics.count(float(span.steps))
        else:
            losses = self._one_by_one(span)
        self._trial[is_as_one].append(time.perf_counter() - begin)
        if len(self._trial[True]) > TRIAL_ROUNDS:
            self._conclude(span.steps)
        return losses

    def _conclude(self, steps: int) -> None:
        as_one, one_by_one = (statistics.median(self._trial[which][1:]) / steps * 1e6 for which in (True, False))
        measured = f"measured {as_one:.0f} us a step, one by one {one_by_one:.0f} us"
        if as_one < MARGIN * one_by_one:
            self._trial = {}
            self._reason = f"; {steps} steps run as one: {measured}"
        else:
            self.drop(f"{steps} steps as one are not faster: {measured}")
