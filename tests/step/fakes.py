"""A compiler, a child and a clock by hand: what `auto` decides, without compiling anything and without waiting."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.data.resident import ResidentBatches, Span
from fasttrain.errors import EngineError
from fasttrain.step import candidate, compiler, ladder, timing
from fasttrain.step.build import GraphJob
from fasttrain.step.cache import Verdict
from fasttrain.step.eager import EagerEngine
from fasttrain.step.function import TracedGraph
from fasttrain.step.program import Runner
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import StepState
from fasttrain.step.trace import Mismatch, TracedStep
from fasttrain.step.walk import Loop, TracedWalk, WalkingProgram
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
        walking_s: what a step takes in a program that walks over resident rows.
        walked: the steps of each call of such a program.
        why_single: why steps cannot walk over resident rows; None where they can.
        was_compiled: whether the program was compiled after an earlier run.
        is_seen_again: whether earlier runs of the job were too short, too.
        left: the pending programs whose child was to go on for later runs.
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
        self.walking_s = 25e-6
        self.walked: list[int] = []
        self.why_single: str | None = None
        self.was_compiled = self.is_seen_again = False
        self.left: list[FakePending] = []

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> Lab:
        """Puts itself in the place of what `auto` uses."""
        lab = cls()
        time: Any = types.SimpleNamespace(perf_counter=lambda: lab.now)
        monkeypatch.setattr(timing, "time", time)
        monkeypatch.setattr(ladder, "time", time)
        monkeypatch.setattr(ladder, "LOOK_STEPS", LOOK_STEPS)
        monkeypatch.setattr(timing, "ROUNDS", TRIAL_ROUNDS)
        monkeypatch.setattr(ladder, "Compiler", lambda spec: FakeCompiler(lab, spec))
        monkeypatch.setattr(ladder, "EagerEngine", lambda spec, choice: TimedEager(lab, spec))
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
    graph = torch.fx.symbolic_trace(lambda x: x.cannot_run())
    parts = (types.SimpleNamespace(part="whole", graph=graph, closed_over=(), reached=()),)
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


class FakeWalk(TracedWalk):
    """Holds for spans of one source, while its step holds."""

    def __init__(self, lab: Lab, step: FakeTrace, source: ResidentBatches) -> None:
        lab.call("walk")
        self.step: Any = step
        self.source = weakref.ref(source)
        self.most_steps = 1_024
        self._lab = lab

    @property
    def steps_done(self) -> int:
        return 0

    def take(self, source: ResidentBatches) -> bool:
        return False

    def inputs_of(self, span: Span) -> list[Any] | Mismatch:
        if span.source is not self.source():
            return Mismatch("the resident data")
        return Mismatch("an option of a parameter group") if self.step.is_stale else [span]

    def run(self, span: Span) -> Tensor | Mismatch:
        """As a program does: everything but the count of batches."""
        found = self.inputs_of(span)
        if isinstance(found, Mismatch):
            return found
        self._lab.now += self._lab.walking_s * span.steps
        self._lab.replayed += span.steps
        self._lab.walked.append(span.steps)
        return self._lab.spoil(self.step.run_all(span))


class FakePending:
    trace_s = 0.5
    compile_s = 20.0

    def __init__(self, lab: Lab, spec: StepSpec, work: Any) -> None:
        self.traced: Any = FakeTrace(lab, spec, work.batch() if isinstance(work, Span) else work)
        if isinstance(work, Span) and lab.why_single is None:
            self.traced = FakeWalk(lab, self.traced, work.source)
        self.is_closed = False
        self._lab = lab

    @property
    def step(self) -> FakeTrace:
        return self.traced.step if isinstance(self.traced, FakeWalk) else self.traced

    def is_ready(self) -> bool:
        self._lab.call("is_ready")
        return self._lab.is_ready

    def wait(self) -> None:
        self._lab.now += self.compile_s
        self._lab.is_ready = True

    def load(self) -> Any:
        self._lab.call("load")
        return self.traced

    def close(self) -> None:
        self.is_closed = True


class FakeCompiler:
    def __init__(self, lab: Lab, spec: StepSpec) -> None:
        lab.call("make")
        self.why_single = lab.why_single or ""
        self._lab = lab
        self._spec = spec

    def begin(self, work: Any, *_: Any) -> FakePending:
        self._lab.call("begin")
        pending = FakePending(self._lab, self._spec, work)
        self._lab.now += pending.trace_s
        self._lab.begun.append(pending)
        return pending

    def verdict(self, work: Any) -> Verdict | None:
        return self._lab.known.get(len((work.batch() if isinstance(work, Span) else work)[0]))

    def is_ready(self) -> bool:
        return self._lab.was_compiled

    def is_seen_again(self) -> bool:
        return self._lab.is_seen_again

    def leave(self, pending: FakePending) -> int | None:
        self._lab.left.append(pending)
        return 4242

    def remember(self, verdict: Verdict) -> None:
        self._lab.remembered.append(verdict)


class Graphs:
    """Has steps replayed by the traced graph itself: all but the machine code is real.

    Attributes:
        builds: how many children there would have been.
        replayed: steps that were run by a graph.
        walked: of these, those of a program that walks over resident rows.
        spoil: what a program does to the loss that it returns.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.builds = 0
        self.replayed = 0
        self.walked = 0
        self.spoil: Callable[[Tensor], Tensor] = lambda loss: loss
        self._folder = folder
        monkeypatch.setattr(compiler, "Build", self._build)
        monkeypatch.setattr(compiler.Pending, "load", lambda pending: self._load(pending))

    def _load(self, pending: Any) -> GraphProgram | GraphWalk:
        walks = isinstance(pending.traced, TracedWalk)
        return GraphWalk(self, pending.traced) if walks else GraphProgram(self, pending.traced)

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
    def __init__(self, graphs: Graphs, traced: TracedStep) -> None:
        self._graphs = graphs
        self._traced = traced

    @property
    def runners(self) -> list[Runner]:
        return [partial(self._run, part) for part in self._traced.parts]

    def run(self, inputs: list[Tensor]) -> Tensor:
        return self.runners[self._traced.due](inputs)[0]

    @torch.no_grad()
    def _run(self, part: TracedGraph, inputs: list[Tensor]) -> list[Tensor]:
        self._graphs.replayed += 1
        return [self._graphs.spoil(part.graph(*inputs))]


