"""Which program runs a step, which goes, what is counted, and when a program is compared with eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.step import candidate
from fasttrain.step import ladder as module
from fasttrain.step.candidate import VERIFIED_BATCHES, Candidate, Stage
from fasttrain.step.ladder import ENOUGH_MISSED, MAX_CANDIDATES, Ladder, Phase
from fasttrain.step.spec import Gathered, Meanwhile
from fasttrain.step.timing import HostClock, Waits
from fasttrain.step.trace import Mismatch
from tests.step.models import CPU


class Stub:
    """A traced step, its pending program and that program in one: it holds for one batch, and its loss is that."""

    tensors = kinds = gradients = ()
    trace_s, compile_s, remark = 0.0, 0.0, ""

    def __init__(self, batch: int, num_parts: int = 1) -> None:
        self.batch = batch
        self.parts = range(num_parts)
        self.due = 0
        self.why_eager: str | None = None
        self.is_stale = self.can_rebind = False
        self.rebinds = 0

    @property
    def traced(self) -> Stub:
        return self

    def inputs(self, batch: int) -> list[Tensor] | Mismatch:
        if self.is_stale:
            return Mismatch("an object")
        return [torch.tensor(float(batch))] if batch == self.batch else Mismatch("a size")

    def rebind(self, _batch: Any = None) -> bool:
        self.rebinds += 1
        took_up = self.is_stale and self.can_rebind
        self.is_stale = self.is_stale and not took_up
        return took_up

    def wait(self) -> None:
        """It is there."""

    def close(self) -> None:
        """Nothing runs."""

    def run(self, inputs: list[Tensor]) -> Tensor:
        return inputs.pop()

    def finish(self) -> None:
        self.due = (self.due + 1) % len(self.parts)


class Eager:
    """Its loss is the negative batch, unless a program is compared with it: then it is right."""

    def __init__(self, _spec: Any, _choice: Any) -> None:
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


class Backend:
    """Compiles at once."""

    name = "compiled"
    clock = HostClock()

    def __init__(self) -> None:
        self.begun: list[Stub] = []

    def begin(self, _compiler: Any, batch: int) -> Any:
        self.begun.append(Stub(batch))
        return self.begun[-1]

    def load(self, pending: Any) -> Any:
        return pending

    def explain(self, _step: Any, *, walks: bool) -> Choice:
        assert not walks
        return Choice(self.name, "")


class Bench:
    """An engine that waits for the compiler, over stubs; programs that it is given are verified and adopted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *batches: int) -> None:
        monkeypatch.setattr(module, "EagerEngine", Eager)
        monkeypatch.setattr(module, "Compiler", lambda _: SimpleNamespace(why_single=""))
        monkeypatch.setattr(candidate, "verify", self._verify)
        self.weight = 0.0
        self.compared = 0
        self.backend = Backend()
        spec: Any = SimpleNamespace(
            metrics=SimpleNamespace(count=self._count),
            device=CPU,
            accumulate=1,
            gathered=Gathered(),
            meanwhile=Meanwhile(),
        )
        asked = Choice("compiled", "asked for")
        self.ladder = Ladder(spec, asked, self.backend, Waits(), waits_for_compiler=True)
        self.eager: Any = self.ladder._eager  # pyright: ignore[reportPrivateUsage]
        self.stubs = {batch: self.adopt(Stub(batch)) for batch in batches}

    def _verify(
        self, _traced: Any, batch: int, eager: Callable[[int], Tensor], program: Callable[[int], Tensor]
    ) -> Any:
        self.compared += 1
        got, wanted = program(batch), eager(batch)
        difference = None if torch.equal(got, wanted) else f"the loss is {got.item():g}"
        return SimpleNamespace(loss=wanted, difference=difference, rule="fp64")

    def _count(self, weight: float) -> None:
        self.weight += weight

    @property
    def candidates(self) -> list[Candidate]:
        return self.ladder._candidates  # pyright: ignore[reportPrivateUsage]

    def adopt(self, stub: Stub, *, is_verified: bool = True) -> Stub:
        """Puts a program on the ladder."""
        given: Any = stub
        made = Candidate(given)
        self.ladder._rising = made  # pyright: ignore[reportPrivateUsage]
        self.ladder._load(made)  # pyright: ignore[reportPrivateUsage]
        self.ladder._adopt(made)  # pyright: ignore[reportPrivateUsage]
        for part in stub.parts:
            for _ in range(VERIFIED_BATCHES if is_verified else 0):
                made.passed(part)
        return stub

    def run(self, batches: Sequence[int]) -> list[int]:
        """By program or eagerly, without another program being made."""
        return [int(self.ladder._run(batch)) for batch in batches]  # pyright: ignore[reportPrivateUsage]


