"""Several steps in one launch: made once single steps run by program, kept if measured faster than these."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.errors import EngineError
from fasttrain.step.clock import Clock, Waits
from fasttrain.step.compiler import Compiler, Pending
from fasttrain.step.parity import compare_steps
from fasttrain.step.program import StepProgram
from fasttrain.step.replay import Programs, raise_index_error
from fasttrain.step.snapshot import fits_in_memory
from fasttrain.step.span import LEAST_STEPS, TracedSpan, fewest_launches, most_steps
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, TracedStep
from fasttrain.step.trial import Trial

__all__ = ["Launcher", "Launches", "ProgramLauncher", "pieces"]

FROM_STEPS = 2_000
"""Fewer steps than these gain nothing that shows."""

MISSED_SPANS, MAX_MADE = 64, 4
"""After so many spans in a row that no launch held for, others are made: of other data, or of the step as it is now. So
often at most."""


CALLS_PER_CHECK = 4
"""Calls of a program between two checks of the guards, on a CPU. The guards of an MLP take as long as half a step; four
calls take 1 ms for it, and 10 ms at most."""


class Launcher(Protocol):
    """How several steps are launched as one.

    Attributes:
        calls_per_check: launches between two checks of the guards.
    """

    calls_per_check: int

    def most_steps(self, traced: TracedStep, batch: Sequence[Tensor], /) -> int:
        """How many steps a launch may have; 1 where a launch does not weigh in such a step.

        Args:
            traced: the step.
            batch: the tensors of its batch.
        """
        ...

    def sizes(self, most: int, num_batches: int, /) -> list[int]:
        """Of how many steps launches are to be, in rising order, of which the fastest is kept.

        Args:
            most: steps that a launch may have.
            num_batches: whole batches of an epoch.
        """
        ...

    def compiled_steps(self, size: int, /) -> int:
        """Steps of the program that launches of so many steps are made of."""
        ...

    def launch(
        self, program: StepProgram, traced: TracedSpan, span: Span, *, is_checked: bool = False
    ) -> Tensor | Mismatch:
        """Runs the steps of a span as one; returns the losses, [steps], or why that does not hold now.

        Args:
            program: of these steps.
            traced: what it was compiled from.
            span: whose steps.
            is_checked: see `TracedSpan.inputs`.

        Raises:
            EngineError: launches of so many steps cannot be made.
        """
        ...

    def forget(self, but: int = 0) -> None:
        """Lets go of what launches are made of, except for those of so many steps."""
        ...


class ProgramLauncher:
    """One call of a program that holds all the steps."""

    calls_per_check = CALLS_PER_CHECK

    def most_steps(self, traced: TracedStep, batch: Sequence[Tensor]) -> int:
        """See `Launcher.most_steps`."""
        return most_steps(traced, batch)

    def sizes(self, most: int, num_batches: int) -> list[int]:
        """See `Launcher.sizes`: one, since each takes a program of its own."""
        size = fewest_launches(range(LEAST_STEPS, most + 1), num_batches)
        return [] if size is None else [size]

    def compiled_steps(self, size: int) -> int:
        """See `Launcher.compiled_steps`."""
        return size

    def launch(
        self, program: StepProgram, traced: TracedSpan, span: Span, *, is_checked: bool = False
    ) -> Tensor | Mismatch:
        """See `Launcher.launch`."""
        inputs = traced.inputs(span, is_checked=is_checked)
        return inputs if isinstance(inputs, Mismatch) else program.run(inputs)

    def forget(self, but: int = 0) -> None:
        """See `Launcher.forget`: it keeps nothing."""


class _CannotLaunchError(Exception):
    """Of a launch that is compared with single steps; an error of theirs is none of these."""


class Launches:
    """Runs spans of steps, by as few launches as was measured to be fastest, else one by one.

    Args:
        spec: the step.
        programs: of single steps.
        launcher: of the device.
        clock: of the device.
        waits: is told what steps have waited for the graph and, where that is asked for, for the compiler.

    Attributes:
        is_uncached: whether the cache was found to be without the spans' program.
    """

    def __init__(self, spec: StepSpec, programs: Programs, launcher: Launcher, clock: Clock, waits: Waits) -> None:
        self.is_uncached = False
        self._reason = self._why_missed = ""
        self._spec = spec
        self._programs = programs
        self._launcher = launcher
        self._clock = clock
        self._waits = waits
        self._most = 1
        self._sizes: list[int] | None = None  # not known yet
        self._pending: Pending[TracedSpan] | None = None
        self._program: StepProgram | None = None
        self._traced: TracedSpan | None = None
        self._proven: set[int] = set()
        self._made = self._missed = 0
        self._is_checked = False
        self._trial: Trial[int] | None = None

    @property
    def reason(self) -> str:
        """What is to be said of launches in the reason of a choice; mostly nothing."""
        if self._missed < MISSED_SPANS:
            return self._reason
        return f"; several steps run one by one, since this keeps changing: {self._why_missed}"

    @property
    def size(self) -> int:
        """Steps of the spans that `run` wants: 1 where single steps are to go on, or where it is not known yet."""
        return self._sizes[-1] if self._sizes else 1

    @property
    def calls(self) -> int:
        """See `Engine.calls`."""
        return self._launcher.calls_per_check if self.is_running and self.is_settled else 1

    @property
    def is_considered(self) -> bool:
        """Whether it is known."""
        return self._sizes is not None

    @property
    def is_settled(self) -> bool:
        """Whether it is decided, for now, how spans are run."""
        return self._sizes == [] or (
            self._sizes is not None and self._proven.issuperset(self._sizes) and self._trial is None
        )

    @property
    def is_made(self) -> bool:
        """Whether there is a program, or was to be one."""
        return self._program is not None or self._pending is not None or self._sizes == []

    @property
    def is_running(self) -> bool:
        """Whether there is a program by which spans run."""
        return self._program is not None and self._trial is None and self._missed < MISSED_SPANS

    @property
    def is_pending(self) -> bool:
        """Whether a program is under way."""
        return self._pending is not None

    def consider(self, batch: object) -> None:
        """Finds out, once, how many of the steps whose program was used last may be worth a launch."""
        if self._sizes is None:
            traced = self._programs.first
            leaves = traced.leaves(batch)
            self._most = 1 if leaves is None else self._launcher.most_steps(traced, leaves)
            self._sizes = [LEAST_STEPS] if self._most > 1 else []  # until there is a span, which tells of its epoch

    def drop(self, reason: str = "") -> None:
        """Goes on with single steps for good."""
        self.close()
        self._launcher.forget()
        self._program, self._traced, self._sizes = None, None, []
        self._proven, self._trial, self._missed = set(), None, 0
        self._reason = reason and f"; {reason}"

    def close(self) -> None:
        """Ends a compiling child; without a program, single steps go on until it is considered again."""
        if self._pending is not None:
            self._pending.close()
            self._pending = None
        if self._program is None and self._sizes:
            self._sizes = None

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
        self._sizes = self._launcher.sizes(self._most, span.source.num_whole)
        if not self._sizes:
            return
        try:
            traced = TracedSpan(step, batch, span.source, self._launcher.compiled_steps(self.size))
            self.is_uncached = only_from_cache and not compiler.has(traced)
            if not self.is_uncached:
                self._pending = compiler.pending(traced)
                self._made += 1
        except EngineError as error:
            self.drop(f"several steps cannot be one program: {error}")
        self._waits.add(time.perf_counter() - begin)

    def take_up(self, *, waits: bool, on_trial: bool) -> None:
        """Takes the program up that is under way, if it is ready.

        Args:
            waits: whether to wait for it.
            on_trial: whether it is to be measured against single steps before it is kept. Which of several sizes is
                fastest is always measured.
        """
        if self._pending is None or not self._sizes:
            return
        begin = time.perf_counter()
        try:
            if waits:
                self._pending.wait()
            if self._pending.is_ready():
                self._program, self._traced = self._pending.load(), self._pending.traced
                self._trial = Trial([1, *self._sizes]) if on_trial or len(self._sizes) > 1 else None
                self._pending.close()
                self._pending = None
        except EngineError as error:
            self.drop(f"several steps are no program: {error}")
        if waits:
            self._waits.add(time.perf_counter() - begin)

    def audit(self) -> None:
        """Has the next launch compared with single steps again."""
        self._proven.clear()

    def run(self, span: Span) -> Tensor:
        """The steps of a span; returns the losses, [steps]."""
        if self._program is None:
            return self._one_by_one(span)
        return self._run(span, self.size) if self._trial is None else self._try_out(span, self._trial)

    def _run(self, span: Span, size: int) -> Tensor:
        """By launches of so many steps."""
        self._is_checked = False
        if size == span.steps:
            return self._launch(span)
        if size == 1 or span.steps % size:
            return self._one_by_one(span)
        return torch.cat([self._launch(piece) for piece in pieces(span, size)])

    def _launch(self, span: Span) -> Tensor:
        is_checked, self._is_checked = self._is_checked, False
        if self._program is None or self._traced is None or span.steps not in (self._sizes or []):
            return self._one_by_one(span)  # the launch just before was dropped
        if span.steps not in self._proven:
            return self._prove(span, self._program, self._traced)
        try:
            losses = self._launcher.launch(self._program, self._traced, span, is_checked=is_checked)
        except EngineError as error:
            self._drop_size(span.steps, str(error))
            return self._one_by_one(span)
        except RuntimeError as error:
            raise_index_error(self._spec, span.batches(), error)
            raise
        if isinstance(losses, Mismatch):
            return self._miss(span, losses.reason)
        self._missed = 0
        self._is_checked = True  # for the next piece of this span
        self._spec.metrics.count(float(span.steps))
        return losses

    def _one_by_one(self, span: Span) -> Tensor:
        return torch.stack([self._programs.step(batch) for batch in span.batches()])

    def _miss(self, span: Span, reason: str) -> Tensor:
        self._missed += 1
        self._why_missed = reason
        if self._missed == MISSED_SPANS and self._made < MAX_MADE:
            self._launcher.forget()
            self._program, self._traced, self._sizes = None, None, None
            self._proven, self._trial = set(), None
            self._missed, self._reason = 0, ""
        return self._one_by_one(span)

    def _drop_size(self, size: int, reason: str) -> None:
        """Goes on without launches of so many steps."""
        self._missed = 0
        sizes = [each for each in self._sizes or [] if each != size]
        reason = f"{size} steps as one were refused: {reason}"
        if not sizes:
            self.drop(reason)
        else:
            self._sizes, self._reason = sizes, f"{self._reason}; {reason}"
            if self._trial is not None:
                self._trial.drop(size)

    def _prove(self, span: Span, program: StepProgram, traced: TracedSpan) -> Tensor:
        """One launch both ways; what differs from single steps, which have been compared with eager, is dropped."""
        inputs = traced.inputs(pieces(span, traced.steps)[0])
        if isinstance(inputs, Mismatch):
            return self._miss(span, inputs.reason)
        step, device = traced.step, self._spec.device
        if not fits_in_memory(step.tensors, device):
            self._drop_size(span.steps, "two copies of the step's state, to compare it with, do not fit in memory")
            return self._one_by_one(span)
        losses: list[Tensor] = []

        def one_by_one(span: Span) -> Tensor:
            losses.append(self._one_by_one(span))
            return losses[0].sum()

        def as_one(span: Span) -> Tensor:
            try:
                found = self._launcher.launch(program, traced, span)
            except EngineError as error:
                raise _CannotLaunchError(str(error)) from error
            assert not isinstance(found, Mismatch)  # it was looked at just before
            return found.sum()

        try:
            _, difference = compare_steps(
                step.tensors, step.kinds, device, one_by_one, as_one, span, current=lambda: step.tensors
            )
        except _CannotLaunchError as error:  # nor has any single step run: the launch's turn comes first
            self._drop_size(span.steps, str(error))
            return self._one_by_one(span)
        self._missed = 0
        if difference is None:
            self._proven.add(span.steps)
        else:
            self._drop_size(span.steps, f"other numbers than single steps: {difference}")
        return losses[0]

    def _try_out(self, span: Span, trial: Trial[int]) -> Tensor:
        """One span of the trial, by the size whose turn it is; all train."""
        size = trial.turn
        is_proven = size == 1 or size in self._proven
        losses, seconds = self._clock.timed(lambda: self._run(span, size))
        if is_proven and size in trial and not self._missed:
            trial.add(size, seconds / span.steps)
        if self._trial is not None and trial.is_over:
            self._conclude(trial)
        return losses

    def _conclude(self, trial: Trial[int]) -> None:
        chosen, medians = trial.fastest(), trial.medians()
        told = [f"{size} as one {median * 1e6:.0f}" for size, median in medians.items() if size > 1]
        measured = f"measured us a step: one by one {medians[1] * 1e6:.0f}, {', '.join(told)}"
        if chosen == 1:
            self.drop(f"several steps as one are not faster: {measured}")
        else:
            self._launcher.forget(but=chosen)
            self._trial, self._sizes = None, [chosen]
            self._reason += f"; {chosen} steps run as one: {measured}"


def pieces(span: Span, steps: int) -> list[Span]:
    """The span in spans of so many steps."""
    rows = span.source.batch_size * steps
    return [
        dataclasses.replace(span, rows=span.rows[at : at + rows], host_rows=span.host_rows[at : at + rows], steps=steps)
        for at in range(0, len(span.host_rows), rows)
    ]
