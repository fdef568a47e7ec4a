"""Fixtures of the quick suite, and the ratios to the textbook at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fasttrain.errors import EngineError
from fasttrain.measure.bench.arm import CHECKED_STEPS
from fasttrain.measure.bench.sources import find_factory
from fasttrain.workloads.job import Job, load_job
from fasttrain.workloads.review_job import ReviewJob, review_job

THREADS = 1
ROUNDS = 5

ROUND_STEPS = 50
"""Least steps in a round; an arm that trains more in one go runs those."""

RATES = pytest.StashKey[dict[str, float]]()


@pytest.fixture(autouse=True, scope="session")
def pinned_threads() -> Iterator[None]:
    """One thread for every arm: these steps are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def job() -> ReviewJob:
    """The review job on the CPU: the real reviews where they are, else generated ones."""
    return review_job(torch.device("cpu"))


@pytest.fixture(scope="session")
def small_job() -> Job:
    """The small network on the CPU."""
    return load_job("mlp", torch.device("cpu"))


def median_s(benchmark: BenchmarkFixture) -> float | None:
    """Seconds of the median round; None under --benchmark-disable."""
    metadata: Any = benchmark.stats
    return None if metadata is None else float(metadata.stats.median)


@pytest.fixture
def time_arm(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Callable[[Job, str], None]:
    """Times rounds of an arm's steps, after the first ones; its samples/s go into `extra_info`."""

    def time_rounds(job: Job, name: str) -> None:
        try:
            arm = find_factory(name)(job)
        except EngineError as error:
            pytest.skip(str(error))

        def run(least: int) -> int:
            steps = 0
            while steps < least:
                steps += arm.step() or 1
            arm.sync()
            return steps

        run(CHECKED_STEPS)
        steps = benchmark.pedantic(run, args=(ROUND_STEPS,), rounds=ROUNDS, warmup_rounds=1)
        seconds = median_s(benchmark)
        if seconds is None:
            return
        rate = steps * job.batch_size / seconds
        benchmark.extra_info["samples_per_s"] = rate
        pytestconfig.stash.setdefault(RATES, {})[name] = rate

    return time_rounds


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints each arm's samples/s and its ratio to the textbook's."""
    rates = config.stash.get(RATES, {})
    textbook = rates.get("textbook")
    if textbook is None:
        return
    terminalreporter.section("samples/s, one after the other: for figures in pairs, python -m fasttrain bench")
    for name, rate in rates.items():
        terminalreporter.write_line(f"{name:<16} {rate:>11,.0f} {rate / textbook:>7.1f}x")