def test_without_programs_it_is_eager_and_nothing_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    assert bench.run([1, 2]) == [-1, -2]
    assert (bench.ladder.choice.reason, bench.weight) == ("asked for", 0.0)


def test_each_batch_is_run_by_the_program_that_holds_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1, 2)
    assert bench.run([1, 2, 3, 1]) == [1, 2, -3, 1]
    assert bench.ladder.choice.reason == "asked for; 1 step ran eagerly, because this differed: a size"
    assert bench.weight == 3.0, "eager counts its own batches"


def test_the_last_used_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1, 2)
    assert bench.candidates[0].step is bench.stubs[2]
    bench.run([1])
    assert bench.candidates[0].step is bench.stubs[1]


def test_the_first_program_is_made_once_the_optimizer_has_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.eager.is_reference, bench.eager.has_stepped = True, False
    for _ in range(3):
        bench.ladder.step(1)
    assert not bench.backend.begun
    bench.eager.has_stepped = True
    bench.ladder.step(1)
    bench.ladder.step(1)
    assert len(bench.backend.begun) == 1
    assert [str(each) for each in bench.ladder.candidates] == ["step, verifying"]
    for _ in range(VERIFIED_BATCHES):
        bench.ladder.step(1)
    assert [str(each) for each in bench.ladder.candidates] == ["step, adopted"]


def test_another_program_is_made_after_enough_steps_that_were_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.eager.is_reference = True
    for _ in range(2 + VERIFIED_BATCHES):
        bench.ladder.step(1)
    for number, batch in enumerate((2, 3), start=1):
        for _ in range(ENOUGH_MISSED):
            assert len(bench.backend.begun) == number
            bench.ladder.step(1)
            bench.ladder.step(batch)
        for _ in range(1 + VERIFIED_BATCHES):
            bench.ladder.step(batch)
        assert len(bench.backend.begun) == number + 1
    assert bench.ladder.choice.value == "compiled"


def test_a_rare_batch_gets_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the short one that ends a long epoch."""
    bench = Bench(monkeypatch)
    bench.eager.is_reference = True
    for _ in range(2 * ENOUGH_MISSED):
        for batch in [1] * 30 + [2]:
            bench.ladder.step(batch)
    assert len(bench.backend.begun) == 1


def test_steps_that_were_missed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1)
    assert bench.ladder.choice == Choice("compiled", "asked for")
    bench.run([2])
    assert bench.ladder.choice.reason == "asked for; 1 step ran eagerly, because this differed: a size"
    bench.run([2] * (ENOUGH_MISSED - 2))
    assert bench.ladder.choice.value == "compiled"
    bench.run([2])
    assert bench.ladder.choice == Choice(
        "eager", f"asked for; {ENOUGH_MISSED} steps ran eagerly, the last because this differed: a size"
    )
    bench.run([1])
    assert bench.ladder.choice.value == "compiled"


def test_each_part_is_compared_on_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    stub = bench.adopt(Stub(1, num_parts=2), is_verified=False)
    bench.eager.is_reference = True
    for number in range(2 * VERIFIED_BATCHES + 4):
        assert bench.run([1]) == [1]
        assert bench.compared == min(number + 1, 2 * VERIFIED_BATCHES)
    assert stub.due == 0
    assert bench.weight == 4.0, "eager counts those that it ran for the comparison"


def test_a_stale_buffer_that_the_first_batch_does_not_show_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.eager.is_reference = True
    stub = bench.adopt(Stub(1), is_verified=False)
    runs: list[int] = []
    monkeypatch.setattr(stub, "run", lambda inputs: (runs.append(1), inputs.pop() + (len(runs) > 2))[1])
    assert bench.run([1, 1, 1]) == [1, 1, 1]
    with pytest.raises(EngineError, match="while it ran: its numbers differ from eager's: the loss is 2"):
        bench.run([1])


def test_a_difference_by_chance_must_be_followed_by_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a ReLU whose input is zero but for rounding."""
    bench = Bench(monkeypatch, 1)
    bench.eager.is_reference = True
    stub, runs = bench.stubs[1], list[int]()
    monkeypatch.setattr(stub, "run", lambda inputs: (runs.append(1), inputs.pop() + (len(runs) == 1))[1])
    bench.ladder.verify_again()
    assert bench.run([1] * 8) == [1] * 8
    assert bench.compared == 1 + VERIFIED_BATCHES
    bench.ladder.verify_again()
    assert bench.run([1] * 8) == [1] * 8
    assert bench.compared == 2 + VERIFIED_BATCHES, "it is trusted again"


