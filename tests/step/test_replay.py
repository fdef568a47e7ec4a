"""Which program runs a step, which goes, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.step.replay import MAX_PROGRAMS, Programs
from fasttrain.step.trace import Mismatch


class Stub:
    """A traced step and its program in one: it holds for one batch, and its loss is that batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.is_stale = self.can_rebind = False
        self.rebinds = 0

    def inputs(self, batch: int) -> list[Tensor] | Mismatch:
        if self.is_stale:
            return Mismatch("an object")
        return [torch.tensor(batch)] if batch == self.batch else Mismatch("a size")

    def rebind(self) -> bool:
        self.rebinds += 1
        took_up = self.is_stale and self.can_rebind
        self.is_stale = self.is_stale and not took_up
        return took_up

    def run(self, inputs: list[Tensor]) -> Tensor:
        return inputs.pop()


class Bench:
    """Programs over stubs; eager's loss is the negative batch."""

    def __init__(self, *batches: int) -> None:
        self.weight = 0.0
        self.programs = Programs(lambda batch: torch.tensor(-batch), self._count)
        self.stubs: dict[Any, Any] = {batch: self.add(batch) for batch in batches}

    def _count(self, weight: float) -> None:
        self.weight += weight

    def add(self, batch: int) -> Stub:
        stub: Any = Stub(batch)
        self.programs.add(stub, stub)
        return stub

    def run(self, batches: Sequence[int]) -> list[int]:
        return [int(self.programs.step(batch)) for batch in batches]


def test_without_programs_it_is_eager_and_nothing_is_missed() -> None:
    bench = Bench()
    assert bench.run([1, 2]) == [-1, -2]
    assert (bench.programs.missed, bench.weight, len(bench.programs)) == (0, 0.0, 0)


def test_each_batch_is_run_by_the_program_that_holds_for_it() -> None:
    bench = Bench(1, 2)
    assert bench.run([1, 2, 3, 1]) == [1, 2, -3, 1]
    assert bench.programs.missed == 1
    assert bench.programs.why_missed == "a size"
    assert bench.weight == 3.0, "eager counts its own batches"


def test_the_last_used_is_first() -> None:
    bench = Bench(1, 2)
    assert bench.programs.first is bench.stubs[2]
    bench.run([1])
    assert bench.programs.first is bench.stubs[1]
    assert bench.programs.first_holds(1)
    assert not bench.programs.first_holds(2)
    assert [bench.programs.hold(batch) for batch in (1, 2, 3)] == [True, True, False]


def test_running_the_first_does_not_count() -> None:
    bench = Bench(1)
    assert int(bench.programs.run_first(1)) == 1
    assert bench.weight == 0.0


@given(st.lists(st.integers(min_value=1, max_value=MAX_PROGRAMS + 3), max_size=30))
@settings(deadline=None)
def test_the_one_unused_for_longest_goes(batches: list[int]) -> None:
    """A program is made for every batch that is missed; the model is a plain list."""
    bench = Bench()
    kept: list[int] = []
    for batch in batches:
        [loss] = bench.run([batch])
        assert loss == (batch if batch in kept else -batch)
        if batch in kept:
            kept.remove(batch)
        else:
            bench.add(batch)
        kept = [batch, *kept][:MAX_PROGRAMS]
    assert len(bench.programs) == len(kept)


def test_dropping() -> None:
    bench = Bench(1, 2, 3)
    bench.programs.drop_first()
    assert bench.run([3, 2, 1]) == [-3, 2, 1]
    bench.programs.clear()
    assert bench.run([1, 2]) == [-1, -2]


@pytest.mark.parametrize("batch", [1, 2])
def test_replaced_objects_are_taken_up_at_once(batch: int) -> None:
    bench = Bench(1, 2)
    stub = bench.stubs[batch]
    stub.is_stale = stub.can_rebind = True
    assert bench.run([batch, batch]) == [batch, batch]
    assert bench.programs.missed == 0


def test_what_cannot_be_taken_up_is_not_looked_at_in_every_step() -> None:
    bench = Bench(1)
    stub = bench.stubs[1]
    stub.is_stale = True
    assert bench.run([1] * 640) == [-1] * 640
    assert bench.programs.missed == 640
    assert stub.rebinds <= 8 + 10
    stub.can_rebind = True
    assert 1 in bench.run([1] * 65)
