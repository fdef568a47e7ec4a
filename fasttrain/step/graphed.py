"""The graphed engine: the whole step in one CUDA graph, then several steps a launch.

What is captured is the traced step, compiled by torch into fewer kernels: its guards, its options as inputs and its
parity check are those of the compiled engine. Captured operator by operator, the optimizer alone would be hundreds of
launches; eager's own calls would need guards, and rates and betas that schedulers may move, all over again.

Random numbers come from the device's default generator, whose place in its stream each replay moves on as eager's
kernels would: dropout draws eager's masks. Not measured yet: there are no figures of this engine.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.step.capture import CapturedSpan, CapturedStep, CudaLane, Lane
from fasttrain.step.eager import EagerEngine
from fasttrain.step.guards import BatchLayout
from fasttrain.step.parity import compare_steps
from fasttrain.step.replay import MAX_PROGRAMS, Programs
from fasttrain.step.spec import StepSpec, run_passes
from fasttrain.step.trace import Mismatch, TracedStep, trace_step

__all__ = ["GraphedEngine", "SpanGraphs"]

Batch = Any

MAX_CAPTURES = 16
"""So often at most a step is traced and compiled; of its graphs, `MAX_PROGRAMS` are kept.

So often at most, too, launches of several steps are made anew."""

MISSED_LAUNCHES = 4
"""After so many in a row that ran step by step, launches are made for the step and the data that there are now."""

SETTLING_STEPS = 1_000
"""In so many, graphs are made and measured."""

TRIAL_ROUNDS = 5
"""Spans of a trial for each number of steps, besides a first one in which graphs are made and compared."""

MARGIN = 0.98
"""More steps a launch are kept if a step then takes less than this share of the time."""


class GraphedEngine:
    """Runs steps eagerly until the optimizer has stepped once, then as one CUDA graph for each shape that is frequent.

    Step counts that the optimizer keeps on the host are moved to their parameters' device, where they stay.

    Args:
        spec: the step.
        choice: why it is this engine.
        lane: what captures and replays; None for CUDA's.

    Attributes:
        compile_s: seconds that steps have waited for traces, compilers and captures; None where there was no wait yet.

    Raises:
        EngineError: the step is not on CUDA, or (from a step) it cannot be captured or gives other numbers than eager.
    """

    def __init__(self, spec: StepSpec, choice: Choice, lane: Lane | None = None) -> None:
        self._lane = CudaLane(spec.device) if lane is None else lane
        self.compile_s: float | None = None
        self._spec = spec
        self._choice = choice
        self._eager = EagerEngine(spec, choice)
        self._programs = Programs(spec, self._eager, _refuse)
        self._made: list[CapturedStep] = []
        self._spans: SpanGraphs | None = None
        self._span_graphs = 0

    @property
    def choice(self) -> Choice:
        """What runs, and why; with the number of steps that ran eagerly because no graph held for them."""
        reason = self._choice.reason + ("" if self._spans is None else self._spans.reason)
        return self._programs.told(Choice(self._choice.value, reason))

    def step(self, batch: Batch) -> Tensor:
        """See `Engine.step`."""
        if self._programs.added < MAX_CAPTURES and self._programs.wants_one(batch):
            self._make(batch)
        return self._programs.step(batch)

    @property
    def span(self) -> int:
        """See `Engine.span`: several, once single steps run by graph."""
        if self._spans is not None:
            return self._spans.size
        is_ready = self._spec.accumulate == 1 and len(self._programs) > 0 and self._programs.are_proven
        return SpanGraphs.MOST_STEPS if is_ready else 1

    def steps(self, span: Span) -> Tensor:
        """See `Engine.steps`."""
        spans = self._spans
        if spans is not None and (spans.missed_in_a_row < MISSED_LAUNCHES or self._span_graphs == MAX_CAPTURES):
            return spans.run(span)
        losses = self._one_by_one(span)  # the step that was used last is now that of these batches
        made = [each for each in self._made if len(self._programs) and each.traced is self._programs.first]
        self._spans = SpanGraphs(made[0], self._one_by_one, self._lane, self._waited) if made else None
        self._span_graphs += 1
        return losses

    def flush(self) -> None:
        """See `Engine.flush`."""
        self._eager.flush()

    def expect(self, steps: int) -> None:
        """See `Engine.expect`: what was asked for is captured, whether it pays or not."""

    def settle(self, batches: Iterable[Batch]) -> None:
        """See `Engine.settle`: the graph is made with the step after the optimizer's first, those of spans after it."""
        for _ in run_passes(self, batches, SETTLING_STEPS):
            is_decided = self._spans is not None and self._spans.is_decided
            if len(self._programs) and self._programs.are_proven and (self.span == 1 or is_decided):
                return

    def close(self) -> None:
        """See `Engine.close`: nothing runs beside the training."""

    def _one_by_one(self, span: Span) -> Tensor:
        return torch.stack([self.step(batch) for batch in span.batches()])

    def _make(self, batch: Batch) -> None:
        begin = time.perf_counter()
        num_leaves = _num_fixed_leaves(batch)
        _bring_counts_home(self._spec.optimizer)
        traced = trace_step(self._spec, batch)
        _refuse_unfit(traced)
        captured = CapturedStep(traced, num_leaves, self._lane, self._waited)
        self._programs.add(traced, captured)
        self._made = [captured, *self._made][:MAX_PROGRAMS]
        self._waited(time.perf_counter() - begin)

    def _waited(self, seconds: float) -> None:
        self.compile_s = (self.compile_s or 0.0) + seconds


