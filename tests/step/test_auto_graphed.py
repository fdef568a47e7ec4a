"""`auto` where compiled steps run by CUDA graphs, on a stand-in for these: it ends on graphs, with eager's numbers."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain import TrainStep
from fasttrain.data.resident import Span
from fasttrain.step import cudagraph, ladder, timing
from fasttrain.step.eager import EagerEngine
from fasttrain.step.ladder import Ladder
from fasttrain.step.spec import StepSpec, run_steps
from tests.step import jobs
from tests.step.cuda_stand_in import EXACT, Recording, graph_backend
from tests.step.jobs import assert_as_eager, batches
from tests.step.models import ASKED, CASES, OPTIMIZERS, assert_same, make
from tests.step.spans import data_of

pytestmark = pytest.mark.usefixtures("in_double", "temporary", "hasty")

NUM_BATCHES = 35
EPOCHS = 6


@pytest.fixture(autouse=True)
def priced(lane: Recording) -> None:
    """Eager steps take time, too."""
    lane.price = lambda launches: launches * 1e-5 or 1e-4


def auto_engine(spec: StepSpec, lane: Recording) -> Ladder:
    backend, waits = graph_backend(spec, lane, is_required=False)
    engine = Ladder(spec, ASKED, backend, waits, waits_for_compiler=False)
    engine.expect(10_000_000)
    return engine


def auto_step(lane: Recording, **options: Any) -> TrainStep:
    step = jobs.train_step("eager", **options)
    step._engine = auto_engine(step.spec, lane)  # pyright: ignore[reportPrivateUsage]
    return step


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip_norm": 0.1}])
def test_it_ends_on_graphs(options: dict[str, Any], lane: Recording) -> None:
    step = auto_step(lane, **options)
    assert_as_eager(step, batches(60), rtol=EXACT, **options)
    assert step.engine.value == "graphed"
    assert "us a step, eager" in step.engine.reason
    assert lane.launches > 20
    assert step.compile_s is not None


def refused(lane: Recording, spoil: Callable[[Tensor], Tensor]) -> TrainStep:
    lane.programs.spoil = spoil
    step = auto_step(lane)
    assert_as_eager(step, batches(40), rtol=EXACT)
    assert step.engine.value == "eager"
    return step


def test_a_graph_with_other_numbers_is_refused(lane: Recording) -> None:
    assert "its numbers differ from eager's: the loss is" in refused(lane, lambda loss: loss * 1.01).engine.reason


def test_a_step_that_cannot_be_captured_stays_eager(lane: Recording) -> None:
    step = refused(lane, lambda loss: loss + 0 * loss.item())
    assert "cannot be captured in a CUDA graph: it waits for the device" in step.engine.reason


def test_a_graph_that_cannot_be_captured_anew_is_left(lane: Recording) -> None:
    """After loaded state a graph is captured again: where that fails, in the middle of training, eager goes on."""

    def load(step: TrainStep) -> None:
        if step.engine.value == "graphed":
            lane.programs.spoil = lambda loss: loss + 0 * loss.item()
        step.spec.optimizer.load_state_dict(copy.deepcopy(step.spec.optimizer.state_dict()))

    step = auto_step(lane)
    assert_as_eager(step, batches(80), {60: load}, rtol=EXACT)
    assert step.engine.value == "eager"
    assert "while it ran: the step cannot be captured" in step.engine.reason


def test_a_lack_of_memory_is_not_remembered(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as crowded:
        crowded.setattr(cudagraph, "fits_in_memory", lambda *_: False)
        step = auto_step(lane)
        assert_as_eager(step, batches(40), rtol=EXACT)
        assert "no memory for two copies" in step.engine.reason
    step = auto_step(lane)
    assert_as_eager(step, batches(60), rtol=EXACT)
    assert step.engine.value == "graphed"


def test_what_no_graph_can_hold_runs_by_the_program(lane: Recording) -> None:
    step = auto_step(lane)
    step.spec.optimizer.register_step_pre_hook(lambda *_: None)
    assert_as_eager(step, batches(60), rtol=EXACT)
    assert step.engine.value == "compiled"
    assert "; without a CUDA graph: AdamW steps eagerly (it has hooks" in step.engine.reason
    assert lane.captures == 0
    assert lane.programs.replayed > 20


class Epochs:
    """Two models of one kind over the same rows: one by `auto`, the other eagerly."""

    def __init__(self, case: str, lane: Recording) -> None:
        self.auto, self.eager = (make(CASES[case], OPTIMIZERS["adam"]) for _ in range(2))
        self.engine = auto_engine(self.auto, lane)
        self.sources = [data_of(CASES[case], batch_size=1) for _ in range(2)]
        self.sizes: list[int] = []

    def run(self, epochs: int) -> None:
        """So many epochs, both ways."""
        eager = EagerEngine(self.eager, ASKED)
        for engine, source in zip((self.engine, eager), self.sources, strict=True):
            torch.manual_seed(11)
            for _ in range(epochs):
                sizes = [ran.steps for ran in run_steps(engine, iter(source)) if isinstance(ran, Span)]
                self.sizes += sizes if engine is self.engine else []
        assert_same(self.auto, self.eager)


def test_resident_rows_are_launched_several_steps_at_a_time(lane: Recording) -> None:
    epochs = Epochs("mlp", lane)
    epochs.run(EPOCHS)
    assert epochs.engine.choice.value == "graphed"
    assert "us a step, several steps a call, eager " in epochs.engine.choice.reason
    assert epochs.sizes[-1] == NUM_BATCHES
    assert (lane.programs.builds, lane.captures) == (1, 2)
    launches = lane.launches
    epochs.run(1)
    assert lane.launches == launches + 2 + 3, "replays of 16 steps, then of one"


def test_rows_of_unequal_length_are_in_the_graphs_of_several_steps(lane: Recording) -> None:
    """Single batches of them have other sizes each time; the rows of a table, by their numbers, have not."""
    epochs = Epochs("sparse", lane)
    epochs.run(EPOCHS)
    assert (epochs.engine.choice.value, lane.captures) == ("graphed", 2)
    assert epochs.sizes[-1] == NUM_BATCHES


def test_later_verifications_compare_graphs_anew(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "VERIFIED_SHARE", 1e9)
    monkeypatch.setattr(ladder, "LEAST_UNVERIFIED", 2 * NUM_BATCHES)
    epochs = Epochs("mlp", lane)
    epochs.run(2 * EPOCHS)
    assert epochs.engine.choice.value == "graphed"
    assert lane.captures == 2

    class Wrong(cudagraph.CapturedWalk):
        def run(self, span: Span, **options: Any) -> Any:
            losses: Any = super().run(span, **options)
            return losses * 1.01

    walk: Any = epochs.engine.candidates[0]._program  # pyright: ignore[reportPrivateUsage]
    walk.__class__ = Wrong
    epochs.run(EPOCHS)
    assert epochs.engine.choice.value == "eager"
    assert "while it ran: its numbers differ from eager's" in epochs.engine.choice.reason


def test_a_walk_that_cannot_be_captured_stays_eager(lane: Recording) -> None:
    tries = itertools.count()

    def refuse() -> None:
        next(tries)
        raise RuntimeError("it waits for the device")

    lane.on_capture = refuse
    epochs = Epochs("mlp", lane)
    epochs.run(EPOCHS)
    assert (epochs.engine.choice.value, next(tries)) == ("eager", 1)
    assert "cannot be captured in a CUDA graph: it waits for the device" in epochs.engine.choice.reason


def test_a_walk_that_cannot_be_captured_anew_is_left(lane: Recording) -> None:
    def refuse() -> None:
        raise RuntimeError("it waits for the device")

    epochs = Epochs("mlp", lane)
    epochs.run(EPOCHS)
    assert epochs.engine.choice.value == "graphed"
    lane.failures += 1  # as a failed capture of another graph
    lane.on_capture = refuse
    epochs.run(EPOCHS)
    assert epochs.engine.choice.value == "eager"
    assert "while it ran: the step cannot be captured" in epochs.engine.choice.reason


def test_graphs_that_do_not_pay_are_let_go_of(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MARGIN", -1.0)  # nothing is ever faster than what is there
    epochs = Epochs("mlp", lane)
    epochs.run(EPOCHS)
    assert epochs.engine.choice.value == "eager"
    assert "the compiled program is not faster: measured" in epochs.engine.choice.reason
    dropped = weakref.ref(epochs.sources[0])
    epochs.sources.clear()
    gc.collect()
    assert dropped() is None
