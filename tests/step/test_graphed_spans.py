"""Several steps a launch of the graphed engine, on a stand-in for CUDA graphs: the numbers are eager's."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain import EngineError, TrainStep, resident
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import Span
from fasttrain.step import graphed, launch, trial
from fasttrain.step.compiler import Pending
from fasttrain.step.cudagraph import CapturedStep
from fasttrain.step.launch import FROM_STEPS
from fasttrain.step.span import TracedSpan
from fasttrain.step.spec import run_steps
from fasttrain.step.trace import Mismatch
from tests.step import jobs
from tests.step.cuda_stand_in import EXACT, Recording, graphed_step
from tests.step.jobs import batches, everything, run
from tests.step.test_compiled import CHANGES

pytestmark = pytest.mark.usefixtures("in_double")

ROWS = 8
NUM_BATCHES = 35


EPOCHS = 5
"""Until it is decided, in a short trial."""


@pytest.fixture(autouse=True)
def short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "ROUNDS", 1)


def data(num_batches: int = NUM_BATCHES) -> Any:
    x, y = (torch.cat(part) for part in zip(*batches(num_batches), strict=True))
    return resident(x, y, batch_size=ROWS, device="cpu", seed=2)


def train(step: TrainStep, source: Any, epochs: int) -> list[int]:
    """Epochs through whatever the engine makes of them; returns the sizes of the spans, 1 for single steps."""
    torch.manual_seed(11)
    step.expect(FROM_STEPS)
    sizes = []
    for _ in range(epochs):
        for ran in run_steps(step._engine, iter(source)):  # pyright: ignore[reportPrivateUsage]
            sizes.append(ran.steps if isinstance(ran, Span) else 1)
    step.flush()
    return sizes


def assert_epochs_as_eager(step: TrainStep) -> list[int]:
    eager = jobs.train_step("eager")
    train(eager, data(), EPOCHS)
    sizes = train(step, data(), EPOCHS)
    torch.testing.assert_close(everything(step), everything(eager), rtol=EXACT, atol=EXACT)
    return sizes


@pytest.mark.parametrize(
    ("price", "size"),
    [
        ({16: 3.0, 4: 2.0, 1: 1.0}, 16),
        ({16: 3.0, 4: 1.0, 1: 2.0}, 4),
        ({16: 1.0, 4: 1.0, 1: 1.0}, 1),
        ({16: 1.0, 4: 0.9, 1: 0.89}, 4),
    ],
)
def test_the_number_of_steps_a_launch_is_measured(price: dict[int, float], size: int, lane: Recording) -> None:
    """16, 4 or 1 steps a launch are 1, 4 or 16 launches; remainders run one by one."""
    lane.price = lambda launches: price.get(launches, 100.0)
    step = graphed_step(lane)
    sizes = assert_epochs_as_eager(step)
    assert sizes[:2] == [1, 1], "eagerly, then compared with eager"
    assert step.span == size
    told = f"{size} steps run as one" if size > 1 else "several steps as one are not faster"
    assert f"; {told}: measured us a step: one by one " in step.engine.reason
    assert sum(sizes) == EPOCHS * NUM_BATCHES
    last = [*[size] * (NUM_BATCHES // size), *[1] * (NUM_BATCHES % size)]
    assert sizes[-len(last) :] == last


@pytest.mark.parametrize(("num_batches", "size"), [(NUM_BATCHES, 16), (37, 12), (8, 8), (5, 4), (3, 1)])
def test_short_epochs_are_launched_too(num_batches: int, size: int, lane: Recording) -> None:
    """By the size that leaves few batches; epochs of three batches run one by one."""
    step = graphed_step(lane)
    sizes = train(step, data(num_batches), EPOCHS * NUM_BATCHES // num_batches)
    assert sizes[-num_batches:].count(size) >= num_batches // size
    assert step.span in (size, 4), "the size that is kept; where an epoch has too few batches, what to try"


def test_a_span_is_one_launch(lane: Recording) -> None:
    step, source = graphed_step(lane), data()
    train(step, source, EPOCHS)
    span = iter(source).take(16)
    assert span is not None
    before = lane.launches
    losses = step.steps(span)
    assert (losses.shape, lane.launches) == (torch.Size([16]), before + 1)
    kept = losses.clone()
    step.steps(span)
    assert torch.equal(losses, kept), "a later launch overwrote them"


def test_the_losses_of_spans_are_those_of_single_steps(lane: Recording) -> None:
    """In all rounds of the trial, of one, four and sixteen launches."""
    losses: list[list[Tensor]] = []
    for step in (graphed_step(lane), jobs.train_step("eager")):
        run(step, batches(2))
        source = data()
        spans = [span for _ in range(EPOCHS) for epoch in [iter(source)] for span in (epoch.take(16), epoch.take(16))]
        losses.append([step.steps(span) for span in spans if span is not None])
    assert len(losses[0]) == 2 * EPOCHS
    torch.testing.assert_close(losses[0], losses[1], rtol=EXACT, atol=EXACT)


def test_other_resident_data_get_graphs_of_their_own(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MISSED_SPANS", 4)
    step, eager = graphed_step(lane), jobs.train_step("eager")
    for each in (step, eager):
        train(each, data(), EPOCHS)
    before, builds = lane.captures, lane.programs.builds
    other = data(NUM_BATCHES - 1)
    train(step, other, 2 * EPOCHS)
    train(eager, data(NUM_BATCHES - 1), 2 * EPOCHS)
    torch.testing.assert_close(everything(step), everything(eager), rtol=EXACT, atol=EXACT)
    assert lane.captures == before + 2
    assert lane.programs.builds <= builds + 1
    launches, span = lane.launches, iter(other).take(16)
    assert span is not None
    step.steps(span)
    assert lane.launches == launches + 1


@pytest.mark.parametrize("name", ["the rate", "the optimizer's state", "a frozen layer", "eval mode", "weight decay"])
def test_a_change_between_spans_has_eagers_effect(name: str, lane: Recording) -> None:
    steps, sources = [graphed_step(lane), jobs.train_step("eager")], [data(), data()]
    changes = CHANGES[name](3)
    for step, source in zip(steps, sources, strict=True):
        train(step, source, EPOCHS)
        for epoch in range(6):
            changes.get(epoch, lambda _: None)(step)
            train(step, source, 1)
    torch.testing.assert_close(everything(steps[0]), everything(steps[1]), rtol=EXACT, atol=EXACT)
    assert steps[0].span == 16


def test_a_launch_of_other_numbers_is_not_used(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(graphed.CapturedSpan):
        def run(self, span: Span) -> Any:
            losses: Any = super().run(span)
            return losses * 1.1 if span.steps == 16 else losses

    monkeypatch.setattr(graphed, "CapturedSpan", Wrong)
    step = graphed_step(lane)
    assert_epochs_as_eager(step)
    assert step.span == 4
    assert "; 16 steps as one were refused: other numbers than single steps: the loss is" in step.engine.reason


def test_batches_that_are_not_plain_rows_run_one_by_one(lane: Recording) -> None:
    """Where they cannot be gathered in a graph, that is said, and training goes on."""

    class Halved:
        def __init__(self, source: Any) -> None:
            self.source = source
            self.columns = [Ragged(torch.zeros(1), torch.zeros(2)), *source.columns]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.source, name)

    step = graphed_step(lane)
    source = data()
    run(step, batches(2))
    for _ in range(4):
        span = iter(source).take(16)
        assert span is not None
        object.__setattr__(span, "source", Halved(source))
        assert step.steps(span).shape == (16,)
    assert step.span == 1
    assert "several steps cannot be one program: batches hold other tensors than the columns" in step.engine.reason


def test_settling_trains_until_the_number_is_known(lane: Recording) -> None:
    step = graphed_step(lane)
    step.settle(data())
    assert step.span == 16
    assert step.compile_s is not None


def test_settling_ends_where_no_launch_can_be_tried(lane: Recording) -> None:
    step = graphed_step(lane)
    step.settle(data(3))
    assert lane.launches < 10
    assert step.span == 4


class Failing(graphed.CapturedSpan):
    """Launches of four steps cannot be captured."""

    tries = 0

    def run(self, span: Span) -> Any:
        if span.steps == 4:
            Failing.tries += 1
            raise EngineError("cannot be captured")
        return super().run(span)


def test_a_size_that_cannot_be_captured_is_tried_once(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "CapturedSpan", Failing)
    monkeypatch.setattr(Failing, "tries", 0)
    step = graphed_step(lane)
    assert_epochs_as_eager(step)
    assert (Failing.tries, step.span) == (1, 16)
    assert step.engine.reason.count("4 steps as one were refused") == 1


def test_a_launch_that_missed_and_then_cannot_be_captured_ends_the_trial(
    lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = itertools.count(1)

    class Moody(graphed.CapturedSpan):
        def run(self, span: Span) -> Any:
            number = next(runs) if span.steps == 16 else 0
            if number == 4:
                raise EngineError("cannot be captured")
            return Mismatch("an option") if number == 3 else super().run(span)

    monkeypatch.setattr(graphed, "CapturedSpan", Moody)
    monkeypatch.setattr(trial, "ROUNDS", 2)
    step = graphed_step(lane)
    train(step, data(), 20)
    assert step.span == 4
    assert "; 4 steps run as one" in step.engine.reason


def test_an_error_of_a_single_step_in_a_proof_is_raised(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no launch's: the batches must not be trained again."""
    prove = launch.Launches._prove  # pyright: ignore[reportPrivateUsage]

    def failing(*_: Any) -> Tensor:
        raise EngineError("no memory for a single step")

    def prove_and_fail(self: launch.Launches, *given: Any) -> Tensor:
        monkeypatch.setattr(CapturedStep, "run", failing)
        return prove(self, *given)

    monkeypatch.setattr(launch.Launches, "_prove", prove_and_fail)
    step = graphed_step(lane)
    with pytest.raises(EngineError, match="cannot run this step: no memory for a single step"):
        train(step, data(), EPOCHS)


