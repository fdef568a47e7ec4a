"""What a traced step takes for granted is noticed when it changes, and nothing else is."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

from fasttrain.device import Choice
from fasttrain.metrics import RunningMetrics
from fasttrain.step.capture import Capture
from fasttrain.step.eager import EagerEngine
from fasttrain.step.guards import Guards
from fasttrain.step.optimizer import GroupOptions
from fasttrain.step.spec import StepSpec, normalise_forward
from fasttrain.step.state import StepState
from fasttrain.step.trace import Mismatch, TracedStep, trace_step

ASKED = Choice("eager", "asked for")

CPU = torch.device("cpu")


def step(optimizer: type[torch.optim.Optimizer] = torch.optim.Adam) -> StepSpec:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    made = optimizer(model.parameters(), lr=0.1)
    vars(made)["horizon"] = 5
    return StepSpec(
        model=model,
        optimizer=made,
        forward=normalise_forward(None, nn.CrossEntropyLoss()),
        device=CPU,
        precision="fp32",
        accumulate=1,
        clip_norm=None,
        clip_value=None,
        metrics=RunningMetrics(CPU),
        scaler=None,
    )


def batch(rows: int = 5) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, 4), torch.zeros(rows, dtype=torch.int64)


@pytest.fixture(scope="module")
def traced() -> TracedStep:
    spec = step()
    EagerEngine(spec, ASKED).step(batch())
    return trace_step(spec, batch())


def weight(spec: StepSpec) -> nn.Parameter:
    return spec.model[0].weight  # pyright: ignore


def change_eps(spec: StepSpec) -> None:
    spec.optimizer.param_groups[0]["eps"] = 1e-3


def new_option(spec: StepSpec) -> None:
    spec.optimizer.param_groups[0]["clipped"] = True


def replace_state(spec: StepSpec) -> None:
    state = spec.optimizer.state[weight(spec)]
    state["exp_avg"] = state["exp_avg"].clone()


def replace_step_count(spec: StepSpec) -> None:
    state = spec.optimizer.state[weight(spec)]
    state["step"] = state["step"].clone()


def load_optimizer(spec: StepSpec) -> None:
    spec.optimizer.load_state_dict(copy.deepcopy(spec.optimizer.state_dict()))


def drop_state(spec: StepSpec) -> None:
    spec.optimizer.state.popitem()


def add_group(spec: StepSpec) -> None:
    spec.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def swap_parameters_of_group(spec: StepSpec) -> None:
    parameters = spec.optimizer.param_groups[0]["params"]
    parameters[0], parameters[1] = parameters[1], parameters[0]


def freeze(spec: StepSpec) -> None:
    weight(spec).requires_grad_(False)


def replace_parameter(spec: StepSpec) -> None:
    spec.model[0].weight = nn.Parameter(weight(spec).detach().clone())  # pyright: ignore


def replace_module(spec: StepSpec) -> None:
    spec.model[3] = copy.deepcopy(spec.model[3])  # pyright: ignore


def replace_buffer(spec: StepSpec) -> None:
    spec.model[1].running_mean = torch.zeros(4)  # pyright: ignore


def widen_data(spec: StepSpec) -> None:
    weight(spec).data = weight(spec).data.double()


def transpose_data(spec: StepSpec) -> None:
    weight(spec).data = weight(spec).data.t()


def leave_gradient(spec: StepSpec) -> None:
    weight(spec).grad = torch.zeros(4, 4)


def replace_step(spec: StepSpec) -> None:
    plain = spec.optimizer.step
    spec.optimizer.step = lambda *args: plain(*args)  # pyright: ignore


CHANGES: list[tuple[Callable[[StepSpec], Any], str]] = [
    (change_eps, "option"),
    (replace_state, "optimizer's state"),
    (replace_step_count, "optimizer's state"),
    (load_optimizer, "group"),
    (drop_state, "optimizer's state"),
    (add_group, "parameter groups"),
    (swap_parameters_of_group, "parameters of a group"),
    (freeze, "requires_grad"),
    (replace_parameter, "the tensor model[0].weight"),
    (replace_module, "the tensor model[3].weight"),
    (replace_buffer, "the tensor model[1].running_mean"),
    (widen_data, "memory"),
    (transpose_data, "stride"),
    (leave_gradient, "gradient"),
    (lambda spec: spec.model.eval(), "model[1].training == True ("),
    (lambda spec: spec.model[2].eval(), "model[2].training == True ("),  # pyright: ignore
    (lambda spec: spec.model.register_forward_hook(lambda *_: None), "hook"),
    (lambda spec: spec.model[0].register_forward_pre_hook(lambda *_: None), "hook"),  # pyright: ignore
    (lambda spec: spec.optimizer.register_step_pre_hook(lambda *_: None), "hook of the optimizer"),
    (lambda spec: spec.metrics.user_metrics.update(more=lambda *_: torch.ones(())), "metrics"),
    (lambda spec: setattr(spec.metrics, "rule", "logit"), "rule"),
    (replace_step, "step was replaced"),
    (lambda spec: setattr(spec.optimizer, "horizon", 10), "attribute of the optimizer"),
    (lambda spec: delattr(spec.optimizer, "horizon"), "attribute of the optimizer"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_a_change_is_noticed(change: Callable[[StepSpec], Any], reason: str) -> None:
    spec = step()
    EagerEngine(spec, ASKED).step(batch())
    found = trace_step(spec, batch())
    assert isinstance(found.inputs(batch()), list)
    change(spec)
    mismatch = found.inputs(batch())
    assert isinstance(mismatch, Mismatch)
    assert reason in mismatch.reason


class OwnSGD(torch.optim.SGD):
    """A user's own optimizer."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "holder", "name"),
    [
        (torch.optim.SGD, torch.optim.SGD, "step"),
        (torch.optim.SGD, sys.modules["torch.optim.sgd"], "sgd"),
        (torch.optim.Adam, sys.modules["torch.optim.adam"], "_single_tensor_adam"),
    ],
)
def test_another_code_of_the_optimizer_is_noticed(
    optimizer: type[torch.optim.Optimizer], holder: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = step(optimizer)
    EagerEngine(spec, ASKED).step(batch())
    traced = trace_step(spec, batch())
    assert not isinstance(traced.inputs(batch()), Mismatch)
    monkeypatch.setattr(holder, name, lambda *_, **__: None)
    found = traced.inputs(batch())
    assert isinstance(found, Mismatch)
    assert "the code of " in found.reason
    assert not traced.rebind(batch())  # another step is computed
    assert "was replaced, and what its code reads is not known" in str(trace_step(spec, batch()).why_eager)


@pytest.mark.parametrize(
    "other",
    [
        batch(6),
        list(batch()),
        (*batch(), 1),
        (batch()[0], object()),
        (batch()[0].double(), batch()[1]),
        (torch.ones(4, 5).t(), batch()[1]),
        {"x": batch()[0], "y": batch()[1]},
        (batch()[0].requires_grad_(), batch()[1]),
    ],
)
def test_another_batch_is_noticed(traced: TracedStep, other: Any) -> None:
    assert isinstance(traced.inputs(other), Mismatch)


def test_modes_of_torch_are_noticed(traced: TracedStep) -> None:
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            assert isinstance(traced.inputs(batch()), Mismatch)
    torch.set_default_dtype(torch.float64)
    try:
        assert isinstance(traced.inputs((batch()[0].float(), batch()[1])), Mismatch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(traced.inputs(batch()), list)


@pytest.mark.parametrize(
    "register",
    [
        register_module_forward_hook,
        register_module_forward_pre_hook,
        register_module_full_backward_hook,
        register_module_full_backward_pre_hook,
    ],
)
def test_a_hook_of_all_modules_is_noticed(traced: TracedStep, register: Callable[[Any], Any]) -> None:
    hook = register(lambda *_: None)
    try:
        mismatch = traced.inputs(batch())
    finally:
        hook.remove()
    assert isinstance(mismatch, Mismatch)
    assert "hook" in mismatch.reason
    assert isinstance(traced.inputs(batch()), list)


def test_what_a_step_may_change_is_not_noticed(traced: TracedStep) -> None:
    inputs = traced.inputs(batch())
    assert isinstance(inputs, list)
    traced.run(inputs)
    traced.spec.optimizer.param_groups[0].update(lr=0.01, betas=(0.5, 0.9), initial_lr=0.1)
    traced.spec.model.load_state_dict(copy.deepcopy(traced.spec.model.state_dict()))
    traced.spec.metrics.reset()
    assert isinstance(traced.inputs(batch()), list)


def guards_of(spec: StepSpec) -> Guards:
    """With all options guarded that are no inputs, and without what forward reads."""
    options = GroupOptions(spec.optimizer, CPU)
    options.note_read(None)
    return Guards(spec, options, cast("Capture", SimpleNamespace(facts=[])))


@pytest.mark.parametrize("change", [load_optimizer, replace_state, swap_parameters_of_group])
def test_guards_agree_where_only_tensors_and_groups_differ(change: Callable[[StepSpec], Any]) -> None:
    spec = step()
    EagerEngine(spec, ASKED).step(batch())
    before = guards_of(spec)
    change(spec)
    assert before.mismatch() is not None
    assert guards_of(spec).agree(before)


@pytest.mark.parametrize(
    "change",
    [
        change_eps,
        new_option,
        lambda spec: spec.optimizer.register_step_post_hook(lambda *_: None),
        lambda spec: spec.metrics.user_metrics.update(more=lambda *_: torch.ones(())),
        replace_step,
        lambda spec: setattr(spec.optimizer, "horizon", 10),
    ],
)
def test_guards_disagree_where_another_step_is_computed(change: Callable[[StepSpec], Any]) -> None:
    spec = step()
    EagerEngine(spec, ASKED).step(batch())
    before = guards_of(spec)
    change(spec)
    assert not guards_of(spec).agree(before)


def change_training(spec: StepSpec) -> None:
    spec.model[2].eval()  # pyright: ignore


def add_forward_hook(spec: StepSpec) -> None:
    spec.model[0].register_forward_hook(lambda *_: None)  # pyright: ignore


def other_module(spec: StepSpec) -> None:
    spec.model.register_module("2", nn.Tanh())


@pytest.mark.parametrize(
    ("change", "is_taken_up"),
    [
        (load_optimizer, True),
        (replace_state, True),
        (replace_buffer, True),
        (replace_parameter, False),  # the optimizer goes on with the old one
        (replace_module, False),
        (other_module, False),
        (change_training, False),
        (add_forward_hook, False),
        (change_eps, False),
    ],
)
def test_a_step_takes_up_other_tensors_of_the_same_kind_and_nothing_else(
    change: Callable[[StepSpec], Any], is_taken_up: bool
) -> None:
    spec = step()
    EagerEngine(spec, ASKED).step(batch())
    found = trace_step(spec, batch())
    change(spec)
    assert isinstance(found.inputs(batch()), Mismatch)
    assert found.rebind(batch()) is is_taken_up
    assert isinstance(found.inputs(batch()), Mismatch) is not is_taken_up


def test_tied_weights_are_one_tensor_of_the_state() -> None:
    spec = step()
    spec.model[3].weight = nn.Parameter(torch.ones(3, 4))  # pyright: ignore
    model = nn.ModuleList([spec.model, spec.model[3]])  # pyright: ignore
    state = StepState(StepSpec(**{**vars(spec), "model": model}))
    assert len(set(map(id, state.tensors))) == len(state.tensors)
