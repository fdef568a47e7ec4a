"""When several steps become one program under `auto`, with a compiler and a clock by hand; the numbers are eager's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.data.resident import ResidentBatches, Span, resident
from fasttrain.step import auto, launch
from fasttrain.step.cache import Verdict
from fasttrain.step.train_step import TrainStep
from tests.step.fakes import TRIAL_ROUNDS, Lab
from tests.step.jobs import batches, everything, train_step

MANY = 10_000_000
SIZE = 4
MEASURED = auto.WARM_STEPS + auto.TIMED_STEPS
UNTIL_COMPILED = MEASURED + 2 * auto.POLL_STEPS + 2 * (TRIAL_ROUNDS + 1) * 20
TRIAL = 2 * (TRIAL_ROUNDS + 1) * SIZE
ENOUGH_FOR_SINGLE = 80_000
"""Steps that repay a known program, and none of several steps."""

KNOWN = Verdict(eager_us=100.0, program_us=50.0, trace_s=0.5, compile_s=20.0, refused=None)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab.install(monkeypatch)
    lab.span_steps, lab.is_ready = SIZE, True
    return lab


def data_of(seed: int) -> ResidentBatches:
    x, y = batches(1, rows=8 * 50)[0]
    return resident(x, y, batch_size=8, device="cpu", seed=seed)


class Epochs:
    """A step's resident data, epoch after epoch, and its own random numbers."""

    def __init__(self, step: TrainStep) -> None:
        torch.manual_seed(11)
        self.step = step
        self.data: ResidentBatches
        self._epoch: Iterator[Any]
        self._sources: dict[int, ResidentBatches] = {}
        self.go_on_with(seed=2)
        self._rng = torch.get_rng_state()

    def go_on_with(self, seed: int) -> None:
        """Begins an epoch of the data of that seed with the next step."""
        self.data = self._sources.setdefault(seed, data_of(seed))
        self._epoch = iter(self.data)

    def run(self, count: int) -> int:
        """So many steps or, where several are one launch, a few more; returns how many."""
        torch.set_rng_state(self._rng)
        done = 0
        while done < count:
            for ran in self.step.run(self._epoch):
                done += ran.steps if isinstance(ran, Span) else 1
                if done >= count:
                    break
            else:
                self._epoch = iter(self.data)
        self._rng = torch.get_rng_state()
        return done


class Job:
    """A job under `auto`, and the same job run eagerly."""

    def __init__(self, expected: int = MANY) -> None:
        self.step = train_step("auto")
        self.step.expect(expected)
        self._auto, self._eager = Epochs(self.step), Epochs(train_step("eager"))

    def run(self, count: int) -> Job:
        """So many steps, both ways."""
        done = self._auto.run(count)
        assert self._eager.run(done) == done
        torch.testing.assert_close(everything(self.step), everything(self._eager.step), rtol=0, atol=0)
        return self

    def go_on_with(self, seed: int) -> None:
        """Other data, both ways."""
        for each in (self._auto, self._eager):
            each.go_on_with(seed)

    @property
    def data(self) -> ResidentBatches:
        return self._auto.data

    @property
    def engine(self) -> str:
        return self.step.engine.value

    @property
    def reason(self) -> str:
        return self.step.engine.reason


def begun(lab: Lab) -> Job:
    """A job whose steps run by program, while that of several is made."""
    job = Job().run(UNTIL_COMPILED + 2 * SIZE)
    assert len(lab.begun_spans) == 1
    return job


def launched(lab: Lab) -> Job:
    """A job that runs several steps as one."""
    lab.is_span_ready = True
    job = begun(lab).run(TRIAL + 4 * SIZE)
    assert "4 steps run as one" in job.reason
    return job


def test_nothing_is_begun_before_single_steps_run_by_program(lab: Lab) -> None:
    lab.is_ready = False
    job = Job().run(3 * UNTIL_COMPILED)
    assert (job.engine, job.step.span, lab.begun_spans) == ("eager", 1, [])
    job.step.close()


