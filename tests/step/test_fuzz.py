"""Random jobs, trained by a plain loop and by FastLoop: the same numbers and objects, or a refusal with its reason."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fuzz import FINE, Draws, FuzzRecord, Outcome, family, section_of
from benchmarks.records import SHOWN_OF_ENVIRONMENT
from fasttrain.measure.bench.record import write_record
from tests.step.fuzz_jobs import draw_job
from tests.step.fuzzing import run_job

ITEMS, SEEDS = 20, 10
"""Test items, and jobs in each: a minute and a half on one core."""

COMPILED = {
    24: "a list of layers under Adam, with a metric",
    40: "dropout under Adam",
    180: "batch norm under AdamW, whose program no longer holds at the end",
}

pytestmark = pytest.mark.usefixtures("in_double")


@pytest.fixture
def frozen() -> Iterator[None]:
    """A capture looks through all objects of the process, most of which were imported: a fifth of a draw."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
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


@pytest.mark.parametrize("seed", COMPILED, ids=str)
def test_a_random_job_compiled(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_job(draw_job(seed), tmp_path, monkeypatch, is_compiled=True)
    assert outcome.kind == "same", outcome.detail
    assert outcome.by_program >= 3
    assert 0.0 < outcome.worst < 1e-12


def test_draws_are_counted_and_added() -> None:
    first, second = Draws(), Draws(draws=1)
    first.add(1, Outcome("refused", "epoch 3: forward reads a Decimal, and more: 'x' in fuzz_1_o.py:3"), [])
    second.add(2, Outcome("refused", 'epoch 1: forward reads a Decimal: "y" in fuzz_2_o.py:4', 2, 1, 1, 1e-15), [])
    second.add(3, Outcome("objects", "a: 1 and 2"), ["mlp"])
    first.merge(second)
    assert first.outcomes == {"refused": 2, "objects": 1}
    assert first.refusals == {"forward reads a Decimal": 2}
    assert (first.draws_by_program, first.draws_by_spans, first.objects_changed) == (1, 1, 1)
    assert [each["seed"] for each in first.findings] == [3]
    assert first.worst_relative_difference == 1e-15
    assert family("epoch 1: Kept0.__class_getitem__ is not followed; use") == "... is not followed"


def test_the_section_of_a_record_counts_each_outcome_once(tmp_path: Path) -> None:
    draws = Draws(draws=10, outcomes={"same": 4, "refused": 2, "excused": 1, "job": 2, "loss": 1}, draws_by_program=5)
    about = dict.fromkeys(SHOWN_OF_ENVIRONMENT, "1") | {"cores": 2, "commit": "0" * 40, "load_average": 1.0}
    about |= {"has_uncommitted_changes": False, "load_average_after": 1.0}
    record = FuzzRecord(
        command="python", created="2026-01-02T03:04:05+00:00", environment=about, tolerance=1e-9, graphs=draws,
        compiled=Draws(),
    )  # fmt: skip
    write_record(record, tmp_path / "fuzz.json")
    assert "| captured graphs | 10 | 5 | 0 | 4 | 2 | 1 | 2 | 1 | 0.0e+00 |" in section_of(tmp_path / "fuzz.json")
