"""What a step reads of Python by name is guarded: numbers, tensors, functions, modules; random numbers are refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttrain.errors import EngineError
from fasttrain.step.python_state import functions_of
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.models import CASES, OPTIMIZERS, Case, started, with_forward
from tests.step.test_python_state import Counting

pytestmark = pytest.mark.usefixtures("in_double")

MLP, SGD = CASES["mlp"], OPTIMIZERS["sgd-momentum"]


class Annealed:
    """A forward that reads a number of its object."""

    def __init__(self, case: Case) -> None:
        self.scale = 1.0
        self._loss = case.loss

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return self._loss(model(batch[0]), batch[1]) * self.scale


BETA = 1.0


def by_global(model: nn.Module, batch: Any) -> Tensor:
    return MLP.loss(model(batch[0]), batch[1]) * weight_of_loss()


def weight_of_loss() -> float:
    return BETA


def set_global(value: float) -> None:
    globals()["BETA"] = value


def kept_in_a_cell() -> tuple[Callable[..., Tensor], Callable[[float], None]]:
    beta = 1.0

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return MLP.loss(model(batch[0]), batch[1]) * beta

    def change(value: float) -> None:
        nonlocal beta
        beta = value

    return forward, change


def kept_on_self() -> tuple[Callable[..., Tensor], Callable[[float], None]]:
    annealed = Annealed(MLP)
    return annealed.forward, partial(setattr, annealed, "scale")


def kept_in_a_partial() -> tuple[Callable[..., Tensor], Callable[[float], None]]:
    def weighted(model: nn.Module, batch: Any, *, beta: float) -> Tensor:
        return MLP.loss(model(batch[0]), batch[1]) * beta

    forward = partial(weighted, beta=1.0)
    return forward, lambda value: forward.keywords.update(beta=value)


def kept_in_a_global() -> tuple[Callable[..., Tensor], Callable[[float], None]]:
    return by_global, set_global


NUMBERS = [kept_in_a_cell, kept_on_self, kept_in_a_partial, kept_in_a_global]


@pytest.mark.parametrize("kept", NUMBERS)
def test_a_number_that_forward_reads_is_guarded(
    kept: Callable[[], tuple[Callable[..., Tensor], Callable[[float], None]]],
) -> None:
    forward, change = kept()
    spec, batch = started(MLP, SGD)
    spec = with_forward(spec, forward)
    traced = trace_step(spec, batch)
    assert not isinstance(traced.inputs(batch), Mismatch)
    change(0.5)
    mismatch = traced.inputs(batch)
    assert isinstance(mismatch, Mismatch)
    assert mismatch.reason.startswith("the value of ")
    assert not traced.rebind()
    change(1.0)
    assert not isinstance(traced.inputs(batch), Mismatch)


def test_settings_of_the_loss_are_guarded_and_its_weights_traced_anew() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(3), label_smoothing=0.1)
    spec, batch = started(Case(MLP.build, MLP.inputs, MLP.targets, loss), SGD)
    traced = trace_step(spec, batch)
    loss.label_smoothing = 0.0
    assert traced.inputs(batch) == Mismatch("the value of 'label_smoothing'")
    loss.label_smoothing = 0.1
    assert not isinstance(traced.inputs(batch), Mismatch)
    loss.weight = torch.tensor([1.0, 2.0, 3.0])
    assert traced.inputs(batch) == Mismatch(
        "a module, parameter, buffer or hook of what forward, the loss or a metric holds"
    )
    assert not traced.rebind()  # the graph holds the old one


class Scaled(nn.Module):
    """Holds a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.scale = torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


SCALE = torch.tensor(1.0)


def twice(x: Tensor) -> Tensor:
    return 2 * x


def by_global_tensor(model: nn.Module, batch: Any) -> Tensor:
    return twice(MLP.loss(model(batch[0]), batch[1]) * SCALE)


def replace_global_tensor() -> None:
    globals()["SCALE"] = torch.tensor(5.0)


def replace_global_function() -> None:
    globals()["twice"] = torch.neg


