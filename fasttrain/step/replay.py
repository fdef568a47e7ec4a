"""Running steps by program where one holds, and eagerly where none does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.step.apart import is_eagers_rounding
from fasttrain.step.eager import EagerEngine, run_forward
from fasttrain.step.parity import compare_steps
from fasttrain.step.snapshot import fits_in_memory
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["Program", "Programs", "raise_index_error"]

MAX_PROGRAMS = 4
"""Programs kept at a time, one a shape (or another option); the one that was not used for longest goes. An engine makes
no more either, so that what changes all the time ends up eager."""

ENOUGH_STEPS = 16
"""Steps that no program holds for run eagerly until there were so many; then there is one more program."""

Batch = Any


class Refuse(Protocol):
    """What is told why a program must not be used."""

    def __call__(self, reason: str, traced: TracedStep, *, is_wrong: bool) -> None:
        """The program of a step gives wrong numbers, or (for now) it cannot run."""
        ...


class Program(Protocol):
    """What runs a traced step in place of its operators: a `StepProgram`, or a CUDA graph."""

    def run(self, inputs: list[Tensor]) -> Tensor:
        """The part of the step that is due, given what `TracedStep.inputs` gives; returns the loss. No host read.

        Raises:
            EngineError: it cannot run; nothing has changed.
        """
        ...


def raise_index_error(spec: StepSpec, batches: Iterable[Batch], error: RuntimeError) -> None:
    """Raises PyTorch's own IndexError, from the line of the user's code, where a program has met an index out of range.

    The program has not finished its step; forward runs again on its batches, eagerly, to find the line.

    Raises:
        IndexError: an index, such as an id for an embedding, is out of range.
    """
    if _OUT_OF_RANGE not in str(error):
        return
    with torch.no_grad():
        for batch in batches:
            try:
                run_forward(spec, spec.forward, batch)
            except IndexError as found:
                raise found from None  # without the thirty lines of the program's own message
    raise IndexError("an index in the batch, such as an id for an embedding, is out of range") from error


_OUT_OF_RANGE = "index out of bounds"
"""What compiled programs say; it is followed by names of variables in generated code."""


class _CannotRunError(Exception):
    """Of a program that is compared with eager; an error of eager's own is none of these."""


@dataclass
class _Entry:
    """A program and what it is of.

    Attributes:
        traced: the step.
        program: compiled from it.
        proven: the parts of the step that have given eager's numbers.
        audits: those of them that are to be compared again.
    """

    traced: TracedStep
    program: Program
    proven: set[int] = field(default_factory=set[int])
    audits: set[int] = field(default_factory=set[int])


