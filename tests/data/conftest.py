"""Fixtures of the tests of `prefetch` and `record`."""

import threading
from collections.abc import Iterator

import pytest

from tests.data.late_copies import LateCopies, workers


@pytest.fixture
def lane() -> LateCopies:
    return LateCopies()


@pytest.fixture(autouse=True)
def _no_worker_left() -> Iterator[None]:
    yield
    assert workers() == []


@pytest.fixture(autouse=True)
def _feeders_ended() -> Iterator[None]:
    """A DataLoader does not wait for the threads that fed its workers' queues; they end when the workers have."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("QueueFeeder"):
            thread.join(5)
