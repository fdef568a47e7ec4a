"""Loops on the review job, pass by pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.arms import TextbookArm
from benchmarks.conftest import THREADS
from benchmarks.harness import Arm
from benchmarks.review_arms import DenseArm, ReviewJob, review_arms
from fasttrain.errors import EngineError

TEXTBOOK_BATCHES = 20


@pytest.mark.benchmark(group="loops")
def test_textbook(job: ReviewJob, time_arm: Callable[[Arm], None]) -> None:
    time_arm(TextbookArm(job, name="textbook", threads=THREADS, num_batches=TEXTBOOK_BATCHES))


@pytest.mark.benchmark(group="loops")
def test_tuned_by_hand(job: ReviewJob, time_arm: Callable[[Arm], None]) -> None:
    time_arm(DenseArm(job, threads=THREADS))


# Dynamo itself makes an instance of autograd.Function when it traces one of its subclasses.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.benchmark(group="loops")
@pytest.mark.parametrize("name", ["eager", "eager, streamed", "compiled"])
def test_fast_loop(job: ReviewJob, time_arm: Callable[[Arm], None], name: str) -> None:
    try:
        arm = review_arms(job, THREADS)[name]()
    except EngineError as error:
        pytest.skip(str(error))
    time_arm(arm)