class GraphWalk(WalkingProgram):
    """What loads nothing."""

    def __init__(self, graphs: Graphs, traced: TracedWalk) -> None:
        self._graphs = graphs
        super().__init__([], traced)

    def run(self, span: Span) -> Tensor | Mismatch:
        losses = super().run(span)
        return losses if isinstance(losses, Mismatch) else self._graphs.spoil(losses)

    def _loaded(self, _packages: Sequence[Path]) -> Loop:
        @torch.no_grad()
        def loop(inputs: list[Tensor], steps: int) -> None:
            for _ in range(steps):
                self.parts[0].graph(*inputs)
            self._graphs.replayed += steps
            self._graphs.walked += steps

        return loop


HASTE: dict[str, float] = {
    "WARM_STEPS": 1,
    "TIMED_STEPS": 1,
    "POLL_STEPS": 1,
    "TRIAL_S": 0.0,
    "LOOK_STEPS": 8,
    "MAX_EAGER_SPAN": 8,
}


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `auto` take a program up within ten steps, whether it is faster or not."""
    for name, value in HASTE.items():
        monkeypatch.setattr(ladder, name, value)
    monkeypatch.setattr(candidate, "VERIFIED_BATCHES", 1)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "MARGIN", 1e9)
    monkeypatch.setattr(ladder, "shortfall", lambda *_, **__: None)
