"""Resident rows under `auto`: one program that walks over them, with a compiler and a clock by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.data.resident import ResidentBatches, Span, resident
from fasttrain.step import ladder
from fasttrain.step.cache import Verdict
from fasttrain.step.candidate import CALLED_STEPS, TIMED_CALLS, VERIFIED_BATCHES
from fasttrain.step.train_step import TrainStep
from tests.step.fakes import TRIAL_ROUNDS, Lab
from tests.step.jobs import batches, everything, train_step

MANY = 10_000_000
BATCHES = 50
"""Whole batches of an epoch; three rows more are a short one."""

MEASURED = ladder.WARM_STEPS + ladder.TIMED_STEPS
UNTIL_LOADED = MEASURED + 4 * ladder.POLL_STEPS
UNTIL_ADOPTED = UNTIL_LOADED + 8 * VERIFIED_BATCHES + 2 * (TRIAL_ROUNDS + 1) * 24 + 2 * BATCHES
KNOWN = Verdict(eager_us=100.0, program_us=25.0, trace_s=0.5, compile_s=20.0, refused=None)
ADOPTED = "measured 25 us a step, several steps a call, eager 100 us"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab.install(monkeypatch)
    lab.is_ready = True
    return lab


def data_of(seed: int, *, drop_last: bool = True) -> ResidentBatches:
    x, y = batches(1, rows=8 * BATCHES + 3)[0]
    return resident(x, y, batch_size=8, device="cpu", seed=seed, drop_last=drop_last)


class Epochs:
    """A step's resident data, epoch after epoch, and its own random numbers."""

    def __init__(self, step: TrainStep, make: Callable[[int], ResidentBatches]) -> None:
        torch.manual_seed(11)
        self.step = step
        self.data: ResidentBatches
        self._make = make
        self._epoch: Iterator[Any]
        self._sources: dict[int, ResidentBatches] = {}
        self.go_on_with(seed=2)
        self._rng = torch.get_rng_state()
        self.done = 0

    def go_on_with(self, seed: int) -> None:
        """Begins an epoch of the data of that seed with the next step."""
        self.data = self._sources.setdefault(seed, self._make(seed))
        self._epoch = iter(self.data)

    def run(self, count: int) -> int:
        """So many steps or, where several are one call, a few more; returns how many there were so far."""
        torch.set_rng_state(self._rng)
        end = self.done + count
        while self.done < end:
            for ran in self.step.run(self._epoch):
                self.done += ran.steps if isinstance(ran, Span) else 1
                if self.done >= end:
                    break
            else:
                self._epoch = iter(self.data)
        self._rng = torch.get_rng_state()
        return self.done

    def run_until(self, done: int) -> None:
        """One by one."""
        torch.set_rng_state(self._rng)
        while self.done < done:
            batch = next(self._epoch, None)
            if batch is None:
                self._epoch = iter(self.data)
                continue
            self.step(batch)
            self.done += 1
        self._rng = torch.get_rng_state()


class Job:
    """A job under `auto`, and the same job run eagerly."""

    def __init__(self, expected: int = MANY, make: Callable[[int], ResidentBatches] = data_of) -> None:
        self.step = train_step("auto")
        self.step.expect(expected)
        self._auto, self._eager = Epochs(self.step, make), Epochs(train_step("eager"), make)

    def run(self, count: int) -> Job:
        """So many steps, both ways."""
        self._eager.run_until(self._auto.run(count))
        torch.testing.assert_close(everything(self.step), everything(self._eager.step), rtol=0, atol=0)
        return self

    def run_wrongly(self, count: int) -> None:
        """So many steps, whose numbers are not compared."""
        self._auto.run(count)

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


def adopted(lab: Lab) -> Job:
    """A job whose walking program has been adopted."""
    job = Job().run(UNTIL_ADOPTED)
    assert (job.engine, job.reason) == ("compiled", ADOPTED)
    return job


