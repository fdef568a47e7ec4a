"""A compiler, a child and a clock by hand: what `auto` decides, without compiling anything and without waiting."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.data.resident import ResidentBatches, Span
from fasttrain.errors import EngineError
from fasttrain.step import auto, clock, compiler, launch, trial
from fasttrain.step.build import GraphJob
from fasttrain.step.cache import Verdict
from fasttrain.step.eager import EagerEngine
from fasttrain.step.program import Runner
from fasttrain.step.recorded import TracedGraph
from fasttrain.step.span import TracedSpan
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import StepState
from fasttrain.step.trace import Mismatch, TracedStep
from tests.step.models import ASKED

Batch = tuple[Tensor, Tensor]

TRIAL_ROUNDS = 3
LOOK_STEPS = 64
"""Smaller than in earnest, to keep the tests short."""


class Lab:
    """What the tests turn, and what they read.

    Attributes:
        now: the clock, in seconds; steps move it.
        eager_s: what a step takes eagerly.
        program_s: what it takes by program.
        is_ready: whether the child has finished.
        errors: by method of the compiler or its result, what it raises.
        known: what the cache knows of the job, by the number of rows of the batch.
        is_changing: whether the step is never as it was when it was traced.
        spoil: what a program does to the loss that it returns.
        begun: the pending programs, in order.
        remembered: the verdicts that were kept.
        replayed: steps that were run by a program, one by one.
        span_steps: how many steps are found to be worth one launch.
        span_step_s: what each of them takes in a launch.
        is_span_cached: whether the cache has the program of several steps.
        looked_up: how often it was asked for that.
        is_span_ready: whether the child that makes the program of several steps has finished.
        spoil_span: what that program does to the losses that it returns.
        begun_spans: the pending programs of several steps, in order.
        launched: steps that were run several as one.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.eager_s = 100e-6
        self.program_s = 50e-6
        self.is_ready = False
        self.is_changing = False
        self.errors: dict[str, str] = {}
        self.known: dict[int, Verdict] = {}
        self.spoil: Callable[[Tensor], Tensor] = lambda loss: loss
        self.begun: list[FakePending] = []
        self.remembered: list[Verdict] = []
        self.replayed = 0
        self.span_steps = 1
        self.span_step_s = 25e-6
        self.is_span_cached = False
        self.looked_up = 0
        self.is_span_ready = False
        self.spoil_span: Callable[[Tensor], Tensor] = lambda losses: losses
        self.begun_spans: list[FakeSpanPending] = []
        self.launched = 0

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> Lab:
        """Puts itself in the place of what `auto` uses."""
        lab = cls()
        time: Any = types.SimpleNamespace(perf_counter=lambda: lab.now)
        monkeypatch.setattr(clock, "time", time)
        monkeypatch.setattr(launch, "time", time)
        monkeypatch.setattr(auto, "LOOK_STEPS", LOOK_STEPS)
        monkeypatch.setattr(trial, "ROUNDS", TRIAL_ROUNDS)
        monkeypatch.setattr(launch, "most_steps", lambda *_: lab.span_steps)
        monkeypatch.setattr(launch, "TracedSpan", lambda *given: FakeSpan(lab, *given))
        monkeypatch.setattr(auto, "Compiler", lambda spec: FakeCompiler(lab, spec))
        monkeypatch.setattr(auto, "EagerEngine", lambda spec, choice: TimedEager(lab, spec))
        return lab

    def call(self, name: str) -> None:
        if name in self.errors:
            raise EngineError(self.errors[name])


class TimedEager(EagerEngine):
    def __init__(self, lab: Lab, spec: StepSpec) -> None:
        super().__init__(spec, ASKED)
        self._lab = lab

    def step(self, batch: Batch) -> Tensor:
        self._lab.now += self._lab.eager_s
        return super().step(batch)


class FakeTrace:
    """Holds for batches of one shape, unless the test says that the step has changed."""

    due = 0
    parts = ("whole",)
    is_whole = False
    gradients = ()
    why_eager = None
    remark = ""

    def __init__(self, lab: Lab, spec: StepSpec, batch: Batch) -> None:
        state = StepState(spec)
        self.tensors, self.kinds = state.tensors, state.kinds
        self.spec = spec
        self.shape = batch[0].shape
        self.is_stale = lab.is_changing
        self.can_rebind = False
        self._eager = EagerEngine(spec, ASKED)
        self._lab = lab

    def inputs(self, batch: Batch) -> list[Tensor] | Mismatch:
        if self.is_stale:
            return Mismatch("an option of a parameter group")
        return list(batch) if batch[0].shape == self.shape else Mismatch("the size of input 0")

    def leaves(self, batch: Batch) -> list[Tensor]:
        return list(batch)

    def rebind(self, _batch: Any = None) -> bool:
        took_up = self.is_stale and self.can_rebind
        self.is_stale = self.is_stale and not took_up
        return took_up

    def finish(self) -> None:
        """Nothing is left to do."""

    def run(self, inputs: list[Tensor]) -> Tensor:
        """As a program does: everything but the count of batches."""
        self._lab.now += self._lab.program_s
        self._lab.replayed += 1
        loss = self._eager.step((inputs[0], inputs[1]))
        self.spec.metrics.count(-1.0)
        return self._lab.spoil(loss)

    def run_all(self, span: Span) -> Tensor:
        """Several steps, as a program of them does."""
        losses = self._eager.steps(span)
        self.spec.metrics.count(-float(span.steps))
        return losses