def _num_fixed_leaves(batch: Batch) -> int:
    """How many tensors a batch has.

    Raises:
        EngineError: one of them has another size in each batch.
    """
    open_dims = BatchLayout(batch).open_dims
    if any(open_dims):
        raise EngineError(
            "engine 'graphed' needs batches of one size, and these have rows of unequal length (Ragged): use another "
            "engine, or pad the rows"
        )
    return len(open_dims)


def _bring_counts_home(optimizer: torch.optim.Optimizer) -> None:
    """Moves scalars of the optimizer's state to their parameters' device: a graph cannot change what is on the host."""
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.dim() == 0 and value.device != parameter.device:
                entries[name] = value.to(parameter.device)


def _refuse_unfit(traced: TracedStep) -> None:
    """Raises EngineError for what no graph can hold."""
    if traced.why_eager is not None:
        optimizer = type(traced.spec.optimizer).__name__
        raise EngineError(
            f"engine 'graphed' needs the step of {optimizer} in its graph, where it cannot be: {traced.why_eager}"
        )
    for part in traced.parts:
        for size, _, _, device in part.kinds:
            if device.type != traced.spec.device.type:
                raise EngineError(
                    f"a tensor of shape {list(size)} that the step reads is on {device}, and a CUDA graph would keep "
                    f"the value that it has now: move it to {traced.spec.device}"
                )


def _refuse(difference: str) -> None:
    raise EngineError(f"engine 'graphed' gives other numbers than eager on this step: {difference}")


