"""Training by programs that walk over resident rows: whatever changes between the epochs, the numbers are eager's.

All but the last replay the traced graphs in place of machine code, which is all that takes long; that one compiles.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasttrain import EngineError, FastLoop
from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.history import EpochResult
from fasttrain.step import compiler, ladder, walk
from fasttrain.step.eager import EagerEngine
from fasttrain.step.train_step import TrainStep
from fasttrain.step.walk import WalkingProgram
from tests.step.fakes import Graphs
from tests.step.jobs import ROUNDING, Change, batches, everything, train_step
from tests.step.models import Averaging

ENGINES = ["compiled", "auto"]
WHOLE = 11
"""Whole batches of an epoch; then a short one."""

EPOCHS, CHANGED = 10, 6
"""How many, and the one before which something is changed."""

pytestmark = pytest.mark.usefixtures("temporary", "hasty")


def data_of(batch_size: int = 8, seed: int = 2) -> ResidentBatches:
    x, y = batches(1, rows=8 * WHOLE + 3)[0]
    return resident(x, y, batch_size=batch_size, device="cpu", seed=seed, drop_last=False)


class Epochs:
    """A job's epochs from a fixed seed.

    Attributes:
        seen: after each, all that a step changes.
        walked: before each, how many steps had been run by walking programs.
    """

    def __init__(self, step: TrainStep, graphs: Graphs | None = None) -> None:
        self.step = step
        self.seen: list[dict[str, Any]] = []
        self.walked: list[int] = []
        self._graphs = graphs

    def run(self, changes: dict[int, Change], other: ResidentBatches | None = None) -> Epochs:
        """All of them; the changed one and those after it on other data, if there are any."""
        torch.manual_seed(11)
        data = data_of()
        for epoch in range(EPOCHS):
            changes.get(epoch, lambda _: None)(self.step)
            self.walked += [self._graphs.walked] if self._graphs is not None else []
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
    wanted = Epochs(started("eager")).run(changes, other())
    found = Epochs(started(engine), graphs).run(changes, other())
    torch.testing.assert_close(found.seen, wanted.seen, rtol=ROUNDING, atol=ROUNDING)
    assert found.walked[CHANGED] >= WHOLE, "nothing walked before the change"
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
@pytest.mark.parametrize("name", STAYS)
def test_what_changes_between_epochs_has_eagers_effect(name: str, engine: str, graphs: Graphs) -> None:
    found = assert_as_eager(graphs, engine, STAYS[name]())
    assert graphs.builds == 1, "the one program, which walks"
    assert graphs.walked - found.walked[CHANGED] == WHOLE * (EPOCHS - CHANGED), "what was loaded is taken up at once"


@pytest.mark.parametrize("engine", ENGINES)
def test_eval_mode_for_an_epoch_is_run_eagerly(engine: str, graphs: Graphs) -> None:
    changes: dict[int, Change] = {
        CHANGED: lambda step: step.spec.model.eval(),
        CHANGED + 1: lambda step: step.spec.model.train(),
    }
    found = assert_as_eager(graphs, engine, changes, may_end_on_eager=engine == "auto")
    assert found.walked[CHANGED] == found.walked[CHANGED + 1] < graphs.walked


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{"batch_size": 7}, {"seed": 5}])
def test_other_data_get_a_program_of_their_own(options: dict[str, int], engine: str, graphs: Graphs) -> None:
    found = assert_as_eager(graphs, engine, {}, lambda: data_of(**options))
    assert graphs.builds == (1 if "seed" in options else 2), "rows like those before are taken by the same program"
    assert graphs.walked > found.walked[CHANGED]


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_of_a_list_and_resident_rows_have_a_program_each(engine: str, graphs: Graphs) -> None:
    step = started(engine)
    for _ in step.run(iter(batches(40))):
        pass
    assert (graphs.builds, graphs.walked) == (1, 0)
    data = data_of()
    for _ in range(6):
        for _ in step.run(iter(data)):
            pass
    assert graphs.builds == 2
    assert graphs.walked >= WHOLE
    step.close()


def test_compiled_settles(graphs: Graphs) -> None:
    step = train_step("compiled")
    step.settle(data_of())
    assert graphs.builds == 1
    assert step.compile_s is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_changes_is_compiled_anew(engine: str, graphs: Graphs) -> None:
    x, y = batches(1, rows=8 * 8)[0]
    data = resident(x, y, batch_size=8, device="cpu", seed=2)
    step = started(engine)
    for epoch in range(14):
        if epoch == 4:
            next(step.spec.model.parameters()).requires_grad_(False)
        for _ in step.run(data):
            pass
    assert graphs.builds == 2, "the step, and the step after the change"
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
    assert graphs.walked > 0
    assert not waited
    step.close()


def test_auto_takes_what_an_earlier_run_has_left_and_starts_no_child(graphs: Graphs) -> None:
    wanted = Epochs(started("eager")).run({})
    for _ in range(2):
        before = graphs.walked
        found = Epochs(started("auto"), graphs).run({})
        torch.testing.assert_close(found.seen, wanted.seen, rtol=ROUNDING, atol=ROUNDING)
        assert graphs.builds == 1
        assert graphs.walked > before


def test_auto_refuses_a_program_with_wrong_numbers(graphs: Graphs) -> None:
    graphs.spoil = lambda losses: losses * 1.01
    wanted = Epochs(started("eager")).run({})
    found = Epochs(started("auto"), graphs).run({})
    torch.testing.assert_close(found.seen, wanted.seen, rtol=ROUNDING, atol=ROUNDING)
    assert 2 <= graphs.walked <= 4, "it was compared on two batches"
    assert "was refused: its numbers differ from eager's: the loss is" in found.step.engine.reason


def test_compiled_raises_over_a_program_with_wrong_numbers(graphs: Graphs) -> None:
    graphs.spoil = lambda losses: losses * 1.01
    step = started("compiled")
    for _ in range(2):
        with pytest.raises(EngineError, match="its numbers differ from eager's: the loss is"):
            for _ in step.run(iter(data_of())):
                pass


def test_verification_bears_buffers_that_forward_replaces(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "VERIFIED_SHARE", 1e9)
    monkeypatch.setattr(ladder, "LEAST_UNVERIFIED", 20)
    torch.manual_seed(5)
    net = Averaging()
    step = TrainStep(net, torch.optim.Adam(net.parameters(), lr=0.01), loss=F.cross_entropy, engine="auto")
    step.expect(10_000_000)
    x, y = batches(1, rows=8 * 12)[0]
    data = resident(x[:, :4].contiguous(), y, batch_size=8, device="cpu")
    before = 0
    for _ in range(20):
        before = graphs.walked
        for _ in step.run(iter(data)):
            pass
    assert graphs.walked > before
    assert step.engine.value == "compiled"
    step.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_after_a_step_that_failed_nothing_goes_on(engine: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    step = started(engine)
    data = data_of()
    for _ in range(4):
        for _ in step.run(iter(data)):
            pass
    assert step.engine.value == "compiled"
    with monkeypatch.context() as failing:
        real = WalkingProgram.run

        def run(program: WalkingProgram, span: Any, **options: Any) -> Any:
            monkeypatch.setattr(program, "_loop", fails)
            return real(program, span, **options)

        def fails(*_: Any) -> None:
            raise RuntimeError("a kernel failed")

        failing.setattr(WalkingProgram, "run", run)
        with pytest.raises(EngineError, match=r"after 0 of the .* steps of this call"):
            for _ in step.run(iter(data)):
                pass
    with pytest.raises(EngineError, match="not to be trusted"):
        for _ in step.run(iter(data)):
            pass
    step.close()


def walking(engine: str, data: ResidentBatches) -> TrainStep:
    """A step whose program has been adopted for these data."""
    step = started(engine)
    for _ in range(8):
        for _ in step.run(iter(data)):
            pass
    assert step.engine.value == "compiled"
    return step


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forward_that_ignores_its_batch_runs_every_step(engine: str, graphs: Graphs) -> None:
    """A program of single batches would hold for a span, too."""

    def run(engine: str) -> tuple[Any, int]:
        torch.manual_seed(3)
        net = nn.Linear(2, 2, bias=False)
        nn.init.ones_(net.weight)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        step = TrainStep(net, optimizer, lambda model, _: model.weight.square().sum(), engine=engine)
        step.expect(10_000_000)
        losses: list[torch.Tensor] = [step(batch) for batch in batches(40)]
        for _ in range(4):
            for _ in step.run(iter(data_of())):
                pass
        step.close()
        return everything(step), len(losses)

    torch.testing.assert_close(run(engine), run("eager"), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_span_of_more_steps_than_a_call_may_have(
    engine: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "MOST_STEPS", 4)
    monkeypatch.setattr(walk, "LEAST_STEPS", 4)
    data = data_of()
    step = walking(engine, data)
    before = graphs.walked
    epoch: Any = iter(data)
    assert step.steps(epoch.take(WHOLE)).shape == (WHOLE,)
    assert graphs.walked == before + WHOLE
    step.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_verification_runs_the_rest_of_a_call_by_program(engine: str, graphs: Graphs) -> None:
    data = data_of()
    step = walking(engine, data)
    before = graphs.walked
    step._engine.verify_again()  # type: ignore[attr-defined]
    epoch: Any = iter(data)
    step.steps(epoch.take(WHOLE))
    assert graphs.walked == before + WHOLE, "the first beside eager"
    step.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_that_no_program_holds_for_are_gathered_a_few_at_a_time(
    engine: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of()
    step = walking(engine, data)
    gathered: list[int] = []
    real = EagerEngine.steps

    def noted(eager: EagerEngine, span: Any) -> torch.Tensor:
        gathered.append(span.steps)
        return real(eager, span)

    monkeypatch.setattr(EagerEngine, "steps", noted)
    step.spec.model.eval()
    epoch: Any = iter(data)
    step.steps(epoch.take(WHOLE))
    assert gathered == [ladder.MAX_EAGER_SPAN, WHOLE - ladder.MAX_EAGER_SPAN]
    step.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_was_left_costs_a_few_steps(engine: str, graphs: Graphs) -> None:
    data = data_of()
    step = walking(engine, data)
    for parameter in step.spec.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = graphs.walked
    for _ in step.run(iter(data)):
        pass
    assert graphs.walked == before + WHOLE - ladder.MAX_EAGER_SPAN
    assert step.span > 0
    step.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_data_that_are_made_anew_for_each_epoch_keep_their_program(engine: str, graphs: Graphs) -> None:
    step = started(engine)
    for epoch in range(12):
        before = graphs.walked
        for _ in step.run(iter(data_of(seed=epoch))):
            pass
        assert epoch < 8 or graphs.walked == before + WHOLE
    assert graphs.builds == 1
    step.close()


def test_a_program_does_not_keep_the_data(graphs: Graphs) -> None:
    data = data_of()
    step = walking("compiled", data)
    column = weakref.ref(data.columns[0].tables[0])
    del data
    gc.collect()
    assert column() is None
    step.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupted_call_leaves_the_metrics_right(
    engine: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of()
    step = walking(engine, data)
    program: Any = step._engine._candidates[0]._program  # type: ignore[attr-defined]
    loop = program._loop

    def interrupted(inputs: list[torch.Tensor], _: int) -> None:
        loop(inputs, 5)
        raise KeyboardInterrupt

    step.metrics.reset()
    monkeypatch.setattr(program, "_loop", interrupted)
    epoch: Any = iter(data)
    with pytest.raises(KeyboardInterrupt):
        step.steps(epoch.take(WHOLE))
    monkeypatch.setattr(program, "_loop", loop)
    losses = program._state.losses[:5]
    assert step.metrics.compute().loss == pytest.approx(losses.mean().item())
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


def test_machine_code_that_walks_gives_eagers_numbers(temporary: Path, own_programs: Path) -> None:
    wanted, found = epochs_of("eager"), epochs_of("compiled")
    torch.testing.assert_close(figures(found[0]), figures(wanted[0]), rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(found[1], wanted[1], rtol=ROUNDING, atol=ROUNDING)
    assert found[0][-2].engine == "compiled"
    assert "this batch was passed by itself" in found[2], "the short batch runs eagerly"
    assert not any(temporary.iterdir())
