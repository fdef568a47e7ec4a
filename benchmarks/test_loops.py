"""Loops on the review job, round by round."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fasttrain.workloads.job import Job


# Dynamo itself makes an instance of autograd.Function when it traces one of its subclasses.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.benchmark(group="loops")
@pytest.mark.parametrize("name", ["textbook", "tuned", "eager", "compiled"])
def test_loop(job: Job, time_arm: Callable[[Job, str], None], name: str) -> None:
    time_arm(job, name)
