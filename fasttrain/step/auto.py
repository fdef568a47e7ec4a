"""`auto`: starts eagerly, compiles beside the training where that can pay, and keeps what is measured faster.

    measure eager -> consider -> trace (the long stall) -> a child compiles -> parity -> trial -> program, or eager

Each arrow is a method that the next steps run through; whatever goes wrong on the way, training goes on eagerly and
`choice` says why.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.step.build import ChildEndedError
from fasttrain.step.cache import Verdict
from fasttrain.step.clock import Waits
from fasttrain.step.compiler import Compiler, Pending
from fasttrain.step.eager import EagerEngine, eager_meanwhile
from fasttrain.step.launch import Launches
from fasttrain.step.replay import Programs
from fasttrain.step.rung import Rung
from fasttrain.step.span import may_have_spans
from fasttrain.step.spec import StepSpec, run_passes
from fasttrain.step.trace import Mismatch, TracedStep
from fasttrain.step.trial import Trial
from fasttrain.step.worth import shortfall

__all__ = ["AutoEngine"]

Batch = Any

WARM_STEPS = 8
"""Eager steps before any is timed: allocator, caches and the optimizer's state are made in them."""

TIMED_STEPS = 32
"""Eager steps whose median says what a step takes."""

POLL_STEPS = 16
"""Steps between two looks at the child."""

TRIAL_S = 0.002
"""What a round of a trial takes at least, by eager steps."""

AUDIT_STEPS = 20_000
"""Steps between two audits of a running program: one step both ways, compared."""

LOOK_STEPS = 256
MISSED_SHARE = 0.25
MAX_TRACES = 4
"""A running step is traced anew where, of so many steps, more than this share found no program; so often at most."""

SETTLING_STEPS = 4_000
"""`settle` ends after so many, decided or not."""

LAUNCHES_FROM_S = 10.0
"""What the steps to come must take, if several are to be made one program: a child keeps a core busy for a minute."""

CACHED_LAUNCHES_FROM_S = 0.5
"""The same, if the cache has that program. It stops the training for 15 to 25 ms (7 to 12 to find it, 3 to load it, 6
to 9 to prove it; reviews and MLP, one thread) and then takes a quarter to a third off each step."""

EAGER, PROGRAM = "eager", "program"
"""The arms of a trial."""

FOREVER = 1 << 40
"""Steps to expect where a program is wanted whether this job repays it or not."""