def test_steps_that_a_launch_does_not_weigh_in_stay_single(lab: Lab) -> None:
    lab.span_steps = 1
    job = Job().run(2 * UNTIL_COMPILED)
    assert (job.engine, job.step.span, lab.begun_spans) == ("compiled", 1, [])
    assert job.reason == "measured 50 us a step, eager 100 us"


@pytest.mark.parametrize("is_cached", [False, True])
def test_it_is_begun_where_the_steps_to_come_repay_it(is_cached: bool, lab: Lab) -> None:
    lab.known[8] = replace(KNOWN, trace_s=0.1)  # so that few steps repay the program of single ones
    lab.is_span_cached = is_cached
    enough = round((auto.CACHED_LAUNCHES_FROM_S if is_cached else auto.LAUNCHES_FROM_S) / lab.program_s)
    job = Job(enough).run(2 * UNTIL_COMPILED)
    assert job.engine == "compiled"
    assert (job.step.span, lab.begun_spans) == (1, [])
    job.step.expect(enough + 100)
    job.run(SIZE)
    assert len(lab.begun_spans) == 1
    job.step.expect(0)
    assert job.step.span == SIZE, "it is made already"
    job.step.close()


def test_the_cache_is_asked_once_where_the_steps_to_come_do_not_repay_a_compiler(lab: Lab) -> None:
    lab.known[8] = KNOWN
    job = Job(ENOUGH_FOR_SINGLE).run(3 * UNTIL_COMPILED)
    assert (job.engine, job.step.span, lab.looked_up, lab.begun_spans) == ("compiled", 1, 1, [])
    assert job.reason == "measured 50 us a step, eager 100 us"
    compile_s = job.step.compile_s
    job.step.expect(MANY)
    job.run(SIZE)
    assert (lab.looked_up, len(lab.begun_spans)) == (1, 1)
    assert job.step.compile_s == compile_s, "nothing was waited for"
    job.step.close()


def test_a_program_that_the_cache_has_is_measured_and_kept(lab: Lab) -> None:
    lab.known[8] = KNOWN
    lab.is_span_cached = lab.is_span_ready = True
    job = Job(ENOUGH_FOR_SINGLE).run(UNTIL_COMPILED + TRIAL + 8 * SIZE)
    assert job.reason.endswith("; 4 steps run as one: measured us a step: one by one 50, 4 as one 25")
    assert lab.looked_up == 1


