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
from fasttrain.step import candidate, compiler, ladder
from fasttrain.step.train_step import TrainStep
from tests.step.fakes import Graphs
from tests.step.jobs import ROUNDING, Change, assert_as_eager, batches, run, started

ENGINES = ["compiled", "auto"]

pytestmark = pytest.mark.usefixtures("temporary", "hasty")


def group(step: TrainStep) -> dict[str, Any]:
    return step.spec.optimizer.param_groups[0]


def layer(step: TrainStep, place: int) -> Any:
    model: Any = step.spec.model
    return model[place]


def scheduled(make: Callable[[torch.optim.Optimizer], Any], made: int = 0) -> Callable[[int], dict[int, Change]]:
    """A scheduler of each run's own, made before a step and moved before each step from the given one on."""

    def changes(at: int) -> dict[int, Change]:
        schedulers: dict[int, Any] = {}

        def begin(step: TrainStep) -> None:
            schedulers[id(step)] = make(step.spec.optimizer)

        return {made: begin, **{later: lambda step: schedulers[id(step)].step() for later in range(at, at + 24)}}

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
    "a scheduler made then": lambda at: scheduled(lambda optimizer: optim.ExponentialLR(optimizer, 0.9), at)(at + 1),
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
    "the share of dropout": once(lambda step: setattr(layer(step, 2), "p", 0.1)),
    "the momentum of batch norm": once(lambda step: setattr(layer(step, 1), "momentum", 0.5)),
    "a frozen layer": once(lambda step: layer(step, 0).requires_grad_(False)),
    "the model's state": saved_and_loaded("model"),
    "the optimizer's state": saved_and_loaded("optimizer"),
    "a replaced parameter": once(replace_parameter),
    "gradients that were there": once(leave_gradients),
    "another activation": once(lambda step: step.spec.model.register_module("3", nn.Tanh())),
    "a hook of a module": once(lambda step: layer(step, 3).register_forward_hook(lambda _m, _i, output: output * 0.5)),
    "a new epoch's metrics": once(lambda step: step.metrics.reset()),
}

STAYS = (
    "nothing",
    "the rate",
    "a scheduler",
    "a scheduler made then",
    "a scheduler that moves betas",
    "betas",
    "weight decay",
    "the model's state",
    "the optimizer's state",
    "a new epoch's metrics",
)
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
    changes = once(lambda step: layer(step, 0).weight.register_hook(lambda gradient: gradient * 0.5))(16)
    step = started("auto")
    assert_as_eager(step, batches(60), changes, rtol=ROUNDING)
    assert step.engine.value == "eager"
    assert step.engine.reason.endswith("steps ran eagerly, the last because this differed: a hook of a gradient")
    step.close()
    with pytest.raises(EngineError, match="has gradient hooks"):
        run(started("compiled"), batches(60), changes)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hook_of_the_optimizer_leaves_its_step_to_itself(engine: str, graphs: Graphs) -> None:
    changes = once(lambda step: step.spec.optimizer.register_step_pre_hook(halve_gradients))(16)
    step = started(engine)
    assert_as_eager(step, batches(60), changes, rtol=ROUNDING)
    assert graphs.builds == 2
    assert step.engine.value == "compiled"
    assert "AdamW steps eagerly: it has hooks" in step.engine.reason
    step.close()


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"accumulate": 5, "clip_norm": 0.1}])
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulated_gradients(engine: str, options: dict[str, Any], graphs: Graphs) -> None:
    """Both parts of the program run; what is loaded in the middle of a group is taken up; the last group is short."""
    step = started(engine, **options)
    changes = {**saved_and_loaded("optimizer")(33), **saved_and_loaded("model")(36)}
    assert_as_eager(step, batches(63), changes, rtol=ROUNDING, **options)
    assert graphs.builds == 2
    assert graphs.replayed >= 63 - 33
    assert step.engine.value == "compiled"
    assert all(parameter.grad is None for parameter in step.spec.trained())
    step.close()


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_norm": 0.1}])
@pytest.mark.parametrize("engine", ENGINES)
def test_scaled_gradients(
    engine: str, options: dict[str, Any], graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, from a scale at which the first steps overflow: there is no program before one does not."""
    monkeypatch.setattr("fasttrain.device._cpu_has", lambda *_: True)
    changes = once(lambda step: step.spec.scaler._init_scale and setattr(step.spec.scaler, "_init_scale", 2.0**22))(0)
    step = started(engine, precision="fp16", **options)
    assert_as_eager(step, batches(40), changes, rtol=2e-3, precision="fp16", **options)
    assert step.engine.value == "compiled"
    assert step.spec.scaler is not None
    assert step.spec.scaler.get_scale() < 2.0**22
    assert "eagerly" not in step.engine.reason
    step.close()


def test_the_record_of_compiled_tells_how_many_steps_it_missed(graphs: Graphs) -> None:
    changes = once(lambda step: step.spec.model.eval())(8)
    step = started("compiled")
    run(step, batches(8))
    assert (step.engine.value, step.engine.reason) == ("compiled", "asked for")
    run(step, batches(3), once(lambda step: step.spec.model.eval())(0))
    assert step.engine.value == "compiled"
    assert step.engine.reason.endswith("model[1].training == True (nn/modules/batchnorm.py:187 in forward)")
    changes = dict.fromkeys(range(40), leave_gradients)
    run(step, batches(40), changes)
    assert step.engine.value == "eager"
    assert "because this differed: a gradient that was there" in step.engine.reason


def test_a_change_while_a_program_is_verified_has_another_one_compiled(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate, "VERIFIED_BATCHES", 3)
    monkeypatch.setattr(ladder, "LOOK_STEPS", 256)
    step = started("compiled")
    assert_as_eager(step, batches(40), once(lambda step: step.spec.model.eval())(3), rtol=ROUNDING)
    assert graphs.builds == 2
    assert graphs.replayed == 40 - 1 - ladder.ENOUGH_MISSED
    assert (step.engine.value, step.engine.reason) == ("compiled", "asked for")


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
    assert_as_eager(step, [*full, *short] * (ladder.ENOUGH_MISSED + 4), rtol=ROUNDING)
    assert graphs.builds == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_the_number_of_programs_is_bounded(engine: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "ENOUGH_MISSED", 4)
    data = [batch for rows in range(4, 12) for batch in batches(24, rows=rows)]
    step = started(engine)
    assert_as_eager(step, data, rtol=ROUNDING)
    assert graphs.builds == ladder.MAX_CANDIDATES
    step.close()


def test_what_cannot_be_traced_is_run_eagerly_by_auto_and_refused_by_compiled(graphs: Graphs) -> None:
    def hook(step: TrainStep) -> None:
        layer(step, 0).weight.register_hook(lambda gradient: gradient)

    step = started("auto")
    assert_as_eager(step, batches(30), {0: hook})
    assert "gradient hooks" in step.engine.reason
    assert step.engine.value == "eager"
    with pytest.raises(EngineError, match="gradient hooks"):
        run(started("compiled"), batches(2), {0: hook})


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
    assert step.engine.value == "compiled"

    def forbidden(*_: Any) -> Any:
        raise AssertionError("a child was started for a program that is in the cache")

    monkeypatch.setattr(compiler, "Build", forbidden)
    again = started("auto")
    assert_as_eager(again, batches(30), changes, rtol=ROUNDING)
    assert again.engine.value == "compiled"
    again.close()
    del step, again
    assert not any(temporary.iterdir())
