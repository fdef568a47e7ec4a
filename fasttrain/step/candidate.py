"""A compiled form of the step on its way up the ladder, and what runs it on a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.step.compiler import Compiler, Pending
from fasttrain.step.spec import StepSpec
from fasttrain.step.timing import Clock, clock_of
from fasttrain.step.trace import Mismatch, TracedStep
from fasttrain.step.verify import Verification, agree, verify
from fasttrain.step.walk import TracedWalk

__all__ = [
    "CALLED_STEPS",
    "VERIFIED_BATCHES",
    "Backend",
    "Candidate",
    "CannotRunError",
    "Missed",
    "Program",
    "ProgramBackend",
    "Stage",
    "Walking",
    "Work",
]

Work = Any
"""What an engine is given at once: a batch, or a `Span` of several."""

VERIFIED_BATCHES = 3
"""Batches on which a program must agree with eager before it is used. One that reads a stale buffer
passes the first."""


CALLED_STEPS = 16
"""Steps of one call that is compared with single steps; of the larger CUDA graph of a step that walks, too."""

TIMED_CALLS = 3
"""Calls that are timed after a program was adopted. The first are short and run with cold caches."""


class Stage(Enum):
    """Where a candidate is on its way up."""

    COMPILING = "compiling"
    VERIFYING = "verifying"
    TRIAL = "on trial"
    ADOPTED = "adopted"
    DROPPED = "dropped"


class Program(Protocol):
    """A compiled step that takes its batch as tensors: a `StepProgram`, or a CUDA graph of it."""

    def run(self, inputs: list[Tensor]) -> Tensor:
        """The part of the step that is due, given the result of `TracedStep.inputs`. Makes no host sync.

        Returns:
            The batch's loss.

        Raises:
            EngineError: it cannot run; nothing has changed.
        """
        ...


class Walking(Protocol):
    """A compiled step that takes its batches from resident rows: a `WalkingProgram`, or CUDA graphs of it."""

    def run(self, span: Span) -> Tensor | Mismatch:
        """The steps of a span. Makes no host sync.

        Returns:
            The losses, [steps], or why the program does not hold now.

        Raises:
            EngineError: it cannot run; nothing has changed.
            StepsFailedError: one of the steps failed: the state is not to be trusted.
        """
        ...

    def inputs_of(self, span: Span) -> list[Tensor] | Mismatch:
        """What each step of a span is given, or why the program does not hold now. Makes no host sync."""
        ...

    @property
    def steps_done(self) -> int:
        """How many steps of the last call are done. HOST READ: after an error in it."""
        ...


class Backend(Protocol):
    """What runs compiled steps on a device.

    Attributes:
        name: of the engine that it makes, at its best.
        clock: times steps on the device.
    """

    name: str
    clock: Clock

    def begin(self, compiler: Compiler, work: Work) -> Pending:
        """Traces the step, which takes a while, and has it compiled if the cache does not have the program.

        Raises:
            EngineError: the step cannot be traced or run so, or no child can be started.
        """
        ...

    def load(self, pending: Pending) -> Program | Walking:
        """What runs the step, once it is compiled.

        Raises:
            EngineError: it cannot be loaded.
        """
        ...

    def explain(self, step: TracedStep, *, walks: bool) -> Choice:
        """The name of what runs a traced step, and what a reason adds about it (mostly nothing)."""
        ...


class ProgramBackend:
    """Runs the compiled program itself.

    Args:
        spec: the step.
    """

    name = "compiled"

    def __init__(self, spec: StepSpec) -> None:
        self.clock = clock_of(spec.device)

    def begin(self, compiler: Compiler, work: Work) -> Pending:
        """See `Backend.begin`."""
        return compiler.begin(work)

    def load(self, pending: Pending) -> Program | Walking:
        """See `Backend.load`."""
        return pending.load()

    def explain(self, step: TracedStep, *, walks: bool) -> Choice:  # noqa: ARG002
        """See `Backend.explain`."""
        return Choice(self.name, step.remark)


class CannotRunError(Exception):
    """A program that is being verified cannot run. Errors of the eager step are not wrapped."""


class Candidate:
    """A compiled form of the step.

    Args:
        pending: its program, which a child may still be compiling.

    Attributes:
        traced: what is compiled: a step that takes its batch, or one that walks over resident rows.
        step: the traced step, whose guards hold for it.
        walks: whether it takes its batches from resident rows by itself.
        most_steps: of a call.
        stage: see above.
        step_s: seconds that a step takes, None before it is measured.
    """

    def __init__(self, pending: Pending) -> None:
        traced: TracedStep | TracedWalk = pending.traced
        self.traced = traced
        self.walks = isinstance(traced, TracedWalk)
        self.step = traced.step if isinstance(traced, TracedWalk) else traced
        self.most_steps = traced.most_steps if isinstance(traced, TracedWalk) else 1
        self.stage = Stage.COMPILING
        self._agreed = Counter[int]()  # batches on which each part of the step has agreed with eager
        self._differed: dict[int, int] = {}  # how often a part had agreed when it last differed
        self._wanted = Counter(dict.fromkeys(range(len(self.step.parts)), VERIFIED_BATCHES))
        self.step_s: float | None = None
        self.verify_s = 0.0
        self.pending: Pending | None = pending
        self._program: Any = None
        self._timed_calls = self._called = 0

    def __str__(self) -> str:
        """Such as "walking step, on trial"."""
        return f"{'walking ' if self.walks else ''}step, {self.stage.value}"

    @property
    def is_over(self) -> bool:
        """Whether it can never hold again: the resident data that it walks over are gone."""
        return isinstance(self.traced, TracedWalk) and self.traced.source() is None

    def is_call_due(self, steps: int) -> bool:
        """Whether so many steps in one call are to be compared with the same steps one by one.

        The first call of several is, and the first of CALLED_STEPS or more: a CUDA graph of many steps is another one.
        """
        return self.walks and steps > 1 and (self._called == 0 or steps >= CALLED_STEPS > self._called)

    def called(self, steps: int) -> None:
        """Notes that so many steps in one call have agreed with the same steps one by one."""
        self._called = steps

    @property
    def is_verified(self) -> bool:
        """Whether every part has agreed with eager as often as is wanted."""
        return all(self._agreed[part] >= wanted for part, wanted in self._wanted.items())

    @property
    def is_due(self) -> bool:
        """Whether the part of the step that runs next is to be compared with eager."""
        return self._agreed[self.step.due] < self._wanted[self.step.due]

    @property
    def has_passed(self) -> bool:
        """Whether that part has agreed often enough to be used: a later comparison may be left out."""
        return self._agreed[self.step.due] >= VERIFIED_BATCHES and not self._is_suspected(self.step.due)

    def passed(self, part: int) -> None:
        """Notes a batch on which a part has agreed with eager."""
        self._agreed[part] += 1

    def differs(self, part: int) -> bool:
        """Notes a batch on which a part differs from eager; it must then agree on VERIFIED_BATCHES more.

        One difference can be caused by rounding: if the input of a ReLU is close to zero, its gradient may vanish on
        one side only.

        Returns:
            Whether it is the second difference within so many batches: the program is wrong.
        """
        is_second = self._is_suspected(part)
        self._differed[part] = self._agreed[part]
        self._wanted[part] = self._agreed[part] + VERIFIED_BATCHES
        return is_second

    def _is_suspected(self, part: int) -> bool:
        return part in self._differed and self._agreed[part] - self._differed[part] < VERIFIED_BATCHES

    def verify_again(self) -> None:
        """Has each part compared once more."""
        for part in self._wanted:
            self._wanted[part] = max(VERIFIED_BATCHES, self._agreed[part] + 1)

    def leave_out(self) -> None:
        """Skips the comparison that is due."""
        self._wanted[self.step.due] = self._agreed[self.step.due]

    def load(self, backend: Backend) -> None:
        """Loads the compiled program. Errors as in `Backend.load`."""
        assert self.pending is not None
        self._program = backend.load(self.pending)
        self.stage = Stage.VERIFYING

    def mismatch(self, work: Work, *, rebinds: bool = True) -> str | None:
        """Why it does not hold for a batch or span and the user's objects as they are; None where it does.

        Args:
            work: the batch or the span.
            rebinds: whether to bind it to tensors, or to resident data, that have replaced those that it knows.
        """
        if self.walks != isinstance(work, Span):
            return _GIVEN_OTHERWISE
        reason = self._mismatch(work)
        if reason is not None and rebinds and self._rebind(work):
            reason = self._mismatch(work)
        return reason

    def _rebind(self, work: Work) -> bool:
        if not isinstance(self.traced, TracedWalk):
            return self.step.rebind(work)
        is_other_data = self.traced.take(work.source)
        return self.step.rebind(work.batch()) or is_other_data

    def _mismatch(self, work: Work) -> str | None:
        found = self._program.inputs_of(work) if self.walks else self.step.inputs(work)
        return found.reason if isinstance(found, Mismatch) else None

    def run(self, work: Work) -> Tensor | Mismatch:
        """The steps of a batch or span by program; returns the loss or losses, or why it does not hold."""
        if self.walks != isinstance(work, Span):
            return Mismatch(_GIVEN_OTHERWISE)
        if self.walks:
            return self._program.run(work)
        inputs = self.step.inputs(work)
        if isinstance(inputs, Mismatch):
            return inputs
        loss = self._program.run(inputs)
        self.step.finish()
        return loss

    def compare(self, work: Work, eager: Callable[[Any], Tensor]) -> Verification:
        """Runs a batch, or a span of one step, by program and eagerly, and compares them (see `verify`).

        Raises:
            CannotRunError: the program cannot run; eager has not run.
        """
        batch = work.batch() if isinstance(work, Span) else work

        def program(_: Any) -> Tensor:
            try:
                return self._run_held(work).reshape(())
            except EngineError as error:
                raise CannotRunError(str(error)) from error

        return verify(self.step, batch, eager, program)

    def compare_call(self, span: Span) -> tuple[Tensor, Verification]:
        """Runs the steps of a span one by one, and compares them with the same steps in one call (see `agree`).

        Returns:
            The losses of the single steps, whose state stays, and the comparison.

        Raises:
            CannotRunError: the steps cannot run in one call; no single step has run.
            StepsFailedError: a single step failed.
        """
        losses = list[Tensor]()

        def one_by_one(_: Any) -> Tensor:
            for piece in span.pieces(1):
                losses.append(self._run_held(piece))
                self.step.spec.metrics.count(1.0)
            return torch.cat(losses).sum()

        def in_one_call(_: Any) -> Tensor:
            try:
                return self._run_held(span).sum()
            except EngineError as error:
                raise CannotRunError(str(error)) from error

        found = agree(self.step, None, one_by_one, in_one_call)
        return torch.cat(losses), found

    def _run_held(self, work: Work) -> Tensor:
        losses = self.run(work)
        assert not isinstance(losses, Mismatch), losses.reason
        return losses

    @property
    def steps_done(self) -> int:
        """How many steps of the last call are done. HOST READ: after an error in it."""
        return self._program.steps_done if self.walks else 0

    @property
    def is_to_be_timed(self) -> bool:
        """Whether the next call is timed: calls are as long, and verifications as rare, as the time of a step says."""
        return self._timed_calls < TIMED_CALLS and self.stage is Stage.ADOPTED

    def note_time(self, step_s: float) -> None:
        """Notes the seconds that each step of a call took; the least counts."""
        self.step_s = step_s if self.step_s is None else min(step_s, self.step_s)
        self._timed_calls += 1

    def close(self) -> None:
        """Ends the child, if one still compiles."""
        if self.pending is not None:
            self.pending.close()
            self.pending = None


@dataclass
class Missed:
    """Steps that ran eagerly although there were programs.

    Attributes:
        count: of them.
        in_a_row: of these, since a program last held.
        lately: of these, since the last check.
        since_begun: of these, since a candidate was last begun.
        reason: why no program held for the last of them.
    """

    count: int = 0
    in_a_row: int = 0
    lately: int = 0
    since_begun: int = 0
    reason: str = ""
    _next_rebinding: int = 0

    def add(self, reason: str, steps: int) -> None:
        """Counts more of them."""
        self.count += steps
        self.in_a_row += steps
        self.lately += steps
        self.since_begun += steps
        self.reason = reason

    def wants_rebinding(self) -> bool:
        """Whether to try rebinding now. It checks every tensor, so it is not tried before every step that is missed."""
        if self.in_a_row >= 8 and self.count < self._next_rebinding:
            return False
        self._next_rebinding = self.count + 64
        return True


_GIVEN_OTHERWISE = "the program reads resident data, and this batch was passed by itself (or the reverse)"