def test_one_program_is_compiled_and_walks_over_the_epoch(lab: Lab) -> None:
    job = adopted(lab)
    assert len(lab.begun) == 1, "no program of single batches"
    assert lab.begun[0].is_closed
    job.run((TIMED_CALLS + 1) * BATCHES)
    lab.walked.clear()
    job.run(10 * BATCHES)
    assert set(lab.walked[1:-1]) == {BATCHES}, "an epoch is one call"


def test_a_call_takes_a_bounded_time(lab: Lab) -> None:
    lab.walking_s, lab.eager_s = 5e-3, 10e-3
    job = adopted_slowly(lab)
    lab.walked.clear()
    job.run(4 * BATCHES)
    assert max(lab.walked) == round(ladder.CALL_S / lab.walking_s) == job.step.span


def adopted_slowly(lab: Lab) -> Job:
    job = Job().run(UNTIL_ADOPTED + 2 * BATCHES)
    assert job.engine == "compiled"
    return job


def test_eager_steps_gather_several_batches_at_once(lab: Lab) -> None:
    lab.is_ready = False
    job = Job().run(3 * MEASURED)
    assert (job.engine, job.step.span) == ("eager", ladder.MAX_EAGER_SPAN)
    lab.eager_s = 40e-3
    slow = Job().run(MEASURED)
    assert slow.step.span == 1, "progress and Ctrl-C wait for a call"
    for each in (job, slow):
        each.step.close()


@pytest.mark.parametrize("expected", [0, 100, 250_000])
def test_a_job_too_short_is_never_traced(lab: Lab, expected: int) -> None:
    job = Job(expected).run(3 * MEASURED)
    assert (job.engine, lab.begun, job.step.compile_s) == ("eager", [], None)


def test_what_is_known_to_pay_needs_fewer_steps(lab: Lab) -> None:
    lab.known[8] = KNOWN
    steps = round(2 * KNOWN.trace_s / 75e-6)
    Job(steps - 1000).run(2 * MEASURED)
    assert not lab.begun
    Job(steps + 2 * MEASURED).run(2 * MEASURED).step.close()
    assert len(lab.begun) == 1


def test_nothing_waits_for_the_compiler(lab: Lab) -> None:
    lab.is_ready = False
    job = Job().run(UNTIL_LOADED)
    now, done = lab.now, job.run(0)._auto.done  # pyright: ignore[reportPrivateUsage]
    job.run(10 * BATCHES)
    steps = job._auto.done - done  # pyright: ignore[reportPrivateUsage]
    assert lab.now - now == pytest.approx(steps * lab.eager_s)
    assert (lab.replayed, job.reason) == (0, "a child process is compiling the step")
    job.step.close()


@pytest.mark.parametrize("walking_s", [99e-6, 300e-6])
def test_a_program_that_is_not_faster_is_dropped(lab: Lab, walking_s: float) -> None:
    lab.walking_s = walking_s
    job = Job().run(UNTIL_ADOPTED)
    assert job.engine == "eager"
    assert f"not faster: measured {walking_s * 1e6:.0f} us a step, several steps a call, eager 100 us" in job.reason
    replayed = lab.replayed
    job.run(3 * BATCHES)
    assert (lab.replayed, len(lab.begun)) == (replayed, 1)


def move_a_weight(lab: Lab) -> None:
    def spoil(losses: Tensor) -> Tensor:
        with torch.no_grad():
            lab.begun[0].step.tensors[0].view(-1)[0] += 0.1
        return losses

    lab.spoil = spoil


@pytest.mark.parametrize("where", ["the loss", "a weight"])
def test_a_program_with_other_numbers_is_refused(lab: Lab, where: str) -> None:
    if where == "a weight":
        move_a_weight(lab)
    else:
        lab.spoil = lambda losses: losses * 1.01
    job = Job().run(UNTIL_ADOPTED)
    assert lab.replayed == 2, "two steps were compared"
    assert job.engine == "eager"
    assert "was refused: its numbers differ from eager's: " in job.reason
    assert [verdict.refused is not None for verdict in lab.remembered] == [True]