@pytest.mark.parametrize(
    ("replace", "reason"),
    [(replace_global_tensor, "what 'SCALE' is"), (replace_global_function, "what 'twice' is")],
)
def test_a_tensor_or_function_that_is_read_as_a_global_is_not_replaced_in_silence(
    replace: Callable[[], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SCALE", "twice"):
        monkeypatch.setitem(globals(), name, globals()[name])
    spec, batch = started(MLP, SGD)
    traced = trace_step(with_forward(spec, by_global_tensor), batch)
    assert not isinstance(traced.inputs(batch), Mismatch)
    replace()
    assert traced.inputs(batch) == Mismatch(reason)
    assert not traced.rebind()


def test_a_tensor_that_a_module_or_a_closure_holds_is_not_replaced_in_silence() -> None:
    scale = torch.tensor(1.0)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return MLP.loss(model(batch[0]), batch[1]) * scale

    spec, batch = started(Case(Scaled, MLP.inputs, MLP.targets, MLP.loss), SGD)
    traced = trace_step(with_forward(spec, forward), batch)
    held: Any = spec.model
    before = held.scale
    held.scale = torch.tensor(5.0)
    assert traced.inputs(batch) == Mismatch("what 'scale' is")
    held.scale = before
    scale.fill_(2.0)  # a tensor that stays the same one is read anew
    held.scale.fill_(2.0)
    assert not isinstance(traced.inputs(batch), Mismatch)
    scale = torch.tensor(5.0)
    assert traced.inputs(batch) == Mismatch("what 'scale' is")
    assert not traced.rebind()


def put_in_eval_mode(teacher: Any) -> None:
    teacher.eval()


def give_other_weights(teacher: Any) -> None:
    teacher[0].weight = nn.Parameter(torch.ones(3, 4), requires_grad=False)


def give_other_rate(teacher: Any) -> None:
    teacher[1].p = 0.5


def add_hook(teacher: Any) -> None:
    teacher[0].register_forward_hook(lambda _m, _i, output: 2 * output)


def test_functions_may_call_each_other_as_deep_as_they_like() -> None:
    def chained(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: inner(x)

    function: Callable[[Tensor], Tensor] = torch.neg
    for _ in range(5_000):
        function = chained(function)
    spec, _ = started(MLP, SGD)
    spec = with_forward(spec, lambda model, batch: function(MLP.loss(model(batch[0]), batch[1])))
    assert len(functions_of(spec)) > 5_000


def taught_by(teacher: nn.Module) -> tuple[StepSpec, Any]:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        found = model(batch[0])
        return MLP.loss(found, batch[1]) + (found - teacher(batch[0])).square().mean()

    spec, batch = started(MLP, SGD)
    return with_forward(spec, forward), batch


@pytest.mark.parametrize("change", [put_in_eval_mode, give_other_weights, give_other_rate, add_hook])
def test_a_module_that_forward_holds_is_guarded_as_the_model_is(change: Callable[[Any], None]) -> None:
    teacher = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)).requires_grad_(False)
    spec, batch = taught_by(teacher)
    traced = trace_step(spec, batch)
    assert not isinstance(traced.inputs(batch), Mismatch)
    change(teacher)
    assert isinstance(traced.inputs(batch), Mismatch)
    assert not traced.rebind()


def test_what_a_module_that_forward_holds_keeps_is_refused() -> None:
    teacher = Counting().requires_grad_(False)
    teacher.count = 7
    spec, batch = taught_by(teacher)
    with pytest.raises(EngineError, match=r"forward changes 'teacher\.count'"):
        trace_step(spec, batch)
    assert teacher.count == 7


OWN = [random.Random(3), np.random.RandomState(3), np.random.default_rng(3)]
DRAWS: list[Any] = [random.random, np.random.rand, *(own.random for own in OWN)]


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_of_others_than_torch_are_refused_and_none_is_lost(draw: Any) -> None:
    spec, batch = started(MLP, SGD)
    assert_refused(with_forward(spec, lambda model, batch: MLP.loss(model(batch[0]), batch[1]) * draw()), batch, draw)


@pytest.mark.parametrize("own", OWN)
def test_generators_that_are_read_or_held_are_noticed_too(own: Any) -> None:
    spec, batch = started(MLP, SGD)
    read = with_forward(spec, lambda model, batch: MLP.loss(model(batch[0]), batch[1]) * own.random())
    assert_refused(read, batch, own.random)
    spec.model.own = own
    held = with_forward(spec, lambda model, batch: MLP.loss(model(batch[0]), batch[1]) * model.own.random())
    assert_refused(held, batch, own.random)
    unused = with_forward(spec, lambda model, batch: MLP.loss(model(batch[0]), batch[1]) + 0 * len(str(model.own)))
    trace_step(unused, batch)


def assert_refused(spec: StepSpec, batch: Any, draw: Any) -> None:
    """And the number that comes next is the one that came next before."""
    twin = copy.deepcopy(draw.__self__)
    with pytest.raises(EngineError, match="random numbers from Python's or numpy's"):
        trace_step(spec, batch)
    assert draw() == getattr(twin, draw.__name__)()
