"""Training by programs of several steps: whatever changes between the epochs, the numbers are eager's.

All but the last replay the traced graphs in place of machine code, which is all that takes long; that one compiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasttrain import FastLoop
from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.history import EpochResult
from fasttrain.step import auto, compiled, compiler, launch
from fasttrain.step import span as span_module
from fasttrain.step.span import TracedSpan
from fasttrain.step.train_step import TrainStep
from tests.step.fakes import Graphs
from tests.step.jobs import ROUNDING, Change, batches, everything, train_step
from tests.step.models import Averaging

ENGINES = ["compiled", "auto"]
SIZE = 4
WHOLE = 11
"""Whole batches of an epoch: two spans, and three batches that are left; then a short one."""

EPOCHS, CHANGED = 8, 4
"""How many, and the one before which something is changed."""

pytestmark = pytest.mark.usefixtures("temporary", "hasty", "several")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of four steps are made as soon as single steps run by program, and kept whether faster or not."""
    monkeypatch.setattr(span_module, "MOST_STEPS", SIZE)
    monkeypatch.setattr(compiled, "FROM_STEPS", 0)
    monkeypatch.setattr(auto, "LAUNCHES_FROM_S", 0.0)
    monkeypatch.setattr(auto, "CACHED_LAUNCHES_FROM_S", 0.0)


def data_of(batch_size: int = 8, seed: int = 2) -> ResidentBatches:
    x, y = batches(1, rows=8 * WHOLE + 3)[0]
    return resident(x, y, batch_size=batch_size, device="cpu", seed=seed, drop_last=False)


class Epochs:
    """A job's epochs from a fixed seed.

    Attributes:
        seen: after each, all that a step changes.
        launched: before each, how many steps had been run several as one.
    """

    def __init__(self, step: TrainStep, graphs: Graphs | None = None) -> None:
        self.step = step
        self.seen: list[dict[str, Any]] = []
        self.launched: list[int] = []
        self._graphs = graphs

    def run(self, changes: dict[int, Change], other: ResidentBatches | None = None) -> Epochs:
        """All of them; the changed one and those after it on other data, if there are any."""
        torch.manual_seed(11)
        data = data_of()
        for epoch in range(EPOCHS):
            changes.get(epoch, lambda _: None)(self.step)
            self.launched += [self._graphs.launched] if self._graphs is not None else []
            for _ in self.step.run(iter(other if other is not None and epoch >= CHANGED else data)):
                pass
            self.seen.append(copy.deepcopy(everything(self.step)))
        self.step.close()
        return self


def started(engine: str) -> TrainStep:
    step = train_step(engine)
    step.expect(10_000_000)
    return step


def assert_as_eager(
    graphs: Graphs,
    engine: str,
    changes: dict[int, Change],
    other: Callable[[], ResidentBatches | None] = lambda: None,
    *,
    may_end_on_eager: bool = False,
) -> Epochs:
    """May: where all steps of a stretch had no program, `auto` says "eager" until it looks again, 64 steps later."""
    wanted = Epochs(started("eager")).run(changes, other())
    found = Epochs(started(engine), graphs).run(changes, other())
    torch.testing.assert_close(found.seen, wanted.seen, rtol=ROUNDING, atol=ROUNDING)
    assert found.launched[CHANGED] >= 2 * SIZE, "nothing was launched before the change"
    assert found.step.engine.value == "compiled" or may_end_on_eager, found.step.engine.reason
    return found


def group(step: TrainStep) -> dict[str, Any]:
    return step.spec.optimizer.param_groups[0]


def reload(part: str) -> dict[int, Change]:
    """The state of an epoch earlier, loaded back."""
    kept: dict[int, Any] = {}

    def save(step: TrainStep) -> None:
        kept[id(step)] = copy.deepcopy(getattr(step.spec, part).state_dict())

    return {
        CHANGED - 1: save,
        CHANGED: lambda step: getattr(step.spec, part).load_state_dict(kept[id(step)]),
    }


def scheduled() -> dict[int, Change]:
    """The rate falls, and betas move, before every epoch."""

    def move(step: TrainStep) -> None:
        group(step).update(lr=group(step)["lr"] * 0.8, betas=(group(step)["betas"][0] * 0.95, 0.99))

    return dict.fromkeys(range(1, EPOCHS), move)


STAYS: dict[str, Callable[[], dict[int, Change]]] = {
    "nothing": dict,
    "rate and betas": scheduled,
    "the optimizer's state": lambda: reload("optimizer"),
    "the model's state": lambda: reload("model"),
    "metrics": lambda: dict.fromkeys(range(EPOCHS), lambda step: step.metrics.reset()),
}
"""What the programs go on with."""


