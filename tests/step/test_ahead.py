"""Compiling for later runs of a job that is too short to compile for: its second run starts it, the third has it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from fasttrain.step import build, ladder
from fasttrain.step.build import Ahead, Build, GraphJob, ahead_of, note_ahead, stop_ahead
from fasttrain.step.cache import ProgramCache
from fasttrain.step.compiler import COMPILE_AHEAD, Compiler, program_key
from fasttrain.step.trace import trace_step
from tests.step.fakes import Lab
from tests.step.jobs import batches, train_step
from tests.step.test_auto import MEASURED, TRIAL, Job, lab

__all__ = ["lab"]

SHORT = 80_000
"""Steps of 100 us that a program repays only if it is there already."""


def test_the_first_run_compiles_nothing(lab: Lab) -> None:
    job = Job(SHORT).run(2 * MEASURED)
    assert not lab.begun
    job.step.close()
    assert "too little to repay" in job.reason
    assert not lab.left


def test_the_second_run_begins_and_leaves_the_child(lab: Lab) -> None:
    lab.is_seen_again = True
    job = Job(SHORT).run(2 * MEASURED)
    assert len(lab.begun) == 1
    assert job.step.compile_s == 0.5, "the trace"
    job.step.close()
    assert lab.left == lab.begun
    assert job.engine == "eager"
    assert job.reason.startswith("training ended before the program was ready; this job was seen before: process 4242")
    assert "`python -m fasttrain cache stop` ends it" in job.reason


def test_a_program_that_gets_ready_in_time_is_used(lab: Lab) -> None:
    lab.is_seen_again = lab.is_ready = True
    job = Job(SHORT).run(MEASURED + 2 * ladder.POLL_STEPS + TRIAL)
    assert job.engine == "compiled"
    job.step.close()
    assert not lab.left


def test_the_third_run_starts_compiled(lab: Lab) -> None:
    lab.was_compiled = lab.is_ready = True
    job = Job(SHORT).run(MEASURED + 2 * ladder.POLL_STEPS + TRIAL)
    assert job.engine == "compiled"


def test_a_job_that_even_a_ready_program_does_not_repay_is_left_alone(lab: Lab) -> None:
    lab.is_seen_again = True
    Job(2_000).run(2 * MEASURED).step.close()
    assert not lab.begun


@pytest.mark.parametrize("is_seen_again", [False, True])
def test_a_run_that_ends_before_its_program_is_ready_counts_too(lab: Lab, is_seen_again: bool) -> None:
    job = Job().run(2 * MEASURED)
    assert len(lab.begun) == 1
    lab.is_seen_again = is_seen_again
    job.step.close()
    assert lab.left == (lab.begun if is_seen_again else [])
    assert job.reason.startswith("training ended before the program was ready")
    assert ("this job was seen before" in job.reason) == is_seen_again


def compiler_of(rows: int = 8) -> Compiler:
    compiler = Compiler(train_step("eager").spec)
    assert compiler.verdict(batches(1, rows=rows)[0]) is None
    return compiler


def test_runs_are_counted_by_job(own_programs: Path) -> None:
    seen = [compiler_of().is_seen_again() for _ in range(9)]
    assert seen == [False, True, False, True, False, False, False, True, False], "the 2nd, 4th, 8th"
    assert not compiler_of(rows=5).is_seen_again(), "another job"


def test_it_can_be_turned_off(own_programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPILE_AHEAD, "0")
    assert not any(compiler_of().is_seen_again() for _ in range(4))
    assert not any(own_programs.glob("*.seen"))


def test_while_one_child_compiles_no_other_is_started(own_programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.step.compiler.ahead_of", lambda _: (4242, "Linear"))
    assert not any(compiler_of().is_seen_again() for _ in range(4))


@pytest.mark.parametrize("content", ["", "[]", '{"pid": "x"}', '{"pid": 1, "until": 1e18, "what": "init"}', None])
def test_a_note_that_names_no_child_of_ours_is_no_child(content: str | None, own_programs: Path) -> None:
    cache = ProgramCache(own_programs)
    if content is not None:
        cache.ahead_path.write_text(content)
    assert ahead_of(cache) is None
    assert stop_ahead(cache) is None


@pytest.mark.parametrize("content", ["", "[]", '{"count": "x"}'])
def test_a_damaged_count_begins_anew(content: str, own_programs: Path) -> None:
    compiler_of().is_seen_again()
    [path] = own_programs.glob("*.seen")
    path.write_text(content)
    assert [compiler_of().is_seen_again() for _ in range(2)] == [False, True]


def test_clearing_the_cache_forgets_the_runs(own_programs: Path) -> None:
    compiler_of().is_seen_again()
    ProgramCache(own_programs).clear()
    assert not any(own_programs.iterdir())


# From here on children are real.


@pytest.fixture
def left(own_programs: Path, temporary: Path) -> Iterator[tuple[ProgramCache, Ahead, int]]:
    """A child that was left to itself just after it was started."""
    step = train_step("eager")
    batch = batches(1)[0]
    step(batch)
    cache = ProgramCache(own_programs)
    job = GraphJob.of(trace_step(step.spec, batch).parts[0])
    note = Ahead(cache=str(cache.folder), key=program_key(job), what="Sequential", signature="job")
    child = Build(job, cache.inductor_folder)
    pid = child.leave(note)
    assert pid is not None
    note_ahead(cache, pid, note.what)
    child.close()  # as a training does at its end
    yield cache, note, pid
    for process in build._left:  # pyright: ignore[reportPrivateUsage]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    build._left.clear()  # pyright: ignore[reportPrivateUsage]


def test_a_child_that_is_left_puts_the_program_into_the_cache(
    left: tuple[ProgramCache, Ahead, int], temporary: Path
) -> None:
    cache, note, pid = left
    assert ahead_of(cache) == (pid, "Sequential")
    deadline = time.monotonic() + 110
    while cache.find(note.key) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert cache.find(note.key) is not None
    [process] = build._left  # pyright: ignore[reportPrivateUsage]
    assert process.wait(timeout=20) == 0
    assert cache.is_ready("job")
    assert ahead_of(cache) is None
    assert not any(temporary.iterdir()), "its files are removed"


def test_it_can_be_ended(left: tuple[ProgramCache, Ahead, int]) -> None:
    cache, _, pid = left
    assert stop_ahead(cache) == pid
    [process] = build._left  # pyright: ignore[reportPrivateUsage]
    assert process.wait(timeout=20) == -signal.SIGKILL
    assert stop_ahead(cache) is None


def test_the_note_is_plain_data() -> None:
    note = Ahead(cache="/c", key="k", what="w", signature="s")
    assert Ahead(**asdict(note)) == note
