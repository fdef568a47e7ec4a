"""Training by programs: whatever changes on the way, the numbers are eager's.

Most of these replay the traced graph in place of machine code, which is all that takes long; the last one compiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.errors import EngineError
from fasttrain.step import compiled, compiler
from fasttrain.step.compiled import CompiledEngine
from fasttrain.step.train_step import TrainStep
from tests.step.fakes import Graphs
from tests.step.jobs import ROUNDING, Change, assert_as_eager, batches, run, started, train_step

ENGINES = ["compiled", "auto"]

pytestmark = pytest.mark.usefixtures("temporary", "hasty")


def group(step: TrainStep) -> dict[str, Any]:
    return step.spec.optimizer.param_groups[0]


def layer(step: TrainStep, place: int) -> Any:
    model: Any = step.spec.model
    return model[place]


def scheduled(make: Callable[[torch.optim.Optimizer], Any]) -> Callable[[int], dict[int, Change]]:
    """A scheduler of each run's own, made at the start and moved before each step from the given one on."""

    def changes(at: int) -> dict[int, Change]:
        schedulers: dict[int, Any] = {}

        def begin(step: TrainStep) -> None:
            schedulers[id(step)] = make(step.spec.optimizer)

        return {0: begin, **{later: lambda step: schedulers[id(step)].step() for later in range(at, at + 24)}}

    return changes


def once(change: Change) -> Callable[[int], dict[int, Change]]:
    return lambda at: {at: change}


def saved_and_loaded(part: str) -> Callable[[int], dict[int, Change]]:
    """The state of some steps earlier, loaded back."""
    kept: dict[int, Any] = {}

    def save(step: TrainStep) -> None:
        kept[id(step)] = copy.deepcopy(getattr(step.spec, part).state_dict())

    return lambda at: {at - 3: save, at: lambda step: getattr(step.spec, part).load_state_dict(kept[id(step)])}


def replace_parameter(step: TrainStep) -> None:
    head = layer(step, 4)
    place = next(place for place, each in enumerate(group(step)["params"]) if each is head.weight)
    state = step.spec.optimizer.state
    entries = state.pop(head.weight)
    head.weight = nn.Parameter(head.weight.detach() * 0.5)
    state[head.weight] = entries
    group(step)["params"][place] = head.weight


def leave_gradients(step: TrainStep) -> None:
    for parameter in step.spec.trained():
        parameter.grad = torch.ones_like(parameter)


def halve_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for each in optimizer.param_groups[0]["params"]:
        each.grad *= 0.5


optim = torch.optim.lr_scheduler
CHANGES: dict[str, Callable[[int], dict[int, Change]]] = {
    "nothing": lambda at: {},
    "the rate": once(lambda step: group(step).update(lr=0.05)),
    "a scheduler": scheduled(lambda optimizer: optim.ExponentialLR(optimizer, 0.9)),
    "a scheduler that moves betas": scheduled(lambda optimizer: optim.OneCycleLR(optimizer, 0.05, total_steps=40)),
    "betas": once(lambda step: group(step).update(betas=(0.5, 0.9))),
    "weight decay": once(lambda step: group(step).update(weight_decay=0.5)),
    "eval mode": once(lambda step: step.spec.model.eval()),
    "eval mode for a while": lambda at: {
        at: lambda step: step.spec.model.eval(),
        at + 3: lambda step: step.spec.model.train(),
    },
    "eval mode of the dropout": once(lambda step: layer(step, 2).eval()),
    "a frozen layer": once(lambda step: layer(step, 0).requires_grad_(False)),
    "the model's state": saved_and_loaded("model"),
    "the optimizer's state": saved_and_loaded("optimizer"),
    "a replaced parameter": once(replace_parameter),
    "gradients that were there": once(leave_gradients),
    "another activation": once(lambda step: step.spec.model.register_module("3", nn.Tanh())),
    "a hook of a module": once(lambda step: layer(step, 3).register_forward_hook(lambda _m, _i, output: output * 0.5)),
    "a new epoch's metrics": once(lambda step: step.metrics.reset()),
}

