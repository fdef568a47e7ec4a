"""Several steps a call of the graphed engine, on a stand-in for CUDA graphs: the numbers are eager's."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain import EngineError, TrainStep, resident
from fasttrain.data.columns import Column, RaggedColumn
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import Span
from fasttrain.step import cudagraph
from fasttrain.step.candidate import VERIFIED_BATCHES
from fasttrain.step.compiler import Pending
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import run_steps
from fasttrain.step.trace import Mismatch
from fasttrain.step.walk import StepsFailedError
from tests.step import jobs
from tests.step.cuda_stand_in import EXACT, Recording, graphed_step
from tests.step.jobs import batches, everything
from tests.step.spans import taken
from tests.step.test_compiled import CHANGES

pytestmark = pytest.mark.usefixtures("in_double")

ROWS = 8
NUM_BATCHES = 35
EPOCHS = 5


def data(num_batches: int = NUM_BATCHES) -> Any:
    x, y = (torch.cat(part) for part in zip(*batches(num_batches), strict=True))
    return resident(x, y, batch_size=ROWS, device="cpu", seed=2)


def train(step: TrainStep, source: Any, epochs: int) -> list[int]:
    """Epochs through whatever the engine makes of them; returns the sizes of the spans."""
    torch.manual_seed(11)
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


def spans_of(source: Any, steps: int) -> list[Span]:
    epoch = iter(source)
    return list(iter(lambda: epoch.take(steps), None))


def walk_of(step: TrainStep) -> Any:
    return step._engine.candidates[0]._program  # type: ignore[attr-defined]


def test_epochs_are_spans_and_the_numbers_are_eagers(lane: Recording) -> None:
    step = graphed_step(lane)
    sizes = assert_epochs_as_eager(step)
    single = 1 + VERIFIED_BATCHES + 1
    assert sizes[:single] == [1] * single, "eagerly, compared with eager, and timed"
    assert sizes[single:] == [NUM_BATCHES - single, *[NUM_BATCHES] * (EPOCHS - 1)], "then as many as there are"
    assert (lane.programs.builds, lane.captures) == (1, 2)
    assert (step.engine.value, step.engine.reason) == ("graphed", "asked for")


@pytest.mark.parametrize("num_batches", [37, 16, 5])
def test_short_epochs_are_spans_too(num_batches: int, lane: Recording) -> None:
    step = graphed_step(lane)
    sizes = train(step, data(num_batches), EPOCHS)
    assert sizes[-1] == num_batches


@pytest.mark.parametrize(("steps", "launches"), [(1, 1), (15, 15), (16, 1), (35, 2 + 3)])
def test_a_span_is_replays_of_sixteen_steps_and_of_one(steps: int, launches: int, lane: Recording) -> None:
    step, source = graphed_step(lane), data()
    train(step, source, EPOCHS)
    before, captures = lane.launches, lane.captures
    losses = step.steps(taken(iter(source), steps))
    assert (losses.shape, lane.launches, lane.captures) == (torch.Size([steps]), before + launches, captures)
    kept = losses.clone()
    step.steps(taken(iter(source), steps))
    assert torch.equal(losses, kept), "a later call overwrote them"


def test_the_losses_of_spans_are_those_of_single_steps(lane: Recording) -> None:
    losses: list[list[Tensor]] = []
    for step in (graphed_step(lane), jobs.train_step("eager")):
        torch.manual_seed(11)
        source = data()
        losses.append([step.steps(span) for _ in range(EPOCHS) for span in spans_of(source, 17)])
    torch.testing.assert_close(losses[0], losses[1], rtol=EXACT, atol=EXACT)
    assert lane.captures == 2


def test_a_graph_is_captured_before_any_step_of_a_span_runs(lane: Recording) -> None:
    """Both graphs that a span takes are: where one cannot be, nothing has changed."""
    step, source = graphed_step(lane), data()
    train(step, source, 1)
    before = everything(step)
    lane.failures += 1  # as a failed capture does: every graph is captured anew
    refused = itertools.count()

    def on_capture() -> None:
        if next(refused):
            raise RuntimeError("it waits for the device")

    lane.on_capture = on_capture
    with pytest.raises(EngineError, match="cannot be captured"):
        walk_of(step).run(taken(iter(source), 17))
    torch.testing.assert_close(everything(step), before, rtol=0, atol=0)
    lane.on_capture = lambda: None
    assert step.steps(taken(iter(source), 17)).shape == (17,)


def test_a_step_that_fails_in_a_graph_is_never_gone_on_with(lane: Recording) -> None:
    step, source = graphed_step(lane), data()
    train(step, source, EPOCHS)
    walk, replays = walk_of(step), itertools.count()
    replay = walk._graphs[1]._replay

    def failing() -> Tensor:
        if next(replays) == 2:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return replay()

    walk._graphs[1]._replay = failing
    launches = lane.launches
    with pytest.raises(StepsFailedError, match="after 18 of the 19 steps of this call"):
        step.steps(taken(iter(source), 19))
    assert lane.launches == launches + 3
    with pytest.raises(EngineError, match="not to be trusted"):
        step(batches(1)[0])
    assert lane.launches == launches + 3


def test_the_time_of_a_capture_is_not_taken_for_a_steps(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger graph may be captured in the last call that is timed."""

    def timed(run: Any) -> tuple[Any, float]:
        before = lane.captures
        return run(), 100.0 if lane.captures > before else 1e-5

    monkeypatch.setattr(lane, "timed", timed)
    step, source = graphed_step(lane), data()
    for steps in (1, *[1] * VERIFIED_BATCHES, 1, 1, 17, 17):
        step.steps(taken(iter(source), steps))
    assert step.span > NUM_BATCHES