def test_a_program_with_other_numbers_is_refused_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    stub = bench.adopt(Stub(1), is_verified=False)
    [only] = bench.candidates
    assert bench.ladder.step(1) == -1, "the step is eager's"
    for _ in range(2):
        with pytest.raises(EngineError, match=r"engine 'compiled' cannot run this step: .*the loss is 1"):
            bench.ladder.step(1)
    assert not bench.candidates
    assert only.stage is Stage.DROPPED
    assert stub.rebinds == 0


def test_a_later_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1)
    bench.run([1])
    assert not bench.compared
    bench.ladder.verify_again()
    assert bench.run([1]) == [-1]
    with pytest.raises(EngineError, match="while it ran: its numbers differ"):
        bench.run([1])
    assert bench.compared == 2


def test_later_comparisons_take_a_small_share_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    bench = Bench(monkeypatch)
    bench.eager.is_reference = True
    real = bench._verify  # pyright: ignore[reportPrivateUsage]

    def slow(*given: Any) -> Any:
        now[0] += 0.1
        return real(*given)

    monkeypatch.setattr(candidate, "verify", slow)
    for _ in range(2 + VERIFIED_BATCHES):
        bench.ladder.step(1)
    [only] = bench.candidates
    for _ in range(candidate.TIMED_CALLS):
        only.note_time(1.0)
    only.step_s = 0.01
    compared, steps = bench.compared, 20_000
    for _ in range(steps):
        bench.ladder.step(1)
    later = bench.compared - compared
    assert later > 1
    assert later * 0.1 <= 2 * module.VERIFIED_SHARE * steps * 0.01


def test_a_later_comparison_that_does_not_fit_in_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1)
    with monkeypatch.context() as crowded:
        crowded.setattr(module, "fits_in_memory", lambda *_: False)
        bench.ladder.verify_again()
        assert bench.run([1, 1]) == [1, 1]
    assert bench.run([1]) == [1], "nor is it made up for"
    assert not bench.compared


def test_a_first_comparison_that_does_not_fit_in_memory_refuses_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.adopt(Stub(1), is_verified=False)
    monkeypatch.setattr(module, "fits_in_memory", lambda *_: False)
    with pytest.raises(EngineError, match="do not fit in memory"):
        bench.run([1])


def test_an_optimizer_that_steps_eagerly_steps_once_also_where_a_program_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    stub = bench.adopt(Stub(1), is_verified=False)
    stub.why_eager = "hooks"
    assert bench.run([1] * (VERIFIED_BATCHES + 1)) == [1] * (VERIFIED_BATCHES + 1)
    assert bench.eager.calls == [*["gather", "apply"] * VERIFIED_BATCHES, "apply"]


@given(st.lists(st.integers(min_value=1, max_value=MAX_CANDIDATES + 3), max_size=30))
@settings(deadline=None)
def test_the_one_unused_for_longest_goes(batches: list[int]) -> None:
    """A program is made for every batch that is missed; the model is a plain list."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(monkeypatch)
        kept: list[int] = []
        for batch in batches:
            [loss] = bench.run([batch])
            assert loss == (batch if batch in kept else -batch)
            if batch in kept:
                kept.remove(batch)
            else:
                bench.adopt(Stub(batch))
            kept = [batch, *kept][:MAX_CANDIDATES]
        assert len(bench.candidates) == len(kept)


@pytest.mark.parametrize("batch", [1, 2])
def test_replaced_objects_are_taken_up_at_once(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1, 2)
    stub = bench.stubs[batch]
    stub.is_stale = stub.can_rebind = True
    assert bench.run([batch, batch]) == [batch, batch]
    assert bench.ladder.choice.reason == "asked for"


def test_what_cannot_be_taken_up_is_not_looked_at_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1)
    stub = bench.stubs[1]
    stub.is_stale = True
    assert bench.run([1] * 640) == [-1] * 640
    assert "640 steps ran eagerly" in bench.ladder.choice.reason
    assert stub.rebinds <= 8 + 10
    stub.can_rebind = True
    assert 1 in bench.run([1] * 65)


def test_a_wait_that_was_interrupted_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.eager.is_reference = True
    bench.ladder.step(1)

    def interrupted(_: Stub) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as waiting:
        waiting.setattr(Stub, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.ladder.step(1)
    assert not bench.ladder.candidates
    bench.ladder.step(1)
    assert bench.ladder._phase is Phase.CLIMBING  # pyright: ignore[reportPrivateUsage]
    assert len(bench.backend.begun) == 2