class FakeSpan:
    """Holds for spans of one source, while its step holds."""

    def __init__(self, lab: Lab, step: FakeTrace, batch: Batch, source: ResidentBatches, steps: int) -> None:
        lab.call("trace several")
        assert not isinstance(step.inputs(batch), Mismatch)
        self.step = step
        self.source = source
        self.steps = steps
        self._lab = lab

    def inputs(self, span: Span, *, is_checked: bool = False) -> list[Span] | Mismatch:
        if span.source is not self.source or self.step.is_stale:
            return Mismatch("the resident data")
        return [span]

    def run(self, inputs: list[Span]) -> Tensor:
        """As a program does: everything but the count of batches."""
        [span] = inputs
        self._lab.now += self._lab.span_step_s * span.steps
        self._lab.launched += span.steps
        losses = self.step.run_all(span)
        return self._lab.spoil_span(losses)


class FakeSpanPending:
    def __init__(self, lab: Lab, traced: FakeSpan) -> None:
        self.traced = traced
        self.is_closed = self.was_waited_for = False
        self._lab = lab

    def is_ready(self) -> bool:
        self._lab.call("are several ready")
        return self._lab.is_span_ready

    def wait(self) -> None:
        self._lab.now += FakePending.compile_s
        self.was_waited_for = self._lab.is_span_ready = True

    def load(self) -> FakeSpan:
        self._lab.call("load several")
        return self.traced

    def close(self) -> None:
        self.is_closed = True


class FakePending:
    trace_s = 0.5
    compile_s = 20.0

    def __init__(self, lab: Lab, spec: StepSpec, batch: Batch) -> None:
        self.traced = FakeTrace(lab, spec, batch)
        self.is_closed = False
        self._lab = lab

    def is_ready(self) -> bool:
        self._lab.call("is_ready")
        return self._lab.is_ready

    def wait(self) -> None:
        self._lab.now += self.compile_s
        self._lab.is_ready = True

    def load(self) -> FakeTrace:
        self._lab.call("load")
        return self.traced

    def close(self) -> None:
        self.is_closed = True


class FakeCompiler:
    def __init__(self, lab: Lab, spec: StepSpec) -> None:
        lab.call("make")
        self._lab = lab
        self._spec = spec

    def begin(self, batch: Batch, *_: Any) -> FakePending:
        self._lab.call("begin")
        pending = FakePending(self._lab, self._spec, batch)
        self._lab.now += pending.trace_s
        self._lab.begun.append(pending)
        return pending

    def pending(self, traced: FakeSpan) -> FakeSpanPending:
        self._lab.call("begin several")
        pending = FakeSpanPending(self._lab, traced)
        self._lab.begun_spans.append(pending)
        return pending

    def has(self, traced: FakeSpan) -> bool:
        self._lab.looked_up += 1
        return self._lab.is_span_cached

    def verdict(self, batch: Batch) -> Verdict | None:
        return self._lab.known.get(len(batch[0]))

    def remember(self, verdict: Verdict) -> None:
        self._lab.remembered.append(verdict)


class Graphs:
    """Has steps replayed by the traced graph itself: all but the machine code is real.

    Attributes:
        builds: how many children there would have been.
        replayed: steps that were run by a graph.
        launched: of these, those that were run several as one.
        spoil: what a program does to the loss that it returns.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.builds = 0
        self.replayed = 0
        self.launched = 0
        self.spoil: Callable[[Tensor], Tensor] = lambda loss: loss
        self._folder = folder
        monkeypatch.setattr(compiler, "Build", self._build)
        monkeypatch.setattr(compiler.Pending, "load", lambda pending: GraphProgram(self, pending.traced))

    def _build(self, job: GraphJob, *_: Any) -> InstantBuild:
        self.builds += 1
        return InstantBuild(self._folder / f"{self.builds}.pt2")


class InstantBuild:
    seconds = 1.0

    def __init__(self, package: Path) -> None:
        package.write_bytes(b"a graph needs none")
        self._package = package

    def poll(self) -> Path:
        return self._package

    wait = poll

    def close(self) -> None:
        self._package.unlink(missing_ok=True)


class GraphProgram:
    def __init__(self, graphs: Graphs, traced: TracedStep | TracedSpan) -> None:
        self._graphs = graphs
        self._traced = traced

    @property
    def runners(self) -> list[Runner]:
        return [partial(self._run, part) for part in self._traced.parts]

    def run(self, inputs: list[Tensor]) -> Tensor:
        return self.runners[self._traced.due](inputs)[0]

    @torch.no_grad()
    def _run(self, part: TracedGraph, inputs: list[Tensor]) -> list[Tensor]:
        losses = part.graph(*inputs)
        self._graphs.replayed += losses.numel()
        self._graphs.launched += losses.numel() if isinstance(self._traced, TracedSpan) else 0
        return [self._graphs.spoil(losses)]


HASTE: dict[str, float] = {
    "WARM_STEPS": 1,
    "TIMED_STEPS": 1,
    "POLL_STEPS": 1,
    "TRIAL_S": 0.0,
    "LOOK_STEPS": 8,
}


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `auto` take a program up within ten steps, whether it is faster or not."""
    for name, value in HASTE.items():
        monkeypatch.setattr(auto, name, value)
    monkeypatch.setattr(trial, "ROUNDS", 1)
    monkeypatch.setattr(trial, "MARGIN", 1e9)
    monkeypatch.setattr(auto, "shortfall", lambda *_: None)