def test_other_resident_data_get_graphs_of_their_own(lane: Recording) -> None:
    step, eager = graphed_step(lane), jobs.train_step("eager")
    for each in (step, eager):
        train(each, data(), EPOCHS)
    before, builds = lane.captures, lane.programs.builds
    other = data(NUM_BATCHES - 1)
    train(step, other, EPOCHS)
    train(eager, data(NUM_BATCHES - 1), EPOCHS)
    torch.testing.assert_close(everything(step), everything(eager), rtol=EXACT, atol=EXACT)
    assert lane.captures == before + 2
    assert lane.programs.builds <= builds + 1
    launches = lane.launches
    step.steps(taken(iter(other), 16))
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
    assert steps[0].span > NUM_BATCHES


def test_graphs_of_other_numbers_are_refused(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(cudagraph.CapturedWalk):
        def run(self, span: Span, **options: Any) -> Any:
            losses: Any = super().run(span, **options)
            return losses * 1.1

    monkeypatch.setattr(cudagraph, "CapturedWalk", Wrong)
    step = graphed_step(lane)
    for _ in range(2):
        with pytest.raises(EngineError, match="cannot run this step: its numbers differ from eager's: the loss is"):
            train(step, data(), 1)


def test_batches_that_are_not_plain_rows_run_one_by_one(lane: Recording) -> None:
    """Where they cannot be gathered in a graph, that is said, and training goes on."""

    class Halved:
        def __init__(self, source: Any) -> None:
            self.source = source
            self.columns: list[Column] = [
                RaggedColumn(Ragged(torch.zeros(1), torch.tensor([0, 1])), self.source.device)
            ]
            self.columns += source.columns

        def __getattr__(self, name: str) -> Any:
            return getattr(self.source, name)

    step = graphed_step(lane)
    source = data()
    for _ in range(4):
        span = taken(iter(source), 16)
        object.__setattr__(span, "source", Halved(source))
        assert step.steps(span).shape == (16,)
    assert step.span == 0
    assert step.engine.value == "graphed"
    told = "asked for; one step a call: batches hold other tensors than the columns that they are gathered from"
    assert step.engine.reason == told


def test_settling_ends_where_the_program_is_verified(lane: Recording) -> None:
    step = graphed_step(lane)
    step.settle(data())
    assert lane.launches < 200
    assert step.span > 1, "a step was timed"
    assert step.compile_s is not None


def test_a_walk_that_cannot_be_captured_is_tried_once(lane: Recording) -> None:
    tries = itertools.count()

    def refuse() -> None:
        next(tries)
        raise RuntimeError("it waits for the device")

    lane.on_capture = refuse
    step = graphed_step(lane)
    for _ in range(2):
        with pytest.raises(EngineError, match="cannot run this step: the step cannot be captured in a CUDA graph"):
            train(step, data(), 1)
    assert next(tries) == 1


def test_a_walk_that_missed_and_then_cannot_be_captured_is_refused(
    lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    moods: list[str] = []

    class Moody(cudagraph.CapturedWalk):
        def run(self, span: Span, **options: Any) -> Any:
            mood = moods.pop(0) if moods else ""
            if mood == "raises":
                raise EngineError("cannot be captured")
            return Mismatch("an option") if mood == "misses" else super().run(span, **options)

    monkeypatch.setattr(cudagraph, "CapturedWalk", Moody)
    step, source = graphed_step(lane), data()
    train(step, source, EPOCHS)
    moods += ["misses", "misses", "raises"]
    with pytest.raises(EngineError, match="cannot run this step: while it ran: cannot be captured"):
        train(step, source, 2)


def test_an_error_of_eager_in_a_verification_is_raised(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the program's: the engine is not refused for it."""
    step, source = graphed_step(lane), data()
    epoch = iter(source)
    step.steps(taken(epoch, 1))

    def failing(*_: Any) -> Tensor:
        raise EngineError("no memory for a single step")

    with monkeypatch.context() as crowded:
        crowded.setattr(EagerEngine, "step", failing)
        with pytest.raises(EngineError, match=r"^no memory for a single step$"):
            step.steps(taken(epoch, 1))
    assert lane.captures == 1, "the program was being verified"
    train(step, source, EPOCHS)
    assert step.engine.value == "graphed"


def test_a_wait_that_was_interrupted_is_begun_anew(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, waits = Pending.wait, itertools.count()

    def interrupted(self: Pending) -> None:
        if next(waits) == 0:
            raise KeyboardInterrupt
        wait(self)

    monkeypatch.setattr(Pending, "wait", interrupted)
    step, source = graphed_step(lane), data()
    with pytest.raises(KeyboardInterrupt):
        train(step, source, 1)
    step.close()
    train(step, source, EPOCHS)
    assert step.span > NUM_BATCHES


def test_spans_before_there_is_a_program_run_eagerly(lane: Recording) -> None:
    step = graphed_step(lane)
    epoch = iter(data())
    assert step.steps(taken(epoch, 2)).shape == (2,)
    assert lane.launches == 0
    assert step.steps(taken(epoch, 3)).shape == (3,)
    assert lane.launches == 1, "the first of them is compared with eager, which runs the others"


def test_data_that_are_dropped_are_let_go_of(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the graphs over them."""
    step, source = graphed_step(lane), data()
    train(step, source, EPOCHS)
    dropped = weakref.ref(source)
    table = weakref.ref(source.columns[0].tables[0])
    del source
    train(step, data(NUM_BATCHES - 1), EPOCHS)
    gc.collect()
    assert dropped() is None
    assert table() is None
    assert step.span > NUM_BATCHES
