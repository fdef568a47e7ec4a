"""Fixtures of the tests of `prefetch`."""

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