def test_a_program_is_compared_on_several_batches(lab: Lab) -> None:
    lab.spoil = lambda losses: losses * (1.01 if len(lab.walked) >= VERIFIED_BATCHES else 1.0)
    job = Job().run(UNTIL_ADOPTED)
    assert lab.walked == [1] * (VERIFIED_BATCHES + 1), "none was used before it had agreed so often"
    assert "its numbers differ from eager's" in job.reason


def test_several_steps_in_one_call_are_compared_with_single_ones(lab: Lab) -> None:
    lab.spoil = lambda losses: losses * (1.01 if losses.numel() > 1 else 1.0)
    job = Job().run(UNTIL_ADOPTED)
    assert job.engine == "eager"
    assert "16 steps in one call give other numbers than one by one: the loss is" in job.reason
    assert lab.walked.count(16) == 1


def test_a_call_of_many_steps_is_compared_too(lab: Lab) -> None:
    """On CUDA it is another graph than that of a few."""
    job = adopted(lab)
    lab.spoil = lambda losses: losses * (1.01 if losses.numel() >= CALLED_STEPS else 1.0)
    job.run_wrongly(2 * BATCHES)
    assert job.engine == "compiled", "it was compared before it was adopted, or just after"
    job = Job().run(UNTIL_ADOPTED + 2 * BATCHES)
    assert job.engine == "eager"
    assert "16 steps in one call give other numbers than one by one" in job.reason


def test_comparisons_go_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    job = adopted(lab)
    monkeypatch.setattr(ladder, "VERIFIED_SHARE", 1.0)
    monkeypatch.setattr(ladder, "LEAST_UNVERIFIED", 64)
    job.step._engine.verify_again()  # type: ignore[attr-defined]
    job.run(4 * BATCHES)
    assert job.engine == "compiled"
    lab.spoil = lambda losses: losses * 1.01
    job.run_wrongly(4 * BATCHES)
    assert job.engine == "eager"
    assert "while it ran: its numbers differ from eager's" in job.reason