def test_a_wait_that_was_interrupted_is_begun_anew(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, waits = Pending.wait, itertools.count()

    def interrupted(self: Pending[Any]) -> None:
        if isinstance(self.traced, TracedSpan) and next(waits) == 0:
            raise KeyboardInterrupt
        wait(self)

    monkeypatch.setattr(Pending, "wait", interrupted)
    step, source = graphed_step(lane), data()
    with pytest.raises(KeyboardInterrupt):
        train(step, source, 1)
    step.close()
    train(step, source, EPOCHS)
    assert step.span == 16


def test_spans_before_there_is_a_program_run_one_by_one(lane: Recording) -> None:
    step = graphed_step(lane)
    epoch = iter(data())
    for size in (1, 2):
        span = epoch.take(size)
        assert span is not None
        assert step.steps(span).shape == (size,)


def test_data_that_do_not_come_any_more_are_let_go_of(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the graphs over them; so is the graph of a size that was not chosen."""
    monkeypatch.setattr(launch, "MISSED_SPANS", 4)
    step, source = graphed_step(lane), data()
    train(step, source, EPOCHS)
    launcher: Any = step._engine._launches._launcher  # type: ignore[attr-defined]
    assert list(launcher._graphs) == [16]
    dropped = weakref.ref(source)
    del source
    train(step, data(NUM_BATCHES - 1), 2 * EPOCHS)
    gc.collect()
    assert dropped() is None
    assert step.span == 16


def test_launches_that_do_not_pay_are_let_go_of(lane: Recording) -> None:
    lane.price = lambda _: 1.0
    step, source = graphed_step(lane), data()
    train(step, source, EPOCHS)
    assert step.span == 1
    dropped = weakref.ref(source)
    del source
    gc.collect()
    assert dropped() is None