class SpanGraphs:
    """Runs spans as launches of one, four or sixteen steps, in turn until it is measured which is fastest.

    Args:
        step: what a single step runs by.
        one_by_one: runs a span by single steps, which have been compared with eager; returns the losses.
        lane: of its device.
        note_wait: is told the seconds that each capture took.

    Attributes:
        reason: what was measured, for the reason of a choice.
        missed_in_a_row: launches for which a graph did not hold, since one did.
    """

    MOST_STEPS = 16
    SIZES = (1, 4, MOST_STEPS)

    def __init__(
        self,
        step: CapturedStep,
        one_by_one: Callable[[Span], Tensor],
        lane: Lane,
        note_wait: Callable[[float], None],
    ) -> None:
        self.reason = ""
        self.missed_in_a_row = 0
        self._step = step
        self._one_by_one = one_by_one
        self._lane = lane
        self._note_wait = note_wait
        self._graphs: dict[int, CapturedSpan] = {}
        self._times: dict[int, list[float]] = {size: [] for size in self.SIZES}
        self._size: int | None = None  # not known yet

    @property
    def size(self) -> int:
        """Steps of the spans that are wanted; 1: none."""
        return self.MOST_STEPS if self._size is None else self._size

    @property
    def is_decided(self) -> bool:
        """Whether it is known what is fastest."""
        return self._size is not None

    def run(self, span: Span) -> Tensor:
        """The steps of a span; returns the losses, [steps]. Waits for the device while it is not decided."""
        if self._size is not None:
            return self._run(span, self._size)
        size = min(self._times, key=lambda each: len(self._times[each]))
        losses, seconds = self._lane.timed(lambda: self._run(span, size))
        if size in self._times:  # no longer, where its graph was refused
            self._times[size].append(seconds / span.steps)
        if self._size is None and all(len(times) > TRIAL_ROUNDS for times in self._times.values()):
            self._decide()
        return losses

    def _run(self, span: Span, size: int) -> Tensor:
        if size == 1 or span.steps % size:
            return self._one_by_one(span)
        return torch.cat([self._launch(piece) for piece in _pieces(span, size)])

    def _launch(self, span: Span) -> Tensor:
        if span.steps not in self._times:
            return self._one_by_one(span)
        try:
            graph = self._graphs.get(span.steps)
            if graph is None:
                return self._prove(span)
            losses = graph.run(span)
        except EngineError as error:
            return self._refuse(span, str(error))
        if isinstance(losses, Mismatch):
            self.missed_in_a_row += 1
            return self._one_by_one(span)
        self.missed_in_a_row = 0
        self._step.traced.spec.metrics.count(float(span.steps))
        return losses

    def _prove(self, span: Span) -> Tensor:
        """Makes a graph of so many steps, and compares it with single steps; the state is theirs."""
        traced = self._step.traced
        graph = CapturedSpan(traced, self._step.operators, span, self._lane, self._note_wait)
        losses: list[Tensor] = []

        def one_by_one(span: Span) -> Tensor:
            losses.append(self._one_by_one(span))
            return losses[0].sum()

        def as_one(span: Span) -> Tensor:
            found = graph.run(span)
            if isinstance(found, Mismatch):
                raise EngineError(f"the step has changed: {found.reason}")
            return found.sum()

        _, difference = compare_steps(traced.tensors, traced.kinds, traced.spec.device, one_by_one, as_one, span)
        if difference is not None:
            self._drop(span.steps, f"other numbers than single steps: {difference}")
        else:
            self._graphs[span.steps] = graph
        return losses[0]

    def _refuse(self, span: Span, reason: str) -> Tensor:
        self._drop(span.steps, reason)
        return self._one_by_one(span)

    def _drop(self, size: int, reason: str) -> None:
        """Goes on without launches of so many steps."""
        self.reason += f"; {size} steps a launch were refused: {reason}"
        self._graphs.pop(size, None)
        del self._times[size]
        if self._size == size or len(self._times) == 1:
            self._size = 1

    def _decide(self) -> None:
        medians = {size: statistics.median(times[1:]) for size, times in self._times.items()}
        chosen = 1
        for size, median in medians.items():
            chosen = size if median < MARGIN * medians[chosen] else chosen
        self._size = chosen
        self._graphs = {size: graph for size, graph in self._graphs.items() if size == chosen}
        measured = ", ".join(f"{size}: {median * 1e6:.0f}" for size, median in medians.items())
        self.reason += f"; {chosen} steps a launch, measured us a step by steps a launch: {measured}"


def _pieces(span: Span, steps: int) -> list[Span]:
    """The span in spans of so many steps."""
    rows = span.source.batch_size * steps
    return [
        dataclasses.replace(span, rows=span.rows[at : at + rows], host_rows=span.host_rows[at : at + rows], steps=steps)
        for at in range(0, len(span.host_rows), rows)
    ]