def test_other_data_that_stay_get_a_program_too(lab: Lab) -> None:
    job = adopted(lab)
    job.go_on_with(seed=5)
    job.run(ladder.LOOK_STEPS // 8)
    assert job.engine == "eager"
    assert "the last because this differed: the resident data" in job.reason
    job.run(2 * ladder.LOOK_STEPS + UNTIL_ADOPTED)
    assert len(lab.begun) == 2
    assert job.engine == "compiled"
    replayed = lab.replayed
    for seed in (2, 5, 2, 5):
        job.go_on_with(seed)
        job.run(BATCHES)
    assert lab.replayed - replayed >= 4 * BATCHES, "both stay"


def test_data_that_keep_changing_end_up_eager(lab: Lab) -> None:
    job = adopted(lab)
    for seed in range(5, 12):
        job.go_on_with(seed)
        job.run(2 * ladder.LOOK_STEPS + UNTIL_ADOPTED)
    assert len(lab.begun) == ladder.MAX_CANDIDATES
    assert job.engine == "eager"
    assert "the resident data" in job.reason


def test_what_cannot_walk_runs_one_step_a_call(lab: Lab) -> None:
    lab.why_single = "rows of unequal length are used otherwise than by sums"
    job = Job().run(UNTIL_ADOPTED)
    assert (job.engine, job.step.span, lab.walked) == ("compiled", 0, [])
    assert job.reason == f"measured 50 us a step, eager 100 us; one step a call: {lab.why_single}"
    assert len(lab.begun) == 1
    span = iter(job.data).take(3)  # type: ignore[attr-defined]
    replayed = lab.replayed
    assert job.step.steps(span).shape == (3,)
    assert lab.replayed == replayed + 3


def test_the_short_batch_that_ends_an_epoch_runs_eagerly(lab: Lab) -> None:
    job = Job(make=lambda seed: data_of(seed, drop_last=False)).run(UNTIL_ADOPTED + 8 * BATCHES)
    assert job.engine == "compiled"
    assert len(lab.begun) == 1
    assert "ran eagerly, the last because this differed: the program reads resident data, and this" in job.reason


ERRORS = {
    "begin": ("this step cannot be traced", 0),
    "is_ready": ("the compiling child was ended by SIGKILL", 1),
    "load": ("the compiled program cannot be loaded", 1),
}


@pytest.mark.parametrize("where", ERRORS)
def test_whatever_fails_training_goes_on_and_says_why(lab: Lab, where: str) -> None:
    message, begun = ERRORS[where]
    lab.errors[where] = message
    job = Job().run(UNTIL_ADOPTED)
    assert job.engine == "eager"
    assert message in job.reason
    assert len(lab.begun) == begun
    assert all(pending.is_closed for pending in lab.begun)


def test_a_comparison_that_does_not_fit_in_memory_is_not_made(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.step.state.free_bytes", lambda _: 10)
    job = Job().run(UNTIL_ADOPTED)
    assert "do not fit in memory" in job.reason
    assert lab.replayed == 0


@pytest.mark.parametrize("stage", ["short of steps", "compiling", "adopted"])
def test_after_close_nothing_is_compiled(lab: Lab, stage: str) -> None:
    if stage == "adopted":
        job = adopted(lab)
    else:
        lab.is_ready = False
        job = Job(100 if stage == "short of steps" else MANY).run(UNTIL_LOADED)
    tried = len(lab.begun)
    assert tried == (stage != "short of steps")
    job.step.close()
    assert all(pending.is_closed for pending in lab.begun)
    lab.is_ready = True
    before = lab.replayed
    job.run(4 * BATCHES)
    assert len(lab.begun) == tried
    assert (lab.replayed > before) == (stage == "adopted")
    job.step.expect(MANY)
    job.run(UNTIL_ADOPTED)
    assert job.engine == "compiled"
    assert len(lab.begun) == max(1, tried) + (stage == "compiling"), "it was begun anew"
    job.step.close()


def test_settle_waits_until_it_is_decided(lab: Lab) -> None:
    lab.is_ready = False
    job = Job(0)
    job.step.settle(job.data)
    assert job.reason == ADOPTED
    assert lab.replayed < 500


def test_state_that_was_loaded_is_taken_up(lab: Lab) -> None:
    job = adopted(lab)
    step = lab.begun[0].step
    step.is_stale = step.can_rebind = True
    before = lab.replayed
    job.run(2 * BATCHES)
    assert lab.replayed - before >= 2 * BATCHES
    assert job.reason == ADOPTED


def test_state_that_is_loaded_while_the_child_compiles_is_taken_up(lab: Lab) -> None:
    lab.is_ready = False
    job = Job().run(UNTIL_LOADED)
    step = lab.begun[0].step
    step.is_stale = step.can_rebind = lab.is_ready = True
    job.run(UNTIL_ADOPTED)
    assert job.reason == ADOPTED


def test_a_change_that_no_program_holds_for_is_followed_and_told(lab: Lab) -> None:
    job = adopted(lab)
    lab.errors["begin"] = "this step cannot be traced"
    lab.begun[0].step.is_stale = True
    before = lab.replayed
    job.run(3 * ladder.LOOK_STEPS)
    assert lab.replayed == before
    assert job.engine == "eager"
    assert "the last because this differed: an option of a parameter group" in job.reason


def test_a_program_known_not_to_pay_is_not_traced(lab: Lab) -> None:
    lab.known[8] = replace(KNOWN, program_us=110.0)
    job = Job(0)
    job.step.settle(job.data)
    assert not lab.begun
