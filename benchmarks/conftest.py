"""Fixtures of the quick suite, and the ratios to the textbook at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import Arm, with_threads
from benchmarks.review_arms import ReviewJob, default_source

THREADS = 1
ROUNDS = 5

RATES = pytest.StashKey[dict[str, float]]()


@pytest.fixture(autouse=True, scope="session")
def pinned_threads() -> Iterator[None]:
    """One thread for every arm: these steps are too small to share."""
    before = torch.get_num_threads()
    with_threads(THREADS)
    yield
    with_threads(before)


@pytest.fixture(scope="session")
def job() -> ReviewJob:
    """The review job on the CPU: the real reviews where they are, else generated ones."""
    return ReviewJob.load(default_source(), torch.device("cpu"))


def median_s(benchmark: BenchmarkFixture) -> float | None:
    """Seconds of the median round; None under --benchmark-disable."""
    metadata: Any = benchmark.stats
    return None if metadata is None else float(metadata.stats.median)


@pytest.fixture
def time_arm(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Callable[[Arm], None]:
    """Times passes of an arm, after one that is not timed; its samples/s go into `extra_info`."""

    def time_passes(arm: Arm) -> None:
        samples = benchmark.pedantic(arm.run, rounds=ROUNDS, warmup_rounds=1)
        seconds = median_s(benchmark)
        if seconds is None:
            return
        rate = samples / seconds
        benchmark.extra_info["samples_per_s"] = rate
        pytestconfig.stash.setdefault(RATES, {})[arm.name] = rate

    return time_passes


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints each arm's samples/s and its ratio to the textbook's."""
    rates = config.stash.get(RATES, {})
    textbook = rates.get("textbook")
    if textbook is None:
        return
    terminalreporter.section("samples/s, one after the other: for interleaved figures, python -m benchmarks.reviews")
    for name, rate in rates.items():
        terminalreporter.write_line(f"{name:<16} {rate:>11,.0f} {rate / textbook:>7.1f}x")
