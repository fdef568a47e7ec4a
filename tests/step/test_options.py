"""Options that schedulers move are inputs of a graph; of the others, those that the optimizer asks for are guarded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from fasttrain.step.eager import EagerEngine
from fasttrain.step.optimizer import GroupOptions
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.agreement import both, run_graph, steps_agree
from tests.step.models import ASKED, CASES, CPU, OPTIMIZERS, batches, started

pytestmark = pytest.mark.usefixtures("in_double")

MLP = CASES["mlp"]
ALL_MOVED: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    **{name: (kind, {"weight_decay": 0.01, **options}) for name, (kind, options) in OPTIMIZERS.items()},
    "rprop": OPTIMIZERS["rprop"],
}


def move(number: int) -> Callable[[StepSpec], None]:
    """Moves all that may move, in each group by another factor."""

    def change(spec: StepSpec) -> None:
        for place, group in enumerate(spec.optimizer.param_groups):
            factor = 1.0 + 0.3 * math.sin(number + place)
            group["lr"] *= factor
            if group.get("weight_decay"):
                group["weight_decay"] *= factor
            if group.get("momentum"):
                group["momentum"] = 0.7 + 0.2 * math.sin(number + place)
            if "betas" in group:
                group["betas"] = (0.8 + 0.1 * math.sin(number + place), 0.99 + 0.009 * math.cos(number))

    return change


@pytest.mark.parametrize("name", ALL_MOVED)
def test_what_moves_in_every_step_has_eagers_effect(name: str) -> None:
    steps_agree(MLP, ALL_MOVED[name], {number: move(number) for number in range(20)})


def test_in_single_precision_options_stay_doubles() -> None:
    """As Python's numbers do, `1 - beta` is rounded once. One operator after the other, both ways: bit for bit."""
    torch.set_default_dtype(torch.float32)
    spec, eager_spec = both(MLP, (optim.Adam, {"lr": 0.01, "foreach": False}))
    [batch] = batches(MLP, 1)
    run_graph(trace_step(spec, batch), batch)
    EagerEngine(eager_spec, ASKED).step(batch)
    for found, wanted in zip(spec.optimizer.state.values(), eager_spec.optimizer.state.values(), strict=True):
        assert torch.equal(found["exp_avg"], wanted["exp_avg"])


schedulers = optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "one cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.05, total_steps=40),
    "cyclic": lambda optimizer: schedulers.CyclicLR(optimizer, 0.001, 0.05, step_size_up=5, cycle_momentum=True),
    "cosine": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 7),
    "numpy": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: np.float64(0.9) ** step),  # pyright: ignore
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam", "sgd-momentum"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_made_in_the_middle_needs_no_new_trace(name: str, optimizer: str, accumulate: int) -> None:
    """It leaves notes of its own in the groups, which no optimizer reads."""
    kept: dict[int, Any] = {}

    def begin(spec: StepSpec) -> None:
        kept[id(spec)] = SCHEDULERS[name](spec.optimizer)

    changes = {5: begin, **dict.fromkeys(range(6, 20), lambda spec: kept[id(spec)].step())}
    steps_agree(MLP, OPTIMIZERS[optimizer], changes, accumulate=accumulate)


def with_option(spec: StepSpec, name: str, value: Any) -> StepSpec:
    for group in spec.optimizer.param_groups:
        group[name] = value
    return spec


NOTICED: list[tuple[str, str, Any]] = [
    ("adam", "weight_decay", 0.1),  # from 0: other code runs
    ("adamw", "weight_decay", 0.0),
    ("sgd-momentum", "momentum", 0.0),
    ("sgd-momentum", "weight_decay", -0.1),
    ("sgd-momentum", "dampening", 0.2),
    ("adam", "eps", 1e-3),
    ("adam", "amsgrad", True),
    ("adam", "maximize", True),
    ("sgd-nesterov", "nesterov", False),
    ("adam", "betas", (0.9, 0.99, 0.999)),
    ("adam", "betas", [0.9, 0.99]),
    ("adam", "lr", torch.tensor(0.1)),
    ("adam", "lr", None),
]


@pytest.mark.parametrize(("optimizer", "name", "value"), NOTICED)
def test_what_makes_another_step_is_noticed(optimizer: str, name: str, value: Any) -> None:
    spec, batch = started(MLP, OPTIMIZERS[optimizer])
    traced = trace_step(spec, batch)
    with_option(spec, name, value)
    mismatch = traced.inputs(batch)
    assert isinstance(mismatch, Mismatch)
    assert "option" in mismatch.reason


