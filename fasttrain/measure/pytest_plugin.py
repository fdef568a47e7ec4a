"""The pytest fixture `no_host_reads`, there as soon as fasttrain is installed. Loading it imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

import pytest

__all__ = ["no_host_reads"]


@pytest.fixture
def no_host_reads() -> Callable[[], AbstractContextManager[None]]:
    """A context that fails the test, naming file, line and count, where the block in it makes a host read.

    ```
    def test_my_loop_never_waits(no_host_reads):
        loop, batches = make_loop()
        with no_host_reads():
            for batch in batches:
                loop.step(batch)
    ```
    """
    return _no_host_reads


@contextmanager
def _no_host_reads() -> Generator[None]:
    from fasttrain.measure.host_reads import count_host_reads

    with count_host_reads() as reads:
        yield
    if reads.count:
        places = "\n".join(f"  {read.file}:{read.line}: {read.what}, {read.count} times" for read in reads.reads)
        pytest.fail(f"{reads.count} host reads, where none is allowed:\n{places}", pytrace=False)
