"""`train --threads auto`: the numbers are those of a run with that many threads, and all that follows has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fasttrain.cli import main
from fasttrain.run.config import TrainConfig
from fasttrain.step import compiler, timing
from fasttrain.step.compiler import program_key
from fasttrain.workloads import reviews
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.reviews import ReviewsOutcome, train_reviews, warm_reviews
from tests.commands import small, strict_json
from tests.step.fakes import Graphs


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generated") / "reviews.csv"
    generate_reviews(600, seed=2).table.to_csv(path, index=False)
    return path


def config_of(data: Path, out: Path, **options: Any) -> TrainConfig:
    small = TrainConfig(data=data, out=out, device="cpu", cutoff=5, batch_size=32, epochs=6, engine="eager")
    return replace(small, threads="auto", **options)


def make_fastest(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the job be measured, whatever its length, by a clock that goes slower with so many threads."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-4 if torch.get_num_threads() == count else 1.5e-4
        return now

    monkeypatch.setattr(timing, "SHARE", 1.0)
    monkeypatch.setattr(timing, "TURN_S", 0.0)
    monkeypatch.setattr(reviews, "choose_threads", partial(timing.choose_threads, clock=clock))


def assert_same_numbers(run: ReviewsOutcome, fixed: ReviewsOutcome) -> None:
    models = [(each.path / "model.safetensors").read_bytes() for each in (run, fixed)]
    assert models[0] == models[1]
    histories = [pd.read_csv(each.path / "history.csv") for each in (run, fixed)]
    for column in ("epoch", "loss", "accuracy", "lr"):
        assert histories[0][column].tolist() == histories[1][column].tolist()
    assert run.summary["test_loss"] == fixed.summary["test_loss"]


@pytest.mark.parametrize("count", [1, 2])
def test_the_numbers_are_those_of_a_run_with_that_many_threads(
    count: int, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fastest(count, monkeypatch)
    run = train_reviews(config_of(generated, tmp_path / "auto"), progress=False)
    assert run.summary["threads"] == count
    assert run.summary["threads_reason"].startswith("measured us a step: 1 thread ")
    assert torch.get_num_threads() == count
    assert run.summary["threads_reason"].replace("'", "&#39;") in (run.path / "report.html").read_text()
    fixed = train_reviews(replace(config_of(generated, tmp_path / "fixed"), threads=count), progress=False)
    assert (fixed.summary["threads"], fixed.summary["threads_reason"]) == (count, "asked for")
    assert_same_numbers(run, fixed)


def test_a_resumed_run_measures_anew_and_goes_on_with_the_same_numbers(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fastest(1, monkeypatch)
    config = config_of(generated, tmp_path / "auto", epochs=3)
    train_reviews(config, progress=False)
    torch.set_num_threads(2)
    resumed = train_reviews(replace(config, epochs=6), resume=tmp_path / "auto", progress=False)
    assert resumed.summary["threads_reason"].startswith("measured")
    fixed = train_reviews(replace(config_of(generated, tmp_path / "fixed"), threads=1), progress=False)
    assert_same_numbers(resumed, fixed)


def record_builds(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[compiler.GraphJob]:
    """Has the traced graph run in place of machine code; the jobs that a child would have been given."""
    Graphs(monkeypatch, folder)
    build, jobs = compiler.Build, []

    def recorded(job: compiler.GraphJob, *rest: Any) -> Any:
        jobs.append(job)
        return build(job, *rest)

    monkeypatch.setattr(compiler, "Build", recorded)
    return jobs


@pytest.mark.parametrize("count", [1, 2])
def test_a_program_is_made_for_the_chosen_count(
    count: int, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_fastest(count, monkeypatch)
    jobs = record_builds(monkeypatch, tmp_path)
    run = train_reviews(config_of(generated, tmp_path / "run", engine="compiled", epochs=3), progress=False)
    assert run.summary["engine"] == "compiled"
    assert [job.num_threads for job in jobs] == [count]
    assert program_key(jobs[0]) != program_key(replace(jobs[0], num_threads=3 - count))


def test_a_program_is_warmed_for_the_chosen_count(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_fastest(1, monkeypatch)
    jobs = record_builds(monkeypatch, tmp_path)
    warm_reviews(config_of(generated, tmp_path / "none"))
    assert [job.num_threads for job in jobs] == [1]


def test_the_command_leaves_torchs_own_to_be_measured(
    generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real clock, and too few steps for it: one thread, said why."""
    arguments = small(generated, tmp_path / "run", "--epochs", "1", "--threads", "auto")
    assert main(arguments) == 0
    line = "threads 1: not measured: the job is too short, with at most 26 steps to come"
    assert line in capsys.readouterr().out.splitlines()
    assert strict_json((tmp_path / "run" / "config.json").read_text())["threads"] == "auto"
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("given", "count", "reason"), [([], 1, "the default"), (["--threads", "2"], 2, "asked for")])
def test_other_options_measure_nothing(
    given: list[str], count: int, reason: str, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reviews, "choose_threads", None)
    assert main(small(generated, tmp_path / "run", "--epochs", "1", *given)) == 0
    summary = strict_json((tmp_path / "run" / "summary.json").read_text())
    assert (summary["threads"], summary["threads_reason"]) == (count, reason)
    assert torch.get_num_threads() == count