class AutoEngine:
    """Runs steps eagerly or by program, whichever is measured faster, and never waits for the compiler.

    Args:
        spec: the step.
        rung: how compiled steps run.
        waits: of the rung.
    """

    def __init__(self, spec: StepSpec, rung: Rung, waits: Waits) -> None:
        self._choice = Choice("eager", "there were too few steps to measure anything")
        self._spec = spec
        self._rung = rung
        self._waits = waits
        self._eager = EagerEngine(spec, self._choice)
        self._programs = Programs(spec, self._eager, self._refuse_program)
        self._launches = Launches(spec, self._programs, rung.launcher, rung.clock, waits)
        self._compiler: Compiler | None = None
        self._pending: Pending[TracedStep] | None = None
        self._verdict: Verdict | None = None
        self._taken_up = self._choice
        self._steps = self._last_step = self._traces = self._mismatches = self._proofs = self._looked = 0
        self._is_settling = self._is_closed = False
        self._eager_times: list[float] = []
        self._program_s = 0.0
        self._trial = Trial([EAGER, PROGRAM])
        self._run: Callable[[Batch], Tensor] = self._measure_eager

    @property
    def compile_s(self) -> float | None:
        """See `Engine.compile_s`: for traces and captures."""
        return self._waits.seconds

    @property
    def choice(self) -> Choice:
        """What runs now, and why."""
        meanwhile = eager_meanwhile()
        if meanwhile is not None:
            return Choice("eager", meanwhile)
        chosen, launches = self._choice, self._launches
        value = self._rung.name if chosen.value != "eager" and launches.is_running else chosen.value
        return Choice(value, chosen.reason + launches.reason)

    def step(self, batch: Batch) -> Tensor:
        """See `Engine.step`."""
        self._steps += 1
        return self._run(batch) if eager_meanwhile() is None else self._eager.step(batch)

    @property
    def span(self) -> int:
        """See `Engine.span`: several, once single steps run by program, where the steps to come repay a launch's."""
        launches = self._launches
        if self._run != self._replay or eager_meanwhile() is not None:
            return 1
        needed_s = LAUNCHES_FROM_S if launches.is_uncached else CACHED_LAUNCHES_FROM_S
        return launches.size if launches.is_made or self._left_s > needed_s else 1

    @property
    def calls(self) -> int:
        """See `Engine.calls`."""
        return self._launches.calls

    def steps(self, span: Span) -> Tensor:
        """See `Engine.steps`."""
        launches = self._launches
        if self._run != self._replay or eager_meanwhile() is not None:
            return torch.stack([self.step(batch) for batch in span.batches()])
        self._steps += span.steps
        self._look(span.steps)
        if not launches.is_made:
            assert self._compiler is not None
            launches.begin(self._compiler, span, only_from_cache=self._left_s <= LAUNCHES_FROM_S)
        elif launches.is_pending:
            launches.take_up(waits=self._is_settling, on_trial=True)
        return launches.run(span)

    def flush(self) -> None:
        """See `Engine.flush`."""
        self._eager.flush()

    def expect(self, steps: int) -> None:
        """See `Engine.expect`."""
        is_more = self._steps + steps > self._last_step
        self._last_step = self._steps + steps
        self._is_closed = False
        if is_more and self._run == self._run_short_of_steps:
            self._run = self._measure_eager

    def close(self) -> None:
        """See `Engine.close`; what was not decided is taken up again where more steps are expected."""
        if self._pending is not None:
            self._programs.drop(self._pending.traced)  # it was not measured to the end
        is_early = self._pending is not None
        is_open = self._run not in (self._replay, self._programs.step)
        self._give_up("training ended before the program was ready" if is_early else self._choice.reason)
        if is_open and not len(self._programs):
            self._run = self._run_short_of_steps
        self._launches.close()
        self._is_closed = True

    def settle(self, batches: Iterable[Batch]) -> None:
        """See `Engine.settle`; some hundred steps are enough."""
        self.expect(FOREVER)
        self._is_settling = True
        has_spans = may_have_spans(batches)
        try:
            for _ in run_passes(self, batches, SETTLING_STEPS):
                if self._run == self._wait_for_program and self._pending is not None:
                    self._wait_for_child(self._pending)
                is_decided = self._run in (self._replay, self._programs.step, self._run_short_of_steps)
                if is_decided and (self._launches.is_settled or not has_spans or not len(self._programs)):
                    break
        finally:
            self._is_settling = False

    def _wait_for_child(self, pending: Pending[TracedStep]) -> None:
        begin = time.perf_counter()
        with suppress(EngineError):  # the step that looks at the child deals with it
            pending.wait()
        self._waits.add(time.perf_counter() - begin)

    @property
    def _eager_s(self) -> float:
        return statistics.median(self._eager_times)

    @property
    def _left_s(self) -> float:
        """What the steps to come take, one by one by program."""
        return (self._last_step - self._steps) * self._program_s

    # Each of these runs one step; `_run` is the one that runs the next.

    def _measure_eager(self, batch: Batch) -> Tensor:
        loss, seconds = self._rung.clock.timed(lambda: self._eager.step(batch))
        if self._steps > WARM_STEPS:
            self._eager_times.append(seconds)
        if len(self._eager_times) >= TIMED_STEPS and self._eager.has_stepped:
            self._run = self._consider
        return loss

    def _consider(self, batch: Batch) -> Tensor:
        missed = self._programs.missed
        loss = self._programs.step(batch)
        if self._programs.missed > missed or not len(self._programs):
            try:
                self._begin_if_worth_it(batch)
            except EngineError as error:
                self._give_up(str(error))
        elif self._steps % LOOK_STEPS == 0:
            self._run = self._replay  # what was missed does not come any more
        return loss

    def _run_short_of_steps(self, batch: Batch) -> Tensor:
        """Until more steps are expected, there is nothing to consider."""
        return self._programs.step(batch)

    def _wait_for_program(self, batch: Batch) -> Tensor:
        assert self._pending is not None
        if self._steps % POLL_STEPS == 0:
            try:
                if self._pending.is_ready():
                    self._run = self._check_parity
            except EngineError as error:
                (self._give_up if isinstance(error, ChildEndedError) else self._refuse)(str(error))
        return self._programs.step(batch)

    def _check_parity(self, batch: Batch) -> Tensor:
        assert self._pending is not None
        traced = self._pending.traced
        inputs = traced.inputs(batch)
        if isinstance(inputs, Mismatch) and self._mismatches % POLL_STEPS == 0 and traced.rebind(batch):
            inputs = traced.inputs(batch)
        if isinstance(inputs, Mismatch):
            return self._missed(batch, inputs.reason)
        try:
            self._programs.add(traced, self._rung.program(self._pending))
        except EngineError as error:
            self._give_up(str(error))
            return self._programs.step(batch)
        self._proofs = 0
        self._run = self._prove
        return self._prove(batch)

    def _prove(self, batch: Batch) -> Tensor:
        """Each part of the program is compared with eager in the first step that it is for."""
        loss = self._programs.step(batch)
        self._proofs += 1
        if self._pending is not None and (self._programs.are_proven or self._proofs == LOOK_STEPS):
            # Whole groups of accumulated batches, or one arm would have the steps with the optimizer in them.
            group = self._spec.accumulate
            self._trial = Trial([EAGER, PROGRAM], steps=group * max(1, round(TRIAL_S / self._eager_s / group)))
            self._run = self._try_out
        return loss

    def _try_out(self, batch: Batch) -> Tensor:
        """One step of the trial, by the arm whose turn it is; both arms train."""
        arm = self._trial.turn
        run = self._eager.step if arm == EAGER else self._programs.step
        loss, seconds = self._rung.clock.timed(lambda: run(batch))
        self._trial.add(arm, seconds)
        if self._trial.is_over and self._pending is not None:  # else the program could not run just now
            self._conclude()
        return loss

    def _replay(self, batch: Batch) -> Tensor:
        self._look(1)
        loss = self._programs.step(batch)
        if not (self._launches.is_considered or self._is_closed) and len(self._programs):
            self._launches.consider(batch)
        return loss

    def _look(self, steps: int) -> None:
        """Now and then, before so many of the steps that are counted already."""
        before = self._steps - steps
        if before // AUDIT_STEPS != self._steps // AUDIT_STEPS:
            self._programs.audit()
            self._launches.audit()
        if before // LOOK_STEPS == self._steps // LOOK_STEPS:
            return
        seen, self._looked = self._steps - self._looked, self._steps
        missed, self._programs.missed = self._programs.missed, 0
        self._choice = self._taken_up
        if missed and missed >= seen - steps:
            self._choice = Choice("eager", f"the program does not hold since this changed: {self._programs.why_missed}")
        if missed > MISSED_SHARE * seen and self._traces < MAX_TRACES and not self._is_closed:
            self._run = self._consider

    # What the steps above decide.

    def _begin_if_worth_it(self, batch: Batch) -> None:
        compiler = self._compiler = self._compiler or Compiler(self._spec)
        known = compiler.verdict(batch)
        if known is not None and known.refused is not None:
            again = "`python -m fasttrain cache clear` has it tried again"
            self._give_up(f"an earlier run of this job refused its program: {known.refused}; {again}")
            return
        missing = shortfall(self._last_step - self._steps, self._eager_s, known, len(list(self._spec.model.modules())))
        if missing is not None:
            self._give_up(missing)
            if not len(self._programs):
                self._run = self._run_short_of_steps
            return
        self._traces, self._mismatches = self._traces + 1, 0
        self._pending = self._rung.begin(compiler, batch)
        self._waits.add(self._pending.trace_s)
        if not len(self._programs):
            self._choice = Choice("eager", "a child process is compiling the step")
        self._run = self._wait_for_program

    def _missed(self, batch: Batch, reason: str) -> Tensor:
        """The program is ready, but not for this step: wait for one that it holds for, then leave it and look again."""
        self._mismatches += 1
        if self._mismatches == LOOK_STEPS and self._traces < MAX_TRACES:
            self._give_up(reason)
            self._run = self._consider
        elif self._mismatches == LOOK_STEPS:
            self._give_up(f"the step kept changing while its program was compiled: {reason}")
        return self._programs.step(batch)

    def _conclude(self) -> None:
        assert self._pending is not None
        eager_s, program_s = self._trial.medians().values()
        is_faster = self._trial.fastest() != EAGER
        self._eager_times = [eager_s]  # beside the program, not some time before: the machine's speed may differ
        measured = f"measured {program_s * 1e6:.0f} us a step, eager {eager_s * 1e6:.0f} us"
        self._remember(program_us=program_s * 1e6, refused=None if is_faster else f"not faster: {measured}")
        traced = self._pending.traced
        self._pending.close()
        self._pending = None
        if is_faster:
            single = self._rung.explain(traced)
            self._choice = self._taken_up = Choice(single.value, measured + single.reason)
            self._program_s = program_s
            self._run = self._replay
        else:
            self._programs.drop(traced)
            self._give_up(f"the compiled program is not faster: {measured}")

    def _refuse_program(self, reason: str, traced: TracedStep, *, is_wrong: bool) -> None:
        """A program gives wrong numbers or cannot run, when it is taken up or later; a lack of memory may pass."""
        is_remembered = is_wrong
        if self._pending is None or self._pending.traced is not traced:
            is_remembered = is_wrong and self._pending is None  # else what is known is of the step that is compiled now
            self._programs.clear()
            self._launches.drop()
            reason = f"while it ran: {reason}"
        (self._refuse if is_remembered else self._give_up)(reason)

    def _refuse(self, reason: str) -> None:
        """The program must not be used, now or in a later run."""
        self._remember(program_us=None, refused=reason)
        self._give_up(f"the compiled program was refused: {reason}")

    def _remember(self, *, program_us: float | None, refused: str | None) -> None:
        assert self._compiler is not None
        times = self._pending or self._verdict  # an audit comes long after the program
        assert times is not None
        self._verdict = Verdict(
            eager_us=self._eager_s * 1e6,
            program_us=program_us,
            trace_s=times.trace_s,
            compile_s=times.compile_s,
            refused=refused,
        )
        self._compiler.remember(self._verdict)

    def _give_up(self, reason: str) -> None:
        """Eager for good, with the programs that there are."""
        if self._pending is not None:
            self._pending.close()
            self._pending = None
        if not len(self._programs):
            self._choice = Choice("eager", reason)
        self._run = self._replay if len(self._programs) else self._programs.step