@pytest.mark.parametrize("engine", ENGINES)
def test_another_is_made_for_other_data_that_stay(graphs: Graphs, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MISSED_SPANS", 2)
    found = assert_as_eager(graphs, engine, {}, lambda: data_of(seed=5))
    assert found.launched[-1] > found.launched[CHANGED]


@pytest.mark.parametrize("engine", ENGINES)
def test_so_often_at_most(graphs: Graphs, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MISSED_SPANS", 2)
    monkeypatch.setattr(launch, "MAX_MADE", 1)
    found = assert_as_eager(graphs, engine, {}, lambda: data_of(seed=5))
    assert found.launched[-1] == found.launched[CHANGED]
    told = "; several steps run one by one, since this keeps changing: the resident data"
    assert told in found.step.engine.reason


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STAYS)
def test_what_changes_between_epochs_has_eagers_effect(name: str, engine: str, graphs: Graphs) -> None:
    found = assert_as_eager(graphs, engine, STAYS[name]())
    assert graphs.builds == 2, "one program of a step, one of several"
    # After what was loaded, the first span is run singly, and with it the new objects are taken up.
    assert graphs.launched - found.launched[CHANGED] >= 2 * SIZE * (EPOCHS - CHANGED) - SIZE


@pytest.mark.parametrize("engine", ENGINES)
def test_eval_mode_for_an_epoch_is_run_singly(engine: str, graphs: Graphs) -> None:
    changes: dict[int, Change] = {
        CHANGED: lambda step: step.spec.model.eval(),
        CHANGED + 1: lambda step: step.spec.model.train(),
    }
    found = assert_as_eager(graphs, engine, changes, may_end_on_eager=engine == "auto")
    assert found.launched[CHANGED] == found.launched[CHANGED + 1] < graphs.launched


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{"batch_size": 7}, {"seed": 5}])
def test_other_data_are_run_singly(options: dict[str, int], engine: str, graphs: Graphs) -> None:
    found = assert_as_eager(graphs, engine, {}, lambda: data_of(**options), may_end_on_eager=engine == "auto")
    assert found.launched[CHANGED] == graphs.launched


@pytest.mark.parametrize("engine", ENGINES)
def test_a_program_of_another_size_that_was_used_last_is_not_repeated(engine: str, graphs: Graphs) -> None:
    """The step on short batches has its own program; the steps of a span are not made of that."""
    step = started(engine)
    full, short = batches(24), batches(24, rows=3)
    for _ in step.run(iter([*full, *short, *full, *short])):  # in lists, which give no spans
        pass
    assert (graphs.builds, graphs.launched) == (2, 0)
    data = data_of()
    for _ in range(6):
        for _ in step.run(iter(data)):
            pass
    assert graphs.launched >= 2 * SIZE
    assert "steps cannot" not in step.engine.reason
    step.close()


def test_compiled_makes_a_program_of_several_steps_where_many_are_expected(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "FROM_STEPS", 100)
    step, data = train_step("compiled"), data_of()
    for expected, builds in ((99, 1), (100, 2), (0, 2)):
        step.expect(expected)
        before = graphs.launched
        for _ in step.run(iter(data)):
            pass
        assert graphs.builds == builds
        assert (graphs.launched > before) == (builds == 2), "once it is there, it is used"


def test_compiled_settles_with_both_programs(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "FROM_STEPS", 2_000)
    step = train_step("compiled")
    step.settle(data_of())
    assert graphs.builds == 2
    assert graphs.launched == SIZE
    assert step.compile_s is not None