def test_a_rate_may_be_zero_for_a_while() -> None:
    """As in a warm-up: no optimizer asks for its sign."""
    rate = OPTIMIZERS["adam"][1]["lr"]
    zero, back = (lambda spec: with_option(spec, "lr", 0.0)), (lambda spec: with_option(spec, "lr", rate))
    steps_agree(MLP, OPTIMIZERS["adam"], {3: zero, 6: back})


def test_an_option_that_is_gone_is_noticed() -> None:
    spec, batch = started(MLP, OPTIMIZERS["adam"])
    traced = trace_step(spec, batch)
    del spec.optimizer.param_groups[1]["betas"]
    assert isinstance(traced.inputs(batch), Mismatch)


class Asking(optim.SGD):
    """Asks for an option that may not be there, as optimizers that take more than torch's do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"] * group.get("boost", 1.0))


class Listing(optim.SGD):
    """Looks at whole groups."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"] * len(list(group)))


class Particular(optim.SGD):
    """Asks more of an option than its sign."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            factor = 1.0 if group["momentum"] > 0.5 else 0.5
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"] * factor)


class InPlace(optim.SGD):
    """Changes what it has derived from an option, anew for each parameter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                factor = 1 - group["momentum"]
                factor *= 0.5
                parameter.data.sub_(parameter.grad * factor * group["lr"])


for _kind in (Asking, Listing, Particular, InPlace):
    _kind.__module__ = "torch.optim.for_tests"  # only torch's own optimizers are traced


SGD = {"lr": 0.05, "momentum": 0.9}


@pytest.mark.parametrize(("kind", "is_noticed"), [(Asking, True), (Listing, True), (optim.SGD, False)])
def test_a_new_option_is_noticed_by_those_who_ask(kind: type[optim.Optimizer], is_noticed: bool) -> None:
    spec, batch = started(MLP, (kind, SGD))
    traced = trace_step(spec, batch)
    assert traced.why_eager is None
    with_option(spec, "boost", 2.0)
    assert isinstance(traced.inputs(batch), Mismatch) == is_noticed


def test_an_option_that_code_is_particular_about_is_guarded_and_the_rate_is_not() -> None:
    changes = {number: lambda spec: with_option(spec, "lr", 0.01) for number in (4, 9)}
    traced = steps_agree(MLP, (Particular, SGD), changes)
    assert traced.why_eager is None
    with_option(traced.spec, "momentum", 0.1)
    assert isinstance(traced.inputs(None), Mismatch)


def test_what_is_derived_and_changed_in_place_is_not_shared_among_parameters() -> None:
    traced = steps_agree(MLP, (InPlace, SGD))
    assert traced.why_eager is None


def test_a_loaded_state_with_other_options_is_taken_up() -> None:
    def load(spec: StepSpec) -> None:
        saved = copy.deepcopy(spec.optimizer.state_dict())
        for group in saved["param_groups"]:
            group["betas"], group["lr"] = (0.5, 0.9), 0.003
        spec.optimizer.load_state_dict(saved)

    spec, batch = started(MLP, OPTIMIZERS["adam"])
    traced = trace_step(spec, batch)
    load(spec)
    assert isinstance(traced.inputs(batch), Mismatch)
    assert traced.rebind()
    run_graph(traced, batch)
    first = spec.optimizer.state[next(spec.model.parameters())]["exp_avg"]
    assert first.abs().sum() > 0


numbers = st.floats(allow_nan=False, width=64)


@given(before=st.tuples(numbers, numbers), after=st.tuples(numbers, numbers), rate=numbers)
@settings(deadline=None)
def test_the_inputs_are_the_options_of_the_moment(
    before: tuple[float, float], after: tuple[float, float], rate: float
) -> None:
    optimizer = optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=0.1)
    for group in optimizer.param_groups:
        group["betas"] = before
    options = GroupOptions(optimizer, CPU)
    [packed] = options.current() or []
    assert packed.dtype == torch.float64
    optimizer.param_groups[1].update(betas=after, lr=rate)
    assert options.current() == [packed]
    assert packed.tolist() == [0.1, *before, 0.0, 0.0, rate, *after, 0.0, 0.0]


def test_a_rate_that_is_a_tensor_is_passed_on() -> None:
    rate = torch.tensor(0.1)
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=rate)
    found = GroupOptions(optimizer, CPU).current()
    assert found is not None
    assert found[1] is rate
    optimizer.param_groups[0]["lr"] = 0.1
    assert GroupOptions(optimizer, CPU).current() is not None
