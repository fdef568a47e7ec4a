"""Optimizers whose step no graph can hold: forward and backward are traced, the optimizer's own code runs as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import optim

from fasttrain.step.trace import Mismatch, trace_step
from tests.step.agreement import run_graph, steps_agree
from tests.step.models import CASES, OPTIMIZERS, everything, started

pytestmark = pytest.mark.usefixtures("in_double")

MLP, SGD_OPTIONS = CASES["mlp"], OPTIMIZERS["sgd-momentum"][1]


class Counting(optim.SGD):
    """Keeps a count of its steps as a Python number."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for state in self.state.values():
            state["count"] = state.get("count", 0) + 1


class CountingInGroup(optim.SGD):
    """Keeps a count of its steps in its parameter groups, as some optimizers from elsewhere do."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


class Cautious(optim.SGD):
    """Steps only where the gradient is small: it looks at values."""

    def step(self, closure: Any = None) -> None:
        norms = [each.grad.norm() for group in self.param_groups for each in group["params"] if each.grad is not None]
        if sum(norms) < 0.5:
            super().step(closure)


def hooked(*args: Any, **kwargs: Any) -> optim.Optimizer:
    """torch's own, with a hook that halves each gradient."""
    optimizer = optim.SGD(*args, **kwargs)

    def halve(*_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad *= 0.5

    optimizer.register_step_pre_hook(halve)
    return optimizer


class Shrinking(optim.SGD):
    """Counts its steps in an attribute, notes them in a list, and shrinks the parameters now and then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.notes: list[int] = []

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.calls += 1
        self.notes.append(self.calls)
        if self.calls % 5 == 0:
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.mul_(0.5)


class Noting(optim.SGD):
    """Notes its steps in a list alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.notes: list[int] = []

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.notes.append(1)


def wrapped(*args: Any, **kwargs: Any) -> optim.Optimizer:
    """torch's own, whose step is replaced on the object, as wrappers from elsewhere do, by one that shrinks."""
    optimizer = optim.SGD(*args, **kwargs)
    plain = optimizer.step

    def step(*args: Any) -> None:
        plain(*args)
        with torch.no_grad():
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.mul_(0.9)

    optimizer.step = step
    return optimizer


NOT_TORCHS = "it is not one of torch's own"

OPTIMIZERS_OF_THEIR_OWN: dict[str, tuple[Any, str]] = {
    "a count in the state": (Counting, NOT_TORCHS),
    "a count in the groups": (CountingInGroup, NOT_TORCHS),
    "a look at values": (Cautious, NOT_TORCHS),
    "a hook": (hooked, "it has hooks"),
    "a count in an attribute": (Shrinking, NOT_TORCHS),
    "a list": (Noting, NOT_TORCHS),
    "a step of the object": (wrapped, "its step was replaced on the object"),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS_OF_THEIR_OWN)
def test_the_numbers_are_eagers(name: str, accumulate: int) -> None:
    kind, reason = OPTIMIZERS_OF_THEIR_OWN[name]
    traced = steps_agree(MLP, (kind, SGD_OPTIONS), accumulate=accumulate, clip_norm=0.3)
    assert traced.why_eager is not None
    assert reason in traced.why_eager
    assert [part.part for part in traced.parts] == ["gather"]


@pytest.mark.parametrize("name", OPTIMIZERS_OF_THEIR_OWN)
def test_finding_out_leaves_no_trace(name: str) -> None:
    spec, batch = started(MLP, (OPTIMIZERS_OF_THEIR_OWN[name][0], SGD_OPTIONS))
    before = copy.deepcopy(everything(spec))
    groups = [dict(group) for group in spec.optimizer.param_groups]
    attributes = {name: copy.copy(value) for name, value in vars(spec.optimizer).items() if name in ("calls", "notes")}
    trace_step(spec, batch)
    assert attributes == {name: vars(spec.optimizer)[name] for name in attributes}
    torch.testing.assert_close(everything(spec), before, rtol=0, atol=0)
    assert groups == spec.optimizer.param_groups
    assert not torch.compiler.is_compiling()


def test_a_scheduler_leaves_the_step_traced() -> None:
    """Its wrapper around the optimizer's step is known, and may come after the trace."""
    spec, batch = started(MLP, OPTIMIZERS["sgd-momentum"])
    for _ in range(2):
        optim.lr_scheduler.ConstantLR(spec.optimizer)
        traced = trace_step(spec, batch)
        assert traced.is_whole
        assert not isinstance(traced.inputs(batch), Mismatch)
    spec, batch = started(MLP, OPTIMIZERS["sgd-momentum"])
    traced = trace_step(spec, batch)
    optim.lr_scheduler.ConstantLR(spec.optimizer)
    if isinstance(traced.inputs(batch), Mismatch):
        assert traced.rebind()
    assert not isinstance(traced.inputs(batch), Mismatch)


def test_parameters_that_get_no_gradient_keep_none() -> None:
    steps_agree(CASES["unused"], (Cautious, SGD_OPTIONS))


def test_options_and_state_are_the_optimizers_own_business() -> None:
    spec, batch = started(MLP, (Counting, SGD_OPTIONS))
    traced = trace_step(spec, batch)
    spec.optimizer.param_groups[0]["dampening"] = 0.5
    spec.optimizer.load_state_dict(spec.optimizer.state_dict())
    assert traced.rebind(), "the groups are new ones"
    run_graph(traced, batch)
    for parameter in spec.trained():
        parameter.grad = torch.ones_like(parameter)
    assert isinstance(traced.inputs(batch), Mismatch)