STAYS = ("nothing", "the rate", "a scheduler", "the model's state", "the optimizer's state", "a new epoch's metrics")
"""What the program that there is goes on with."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_the_middle_has_eagers_effect(engine: str, name: str, graphs: Graphs) -> None:
    step = started(engine)
    seen: list[int] = []
    changes = CHANGES[name](16)
    before = changes.get(16, lambda _: None)
    changes[16] = lambda each: (seen.append(graphs.replayed), before(each))
    assert_as_eager(step, batches(40), changes, rtol=ROUNDING)
    assert seen[-1] > 4, "no program ran before the change"
    assert step.engine.value == "compiled"
    if name in STAYS:
        assert graphs.builds == 1
        assert graphs.replayed - seen[-1] == 24
    step.close()


def test_a_change_that_no_program_can_follow_is_followed_eagerly_or_refused(graphs: Graphs) -> None:
    changes = once(lambda step: step.spec.optimizer.register_step_pre_hook(halve_gradients))(16)
    step = started("auto")
    assert_as_eager(step, batches(60), changes, rtol=ROUNDING)
    assert step.engine.value == "eager"
    assert step.engine.reason.endswith("since this changed: a hook of the optimizer")
    step.close()
    with pytest.raises(EngineError, match="the optimizer has hooks"):
        run(started("compiled"), batches(60), changes)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_another_size_is_run_eagerly_until_it_has_its_program(engine: str, graphs: Graphs) -> None:
    full, short = batches(60), batches(60, rows=5)
    data = [short[place] if place > 15 and place % 2 else batch for place, batch in enumerate(full)]
    step = started(engine)
    assert_as_eager(step, data, rtol=ROUNDING)
    assert graphs.builds == 2, "one program a shape"
    assert step.engine.value == "compiled"
    step.close()


def test_the_short_batch_that_ends_each_epoch_gets_its_program(graphs: Graphs) -> None:
    full, short = batches(4), batches(1, rows=5)
    step = started("compiled")
    assert_as_eager(step, [*full, *short] * (compiled.ENOUGH_STEPS + 4), rtol=ROUNDING)
    assert graphs.builds == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_the_number_of_programs_is_bounded(engine: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ENOUGH_STEPS", 4)
    data = [batch for rows in range(4, 12) for batch in batches(24, rows=rows)]
    step = started(engine)
    assert_as_eager(step, data, rtol=ROUNDING)
    assert graphs.builds == compiled.MAX_PROGRAMS
    step.close()


def test_what_cannot_be_traced_is_run_eagerly_by_auto_and_refused_by_compiled(graphs: Graphs) -> None:
    step = started("auto", accumulate=2)
    eager = train_step("eager", accumulate=2)
    assert run(step, batches(30)) == run(eager, batches(30))
    assert "accumulate=2" in step.engine.reason
    assert step.engine.value == "eager"
    with pytest.raises(EngineError, match="accumulate=2"):
        run(started("compiled", accumulate=2), batches(2))


def test_the_second_run_of_a_job_needs_no_child(graphs: Graphs) -> None:
    run(started("compiled"), batches(4))
    for engine in ENGINES:
        step = started(engine)
        assert_as_eager(step, batches(30), rtol=ROUNDING)
        assert step.engine.value == "compiled"
        step.close()
    assert graphs.builds == 1


def test_a_compiled_job_gives_eagers_numbers_and_its_second_run_needs_no_child(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates, a loaded state and new metrics on the way; dropout's random numbers are eager's own."""
    changes = {
        **CHANGES["a scheduler"](12),
        **CHANGES["the optimizer's state"](8),
        **CHANGES["a new epoch's metrics"](6),
    }
    step = started("compiled")
    assert_as_eager(step, batches(30), changes, rtol=ROUNDING)
    assert isinstance(step._engine, CompiledEngine)  # pyright: ignore[reportPrivateUsage]

    def forbidden(*_: Any) -> Any:
        raise AssertionError("a child was started for a program that is in the cache")

    monkeypatch.setattr(compiler, "Build", forbidden)
    again = started("auto")
    assert_as_eager(again, batches(30), changes, rtol=ROUNDING)
    assert again.engine.value == "compiled"
    again.close()
    del step, again
    assert not any(temporary.iterdir())