@pytest.mark.parametrize("whole", [8, 9])
def test_a_step_that_changes_before_launches_are_made_is_compiled_anew(
    whole: int, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an epoch is whole spans, so that no single batch is left over."""
    monkeypatch.setattr(compiled, "FROM_STEPS", 2_000)
    x, y = batches(1, rows=8 * whole)[0]
    data = resident(x, y, batch_size=8, device="cpu", seed=2)
    step = train_step("compiled")
    for epoch in range(12):
        step.expect(0 if epoch < 2 else 100_000)
        if epoch == 2:
            next(step.spec.model.parameters()).requires_grad_(False)
        for _ in step.run(data):
            pass
    assert graphs.builds == 3, "the step, the step after the change, and the launch of that"
    assert graphs.launched > 0
    assert step.engine.value == "compiled"
    step.close()


def test_after_settling_that_was_interrupted_auto_waits_no_more(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Iterator[Any]:
        yield from batches(3)
        raise KeyboardInterrupt

    step = train_step("auto")
    with pytest.raises(KeyboardInterrupt):
        step.settle(interrupted())
    waited: list[object] = []
    monkeypatch.setattr(compiler.Pending, "wait", waited.append)
    data = data_of()
    for _ in range(EPOCHS):
        for _ in step.run(iter(data)):
            pass
    assert graphs.launched > 0
    assert not waited
    step.close()


def test_auto_takes_what_an_earlier_run_has_left_and_starts_no_child(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Epochs(started("eager")).run({})
    for compiles_from_s, builds in ((float("inf"), 1), (0.0, 2), (float("inf"), 2)):
        monkeypatch.setattr(auto, "LAUNCHES_FROM_S", compiles_from_s)
        before = graphs.launched
        found = Epochs(started("auto"), graphs).run({})
        torch.testing.assert_close(found.seen, wanted.seen, rtol=ROUNDING, atol=ROUNDING)
        assert graphs.builds == builds
        assert (graphs.launched > before) == (builds == 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_wrong_numbers_of_several_steps_are_refused(engine: str, graphs: Graphs) -> None:
    graphs.spoil = lambda losses: losses * 1.01 if losses.dim() else losses
    wanted = Epochs(started("eager")).run({})
    found = Epochs(started(engine), graphs).run({})
    torch.testing.assert_close(found.seen, wanted.seen, rtol=ROUNDING, atol=ROUNDING)
    assert graphs.launched == SIZE
    assert "4 steps as one were refused: other numbers than single steps: the loss is" in found.step.engine.reason


def test_an_audit_bears_buffers_that_forward_replaces(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "AUDIT_STEPS", 40)
    torch.manual_seed(5)
    net = Averaging()
    step = TrainStep(net, torch.optim.Adam(net.parameters(), lr=0.01), loss=F.cross_entropy, engine="auto")
    step.expect(10_000_000)
    x, y = batches(1, rows=8 * 12)[0]
    data = resident(x[:, :4].contiguous(), y, batch_size=8, device="cpu")
    before = 0
    for _ in range(20):
        before = graphs.launched
        for _ in step.run(iter(data)):
            pass
    assert graphs.launched > before
    assert "4 steps run as one" in step.engine.reason
    step.close()


def epochs_of(engine: str) -> tuple[list[EpochResult], dict[str, Any], str]:
    """A small job of FastLoop, with a scheduler, a state that is loaded, a short batch and what is left of spans."""
    torch.manual_seed(11)
    net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    loop = FastLoop(net, optimizer, loss=F.cross_entropy, engine=engine)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data, results = data_of(), list[EpochResult]()
    for epoch in range(6):
        if epoch == 4:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        results += [loop.train(data), loop.evaluate(data)]
        scheduler.step()
    reason = loop.step.engine.reason
    loop.step.close()
    return results, everything(loop.step), reason


def figures(results: Sequence[EpochResult]) -> list[tuple[Any, ...]]:
    return [(each.loss, each.accuracy, each.batches, each.samples) for each in results]


def test_machine_code_of_several_steps_gives_eagers_numbers(
    graphs: Graphs, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of single steps is the graph, that of several is compiled."""
    instant, of_graph = compiler.Build, compiler.Pending.load
    ran: list[int] = []

    def load(pending: compiler.Pending[Any]) -> Any:
        if not isinstance(pending.traced, TracedSpan):
            return of_graph(pending)
        program = LOAD(pending)
        run = program.run
        program.run = lambda inputs: (ran.append(pending.traced.steps), run(inputs))[1]
        return program

    monkeypatch.setattr(compiler, "Build", lambda job, *rest: (BUILD if job.unrolling else instant)(job, *rest))
    monkeypatch.setattr(compiler.Pending, "load", load)
    wanted, found = epochs_of("eager"), epochs_of("compiled")
    torch.testing.assert_close(figures(found[0]), figures(wanted[0]), rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(found[1], wanted[1], rtol=ROUNDING, atol=ROUNDING)
    assert "steps" not in found[2].replace("steps ran eagerly", ""), "it was not dropped"
    assert found[0][-2].engine == "compiled"
    assert ran == [SIZE] * (2 * 6 - 1), "all but that which took up what was loaded"
    assert not any(temporary.iterdir())


BUILD, LOAD = compiler.Build, compiler.Pending.load
"""What compiles and loads in earnest."""
