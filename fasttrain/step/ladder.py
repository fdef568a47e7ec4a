"""The ladder: eager steps at its foot, compiled steps above, each verified before it is used.

A `Candidate` is a compiled form of the step on its way up:

    compiling -> verifying -> on trial -> adopted
    (any of these) -> dropped, for a reason that `Ladder.choice` tells

A child process compiles while the training goes on eagerly. A loaded program is compared with eager steps on several
real batches. `auto` then measures both in turn and adopts the faster; `compiled` and `graphed` wait for the compiler
and adopt what was verified, or raise. These are the only differences between the engines.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.step.build import AHEAD_S, ChildEndedError
from fasttrain.step.cache import Verdict
from fasttrain.step.candidate import CALLED_STEPS, Backend, Candidate, CannotRunError, Missed, Stage, Work
from fasttrain.step.compiler import Compiler, shortfall
from fasttrain.step.eager import EagerEngine, eager_meanwhile, raise_index_error
from fasttrain.step.spec import StepSpec, run_passes
from fasttrain.step.state import fits_in_memory
from fasttrain.step.timing import Trial, Waits
from fasttrain.step.trace import Mismatch
from fasttrain.step.walk import StepsFailedError, TracedWalk, kind_of

__all__ = ["Ladder"]

Batch = Any

WARM_STEPS = 8
"""Eager steps before any is timed: allocator, caches and the optimizer's state are made in them."""

TIMED_STEPS = 32
"""Eager steps whose median is the time of a step."""

POLL_STEPS = 16
"""Steps between two looks at the compiling child."""

VERIFIED_SHARE = 0.005
"""Upper bound on the share of the training time that is spent on later verifications."""

LEAST_UNVERIFIED = 1_000
"""Steps between two later verifications, at least."""

TRIAL_S = 0.002
"""Minimum duration of a round of a trial, measured in eager steps."""

LOOK_STEPS = 256
MISSED_SHARE = 0.25
MAX_CANDIDATES = 4
"""`auto` compiles again where, of LOOK_STEPS steps, more than MISSED_SHARE found no program. An engine makes at most
MAX_CANDIDATES programs and keeps as many: steps that change all the time end up eager."""

OTHERS_PATIENCE = 16
"""A candidate whose batches do not come any more, while another program holds for those that come, is left after so
many times LOOK_STEPS."""

ENOUGH_MISSED, MISSED_SHARE_WHERE_ASKED = 16, 0.05
"""An engine that waits for the compiler compiles again once this many steps had no matching program, if they are more
than this share of all: the short batch that ends a long epoch runs eagerly."""

SETTLING_STEPS = 4_000
"""`settle` ends after so many, decided or not."""

CALL_S = 0.05
"""Time of the steps of one call: progress, Ctrl-C and the guards wait for it."""

MAX_EAGER_SPAN = 32
"""Resident batches that are gathered at once for eager steps: 8 at once make a step of the reviews 15% slower."""

FOREVER = 1 << 40
"""A number of expected steps that makes compiling always pay."""

EAGER, PROGRAM = "eager", "program"
"""The arms of a trial."""


class Phase(Enum):
    """What an engine does besides training."""

    MEASURING = "measuring eager steps"
    CONSIDERING = "deciding whether to compile"
    CLIMBING = "a candidate is under way"
    DECIDED = "it is decided what runs"
    SHORT = "too few steps are expected"


