"""What `auto` decides and why, with a compiler and a clock by hand; the numbers are eager's throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fasttrain.step import compiler, ladder
from fasttrain.step.cache import Verdict
from fasttrain.step.candidate import VERIFIED_BATCHES
from tests.step.fakes import TRIAL_ROUNDS, Lab
from tests.step.jobs import batches, everything, train_step

MANY = 10_000_000
MEASURED = ladder.WARM_STEPS + ladder.TIMED_STEPS
TRIAL = VERIFIED_BATCHES + 2 * (TRIAL_ROUNDS + 1) * 20
"""More steps than verification and trial have, where a round of 2 ms has 20 steps of 100 us."""

VERIFIED_OFTEN = 0.05
"""Share of the training that verifications may take: one in some sixty steps."""

KNOWN = Verdict(eager_us=100.0, program_us=50.0, trace_s=0.5, compile_s=20.0, refused=None)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab.install(monkeypatch)


class Job:
    """A job under `auto`, and the same job run eagerly, step by step."""

    def __init__(self, expected: int | None = MANY) -> None:
        torch.manual_seed(11)
        self.step = train_step("auto")
        self.eager = train_step("eager")
        if expected is not None:
            self.step.expect(expected)
        self._full, self._short = batches(1)[0], batches(1, rows=5)[0]
        self._rng = torch.get_rng_state()
        self._eager_rng = self._rng

    def run(self, count: int, *, is_short: Callable[[int], bool] = lambda _: False) -> Job:
        """So many steps, both ways; those of the numbers that `is_short` says have a batch of fewer rows."""
        for number in range(count):
            batch = self._short if is_short(number) else self._full
            torch.set_rng_state(self._rng)
            loss = self.step(batch)
            self._rng = torch.get_rng_state()
            torch.set_rng_state(self._eager_rng)
            assert torch.equal(loss, self.eager(batch))
            self._eager_rng = torch.get_rng_state()
        torch.testing.assert_close(everything(self.step), everything(self.eager), rtol=0, atol=0)
        assert torch.equal(self._rng, self._eager_rng)
        return self

    @property
    def engine(self) -> str:
        return self.step.engine.value

    @property
    def reason(self) -> str:
        return self.step.engine.reason


def compiled(lab: Lab) -> Job:
    """A job whose program has been taken up."""
    lab.is_ready = True
    job = Job().run(MEASURED + 2 * ladder.POLL_STEPS + TRIAL)
    assert job.engine == "compiled"
    return job


def test_before_anything_is_measured_it_is_eager(lab: Lab) -> None:
    job = Job().run(MEASURED)
    assert (job.engine, lab.begun, job.step.compile_s) == ("eager", [], None)
    assert "too few steps" in job.reason


@pytest.mark.parametrize("expected", [None, 0, 100, 250_000])
def test_a_job_too_short_is_never_traced(lab: Lab, expected: int | None) -> None:
    job = Job(expected).run(3 * MEASURED)
    assert (job.engine, lab.begun, job.step.compile_s) == ("eager", [], None)
    assert ("too little to repay a compiled program" if expected else "no more steps are expected") in job.reason


def test_a_job_that_turns_out_longer_is_traced_then(lab: Lab) -> None:
    job = Job(1000).run(2 * MEASURED)
    assert not lab.begun
    job.step.expect(MANY)
    job.run(2 * ladder.POLL_STEPS)
    assert len(lab.begun) == 1
    assert job.reason == "a child process is compiling the step"
    assert job.step.compile_s == 0.5
    job.step.close()


def test_long_steps_need_more_time_to_repay(lab: Lab) -> None:
    """Their time is in matrix products: little can be gained."""
    seconds_to_come = 40.0
    lab.eager_s = 100e-6
    Job(round(seconds_to_come / lab.eager_s)).run(MEASURED + ladder.POLL_STEPS).step.close()
    assert len(lab.begun) == 1
    lab.eager_s = 20e-3
    Job(round(seconds_to_come / lab.eager_s)).run(MEASURED + ladder.POLL_STEPS).step.close()
    assert len(lab.begun) == 1


def test_what_is_known_to_pay_needs_fewer_steps(lab: Lab) -> None:
    lab.known[8] = KNOWN
    steps = round(2 * 2 * KNOWN.trace_s / 100e-6)
    Job(steps - 1000).run(2 * MEASURED)
    assert not lab.begun
    Job(steps + 2 * MEASURED).run(2 * MEASURED).step.close()
    assert len(lab.begun) == 1


def test_the_only_processor_is_not_shared_with_a_compiler_for_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler.os, "sched_getaffinity", lambda _: {0})
    seconds_to_come = 40.0  # repays a compiler that runs beside it, as another test shows
    Job(round(seconds_to_come / lab.eager_s)).run(MEASURED + ladder.POLL_STEPS)
    assert not lab.begun


def test_a_faster_program_is_taken_up(lab: Lab) -> None:
    job = Job().run(MEASURED + 10 * ladder.POLL_STEPS)
    assert lab.replayed == 0
    lab.is_ready = True
    job.run(2 * ladder.POLL_STEPS + TRIAL)
    assert job.engine == "compiled"
    assert job.reason == "measured 50 us a step, eager 100 us"
    [verdict] = lab.remembered
    assert verdict == Verdict(
        eager_us=pytest.approx(100.0), program_us=pytest.approx(50.0), trace_s=0.5, compile_s=20.0, refused=None
    )
    assert lab.begun[0].is_closed
    replayed = lab.replayed
    job.run(100)
    assert lab.replayed == replayed + 100
    assert job.step.compile_s == 0.5


@pytest.mark.parametrize("program_s", [99e-6, 300e-6])
def test_a_program_that_is_not_faster_is_dropped(lab: Lab, program_s: float) -> None:
    lab.program_s, lab.is_ready = program_s, True
    job = Job().run(MEASURED + 2 * ladder.POLL_STEPS + TRIAL)
    assert job.engine == "eager"
    assert "not faster: measured" in job.reason
    [verdict] = lab.remembered
    assert verdict.refused is not None
    assert "not faster" in verdict.refused
    assert verdict.program_us == pytest.approx(program_s * 1e6)
    replayed = lab.replayed
    job.step.expect(MANY)
    job.run(3 * MEASURED)
    assert lab.replayed == replayed
    assert len(lab.begun) == 1
    assert lab.begun[0].is_closed


def test_what_is_remembered_of_eager_was_measured_beside_the_program(lab: Lab) -> None:
    lab.eager_s = 60e-6
    job = Job().run(MEASURED + ladder.POLL_STEPS)
    lab.eager_s, lab.is_ready = 100e-6, True  # the machine is slower now
    job.run(2 * ladder.POLL_STEPS + 2 * TRIAL)
    assert job.engine == "compiled"
    [verdict] = lab.remembered
    assert (verdict.eager_us, verdict.program_us) == (pytest.approx(100.0), pytest.approx(50.0))


def test_settle_ends_where_a_program_is_known_not_to_pay(lab: Lab) -> None:
    lab.known[8] = replace(KNOWN, program_us=110.0)
    job = Job(0)
    job.step.settle(batches(8))
    assert not lab.begun
    assert lab.now < 2 * MEASURED * lab.eager_s


def test_what_an_earlier_run_refused_is_not_traced(lab: Lab) -> None:
    lab.known[8] = Verdict(eager_us=100.0, program_us=200.0, trace_s=0.5, compile_s=20.0, refused="not faster")
    job = Job().run(2 * MEASURED)
    assert not lab.begun
    assert job.engine == "eager"
    assert job.reason.startswith("an earlier run of this job refused its program: not faster; `python -m fasttrain")


def test_a_program_with_other_numbers_is_refused_and_remembered(lab: Lab) -> None:
    lab.spoil, lab.is_ready = lambda loss: loss * 1.01, True
    job = Job().run(2 * MEASURED + TRIAL)
    assert lab.replayed == 2
    assert job.engine == "eager"
    assert "was refused: its numbers differ from eager's: the loss is" in job.reason
    assert [verdict.refused is not None for verdict in lab.remembered] == [True]
    assert lab.begun[0].is_closed


ERRORS = {
    "make": ("the program cache belongs to another user", 0),
    "begin": ("this step cannot be traced", 0),
    "is_ready": ("the compiling child was ended by SIGKILL", 1),
    "load": ("the compiled program cannot be loaded", 1),
}


@pytest.mark.parametrize("where", ERRORS)
def test_whatever_fails_training_goes_on_and_says_why(lab: Lab, where: str) -> None:
    reason, begun = ERRORS[where]
    lab.errors[where], lab.is_ready = reason, True
    job = Job().run(2 * MEASURED)
    assert job.engine == "eager"
    assert reason in job.reason
    assert len(lab.begun) == begun
    assert all(pending.is_closed for pending in lab.begun)
    del lab.errors[where]
    job.step.expect(MANY)
    job.run(2 * MEASURED)
    assert len(lab.begun) == begun, "it was tried again"


def test_a_program_that_does_not_fit_beside_the_training_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.step.state.free_bytes", lambda _: 10)
    lab.is_ready = True
    job = Job().run(2 * MEASURED)
    assert "do not fit in memory" in job.reason
    assert lab.replayed == 0
    assert lab.begun[0].is_closed


def test_audits_go_on_while_a_program_runs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "VERIFIED_SHARE", VERIFIED_OFTEN)
    monkeypatch.setattr(ladder, "LEAST_UNVERIFIED", 1)
    job = compiled(lab)
    job.run(200)
    assert job.engine == "compiled"
    lab.spoil = lambda loss: loss * 1.01
    step = job.step
    before = lab.replayed
    for batch in batches(64):
        step(batch)
    assert step.engine.value == "eager"
    assert "while it ran: its numbers differ" in step.engine.reason
    last = lab.remembered[-1]
    assert last.refused is not None
    assert (last.trace_s, last.compile_s) == (0.5, 20.0)
    assert lab.replayed - before <= 64
    before = lab.replayed
    for batch in batches(100):
        step(batch)
    assert lab.replayed == before


def test_what_is_wrong_while_another_program_is_compiled_is_not_remembered_of_that(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = compiled(lab)
    lab.is_ready = False
    job.run(3 * ladder.LOOK_STEPS, is_short=half)
    assert len(lab.begun) == 2
    assert not lab.begun[1].is_closed
    remembered = len(lab.remembered)
    lab.spoil = lambda loss: loss * 1.01
    job.step._engine.verify_again()  # type: ignore[attr-defined]
    for batch in batches(4):
        job.step(batch)
    assert job.engine == "eager"
    assert "while it ran: its numbers differ" in job.reason
    assert len(lab.remembered) == remembered
    assert lab.begun[1].is_closed


def test_a_rare_batch_at_the_moment_of_the_swap_does_not_matter(lab: Lab) -> None:
    job = Job().run(MEASURED + ladder.POLL_STEPS)
    lab.is_ready = True
    job.run(ladder.POLL_STEPS + 20, is_short=lambda _: True)
    assert lab.replayed == 0
    job.run(TRIAL + 1)
    assert job.engine == "compiled"
    assert len(lab.begun) == 1


def test_objects_replaced_while_the_child_compiled_are_taken_up(lab: Lab) -> None:
    job = Job().run(MEASURED + ladder.POLL_STEPS)
    traced = lab.begun[0].traced
    traced.is_stale = traced.can_rebind = True
    lab.is_ready = True
    # Both at once: the objects are taken up, and the batch is still another.
    job.run(ladder.POLL_STEPS, is_short=lambda _: True)
    job.run(TRIAL + 1)
    assert job.engine == "compiled"
    assert len(lab.begun) == 1


def test_a_step_that_has_changed_meanwhile_is_traced_anew(lab: Lab) -> None:
    job = Job().run(MEASURED + ladder.POLL_STEPS)
    lab.begun[0].traced.is_stale = True
    lab.is_ready = True
    job.run(ladder.LOOK_STEPS + 3 * ladder.POLL_STEPS + TRIAL)
    assert [pending.is_closed for pending in lab.begun] == [True, True]
    assert job.engine == "compiled"
    assert job.step.compile_s == 1.0


def test_a_step_that_keeps_changing_is_given_up(lab: Lab) -> None:
    lab.is_changing = lab.is_ready = True
    job = Job().run(MEASURED + (ladder.MAX_CANDIDATES + 1) * (ladder.LOOK_STEPS + 2 * ladder.POLL_STEPS))
    assert len(lab.begun) == ladder.MAX_CANDIDATES
    assert all(pending.is_closed for pending in lab.begun)
    assert job.engine == "eager"
    assert "kept changing" in job.reason
    assert "an option of a parameter group" in job.reason


def half(number: int) -> bool:
    return number % 2 == 1


def test_a_second_shape_gets_a_program_too(lab: Lab) -> None:
    job = compiled(lab)
    job.run(ladder.LOOK_STEPS // 8, is_short=half)
    assert len(lab.begun) == 1, "too few to matter"
    job.run(3 * ladder.LOOK_STEPS + 2 * TRIAL, is_short=half)
    assert [len(pending.traced.shape) and pending.traced.shape[0] for pending in lab.begun] == [8, 5]
    assert job.engine == "compiled"
    replayed = lab.replayed
    job.run(100, is_short=half)
    assert lab.replayed == replayed + 100


def test_the_number_of_traces_is_bounded(lab: Lab) -> None:
    job = compiled(lab)
    lab.is_ready = False
    for _ in range(2):
        lab.begun[-1].traced.is_stale = True
        job.run(3 * ladder.LOOK_STEPS)
    lab.errors["begin"] = "this step cannot be traced"
    calls: list[str] = []
    real = lab.call
    lab.call = lambda name: (calls.append(name), real(name))[1]  # pyright: ignore[reportAttributeAccessIssue]
    job.run(8 * ladder.LOOK_STEPS)
    assert len(lab.begun) + calls.count("begin") <= ladder.MAX_CANDIDATES


def test_while_a_second_shape_is_looked_at_the_record_tells_what_runs(lab: Lab) -> None:
    job = compiled(lab)
    lab.is_ready = False
    job.run(3 * ladder.LOOK_STEPS, is_short=half)
    assert len(lab.begun) == 2
    assert job.engine == "compiled"
    lab.errors["is_ready"] = "the compiling child was ended by SIGKILL"
    replayed = lab.replayed
    job.run(100, is_short=half)
    assert job.engine == "compiled"
    assert lab.replayed == replayed + 50


def test_a_second_shape_that_cannot_repay_leaves_the_first_program(lab: Lab) -> None:
    job = compiled(lab)
    job.step.expect(2000)
    job.run(3 * ladder.LOOK_STEPS, is_short=half)
    assert len(lab.begun) == 1
    assert job.engine == "compiled"


def test_the_record_tells_when_no_program_holds_and_when_one_does_again(lab: Lab) -> None:
    job = compiled(lab)
    lab.errors["begin"] = "this step cannot be traced"
    lab.begun[0].traced.is_stale = True
    job.run(3 * ladder.LOOK_STEPS)
    assert job.engine == "eager"
    assert "192 steps ran eagerly, the last because this differed: an option of a parameter group" in job.reason
    lab.begun[0].traced.is_stale = False
    job.run(2 * ladder.LOOK_STEPS)
    assert job.engine == "compiled"
    assert job.reason.startswith("measured 50 us a step, eager 100 us; 192 steps ran eagerly")
