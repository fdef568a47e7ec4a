"""Random jobs, trained by a plain loop and by FastLoop: the same numbers and objects, or a refusal with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.step.fuzz_jobs import draw_job
from tests.step.fuzzing import FINE, run_job

ITEMS, SEEDS = 20, 12
"""Test items, and jobs in each: two minutes on one core."""

pytestmark = pytest.mark.usefixtures("in_double")


@pytest.mark.parametrize("item", range(ITEMS))
def test_a_random_job_trains_as_plain_pytorch_does(
    item: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_program = 0
    for seed in range(item * SEEDS, (item + 1) * SEEDS):
        outcome = run_job(draw_job(seed), tmp_path, monkeypatch)
        by_program += outcome.by_program > 0
        assert outcome.kind in FINE, f"python -m tests.step.fuzzing {seed}: {outcome.kind}: {outcome.detail}"
    capsys.readouterr()
    assert by_program >= SEEDS // 4