class Ladder:
    """Runs steps eagerly, or by the first adopted candidate that holds for them (see `Engine`).

    Args:
        spec: the step.
        choice: the engine's name and why it is this one, until something is decided.
        backend: how compiled steps run.
        waits: is told the seconds that steps have waited for traces and compilers.
        waits_for_compiler: True: `compiled` and `graphed`: the second step waits for the compiler, what is verified is
            adopted, and what cannot run raises EngineError. False: `auto`: nothing waits, only what is measured faster
            is adopted, and whatever fails leaves the steps eager.
    """

    def __init__(
        self, spec: StepSpec, choice: Choice, backend: Backend, waits: Waits, *, waits_for_compiler: bool
    ) -> None:
        self._asked = choice
        self._choice = choice
        self._spec = spec
        self._backend = backend
        self._waits = waits
        self._waits_for_compiler = waits_for_compiler
        self._eager = EagerEngine(spec, choice)
        self._compiler = Compiler(spec) if waits_for_compiler else None
        self._candidates: list[Candidate] = []  # those that are loaded, the last used first
        self._rising: Candidate | None = None
        self._phase = Phase.MEASURING
        self._missed = Missed()
        self._eager_times: deque[float] = deque(maxlen=TIMED_STEPS)
        self._eager_s: float | None = None
        self._trial = Trial([EAGER, PROGRAM])
        self._verdict: Verdict | None = None
        self._refused: str | None = None
        self._steps = self._last_step = self._looked = self._next_poll = 0
        self._next_verification = FOREVER
        self._begun = self._begun_at = self._rising_steps = 0
        self._rising_missed = 0.0
        self._is_closed = self._is_settling = False
        self._is_for_later = False  # whether what is compiled is to serve later runs
        self._single: set[object] = set()  # kinds of resident data that the step cannot walk over
        self._why_single = ""
        self._has_seen_span = False

    # The engine's contract.

    @property
    def compile_s(self) -> float | None:
        """See `Engine.compile_s`."""
        return self._waits.seconds

    @property
    def candidates(self) -> list[Candidate]:
        """All that are not dropped; they can be printed."""
        rising = [] if self._rising is None or self._rising in self._candidates else [self._rising]
        return [*self._candidates, *rising]

    @property
    def choice(self) -> Choice:
        """What runs now, and why; with the number of steps that ran eagerly because no program held for them."""
        meanwhile = eager_meanwhile(self._spec)
        if meanwhile is not None:
            return Choice("eager", meanwhile)
        value, reason = self._choice.value, self._choice.reason
        if self._waits_for_compiler and self._candidates:
            single = self._backend.explain(self._candidates[0].step, walks=self._candidates[0].walks)
            value, reason = single.value, reason + single.reason
        missed = self._missed
        if missed.count and self._candidates:
            steps = "1 step ran eagerly," if missed.count == 1 else f"{missed.count:,} steps ran eagerly, the last"
            reason += f"; {steps} because this differed: {missed.reason}"
            value = "eager" if missed.in_a_row >= ENOUGH_MISSED else value
        if self._why_single and self._candidates:
            reason += f"; one step a call: {self._why_single}"
        return Choice(value, reason)

    @property
    def span(self) -> int:
        """See `Engine.span`."""
        adopted = [each for each in self._candidates if each.walks and each.stage is Stage.ADOPTED]
        if adopted:
            step_s, most = adopted[0].step_s, adopted[0].most_steps
        elif self._single or (self._phase in (Phase.SHORT, Phase.DECIDED) and not self._candidates):
            return 0  # eager, whose batches are gathered in larger blocks
        else:
            step_s, most = self._eager_s, MAX_EAGER_SPAN
        return min(most, 1 if step_s is None else max(1, int(CALL_S / max(step_s, 1e-9))))

    def step(self, batch: Batch) -> Tensor:
        """See `Engine.step`."""
        return self._advance(batch, 1)

    def steps(self, span: Span) -> Tensor:
        """See `Engine.steps`."""
        return self._advance(span, span.steps)

    def flush(self) -> None:
        """See `Engine.flush`."""
        self._eager.flush()

    def expect(self, steps: int) -> None:
        """See `Engine.expect`."""
        is_more = self._steps + steps > self._last_step
        self._last_step = self._steps + steps
        self._is_closed = False
        if is_more and self._phase is Phase.SHORT:
            self._phase = Phase.MEASURING

    def settle(self, batches: Iterable[Batch]) -> None:
        """See `Engine.settle`; some hundred steps are enough."""
        self.expect(FOREVER)
        self._is_settling = True
        try:
            for _ in run_passes(self, batches, SETTLING_STEPS):
                is_timed = not any(candidate.is_to_be_timed for candidate in self._candidates[:1])
                if self._phase in (Phase.DECIDED, Phase.SHORT) and is_timed:
                    break
        finally:
            self._is_settling = False

    def close(self) -> None:
        """See `Engine.close`; what was not decided is taken up again where more steps are expected."""
        if self._waits_for_compiler:
            return  # nothing runs beside its steps
        if self._phase is Phase.CLIMBING:
            self._give_up("training ended before the program was ready" + self._left_for_later())
            self._phase = Phase.DECIDED if self._candidates else Phase.SHORT
        elif self._phase in (Phase.MEASURING, Phase.CONSIDERING):
            self._phase = Phase.DECIDED if self._candidates else Phase.SHORT
        self._is_closed = True

    def _left_for_later(self) -> str:
        """Has the child go on where this job was seen before; returns what a reason tells of it."""
        rising, compiler = self._rising, self._compiler
        if rising is None or rising.stage is not Stage.COMPILING or compiler is None:
            return ""
        pending = rising.pending
        if pending is None or not (self._is_for_later or compiler.is_seen_again()):
            return ""
        pid = compiler.leave(pending)
        if pid is None:
            return ""
        return (
            f"; this job was seen before: process {pid} compiles its step for later runs, for {AHEAD_S:.0f} s at most "
            "(`python -m fasttrain cache stop` ends it)"
        )

    # One call, by what the engine does besides.

    def _advance(self, work: Work, steps: int) -> Tensor:
        if self._refused is not None:
            raise EngineError(self._refused)
        if eager_meanwhile(self._spec) is not None:
            return self._eagerly(work)
        if isinstance(work, Span):
            self._has_seen_span = True
            if self._single and kind_of(work.source) in self._single:
                pieces = work.pieces(MAX_EAGER_SPAN)
                return torch.stack([self._advance(batch, 1) for piece in pieces for batch in piece.batches()])
        self._steps += steps
        if self._phase in (Phase.DECIDED, Phase.CLIMBING) and self._steps >= self._next_verification:
            self.verify_again()
        if self._phase is Phase.DECIDED:
            self._look(steps)
        if self._phase is Phase.MEASURING:
            return self._measure(work, steps)
        if self._phase is Phase.CONSIDERING:
            self._consider(work)
            if isinstance(work, Span) and self._single and kind_of(work.source) in self._single:
                self._steps -= steps  # each of its batches counts by itself
                return self._advance(work, steps)
        if self._phase is Phase.CLIMBING:
            return self._climb(work, steps)
        return self._run(work)

    def _measure(self, work: Work, steps: int) -> Tensor:
        if self._waits_for_compiler:
            losses = self._eagerly(work)
            self._phase = Phase.CONSIDERING if self._eager.has_stepped else Phase.MEASURING
            return losses
        losses, seconds = self._backend.clock.timed(lambda: self._eagerly(work))
        if self._steps > WARM_STEPS:
            self._eager_times.extend([seconds / steps] * steps)
            self._eager_s = statistics.median(self._eager_times)
        if len(self._eager_times) >= TIMED_STEPS and self._eager.has_stepped:
            self._phase = Phase.CONSIDERING
        return losses

    def _consider(self, work: Work) -> None:
        if self._has_seen_span and not isinstance(work, Span) and not self._candidates:
            return  # such as the short batch that ends an epoch of resident data: these get their program first
        if any(candidate.mismatch(work) is None for candidate in self._candidates):
            if self._waits_for_compiler or self._steps - self._looked >= LOOK_STEPS:
                self._phase = Phase.DECIDED  # what was missed does not come any more
            return
        try:
            self._begin_if_worth_it(work)
        except EngineError as error:
            if self._waits_for_compiler:
                raise
            self._give_up(str(error))

    def _climb(self, work: Work, steps: int) -> Tensor:
        rising = self._rising
        assert rising is not None
        if rising.stage is Stage.COMPILING:
            self._poll(rising)
        if rising.stage is Stage.TRIAL and rising.mismatch(work) is None:
            self._rising_missed = 0
            return self._try_out(rising, work, steps)
        missed = self._missed.count
        losses = self._run(work)
        if rising.stage not in (Stage.VERIFYING, Stage.TRIAL):
            return losses
        if self._missed.count == missed and self._candidates[0] is rising:
            self._rising_steps += steps
            self._rising_missed = 0
            if rising.is_verified or self._rising_steps >= LOOK_STEPS:  # not every part of a step need ever be due
                self._begin_trial(rising)
        else:
            # Another program may hold meanwhile, as for all but the last batch of an epoch.
            self._rising_missed += steps if self._missed.count > missed else steps / OTHERS_PATIENCE
            if self._rising_missed >= LOOK_STEPS or (self._waits_for_compiler and self._misses_often):
                self._leave(rising, work)
        return losses

    # How steps run.

    def _eagerly(self, work: Work) -> Tensor:
        if not isinstance(work, Span):
            return self._eager.step(work)
        source = work.source
        most = max(1, min(MAX_EAGER_SPAN, source.block_rows // source.batch_size))
        if work.steps <= most:
            return self._eager.steps(work)
        return torch.cat([self._eager.steps(piece) for piece in work.pieces(most)])

    def _run(self, work: Work) -> Tensor:
        """Runs a batch or span by the first candidate whose guards hold, else eagerly."""
        if not isinstance(work, Span):
            return self._run_first(work)[0]
        losses, done = list[Tensor](), 0
        while done < work.steps:
            part, count = self._run_first(work.piece(done, work.steps) if done else work)
            losses.append(part)
            done += count
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def _run_first(self, work: Work) -> tuple[Tensor, int]:
        """Runs a batch, or the first steps of a span. Returns the losses and the number of steps."""
        steps, reason = work.steps if isinstance(work, Span) else 1, ""
        for index, candidate in enumerate(self._candidates):
            count = min(steps, candidate.most_steps)
            losses = self._by_candidate(candidate, work if count == steps else work.piece(0, count))
            if isinstance(losses, Mismatch):
                reason = reason or losses.reason
                continue
            self._missed.in_a_row = 0
            if index and candidate in self._candidates:
                self._candidates.insert(0, self._candidates.pop(self._candidates.index(candidate)))
            return losses, count
        count = min(steps, MAX_EAGER_SPAN)  # then a program may hold again: eager clears gradients that were left
        if self._candidates:
            self._missed.add(reason, count)
        return self._eagerly(work if count == steps else work.piece(0, count)), count

    def _by_candidate(self, candidate: Candidate, work: Work) -> Tensor | Mismatch:
        """Runs a batch or span by one candidate, and verifies it where due. Returns a Mismatch if its guards fail."""
        if self._is_to_be_verified(candidate):
            reason = candidate.mismatch(work, rebinds=self._missed.wants_rebinding())
            return Mismatch(reason) if reason is not None else self._verify(candidate, work)
        if isinstance(work, Span) and candidate.is_call_due(work.steps) and candidate.mismatch(work) is None:
            if self._fits_twice(candidate):
                return self._verify_call(candidate, work)
            candidate.called(CALLED_STEPS)  # single steps are verified
        try:
            losses = self._by_program(candidate, work)
            if isinstance(losses, Mismatch) and self._missed.wants_rebinding() and candidate.mismatch(work) is None:
                losses = self._by_program(candidate, work)
        except StepsFailedError as error:
            self._refused = str(error)  # for good: nothing may go on from this state
            raise
        except (IndexError, KeyboardInterrupt):
            self._spec.metrics.count(float(candidate.steps_done))  # the program has added their losses
            raise
        except EngineError as error:  # such as a graph that must be captured anew, and cannot be; nothing has changed
            self._drop_running(candidate, str(error), is_wrong=False)
            return self._eagerly(work)
        if not isinstance(losses, Mismatch):
            self._spec.metrics.count(float(losses.numel()))
            if candidate.step.why_eager is not None:
                self._eager.apply_if_due()
        return losses

    def _by_program(self, candidate: Candidate, work: Work) -> Tensor | Mismatch:
        try:
            if not candidate.is_to_be_timed:
                return candidate.run(work)
            waited = self._waits.seconds
            losses, seconds = self._backend.clock.timed(lambda: candidate.run(work))
            if not isinstance(losses, Mismatch) and self._waits.seconds == waited:  # else a graph was captured
                candidate.note_time(seconds / losses.numel())
            return losses
        except RuntimeError as error:
            raise_index_error(self._spec, work.batches() if isinstance(work, Span) else [work], error)
            raise

    # Verification.

    def _is_to_be_verified(self, candidate: Candidate) -> bool:
        if candidate.is_due and candidate.has_passed and not self._fits_twice(candidate):
            candidate.leave_out()
        return candidate.is_due

    def _fits_twice(self, candidate: Candidate) -> bool:
        step = candidate.step
        return fits_in_memory([*step.tensors, *step.gradients], self._spec.device)

    def _verify(self, candidate: Candidate, work: Work) -> Tensor:
        """Runs a batch or span eagerly, and compares the first step with the candidate."""
        if not self._fits_twice(candidate):
            reason = "two copies of the step's state, to check the program with, do not fit in memory"
            self._drop_running(candidate, reason, is_wrong=False)
            return self._eagerly(work)
        step, due = candidate.step, candidate.step.due
        # An optimizer that steps eagerly may keep Python state, which could not be put back: it steps once.
        eager = self._eager.step if step.why_eager is None else self._eager.gather
        begin = time.perf_counter()
        try:
            found = candidate.compare(work.piece(0, 1) if isinstance(work, Span) else work, eager)
        except CannotRunError as error:  # nor has eager: the program's turn comes first
            self._drop_running(candidate, str(error), is_wrong=False)
            return self._eagerly(work)
        candidate.verify_s = time.perf_counter() - begin
        if step.why_eager is not None:
            self._eager.apply_if_due()
        if found.difference is not None and candidate.differs(due):
            self._drop_running(candidate, f"its numbers differ from eager's: {found.difference}", is_wrong=True)
        elif found.difference is None and candidate in self._candidates:
            candidate.passed(due)
            self._plan_verification(candidate)
        if not isinstance(work, Span):
            return found.loss
        if work.steps == 1:
            return found.loss.reshape(1)
        rest = work.piece(1, work.steps)
        run = self._run if candidate.stage is Stage.ADOPTED else self._eagerly
        return torch.cat([found.loss.reshape(1), run(rest)])

    def _verify_call(self, candidate: Candidate, span: Span) -> Tensor:
        """Runs the steps of a span by program, and compares one call of its first steps with single steps."""
        end = CALLED_STEPS if span.steps >= CALLED_STEPS else span.steps
        try:
            losses, found = candidate.compare_call(span.piece(0, end))
        except StepsFailedError as error:  # of a single step, whose state stays
            self._refused = str(error)
            raise
        except CannotRunError as error:
            self._drop_running(candidate, str(error), is_wrong=False)
            return self._eagerly(span)
        if found.difference is None:
            candidate.called(end)
        else:
            reason = f"{end} steps in one call give other numbers than one by one: {found.difference}"
            self._drop_running(candidate, reason, is_wrong=True)
        if end == span.steps:
            return losses
        return torch.cat([losses, self._run(span.piece(end, span.steps))])

    def _plan_verification(self, candidate: Candidate) -> None:
        """Schedules the next verification, so that all of them take at most VERIFIED_SHARE of the training time."""
        step_s = candidate.step_s or self._eager_s or CALL_S
        steps = math.ceil(candidate.verify_s / VERIFIED_SHARE / step_s)
        self._next_verification = self._steps + max(LEAST_UNVERIFIED, steps)

    # What the calls above decide.

    def _look(self, steps: int) -> None:
        """Now and then: is it time to compile for steps that no program holds for?"""
        if self._waits_for_compiler:
            if self._misses_often and self._begun < MAX_CANDIDATES:
                self._phase = Phase.CONSIDERING
            return
        seen = self._steps - steps - self._looked
        if seen < LOOK_STEPS:
            return
        self._looked = self._steps - steps
        missed, self._missed.lately = self._missed.lately, 0
        if missed > MISSED_SHARE * seen and self._begun < MAX_CANDIDATES and not self._is_closed:
            self._phase = Phase.CONSIDERING

    @property
    def _misses_often(self) -> bool:
        """Whether an engine that waits for the compiler is to compile again."""
        missed = self._missed.since_begun
        return missed >= ENOUGH_MISSED and missed > MISSED_SHARE_WHERE_ASKED * (self._steps - self._begun_at)

    def verify_again(self) -> None:
        """Has each adopted program compared with eager in its next step."""
        adopted = [candidate for candidate in self._candidates if candidate.stage is Stage.ADOPTED]
        for candidate in adopted:
            candidate.verify_again()
        self._next_verification = FOREVER
        if adopted:
            self._plan_verification(adopted[0])

    def _begin_if_worth_it(self, work: Work) -> None:
        """Begins a candidate, if the steps to come repay it. Raises EngineError where none can be made."""
        compiler = self._compiler = self._compiler or Compiler(self._spec)
        if not self._waits_for_compiler:
            assert self._eager_s is not None
            known = compiler.verdict(work)
            if known is not None and known.refused is not None:
                again = "`python -m fasttrain cache clear` has it tried again"
                self._give_up(f"an earlier run of this job refused its program: {known.refused}; {again}")
                return
            num_modules = len(list(self._spec.model.modules()))
            pays = partial(shortfall, self._last_step - self._steps, self._eager_s, known, num_modules)
            missing = pays(is_ready=compiler.is_ready())
            may_pay_later = missing is not None and known is None and pays(is_ready=True) is None
            self._is_for_later = may_pay_later and compiler.is_seen_again()
            if missing is not None and not self._is_for_later:
                self._give_up(missing)
                self._phase = self._phase if self._candidates else Phase.SHORT
                return
        self._begun, self._begun_at, self._missed.since_begun = self._begun + 1, self._steps, 0
        begin = time.perf_counter()
        pending = self._backend.begin(compiler, work)
        if isinstance(work, Span) and not isinstance(pending.traced, TracedWalk):
            self._single.add(kind_of(work.source))
            self._why_single = compiler.why_single
        self._rising, self._phase = Candidate(pending), Phase.CLIMBING
        self._rising_steps, self._rising_missed = 0, 0.0
        if not self._waits_for_compiler:
            self._waits.add(pending.trace_s)
            self._choice = (
                self._choice if self._candidates else Choice("eager", "a child process is compiling the step")
            )
            return
        try:
            pending.wait()
            self._load(self._rising)
        except BaseException:  # Ctrl-C, too: the next step begins anew
            self._begun -= 1
            self._drop_rising()
            self._phase = Phase.CONSIDERING
            raise
        finally:
            pending.close()
        self._waits.add(time.perf_counter() - begin)
        self._choice = self._asked

    def _poll(self, rising: Candidate) -> None:
        """Looks whether the child is done. A child that failed ends the climb."""
        assert rising.pending is not None
        if not self._is_settling and self._steps < self._next_poll:
            return
        self._next_poll = self._steps + POLL_STEPS
        begin = time.perf_counter()
        try:
            if self._is_settling:
                rising.pending.wait()
                self._waits.add(time.perf_counter() - begin)
            is_ready = rising.pending.is_ready()
        except ChildEndedError as error:
            self._give_up(str(error))
            return
        except EngineError as error:
            self._refuse(str(error))
            return
        try:
            if is_ready:
                self._load(rising)
        except EngineError as error:
            self._give_up(str(error))

    def _leave(self, rising: Candidate, work: Work) -> None:
        """Drops a candidate whose guards no longer hold for any step."""
        reason = rising.mismatch(work) or self._missed.reason
        if self._begun < MAX_CANDIDATES:
            self._give_up(reason)
            self._phase = Phase.CONSIDERING
        else:
            self._give_up(f"the step kept changing while its program was compiled: {reason}")

    def _load(self, rising: Candidate) -> None:
        rising.load(self._backend)
        before = self._candidates
        kept = [each for each in before if not each.is_over]
        self._candidates = [rising, *kept[: MAX_CANDIDATES - 1]]
        for each in before:
            if each not in self._candidates:
                each.stage = Stage.DROPPED

    def _begin_trial(self, rising: Candidate) -> None:
        if self._waits_for_compiler:
            self._adopt(rising)
            return
        assert self._eager_s is not None
        # Whole groups of accumulated batches, or one arm would have the steps with the optimizer in them.
        group = self._spec.accumulate
        self._trial = Trial([EAGER, PROGRAM], steps=group * max(1, round(TRIAL_S / self._eager_s / group)))
        rising.stage = Stage.TRIAL

    def _try_out(self, rising: Candidate, work: Work, steps: int) -> Tensor:
        """The steps of one call by the arm whose turn it is; both arms train."""
        arm = self._trial.turn

        def run() -> Tensor | Mismatch:
            if arm == EAGER:
                return self._eagerly(work)
            return self._by_candidate(rising, work) if steps <= rising.most_steps else self._run(work)

        is_compared = arm == PROGRAM and rising.is_call_due(steps)  # its steps run twice
        losses, seconds = self._backend.clock.timed(run)
        if isinstance(losses, Mismatch):  # it held just before: forward's own code has changed something
            return self._eagerly(work)
        if not is_compared:
            for _ in range(steps):
                self._trial.add(arm, seconds / steps)
        if self._trial.is_over and rising.stage is Stage.TRIAL:
            self._conclude(rising)
        return losses

    def _conclude(self, rising: Candidate) -> None:
        eager_s, program_s = self._trial.step_s().values()
        is_faster = self._trial.fastest() != EAGER
        self._eager_s = eager_s  # beside the program, not some time before: the machine's speed may differ
        rising.step_s = program_s
        together = ", several steps a call" if rising.walks else ""
        measured = f"measured {program_s * 1e6:.0f} us a step{together}, eager {eager_s * 1e6:.0f} us"
        self._remember(program_us=program_s * 1e6, refused=None if is_faster else f"not faster: {measured}")
        if is_faster:
            single = self._backend.explain(rising.step, walks=rising.walks)
            self._choice = Choice(single.value, measured + single.reason)
            self._adopt(rising)
        else:
            self._give_up(f"the compiled program is not faster: {measured}")

    def _adopt(self, rising: Candidate) -> None:
        rising.close()
        rising.stage = Stage.ADOPTED
        self._rising, self._phase = None, Phase.DECIDED
        if len(self._candidates) == 1:
            self._missed = Missed()  # what was missed while it was verified
        self._looked, self._missed.lately = self._steps, 0
        self._plan_verification(rising)

    def _drop_running(self, candidate: Candidate, reason: str, *, is_wrong: bool) -> None:
        """Drops a program that gives wrong numbers or cannot run, before or after adoption.

        A lack of memory is not remembered.
        """
        if candidate is not self._rising:
            reason = f"while it ran: {reason}"
            is_wrong = is_wrong and self._rising is None  # else what is known is of the step that is compiled now
            for each in self._candidates:
                each.stage = Stage.DROPPED
            self._candidates.clear()
        if self._waits_for_compiler:
            self._refused = f"engine {self._backend.name!r} cannot run this step: {reason}"
            self._drop_rising()
            raise EngineError(self._refused)
        (self._refuse if is_wrong else self._give_up)(reason)

    def _refuse(self, reason: str) -> None:
        """The program must not be used, now or in a later run."""
        self._remember(program_us=None, refused=reason)
        self._give_up(f"the compiled program was refused: {reason}")

    def _remember(self, *, program_us: float | None, refused: str | None) -> None:
        assert self._compiler is not None
        assert self._eager_s is not None
        pending = self._rising.pending if self._rising is not None else None
        times = pending or self._verdict  # a later verification comes long after the program
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
        """Goes on with the programs that there are, or eagerly for good."""
        self._drop_rising()
        self._phase = Phase.DECIDED
        self._looked, self._missed.lately = self._steps, 0
        if not self._candidates:
            self._choice = Choice("eager", reason)

    def _drop_rising(self) -> None:
        if self._rising is not None:
            self._rising.close()
            self._rising.stage = Stage.DROPPED
            self._candidates = [each for each in self._candidates if each is not self._rising]
            self._rising = None
