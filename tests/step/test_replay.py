"""Which program runs a step, which goes, what is counted, and when a program is compared with eager."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.device import Choice
from fasttrain.step import replay
from fasttrain.step.replay import ENOUGH_STEPS, MAX_PROGRAMS, Programs
from fasttrain.step.spec import Gathered
from fasttrain.step.trace import Mismatch
from tests.step.models import CPU


class Stub:
    """A traced step and its program in one: it holds for one batch, and its loss is that batch."""

    tensors = kinds = gradients = ()

    def __init__(self, batch: int, num_parts: int = 1) -> None:
        self.batch = batch
        self.parts = range(num_parts)
        self.due = 0
        self.why_eager: str | None = None
        self.is_whole = False
        self.is_stale = self.can_rebind = False
        self.rebinds = 0

    def inputs(self, batch: int) -> list[Tensor] | Mismatch:
        if self.is_stale:
            return Mismatch("an object")
        return [torch.tensor(float(batch))] if batch == self.batch else Mismatch("a size")

    def rebind(self, _batch: Any = None) -> bool:
        self.rebinds += 1
        took_up = self.is_stale and self.can_rebind
        self.is_stale = self.is_stale and not took_up
        return took_up

    def run(self, inputs: list[Tensor]) -> Tensor:
        return inputs.pop()

    def finish(self) -> None:
        self.due = (self.due + 1) % len(self.parts)


class Eager:
    """Its loss is the negative batch, unless a program is compared with it: then it is right."""

    def __init__(self) -> None:
        self.is_reference = False
        self.has_stepped = True
        self.calls: list[str] = []

    def step(self, batch: int) -> Tensor:
        self.calls.append("step")
        return torch.tensor(float(batch if self.is_reference else -batch))

    def gather(self, batch: int) -> Tensor:
        self.calls.append("gather")
        return torch.tensor(float(batch))

    def apply_if_due(self) -> None:
        self.calls.append("apply")


class Bench:
    """Programs over stubs, proven unless the test wants to see that."""

    def __init__(self, *batches: int) -> None:
        self.weight = 0.0
        self.differences: list[str] = []
        self.eager: Any = Eager()
        metrics = SimpleNamespace(count=self._count)
        spec: Any = SimpleNamespace(
            metrics=metrics,
            device=CPU,
            precision="fp32",
            gathered=Gathered(),
            trained=lambda: iter(()),
            with_gradients=list,
        )
        self.programs = Programs(spec, self.eager, self.refuse)
        self.stubs: dict[Any, Any] = {batch: self.add(batch) for batch in batches}

    def refuse(self, reason: str, traced: Any, *, is_wrong: bool) -> None:
        assert is_wrong
        assert isinstance(traced, Stub)
        self.differences.append(reason)

    def _count(self, weight: float) -> None:
        self.weight += weight

    def add(self, batch: int) -> Stub:
        stub: Any = Stub(batch)
        self.programs.add(stub, stub)
        self.prove(stub)
        return stub

    def prove(self, stub: Any) -> None:
        """Runs a stub's parts for the first time."""
        self.eager.is_reference = True
        for _ in stub.parts:
            self.programs.step(stub.batch)
            stub.finish()
        self.eager.is_reference = False
        self.eager.calls.clear()

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
    assert [bench.programs.hold(batch) for batch in (1, 2, 3)] == [True, True, False]


def test_steps_that_are_missed_in_a_row_are_counted() -> None:
    bench = Bench(1)
    for batches, (missed, in_a_row) in (([3, 3], (2, 2)), ([1], (2, 0)), ([3], (3, 1))):
        bench.run(batches)
        assert (bench.programs.missed, bench.programs.missed_in_a_row) == (missed, in_a_row)


def test_the_first_program_is_wanted_once_the_optimizer_has_stepped() -> None:
    bench = Bench()
    bench.eager.has_stepped = False
    assert not bench.programs.wants_one(1)
    bench.eager.has_stepped = True
    assert bench.programs.wants_one(1)
    stub: Any = bench.add(1)
    bench.programs.drop(stub)
    assert not bench.programs.wants_one(1), "it was refused"


def test_another_program_is_wanted_after_enough_steps_that_were_missed_since_the_last() -> None:
    bench = Bench(1)
    for batch in (2, 3):
        assert not bench.programs.wants_one(batch)
        bench.run([batch, 1] * (ENOUGH_STEPS - 1))
        assert not bench.programs.wants_one(batch)
        bench.run([batch])
        assert bench.programs.wants_one(batch)
        assert not bench.programs.wants_one(1), "one holds for it"
        bench.add(batch)
    assert (bench.programs.added, bench.programs.missed) == (3, 2 * ENOUGH_STEPS)


def test_steps_that_were_missed_are_told() -> None:
    bench, asked = Bench(1), Choice("compiled", "asked for")
    assert bench.programs.told(asked) == asked
    bench.run([2])
    assert bench.programs.told(asked).reason == "asked for; 1 step ran eagerly, because this differed: a size"
    bench.run([2] * (ENOUGH_STEPS - 2))
    assert bench.programs.told(asked).value == "compiled"
    bench.run([2])
    assert bench.programs.told(asked) == Choice(
        "eager", f"asked for; {ENOUGH_STEPS} steps ran eagerly, the last because this differed: a size"
    )
    bench.run([1])
    assert bench.programs.told(asked).value == "compiled"


def test_each_part_is_compared_where_it_runs_first() -> None:
    bench = Bench()
    stub: Any = Stub(1, num_parts=2)
    bench.programs.add(stub, stub)
    bench.eager.is_reference = True
    for due, is_compared in ((0, True), (0, False), (1, True), (1, False), (0, False)):
        stub.due = due
        before = list(bench.eager.calls)
        assert bench.run([1]) == [1]
        assert (bench.eager.calls != before) == is_compared
        assert bench.programs.are_proven == (1 in bench.programs._entries[0].proven)  # pyright: ignore
    assert not bench.differences
    assert bench.weight == 3.0, "eager counts the two that it ran for the comparison"


def test_a_program_with_other_numbers_is_dropped_and_the_step_is_eagers() -> None:
    bench = Bench(2)
    stub: Any = Stub(1)
    bench.programs.add(stub, stub)
    assert bench.run([1]) == [-1]
    [difference] = bench.differences
    assert "the loss is 1" in difference
    assert bench.run([1, 2]) == [-1, 2], "only that one is dropped"


def test_an_audit_compares_again() -> None:
    bench = Bench(1)
    bench.run([1])
    assert not bench.eager.calls
    bench.programs.audit()
    assert bench.run([1]) == [-1]
    assert len(bench.differences) == 1


def test_an_audit_that_does_not_fit_in_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(1)
    with monkeypatch.context() as crowded:
        crowded.setattr(replay, "fits_in_memory", lambda *_: False)
        bench.programs.audit()
        assert bench.run([1, 1]) == [1, 1]
    assert bench.run([1]) == [1], "nor is it made up for"
    assert not bench.eager.calls
    assert not bench.differences


def test_an_optimizer_that_steps_eagerly_steps_once_also_where_a_program_is_compared() -> None:
    bench = Bench()
    stub: Any = Stub(1)
    stub.why_eager = "hooks"
    bench.programs.add(stub, stub)
    assert bench.run([1, 1]) == [1, 1]
    assert bench.eager.calls == ["gather", "apply", "apply"]


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
    bench.programs.drop(bench.stubs[3])
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