class Programs:
    """The programs of a step, the last used first. Each part of one is compared with eager where it runs first.

    Args:
        spec: the step.
        eager: runs a step that no program holds for.
        refuse: is told why a program must not be used: what differs where it does not give eager's numbers, or why it
            cannot run.

    Attributes:
        missed: steps that no program held for; whoever looks at it may set it back.
        missed_in_a_row: of these, since one last held.
        why_missed: the reason of the last of them.
        added: programs taken up so far, those that are gone among them.
    """

    def __init__(self, spec: StepSpec, eager: EagerEngine, refuse: Refuse) -> None:
        self.missed = 0
        self.missed_in_a_row = 0
        self.why_missed = ""
        self.added = 0
        self._missed_since_added = 0
        self._spec = spec
        self._eager = eager
        self._refuse = refuse
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        """How many programs there are."""
        return len(self._entries)

    @property
    def first(self) -> TracedStep:
        """The step whose program was used last."""
        return self._entries[0].traced

    @property
    def are_proven(self) -> bool:
        """True where every part of the program that was used last has been compared."""
        return len(self._entries[0].proven) == len(self._entries[0].traced.parts)

    @property
    def _may_rebind(self) -> bool:
        """Rebinding looks at every tensor: not before each of many steps that it does not help."""
        return self.missed_in_a_row < 8 or self.missed_in_a_row % 64 == 0

    def add(self, traced: TracedStep, program: Program) -> None:
        """Takes a program up; it is tried first."""
        self._entries.insert(0, _Entry(traced, program))
        del self._entries[MAX_PROGRAMS:]
        self.added += 1
        self._missed_since_added = 0

    def wants_one(self, batch: Batch) -> bool:
        """True where none holds for a batch, and it is to have one: it is the first, or enough steps were missed."""
        is_due = self.added == 0 or self._missed_since_added >= ENOUGH_STEPS
        # Not before the optimizer's first step, in which its state is made.
        return is_due and self._eager.has_stepped and not self.hold(batch)

    def told(self, choice: Choice) -> Choice:
        """The choice of an engine, with the number of steps that ran eagerly because no program held for them."""
        if not self.missed:
            return choice
        steps = "1 step ran eagerly," if self.missed == 1 else f"{self.missed:,} steps ran eagerly, the last"
        reason = f"{choice.reason}; {steps} because this differed: {self.why_missed}"
        return Choice("eager" if self.missed_in_a_row >= ENOUGH_STEPS else choice.value, reason)

    def hold(self, batch: Batch) -> bool:
        """True where any of the programs holds for a batch, and the user's objects are as it knows them."""
        return any(not isinstance(entry.traced.inputs(batch), Mismatch) for entry in self._entries)

    def audit(self) -> None:
        """Has the program that was used last compared with eager again, where memory allows that."""
        self._entries[0].audits = set(self._entries[0].proven)

    def drop(self, traced: TracedStep) -> None:
        """Drops the program of a step, if it is there."""
        self._entries = [entry for entry in self._entries if entry.traced is not traced]

    def clear(self) -> None:
        """Drops all programs."""
        self._entries.clear()

    def step(self, batch: Batch) -> Tensor:
        """One step, by the first program that holds for the batch and the user's objects as they are, else eagerly."""
        for index, entry in enumerate(self._entries):
            inputs = entry.traced.inputs(batch)
            if isinstance(inputs, Mismatch) and self._may_rebind and entry.traced.rebind(batch):
                inputs = entry.traced.inputs(batch)
            if isinstance(inputs, Mismatch):
                self.why_missed = inputs.reason
                continue
            self.missed_in_a_row = 0
            if index:
                self._entries.insert(0, self._entries.pop(index))
            if self._is_to_be_proven(entry):
                return self._prove(entry, batch)
            try:
                loss = self._run(entry, inputs, batch)
            except EngineError as error:  # a graph that must be captured anew, and cannot be; nothing has changed
                return self._drop(entry, str(error), batch)
            self._spec.metrics.count(1.0)
            if entry.traced.why_eager is not None:
                self._eager.apply_if_due()
            return loss
        if self._entries:
            self.missed += 1
            self.missed_in_a_row += 1
            self._missed_since_added += 1
        return self._eager.step(batch)

    def _run(self, entry: _Entry, inputs: list[Tensor], batch: Batch) -> Tensor:
        try:
            loss = entry.program.run(inputs)
        except RuntimeError as error:
            raise_index_error(self._spec, [batch], error)
            raise
        entry.traced.finish()
        return loss

    def _is_to_be_proven(self, entry: _Entry) -> bool:
        due = entry.traced.due
        if due not in entry.proven:
            return True
        if due in entry.audits and not self._fits_twice(entry.traced):
            entry.audits.discard(due)
        return due in entry.audits

    def _fits_twice(self, traced: TracedStep) -> bool:
        return fits_in_memory([*traced.tensors, *traced.gradients], self._spec.device)

    def _prove(self, entry: _Entry, batch: Batch) -> Tensor:
        """One step both ways; the state is eager's."""
        traced, due = entry.traced, entry.traced.due
        if not self._fits_twice(traced):
            return self._drop(
                entry, "two copies of the step's state, to check the program with, do not fit in memory", batch
            )

        def by_program(batch: Batch) -> Tensor:
            inputs = traced.inputs(batch)
            assert not isinstance(inputs, Mismatch)
            try:
                return self._run(entry, inputs, batch)
            except EngineError as error:
                raise _CannotRunError(str(error)) from error

        def state_after_eager() -> list[Tensor]:
            if isinstance(traced.inputs(batch), Mismatch):
                traced.rebind(batch)  # a buffer that forward assigns anew
            return traced.tensors

        # An optimizer that steps eagerly may keep Python state, which could not be brought back: it steps once.
        eager = self._eager.step if traced.why_eager is None else self._eager.gather
        try:
            loss, difference = compare_steps(
                traced.tensors,
                traced.kinds,
                self._spec.device,
                eager,
                by_program,
                batch,
                self._spec,
                partial(is_eagers_rounding, traced, by_program, batch),
                state_after_eager,
            )
        except _CannotRunError as error:  # nor has eager: the program's turn comes first
            return self._drop(entry, str(error), batch)
        if traced.why_eager is not None:
            self._eager.apply_if_due()
        if difference is not None:
            self.drop(traced)
            self._refuse(f"its numbers differ from eager's: {difference}", traced, is_wrong=True)
        entry.proven.add(due)
        entry.audits.discard(due)
        return loss

    def _drop(self, entry: _Entry, reason: str, batch: Batch) -> Tensor:
        """Goes on without a program that cannot run; the step is eager's."""
        self.drop(entry.traced)
        self._refuse(reason, entry.traced, is_wrong=False)
        return self._eager.step(batch)