def test_what_keeps_changing_is_told_while_it_holds(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MISSED_SPANS", 2)
    monkeypatch.setattr(launch, "MAX_MADE", 2)
    job = launched(lab)
    job.go_on_with(seed=5)
    job.run(TRIAL + 8 * SIZE)
    assert "4 steps run as one" in job.reason, "it was made anew"
    job.go_on_with(seed=6)
    job.run(4 * SIZE)
    assert job.reason.endswith("; several steps run one by one, since this keeps changing: the resident data")
    assert len(lab.begun_spans) == 2
    job.go_on_with(seed=5)
    job.run(SIZE)
    assert "4 steps run as one" in job.reason


def test_what_keeps_changing_is_not_told_of_single_steps_that_are_refused(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MISSED_SPANS", 2)
    monkeypatch.setattr(launch, "MAX_MADE", 1)
    monkeypatch.setattr(auto, "AUDIT_STEPS", 64)
    job = launched(lab)
    job.go_on_with(seed=5)
    job.run(4 * SIZE)
    assert "keeps changing" in job.reason
    lab.spoil = lambda loss: loss * 1.01
    job.run(64)
    assert (job.engine, job.step.span) == ("eager", 1)
    assert "while it ran: its numbers differ" in job.reason
    assert "keeps changing" not in job.reason


def test_nothing_waits_for_the_compiler(lab: Lab) -> None:
    job = begun(lab)
    replayed, now = lab.replayed, lab.now
    job.run(100 * SIZE)
    steps = lab.replayed - replayed
    assert steps >= 100 * SIZE
    assert lab.now - now == pytest.approx(steps * lab.program_s)
    assert lab.launched == 0
    assert not lab.begun_spans[0].was_waited_for
    assert job.reason == "measured 50 us a step, eager 100 us"
    job.step.close()


def test_a_faster_program_of_several_steps_is_kept(lab: Lab) -> None:
    job = launched(lab)
    assert job.engine == "compiled"
    assert job.reason == (
        "measured 50 us a step, eager 100 us; 4 steps run as one: measured us a step: one by one 50, 4 as one 25"
    )
    assert lab.begun_spans[0].is_closed
    before, replayed = lab.launched, lab.replayed
    job.run(10 * 50)
    assert lab.launched - before >= 10 * 48
    assert lab.replayed - replayed <= 10 * 2 + SIZE, "what is left of an epoch is run one by one"
    assert len(lab.begun_spans) == 1


@pytest.mark.parametrize("span_step_s", [49.5e-6, 200e-6])
def test_a_program_of_several_steps_that_is_not_faster_is_dropped(lab: Lab, span_step_s: float) -> None:
    lab.span_step_s, lab.is_span_ready = span_step_s, True
    job = begun(lab).run(TRIAL + 4 * SIZE)
    assert job.engine == "compiled"
    assert job.reason.endswith(
        f"; several steps as one are not faster: measured us a step: one by one 50, 4 as one {span_step_s * 1e6:.0f}"
    )
    before = lab.launched
    assert job.step.span == 1
    job.run(100)
    assert (lab.launched, len(lab.begun_spans)) == (before, 1)


def move_a_weight(lab: Lab) -> None:
    def spoil(losses: Tensor) -> Tensor:
        with torch.no_grad():
            lab.begun_spans[0].traced.step.tensors[0].view(-1)[0] += 0.1
        return losses

    lab.spoil_span = spoil


@pytest.mark.parametrize("where", ["the loss", "a weight"])
def test_a_program_with_other_numbers_is_dropped_and_the_steps_are_single_ones(lab: Lab, where: str) -> None:
    if where == "a weight":
        move_a_weight(lab)
    else:
        lab.spoil_span = lambda losses: losses * 1.01
    lab.is_span_ready = True
    job = begun(lab).run(TRIAL)
    assert lab.launched == SIZE, "it was proved once"
    assert job.engine == "compiled"
    assert "; 4 steps as one were refused: other numbers than single steps: " in job.reason
    assert (job.step.span, len(lab.begun_spans)) == (1, 1)


def test_an_audit_before_the_program_is_there_does_not_stand_for_its_proof(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "AUDIT_STEPS", 64)
    job = begun(lab).run(128)
    lab.spoil_span = lambda losses: losses * 1.01
    lab.is_span_ready = True
    job.run(2 * SIZE)
    assert "other numbers than single steps" in job.reason


@pytest.mark.parametrize("what", ["several", "single"])
def test_audits_go_on(lab: Lab, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "AUDIT_STEPS", 64)
    job = launched(lab).run(200)
    assert "4 steps run as one" in job.reason
    replayed = lab.replayed
    job.run(10 * 48)
    assert lab.replayed - replayed >= 10 * 48 // 64 * SIZE, "an audit runs the steps singly, too"
    if what == "several":
        lab.spoil_span = lambda losses: losses * 1.01
    else:
        lab.spoil = lambda loss: loss * 1.01
    step, data = job.step, job.data
    for _ in step.run(iter(data)):
        pass
    for _ in step.run(iter(data)):
        pass
    assert step.span == 1
    assert step.engine.value == ("compiled" if what == "several" else "eager")
    assert ("4 steps as one were refused: other numbers" in step.engine.reason) == (what == "several")
    assert ("while it ran: its numbers differ from eager's" in step.engine.reason) == (what == "single")
    assert "run as one" not in step.engine.reason


ERRORS = {
    "trace several": ("batches hold other tensors", "several steps cannot be one program"),
    "begin several": ("no child can be started", "several steps cannot be one program"),
    "are several ready": ("the compiling child was ended by SIGKILL", "several steps are no program"),
    "load several": ("the compiled program cannot be loaded", "several steps are no program"),
}


@pytest.mark.parametrize("where", ERRORS)
def test_whatever_fails_single_steps_go_on_and_the_record_says_why(lab: Lab, where: str) -> None:
    message, what = ERRORS[where]
    lab.errors[where], lab.is_span_ready = message, True
    job = Job().run(UNTIL_COMPILED + 4 * SIZE)
    assert job.engine == "compiled"
    assert job.reason == f"measured 50 us a step, eager 100 us; {what}: {message}"
    assert all(pending.is_closed for pending in lab.begun_spans)
    del lab.errors[where]
    tried = len(lab.begun_spans)
    job.run(100)
    assert (job.step.span, len(lab.begun_spans), lab.launched) == (1, tried, 0), "it was tried again"


def test_a_proof_that_does_not_fit_in_memory_is_not_made(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    job = begun(lab)
    monkeypatch.setattr("fasttrain.step.snapshot.free_bytes", lambda _: 10)
    lab.is_span_ready = True
    job.run(4 * SIZE)
    assert "do not fit in memory" in job.reason
    assert lab.launched == 0


@pytest.mark.parametrize("stage", ["considered", "pending", "launched"])
def test_after_close_nothing_is_compiled(lab: Lab, stage: str) -> None:
    if stage == "considered":
        lab.known[8] = KNOWN
        job = Job(ENOUGH_FOR_SINGLE).run(2 * UNTIL_COMPILED)
    else:
        job = begun(lab) if stage == "pending" else launched(lab)
    tried = len(lab.begun_spans)
    assert tried == (stage != "considered")
    job.step.close()
    assert all(pending.is_closed for pending in lab.begun_spans)
    lab.is_span_ready = True
    before = lab.launched
    job.run(200)
    assert job.engine == "compiled"
    assert len(lab.begun_spans) == tried
    assert (lab.launched > before) == (stage == "launched")
    job.step.expect(MANY)
    job.run(200)
    assert len(lab.begun_spans) == max(1, tried) + (stage == "pending"), "it was not gone on with"
    job.step.close()


def test_settle_waits_until_it_is_decided(lab: Lab) -> None:
    job = Job(0)
    job.step.settle(job.data)
    assert lab.begun_spans[0].was_waited_for
    assert job.reason.endswith("; 4 steps run as one: measured us a step: one by one 50, 4 as one 25")
    assert lab.launched + lab.replayed < 500


def test_state_that_was_loaded_just_before_does_not_keep_it_from_being_made(lab: Lab) -> None:
    """The step of single batches takes the new objects up in its next step, and so does that of several."""
    lab.known[8] = KNOWN
    job = Job(ENOUGH_FOR_SINGLE).run(2 * UNTIL_COMPILED)
    assert (job.engine, lab.begun_spans) == ("compiled", [])
    traced = lab.begun[0].traced
    traced.is_stale = traced.can_rebind = lab.is_span_ready = True
    job.step.expect(MANY)
    job.run(TRIAL + 4 * SIZE)
    assert "4 steps run as one" in job.reason


def test_a_change_that_no_program_holds_for_is_followed_and_told(lab: Lab) -> None:
    job = launched(lab)
    lab.errors["begin"] = "this step cannot be traced"
    lab.begun[0].traced.is_stale = True
    before = lab.launched, lab.replayed
    job.run(3 * auto.LOOK_STEPS)
    assert (lab.launched, lab.replayed) == before
    assert job.engine == "eager"
    assert "since this changed: an option of a parameter group" in job.reason
