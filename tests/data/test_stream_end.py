"""How a pass of `prefetch` ends: errors, breaks, interrupts, garbage; nothing is left running."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from fasttrain.data import stream
from tests.data.late_copies import LateCopies, LateEvent, Source, checksums, late, numbered, workers


def test_an_error_of_the_loader_comes_at_its_place_with_its_traceback(lane: LateCopies) -> None:
    def failing_loader() -> Iterator[Tensor]:
        yield from numbered(3)
        raise KeyError("row 384")

    iterator = iter(late(failing_loader(), lane, depth=5))
    held = [next(iterator) for _ in range(3)]
    with pytest.raises(KeyError, match="row 384") as caught:
        next(iterator)
    assert "failing_loader" in [entry.name for entry in traceback.extract_tb(caught.value.__traceback__)]
    assert workers() == []
    assert lane._pending == []
    assert next(iterator, None) is None
    assert checksums(held) == checksums(numbered(3))


def test_an_error_of_a_copy_reaches_the_consumer_and_the_next_pass_starts_afresh(
    lane: LateCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = late(numbered(4), lane)
    with monkeypatch.context() as patch:
        patch.setattr(lane, "upload", lambda host: (_ for _ in ()).throw(MemoryError("device full")))
        with pytest.raises(MemoryError, match="device full"):
            list(batches)
    held = list(batches)
    lane.finish()
    assert checksums(held) == checksums(numbered(4))


def test_an_error_leaves_no_cycle_that_holds_the_callers_frames(lane: LateCopies) -> None:
    class Marker:
        pass

    def failing_loader() -> Iterator[Tensor]:
        raise ValueError("bad")
        yield

    def consume() -> weakref.ref[Marker]:
        marker = Marker()
        with pytest.raises(ValueError, match="bad"):
            list(late(failing_loader(), lane))
        return weakref.ref(marker)

    gc.collect()
    gc.disable()
    try:
        ref = consume()
        assert ref() is None
    finally:
        gc.enable()


def test_an_error_of_iter_itself_is_raised_at_once(lane: LateCopies) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        iter(late(3, lane))


@pytest.mark.parametrize("num_taken", [0, 1, 7])
def test_break_joins_the_worker_and_closes_the_source(lane: LateCopies, num_taken: int) -> None:
    source = Source(numbered(30))
    iterator = iter(late(source, lane))
    for _ in range(num_taken):
        next(iterator)
    del iterator
    assert workers() == []
    assert source.closed_by == ["fasttrain-prefetch"]
    assert source.num_pulled <= num_taken + 3


def test_a_for_loop_left_by_an_error_of_the_consumer_ends_the_pass(lane: LateCopies) -> None:
    source = Source(numbered(30))

    def consume() -> None:
        for _ in late(source, lane):
            raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        consume()
    gc.collect()
    assert source.closed_by == ["fasttrain-prefetch"]


def test_close_ends_the_pass_and_drops_what_was_loaded_ahead(lane: LateCopies) -> None:
    source = Source(numbered(30))
    iterator = iter(late(source, lane))
    next(iterator)
    source.wait_for(3)
    iterator.close()
    assert workers() == []
    assert next(iterator, None) is None
    iterator.close()
    assert source.closed_by == ["fasttrain-prefetch"]
    assert iterator._worker.ready.empty()


def test_an_early_end_waits_for_the_copies_under_way(lane: LateCopies) -> None:
    iterator = iter(late(Source(numbered(30)), lane))
    batch = next(iterator)
    iterator.close()
    assert lane._pending == []
    assert checksums([batch]) == checksums(numbered(1))


def test_a_loader_error_that_was_loaded_ahead_is_not_raised_after_a_break(lane: LateCopies) -> None:
    def failing_loader() -> Iterator[Tensor]:
        yield from numbered(2)
        raise KeyError("never reached by the consumer")

    iterator = iter(late(failing_loader(), lane))
    next(iterator)
    iterator.close()


def test_an_error_of_closing_the_source_is_raised(lane: LateCopies) -> None:
    def careless() -> Iterator[Tensor]:
        try:
            yield from numbered(9)
        finally:
            raise OSError("cannot remove the spool")

    iterator = iter(late(careless(), lane))
    next(iterator)
    with pytest.raises(OSError, match="spool"):
        iterator.close()


def test_ctrl_c_while_the_consumer_waits_ends_the_pass(lane: LateCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(numbered(30))
    iterator = iter(late(source, lane))
    next(iterator)

    def interrupt(event: LateEvent) -> None:
        raise KeyboardInterrupt

    original = lane.wait
    side = lane._in_worker
    monkeypatch.setattr(
        lane, "wait", lambda event: original(event) if getattr(side, "yes", False) else interrupt(event)
    )
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert workers() == []
    assert source.closed_by == ["fasttrain-prefetch"]


def test_a_pass_in_a_reference_cycle_is_ended_by_the_collector(lane: LateCopies) -> None:
    source = Source(numbered(30))
    iterator = iter(late(source, lane))
    next(iterator)
    cycle: list[Any] = [iterator]
    cycle.append(cycle)
    del iterator, cycle
    end = time.monotonic() + 10.0
    while workers() and time.monotonic() < end:
        gc.collect()  # which does nothing where the worker's own thread is collecting at this moment
    assert workers() == []
    assert source.closed_by == ["fasttrain-prefetch"]


def test_a_pass_that_is_dropped_does_not_wait_for_ever_for_a_worker_that_cannot_end(
    lane: LateCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the collector ends it while this thread holds a lock that the worker needs."""
    monkeypatch.setattr(stream, "COLLECTED_S", 0.05)
    held = threading.Lock()

    def guarded() -> Iterator[Tensor]:
        try:
            yield from numbered(9)
        finally:
            with held:
                pass

    with held:
        iterator = iter(late(guarded(), lane))
        next(iterator)
        del iterator
        [worker] = workers()
    worker.join()


def test_an_exhausted_source_is_not_closed(lane: LateCopies) -> None:
    source = Source(numbered(4))
    list(late(source, lane))
    assert source.closed_by == []


def test_a_process_ends_with_a_pass_still_open() -> None:
    program = """
import torch
from tests.data.test_stream import LateCopies, late, numbered
iterator = iter(late(numbered(30), LateCopies()))
print(next(iterator).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([8])\n", "")
