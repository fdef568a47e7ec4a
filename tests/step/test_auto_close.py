"""What `auto` does after `close`: nothing is compiled, until more steps are expected."""

from __future__ import annotations

import pytest

from fasttrain.step import ladder
from tests.step.fakes import Lab
from tests.step.test_auto import MANY, MEASURED, TRIAL, Job, half, lab

__all__ = ["lab"]


STAGES = {
    "measuring": 1,
    "short of steps": 2 * MEASURED,
    "waiting": 2 * MEASURED,
    "trial": MEASURED + 2 * ladder.POLL_STEPS + TRIAL // 2,
    "compiled": MEASURED + 2 * ladder.POLL_STEPS + TRIAL,
}


@pytest.mark.parametrize("stage", STAGES)
def test_after_close_nothing_is_compiled_and_the_record_is_right(lab: Lab, stage: str) -> None:
    lab.is_ready = stage in ("trial", "compiled")
    job = Job(1000 if stage == "short of steps" else MANY).run(STAGES[stage])
    begun, replayed = len(lab.begun), lab.replayed
    assert (replayed > 0) == lab.is_ready
    job.step.close()
    assert all(pending.is_closed for pending in lab.begun)
    assert job.engine == ("compiled" if stage == "compiled" else "eager")
    assert ("training ended before the program was ready" in job.reason) == (stage in ("waiting", "trial"))
    lab.is_ready = True
    job.run(3 * MEASURED)
    job.run(2 * ladder.LOOK_STEPS, is_short=half)
    assert len(lab.begun) == begun
    assert (lab.replayed > replayed) == (stage == "compiled")
    job.step.close()


@pytest.mark.parametrize("stage", STAGES)
def test_where_more_is_expected_after_close_it_goes_on(lab: Lab, stage: str) -> None:
    lab.is_ready = stage in ("trial", "compiled")
    job = Job(1000 if stage == "short of steps" else MANY).run(STAGES[stage])
    job.step.close()
    begun = len(lab.begun)
    lab.is_ready = True
    job.step.expect(2 * MANY)
    job.run(MEASURED + 4 * ladder.POLL_STEPS + TRIAL)
    assert job.engine == "compiled"
    assert job.reason == "measured 50 us a step, eager 100 us"
    assert len(lab.begun) == begun + (stage != "compiled")
    job.step.close()
