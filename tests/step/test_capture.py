"""What the captured graph reads of Python: a change is noticed, or the step is refused with the user's line.

Each change is run three times: by a plain loop, by the eager engine, and by the compiled engine with the captured graph
in place of a compiled program (see `graph_backend`). All are in double precision and must give the same numbers.
"""

from __future__ import annotations

import copy
import enum
import fractions
import functools
import itertools
import math
import random
import re
import threading
import time
import types
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.testing import CompileCounter

from fasttrain import TrainStep
from fasttrain.data.ragged import Ragged
from fasttrain.errors import EngineError
from fasttrain.step import replay
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import global_module_hooks
from fasttrain.step.torch_private.dynamo import _OPTIONS
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.agreement import run_graph
from tests.step.graph_backend import use_graphs
from tests.step.models import CASES, OPTIMIZERS, started, with_forward

pytestmark = pytest.mark.usefixtures("in_double")

Batch = Any
Forward = Callable[[nn.Module, Batch], Any]

BEFORE, AFTER = 3, 5
"""Steps before and after a change. The graph is captured at the second step and, where it no longer holds, anew at the
second one after the change."""


@pytest.fixture(autouse=True)
def captured_graphs(monkeypatch: pytest.MonkeyPatch, own_programs: object) -> None:
    """`compiled` runs captured graphs, and makes another one as soon as one step was missed."""
    use_graphs(monkeypatch)
    monkeypatch.setattr(replay, "ENOUGH_STEPS", 1)


@dataclass
class Job:
    """A training job and a change of it.

    Attributes:
        model: the model.
        forward: the user's forward.
        change: what happens between two steps.
        batches: the batches before the change, and those after it.
        is_compiled: whether the steps after the change run compiled.
    """

    model: nn.Module
    forward: Forward
    change: Callable[[], Any]
    batches: tuple[list[Batch], list[Batch]] = field(default_factory=lambda: (pairs(BEFORE), pairs(AFTER, seed=1)))
    is_compiled: bool = True


def pairs(count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = 8, 4
    return [(torch.randn(shape, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(count)]


def plain_steps(job: Job) -> list[float]:
    optimizer = sgd(job.model)
    losses: list[float] = []
    for number, batches in enumerate(job.batches):
        if number:
            job.change()
        for batch in batches:
            optimizer.zero_grad()
            output = job.forward(job.model, batch)
            loss = output[0] if isinstance(output, tuple) else output
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def engine_steps(job: Job, engine: str) -> list[float]:
    step = TrainStep(job.model, sgd(job.model), job.forward, engine=engine)
    losses: list[float] = []
    for number, batches in enumerate(job.batches):
        if number:
            job.change()
        losses += [step(batch).item() for batch in batches]
    is_eager = engine == "eager"
    runs_compiled = not is_eager and step._engine._programs.missed_in_a_row == 0  # pyright: ignore
    assert runs_compiled == (job.is_compiled and not is_eager), step.engine
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=False)  # the plain loop on each side


def assert_same_on_all_sides(make: Callable[[], Job]) -> None:
    found: list[tuple[list[float], list[Tensor]]] = []
    for run in (plain_steps, lambda job: engine_steps(job, "eager"), lambda job: engine_steps(job, "compiled")):
        torch.manual_seed(0)
        job = make()
        found.append((run(job), [parameter.detach() for parameter in job.model.parameters()]))
    wanted, *others = found
    for other in others:
        torch.testing.assert_close(other, wanted, rtol=1e-12, atol=1e-12)


def mean_square(model: nn.Module, batch: Batch) -> Any:
    predictions = model(batch[0])
    return F.mse_loss(predictions, batch[1]), predictions, batch[1]


class Phase(enum.Enum):
    WARM_UP = 1
    MAIN = 2


class Holding(nn.Module):
    """Computes with a value that it holds as an attribute."""

    def __init__(self, value: Any, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 1)
        self.value = value
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.fc(x), self.value)


def double(x: Tensor) -> Tensor:
    return 2 * x


class Shift:
    def __init__(self, by: float) -> None:
        self.by = by


VALUES: dict[str, tuple[Any, Any, Callable[[Tensor, Any], Tensor]]] = {
    "float": (1.0, 0.5, lambda x, value: x * value),
    "bool": (False, True, lambda x, value: x * 3 if value else x),
    "1 that becomes True": (1, True, lambda x, value: x * 3 if value is True else x),
    "1 that becomes 1.0": (1, 1.0, lambda x, value: x * 3 if isinstance(value, float) else x),
    "str": ("sum", "mean", lambda x, value: x * 2 if value == "sum" else x),
    "None": (None, 2.0, lambda x, value: x if value is None else x * value),
    "NaN": (float("nan"), 1.0, lambda x, value: x * 3 if value != value else x),
    "complex": (1 + 0j, 2 + 1j, lambda x, value: x * value.real + value.imag),
    "Fraction": (fractions.Fraction(1, 1), fractions.Fraction(1, 2), lambda x, value: x * float(value)),
    "enum": (Phase.WARM_UP, Phase.MAIN, lambda x, value: x * 3 if value is Phase.MAIN else x),
    "tuple": ((1.0, (2.0,)), (1.0, (0.5,)), lambda x, value: x * value[1][0]),
    "list": ([1.0], [0.5], lambda x, value: x * value[0]),
    "length of a list": ([1.0], [1.0, 0.5], lambda x, value: x * sum(value)),
    "dict": ({"a": {"b": 1.0}}, {"a": {"b": 0.5}}, lambda x, value: x * value["a"]["b"]),
    "set": ({"scale"}, {"shift"}, lambda x, value: x * 3 if "scale" in value else x),
    "size": (torch.Size([4, 1]), torch.Size([2, 1]), lambda x, value: x * value[0]),
    "object": (Shift(1.0), Shift(0.5), lambda x, value: x + value.by),
    "SimpleNamespace": (types.SimpleNamespace(k=1.0), types.SimpleNamespace(k=2.0), lambda x, value: x * value.k),
    "builtin": (torch.tanh, torch.relu, lambda x, value: x + value(x)),
    "function": (double, torch.relu, lambda x, value: value(x)),
    "partial": (
        functools.partial(F.leaky_relu, negative_slope=0.1),
        functools.partial(F.leaky_relu, negative_slope=0.9),
        lambda x, value: value(x),
    ),
    "class": (nn.Tanh, nn.ReLU, lambda x, value: x + value()(x)),
    "slice": (slice(0, 4), slice(0, 2), lambda x, value: x + x[value].mean()),
    "range": (range(2), range(3), lambda x, value: x * sum(value)),
    "dtype": (torch.float64, torch.float16, lambda x, value: x.to(value).to(x.dtype)),
    "number that becomes a tensor": (1.0, torch.linspace(0, 1, 8).reshape(8, 1), lambda x, value: x * value),
    "tensor of another shape": (torch.ones(8, 1), torch.tensor([2.0]), lambda x, value: x * value),
    "tensor": (torch.tensor(1.0), torch.tensor(0.5), lambda x, value: x * value),
    "tensors in a list": ([torch.tensor(1.0)], [torch.tensor(0.5)], lambda x, value: x * value[0]),
    "tensors in a dict": ({"a": torch.tensor(1.0)}, {"a": torch.tensor(0.5)}, lambda x, value: x * value["a"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_another_value_of_an_attribute_is_noticed(name: str) -> None:
    before, after, use = VALUES[name]

    def make() -> Job:
        model = Holding(before, use)
        return Job(model, mean_square, lambda: setattr(model, "value", after))

    assert_same_on_all_sides(make)


# Where a number lives. Each maker returns forward and a function that sets the number, which is 1 at first.

Home = tuple[Forward, Callable[[float], Any]]


def weighted(loss: Tensor, weight: float) -> Tensor:
    return loss * weight


WEIGHT = 1.0


def global_weight(loss: Tensor) -> Tensor:
    return loss * WEIGHT


def in_a_global() -> Home:
    def forward(model: nn.Module, batch: Batch) -> Any:
        return global_weight(mean_square(model, batch)[0])

    globals()["WEIGHT"] = 1.0
    return forward, lambda value: globals().update(WEIGHT=value)


def in_a_closure() -> Home:
    weight = 1.0

    def inner(loss: Tensor) -> Tensor:
        return loss * weight

    def forward(model: nn.Module, batch: Batch) -> Any:
        return inner(mean_square(model, batch)[0])

    def change(value: float) -> None:
        nonlocal weight
        weight = value

    return forward, change


def in_a_default() -> Home:
    def forward(model: nn.Module, batch: Batch, weight: float = 1.0) -> Any:
        return mean_square(model, batch)[0] * weight

    return forward, lambda value: setattr(forward, "__defaults__", (value,))


def in_a_default_of_a_helper() -> Home:
    def helper(loss: Tensor, weight: float = 1.0) -> Tensor:
        return loss * weight

    def forward(model: nn.Module, batch: Batch) -> Any:
        return helper(mean_square(model, batch)[0])

    return forward, lambda value: setattr(helper, "__defaults__", (value,))


def in_a_keyword_default() -> Home:
    def forward(model: nn.Module, batch: Batch, *, weight: float = 1.0) -> Any:
        return mean_square(model, batch)[0] * weight

    return forward, lambda value: forward.__kwdefaults__.update(weight=value)


def in_replaced_keyword_defaults() -> Home:
    def forward(model: nn.Module, batch: Batch, *, weight: float = 1.0) -> Any:
        return mean_square(model, batch)[0] * weight

    return forward, lambda value: setattr(forward, "__kwdefaults__", {"weight": value})


def on_the_function() -> Home:
    def forward(model: nn.Module, batch: Batch) -> Any:
        return mean_square(model, batch)[0] * forward.weight  # pyright: ignore

    forward.weight = 1.0  # pyright: ignore
    return forward, lambda value: setattr(forward, "weight", value)


def in_a_partial() -> Home:
    def whole(model: nn.Module, batch: Batch, *, weight: float) -> Any:
        return mean_square(model, batch)[0] * weight

    forward = functools.partial(whole, weight=1.0)
    return forward, lambda value: forward.keywords.update(weight=value)


def in_containers() -> Home:
    held: dict[str, Any] = {"weights": [(types.SimpleNamespace(value=1.0),)]}

    def forward(model: nn.Module, batch: Batch) -> Any:
        return mean_square(model, batch)[0] * held["weights"][0][0].value

    return forward, lambda value: setattr(held["weights"][0][0], "value", value)


class Base:
    base_weight = 1.0

    def from_base(self) -> float:
        return self.base_weight


class Task(Base):
    """A trainer object of the user's, whose forward is a method of it."""

    class_weight = 1.0

    def __init__(self) -> None:
        self.weight = self.half = 1.0
        self.tensor = torch.tensor(1.0)

    def criterion(self, loss: Tensor) -> Tensor:
        return loss * self.weight * self.tensor * self.class_weight

    def from_base(self) -> float:
        return super().from_base()

    @property
    def doubled(self) -> float:
        return self.half * 2

    @classmethod
    def of_class(cls) -> float:
        return cls.class_weight

    @staticmethod
    def unchanged(loss: Tensor) -> Tensor:
        return loss

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        loss = self.unchanged(self.criterion(mean_square(model, batch)[0]))
        return loss * self.doubled * self.from_base() * self.of_class()


def new_task() -> Task:
    """A task whose classes are as they were defined."""
    Task.class_weight = Base.base_weight = 1.0
    if "base_weight" in vars(Task):
        del Task.base_weight
    return Task()


def of_a_task(name: str, *, is_called: bool = False) -> Home:
    task = new_task()
    forward: Forward = (lambda model, batch: task.forward(model, batch)) if is_called else task.forward
    return forward, lambda value: setattr(task, name, value)


def on_a_class(kind: type, name: str) -> Home:
    task = new_task()
    return task.forward, lambda value: setattr(kind, name, value)


def in_an_autograd_function() -> Home:
    held = types.SimpleNamespace(weight=1.0)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * held.weight

    def forward(model: nn.Module, batch: Batch) -> Any:
        return F.mse_loss(Scaled.apply(model(batch[0])), batch[1])

    return forward, lambda value: setattr(held, "weight", value)


def in_a_loss_module() -> Home:
    loss = nn.SmoothL1Loss(beta=1.0)
    return lambda model, batch: loss(model(batch[0]), batch[1]), lambda value: setattr(loss, "beta", value)


def in_torch_settings() -> Home:
    pool = nn.LPPool1d(1.0, 2)
    return (
        lambda model, batch: mean_square(model, batch)[0] + pool(model(batch[0]).square().T).sum(),
        lambda value: setattr(pool, "norm_type", 1 + value),
    )


def in_a_key_that_comes_later() -> Home:
    weights: dict[str, float] = {}

    def forward(model: nn.Module, batch: Batch) -> Any:
        try:
            weight = weights["weight"]
        except KeyError:
            weight = 1.0
        return mean_square(model, batch)[0] * weight

    return forward, lambda value: weights.update(weight=value)


def behind_getattr() -> Home:
    class Settings:
        def __getattr__(self, name: str) -> float:
            return 1.0

    settings = Settings()
    return (
        lambda model, batch: mean_square(model, batch)[0] * settings.weight,
        lambda value: setattr(settings, "weight", value),
    )


HOMES: dict[str, Callable[[], Home]] = {
    "global": in_a_global,
    "closure": in_a_closure,
    "default": in_a_default,
    "default of a helper": in_a_default_of_a_helper,
    "keyword default": in_a_keyword_default,
    "keyword defaults replaced": in_replaced_keyword_defaults,
    "attribute of a function": on_the_function,
    "partial": in_a_partial,
    "containers": in_containers,
    "helper method": lambda: of_a_task("weight"),
    "helper method, called": lambda: of_a_task("weight", is_called=True),
    "property": lambda: of_a_task("half"),
    "class attribute, set on the instance": lambda: of_a_task("class_weight"),
    "base class's attribute, set on the instance": lambda: of_a_task("base_weight"),
    "class": lambda: on_a_class(Task, "class_weight"),
    "base class": lambda: on_a_class(Base, "base_weight"),
    "base class's attribute, set on the class": lambda: on_a_class(Task, "base_weight"),
    "key that comes later": in_a_key_that_comes_later,
    "__getattr__": behind_getattr,
    "autograd.Function": in_an_autograd_function,
    "loss module": in_a_loss_module,
    "setting of torch's module": in_torch_settings,
}


@pytest.mark.parametrize("name", HOMES)
def test_another_number_is_noticed_wherever_it_lives(name: str) -> None:
    def make() -> Job:
        forward, change = HOMES[name]()
        return Job(nn.Linear(4, 1), forward, lambda: change(0.25))

    assert_same_on_all_sides(make)


# Code that is replaced.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.conv = nn.Conv1d(1, 1, 3, padding=(1,))

    def mixed(self, x: Tensor) -> Tensor:
        return self.conv(x.unsqueeze(1)).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(self.fc(x))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.out = nn.Linear(4, 1)

    @classmethod
    def scale(cls) -> float:
        return 1.0

    @property
    def shift(self) -> float:
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x)) * self.scale() + self.shift


def doubling(x: Tensor) -> Tensor:
    return double(x)


def using_helpers(model: nn.Module, batch: Batch) -> Any:
    return doubling(mean_square(model, batch)[0])


def set_padding(net: Any) -> None:
    net.block.conv.padding, net.block.conv.dilation = (2,), (2,)


CODE: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "forward of a class": lambda net, patch: patch.setattr(Block, "forward", lambda self, x: torch.tanh(self.fc(x))),
    "forward of the model's class": lambda net, patch: patch.setattr(Net, "forward", lambda self, x: self.out(x)),
    "forward of torch's class": lambda net, patch: patch.setattr(
        nn.Linear, "forward", lambda self, input: F.linear(input, self.weight * 2, self.bias)
    ),
    "forward of an object": lambda net, patch: setattr(
        net.block, "forward", types.MethodType(lambda self, x: self.fc(x) * 3, net.block)
    ),
    "forward of the model": lambda net, patch: setattr(
        net, "forward", types.MethodType(lambda self, x: self.out(torch.relu(self.block(x))), net)
    ),
    "class of an object": lambda net, patch: setattr(net.out, "__class__", Scaled),
    "method of a class": lambda net, patch: patch.setattr(Block, "mixed", lambda self, x: x * 3),
    "classmethod": lambda net, patch: patch.setattr(Net, "scale", classmethod(lambda cls: 2.0)),
    "property": lambda net, patch: patch.setattr(Net, "shift", property(lambda self: 1.0)),
    "call of a class": lambda net, patch: patch.setattr(
        Block, "__call__", lambda self, x: 2 * self.forward(x), raising=False
    ),
    "function": lambda net, patch: patch.setitem(globals(), "double", torch.neg),
    "function that calls it": lambda net, patch: patch.setitem(globals(), "doubling", lambda x: x),
    "code of a function": lambda net, patch: patch.setattr(double, "__code__", (lambda x: 3 * x).__code__),
    "padding": lambda net, patch: set_padding(net),
    "a module": lambda net, patch: setattr(net, "block", nn.Sequential(nn.Identity())),
    "freezing": lambda net, patch: net.block.requires_grad_(False),
    "hook of a module": lambda net, patch: net.block.fc.register_forward_hook(lambda _m, _i, output: output * 2),
    "pre-hook of a module": lambda net, patch: net.out.register_forward_pre_hook(lambda _m, inputs: (inputs[0] * 2,)),
    "weights tied": lambda net, patch: setattr(net.block.fc, "weight", net.block.unused.weight),
}


@pytest.mark.parametrize("name", CODE)
def test_other_code_is_noticed(name: str) -> None:
    patches: list[pytest.MonkeyPatch] = []

    def make() -> Job:
        for patch in patches:
            patch.undo()
        patches[:] = [pytest.MonkeyPatch()]
        net = Net()
        return Job(net, using_helpers, lambda: CODE[name](net, patches[0]))

    try:
        assert_same_on_all_sides(make)
    finally:
        for patch in patches:
            patch.undo()


# What travels with a batch.


class Rows(dict[str, Tensor]):
    weight = 1.0


class Targets(list[Tensor]):
    weight = 1.0


@dataclass
class Sample:
    rows: Rows
    targets: Targets
    x: Tensor
    ids: list[str]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        self.weight = 1.0


def sample(x: Tensor, y: Tensor) -> Sample:
    return Sample(Rows(x=x), Targets([y]), x.clone(), ["a", "b"], {"weight": 1.0, "unread": object()})


def forward_of_sample(model: nn.Module, batch: Sample) -> Any:
    predictions = model(batch.rows["x"])
    weight = batch.rows.weight * batch.targets.weight * batch.weight * getattr(batch.x, "weight", 1.0)
    return F.mse_loss(predictions, batch.targets[0]) * weight * batch.meta["weight"], predictions, batch.targets[0]


CARRIED: dict[str, Callable[[Sample], Any]] = {
    "attribute of a dict": lambda batch: setattr(batch.rows, "weight", 0.25),
    "attribute of a list": lambda batch: setattr(batch.targets, "weight", 0.25),
    "attribute of a dataclass": lambda batch: setattr(batch, "weight", 0.25),
    "attribute of a tensor": lambda batch: setattr(batch.x, "weight", 0.25),
    "entry of a dict": lambda batch: batch.meta.update(weight=0.25),
    "a number that becomes a tensor": lambda batch: batch.meta.update(weight=torch.tensor(0.25)),
    "strings and objects that forward does not read": lambda batch: (batch.ids.append("c"), batch.meta.update(other=1)),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_a_batch_carries_is_noticed(name: str) -> None:
    def make() -> Job:
        before, after = ([sample(*pair) for pair in pairs(count, seed=count)] for count in (BEFORE, AFTER))
        for batch in after:
            CARRIED[name](batch)
        return Job(nn.Linear(4, 1), forward_of_sample, lambda: None, (before, after))

    assert_same_on_all_sides(make)


# What a graph cannot repeat is refused; the object stays as it was, and `auto` trains on as the plain loop does.


class Counter:
    """A trainer object that keeps things from step to step."""

    count = 0

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.kept: dict[str, Any] = {}
        self.recent: deque[float] = deque([1.0], maxlen=2)
        self.scales = itertools.cycle([1.0, 2.0, 3.0])
        self.array = np.ones(2)
        self.scalar = np.float64(2.0)
        self.average = torch.zeros(())


@dataclass
class Refusal:
    """A forward that no graph can hold.

    Attributes:
        forward: takes the object, the model and the batch.
        reason: what the error says, as a regular expression.
        kept: what the object holds after training; it must be as after the plain loop.
    """

    forward: Callable[[Counter, nn.Module, Batch], Any]
    reason: str
    kept: Callable[[Counter], Any] = lambda counter: counter.count


def warmed_up(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    counter.count += 1
    return mean_square(model, batch)[0] * min(1.0, counter.count / 5)


def warmed_up_on_the_class(_: Counter, model: nn.Module, batch: Batch) -> Any:
    Counter.count += 1
    return mean_square(model, batch)[0] * min(1.0, Counter.count / 5)


def kept_in_a_list(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    counter.values.append(loss.detach())
    return loss


def kept_in_a_dict(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    counter.kept["last"] = loss.detach()
    return loss


def averaged(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    counter.average = 0.9 * counter.average + 0.1 * loss.detach()
    return loss + counter.average


def changed_in_place(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    counter.average.mul_(0.9).add_(loss.detach(), alpha=0.1)
    return loss + counter.average


def from_a_deque(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    counter.recent.append(counter.recent[-1] * 0.9)
    return mean_square(model, batch)[0] * counter.recent[0]


def from_an_iterator(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * next(counter.scales)


def counted_in_numpy(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    counter.array[0] += 1
    return mean_square(model, batch)[0] * float(counter.array[0])


def read_from_numpy(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * counter.array[0]


def kept_on_the_model(_: Counter, model: Any, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    model.last = loss.detach()
    return loss


def kept_on_a_part_of_the_model(_: Counter, model: Any, batch: Batch) -> Any:
    def keep(module: Any, _inputs: Any, output: Tensor) -> None:
        module.last = output.detach()

    hook = model.register_forward_hook(keep)
    try:
        return mean_square(model, batch)[0]
    finally:
        hook.remove()


STATE = torch.zeros(1)


def kept_in_a_global(_: Counter, model: nn.Module, batch: Batch) -> Any:
    global STATE
    predictions = model(batch[0]) + STATE.detach()
    STATE = predictions.mean(0)
    return F.mse_loss(predictions, batch[1])


def read_from_a_numpy_scalar(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * counter.scalar


@functools.lru_cache(None)
def cached(scale: float) -> float:
    return scale * WEIGHT


def read_through_a_cache(_: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * cached(1.0)


def branched(_: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    return loss * 2 if loss.item() > 1 else loss


def through_numpy(_: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * float(batch[0].numpy().max())


CHANGES_OBJECTS = "forward changes Python objects.*"

REFUSALS: dict[str, Refusal] = {
    "counter": Refusal(warmed_up, CHANGES_OBJECTS + "'counter.count [+]= 1' in test_capture.py:"),
    "counter of the class": Refusal(warmed_up_on_the_class, CHANGES_OBJECTS, lambda _: Counter.count),
    "list": Refusal(kept_in_a_list, CHANGES_OBJECTS + "'counter.values.append", lambda counter: counter.values),
    "dict": Refusal(kept_in_a_dict, CHANGES_OBJECTS + "'counter.kept", lambda counter: counter.kept),
    "average": Refusal(averaged, CHANGES_OBJECTS + "'counter.average =", lambda counter: counter.average),
    "tensor changed in place": Refusal(
        changed_in_place, "changes a tensor of shape .* that is no buffer", lambda counter: counter.average
    ),
    "deque": Refusal(from_a_deque, CHANGES_OBJECTS + "'counter.recent", lambda counter: list(counter.recent)),
    "iterator": Refusal(
        from_an_iterator, "'return .*next.*' in test_capture.py:", lambda counter: next(counter.scales)
    ),
    "numpy array": Refusal(counted_in_numpy, "'counter.array.*' in test_capture.py:", lambda counter: counter.array[0]),
    "numpy value": Refusal(
        read_from_numpy, "numpy.*'return .* counter.array.0.' in test_capture.py", lambda counter: counter.array[0]
    ),
    "numpy scalar": Refusal(
        read_from_a_numpy_scalar, "forward reads the numpy value .*[.]scalar: make", lambda counter: counter.scalar
    ),
    "model": Refusal(kept_on_the_model, CHANGES_OBJECTS + "'model.last =", lambda _: 0),
    "hook": Refusal(kept_on_a_part_of_the_model, "forward ", lambda _: 0),
    "global": Refusal(kept_in_a_global, CHANGES_OBJECTS + "'STATE =", lambda _: STATE.detach()),
    "cache": Refusal(read_through_a_cache, "functools caches the results", lambda _: cached.cache_info().misses),
    "branch": Refusal(branched, "reads the value of a tensor.*'return loss .*if loss.item.* in test_capture.py:"),
    "numpy of a tensor": Refusal(through_numpy, "calls numpy.*float.batch.0..numpy.*' in test_capture.py:"),
}


def bound(refusal: Refusal) -> tuple[Counter, Forward]:
    counter = Counter()
    Counter.count = 0
    globals().update(STATE=torch.zeros(1), WEIGHT=1.0)
    cached.cache_clear()
    return counter, lambda model, batch: refusal.forward(counter, model, batch)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_graph_cannot_repeat_is_refused_and_leaves_no_trace(name: str) -> None:
    refusal = REFUSALS[name]
    counter, forward = bound(refusal)
    model = nn.Linear(4, 1)
    step = TrainStep(model, sgd(model), forward, engine="compiled")
    first, second = pairs(2)
    step(first)
    before = copy.deepcopy((vars(model), {**vars(counter), "scales": None}, Counter.count, STATE.detach()))
    with pytest.raises(EngineError, match=refusal.reason):
        step(second)
    after = (vars(model), {**vars(counter), "scales": None}, Counter.count, STATE.detach())
    assert repr(after) == repr(before)
    assert not any(map(is_fake, [*counter.values, *counter.kept.values(), counter.average, STATE]))


@pytest.mark.parametrize("name", REFUSALS)
def test_where_a_step_is_refused_auto_goes_on_as_the_plain_loop(name: str, hasty: None) -> None:
    refusal, count = REFUSALS[name], 30
    sides: list[Any] = []
    for is_auto in (False, True):
        counter, forward = bound(refusal)
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        job = Job(model, forward, lambda: None, (pairs(count), []))
        if is_auto:
            step = TrainStep(model, sgd(model), forward, engine="auto")
            step.expect(1_000_000)
            losses = [step(batch).item() for batch in job.batches[0]]
            assert re.search(refusal.reason, step.engine.reason), step.engine
            step.close()
        else:
            losses = plain_steps(job)
        sides.append((losses, list(model.parameters()), refusal.kept(counter)))
    torch.testing.assert_close(sides[1], sides[0], rtol=1e-12, atol=1e-12)


def is_fake(value: Any) -> bool:
    return type(value) not in (Tensor, nn.Parameter)


def test_what_a_closure_or_a_hook_keeps_is_refused() -> None:
    count, found = 0, {}
    hooked, [batch] = nn.Linear(4, 1), pairs(1)
    hooked.register_forward_hook(lambda _m, _i, output: found.update(fc=output.detach()))

    def counting(model: nn.Module, batch: Batch) -> Any:
        nonlocal count
        count += 1
        return mean_square(model, batch)

    for model, forward, line in ((nn.Linear(4, 1), counting, "count .= 1"), (hooked, mean_square, ".*model.batch")):
        spec = spec_of(model, forward)
        before = dict(found)
        with pytest.raises(EngineError, match=f"{CHANGES_OBJECTS}{line}"):
            trace_step(spec, batch)
        assert count == 0
        assert list(map(id, found.values())) == list(map(id, before.values()))


def test_hidden_state_in_a_buffer_compiles() -> None:
    class Language(nn.Module):
        hidden: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRU(4, 4), nn.Linear(4, 1)
            self.register_buffer("hidden", torch.zeros(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            output, hidden = self.cell(x, self.hidden)
            self.hidden = hidden.detach()
            return self.head(output)

    def make() -> Job:
        model: Any = Language()
        return Job(model, mean_square, lambda: model.hidden.zero_())

    assert_same_on_all_sides(make)


def test_buffers_that_change_places_compile() -> None:
    class Delayed(nn.Module):
        newer: Tensor
        older: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 1)
            for name in ("newer", "older"):
                self.register_buffer(name, torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            output = self.fc(x + self.older - 0.5 * self.newer)
            self.newer, self.older = x.mean(0), self.newer
            return output

    def make() -> Job:
        model: Any = Delayed()
        return Job(model, mean_square, lambda: model.older.zero_())

    assert_same_on_all_sides(make)


def test_a_buffer_that_is_replaced_by_one_of_another_shape_is_refused() -> None:
    class Growing(nn.Linear):
        seen: Tensor

        def forward(self, input: Tensor) -> Tensor:
            self.seen = input.mean(0)[:1]
            return super().forward(input)

    model = Growing(4, 1)
    model.register_buffer("seen", torch.zeros(4))
    spec = TrainStep(model, sgd(model), mean_square, engine="eager").spec
    with pytest.raises(EngineError, match=r"buffer 'seen', a tensor of shape \[4\] .* by one of shape \[1\]"):
        trace_step(spec, pairs(1)[0])


# Random numbers.

OWN = [random.Random(3), np.random.RandomState(3), np.random.default_rng(3)]
DRAWS: list[Any] = [random.random, np.random.rand, *(own.random for own in OWN)]


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_that_are_not_torchs_are_refused_and_none_is_lost(draw: Any) -> None:
    model = nn.Linear(4, 1)
    spec = spec_of(model, lambda model, batch: mean_square(model, batch)[0] * draw())
    twin = copy.deepcopy(draw.__self__)
    with pytest.raises(EngineError, match="random numbers"):
        trace_step(spec, pairs(1)[0])
    assert draw() == getattr(twin, draw.__name__)()


def test_a_trace_leaves_the_random_numbers_of_other_threads_alone() -> None:
    random.seed(3)
    drawn: list[float] = []
    is_over = threading.Event()

    def draw() -> None:
        while not is_over.is_set():
            drawn.append(random.random())
            time.sleep(0)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        trace_step(spec_of(nn.Linear(4, 1), mean_square), pairs(1)[0])
    finally:
        is_over.set()
        thread.join()
    random.seed(3)
    assert drawn == [random.random() for _ in drawn]


def spec_of(model: nn.Module, forward: Forward) -> StepSpec:
    """A step whose optimizer has made its state."""
    step = TrainStep(model, sgd(model), mean_square, engine="eager")
    step(pairs(1)[0])
    return with_forward(step.spec, forward)


# What forward does not read.


def test_what_forward_does_not_read_may_change() -> None:
    def make() -> Job:
        net = Net()
        net.unused = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

        def change() -> None:
            net.register_buffer("more", torch.ones(1))
            net.unused.eval()
            net.unused[0].register_forward_hook(lambda *_: None)
            net.note = "new"

        return Job(net, using_helpers, change)

    assert_same_on_all_sides(make)
    job = make()
    spec = spec_of(job.model, job.forward)
    traced = trace_step(spec, pairs(1)[0])
    job.change()
    assert not isinstance(traced.inputs(pairs(1)[0]), Mismatch)


def tensor_of_the_model() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    model = Holding(torch.tensor(1.0), lambda x, value: x * value)
    return model, mean_square, lambda value: setattr(model, "value", value), "the tensor model.value"


def tensor_in_a_global() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    globals()["STATE"] = torch.zeros(1)
    forward = lambda model, batch: mean_square(model, batch)[0] * (STATE + 1).sum()  # noqa: E731
    return nn.Linear(4, 1), forward, lambda value: globals().update(STATE=value), "STATE"


def tensor_in_a_closure() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    scale = torch.tensor(1.0)

    def change(value: Tensor) -> None:
        nonlocal scale
        scale = value

    return nn.Linear(4, 1), lambda model, batch: mean_square(model, batch)[0] * scale, change, "the tensor "


def weight_of_the_loss() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    loss = nn.BCEWithLogitsLoss(weight=torch.tensor(1.0))
    forward = lambda model, batch: loss(model(batch[0]), batch[1].sigmoid())  # noqa: E731
    return nn.Linear(4, 1), forward, lambda value: setattr(loss, "weight", value), ".weight"


def weight_of_a_teacher() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    teacher = nn.Linear(4, 1).requires_grad_(False)
    forward = lambda model, batch: F.mse_loss(model(batch[0]), teacher(batch[0]))  # noqa: E731

    def change(value: Tensor) -> None:
        teacher.bias = nn.Parameter(value.reshape(1), requires_grad=False)

    return nn.Linear(4, 1), forward, change, ".bias"


@pytest.mark.parametrize(
    "make",
    [tensor_of_the_model, tensor_in_a_global, tensor_in_a_closure, weight_of_the_loss, weight_of_a_teacher],
)
def test_a_replaced_tensor_is_told_by_name_and_taken_up(
    make: Callable[[], tuple[nn.Module, Forward, Callable[[Tensor], Any], str]],
) -> None:
    model, forward, change, name = make()
    [batch] = pairs(1)
    spec = spec_of(model, forward)
    traced = trace_step(spec, batch)
    shape = (1,) if make is tensor_in_a_global else ()
    for value in (0.5, 3.0):
        change(torch.full(shape, value))
        mismatch = traced.inputs(batch)
        assert isinstance(mismatch, Mismatch)
        assert name in mismatch.reason
        assert traced.rebind(batch)
        wanted = spec.forward(model, batch).loss.detach()
        torch.testing.assert_close(run_graph(traced, batch), wanted, rtol=1e-12, atol=1e-12)


def test_a_tensor_that_is_changed_in_place_is_read_anew() -> None:
    model, forward, _, _ = tensor_of_the_model()
    [batch] = pairs(1)
    traced = trace_step(spec_of(model, forward), batch)
    for value in (0.5, 3.0):
        vars(model)["value"].fill_(value)
        wanted = mean_square(model, batch)[0].detach()
        torch.testing.assert_close(run_graph(traced, batch), wanted, rtol=1e-12, atol=1e-12)


def test_a_module_that_forward_holds_is_guarded_as_the_model_is() -> None:
    def change_mode(teacher: Any) -> None:
        teacher.eval()

    def change_rate(teacher: Any) -> None:
        teacher[1].p = 0.5

    def add_hook(teacher: Any) -> None:
        teacher[0].register_forward_hook(lambda _m, _i, output: 2 * output)

    for change in (change_mode, change_rate, add_hook):
        teacher = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.9)).requires_grad_(False)

        def forward(model: nn.Module, batch: Batch, teacher: nn.Module = teacher) -> Any:
            return F.mse_loss(model(batch[0]), teacher(batch[0]))

        [batch] = pairs(1)
        traced = trace_step(spec_of(nn.Linear(4, 1), forward), batch)
        assert not isinstance(traced.inputs(batch), Mismatch)
        change(teacher)
        assert isinstance(traced.inputs(batch), Mismatch)
        assert not traced.rebind(batch)


def test_a_parameter_that_only_the_optimizer_has_is_trained() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
            return F.mse_loss(predictions, targets) * (-self.log_scale).exp() + self.log_scale

    found: list[Tensor] = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(0)
        model, loss = nn.Linear(4, 1), Weighted()
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1, foreach=False)
        step = TrainStep(model, optimizer, loss=loss, engine=engine)
        for batch in pairs(5):
            step(batch)
        assert step.engine.value == engine
        found.append(loss.log_scale.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert found[0] != 0


# Sizes that are left open.


def rows_of(count: int) -> tuple[Ragged, Tensor]:
    offsets = torch.linspace(0, count, 6).long()
    return Ragged(torch.arange(count, dtype=torch.int32) % 9, offsets), torch.ones(5, dtype=torch.int64)


SIZED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a division": lambda loss, count: loss / count,
    "a float": lambda loss, count: loss / float(count),
    "a root": lambda loss, count: loss / math.sqrt(count),
    "a branch": lambda loss, count: loss if count > 9 else loss.sqrt(),
}


def by_count(decide: Callable[[Tensor, int], Tensor]) -> StepSpec:
    spec, _ = started(CASES["sparse"], OPTIMIZERS["sgd"])
    return with_forward(spec, lambda model, batch: decide(model(batch[0]).square().sum(), batch[0].values.shape[0]))


@pytest.mark.parametrize("how", SIZED)
def test_what_is_computed_of_the_number_of_values_holds_for_any_or_is_noticed(how: str) -> None:
    spec = by_count(SIZED[how])
    traced = trace_step(spec, rows_of(20))
    for count in (20, 2, 33):
        batch = rows_of(count)
        wanted = spec.forward(spec.model, batch).loss.detach()
        if how == "a branch" and count < 9:
            assert isinstance(traced.inputs(batch), Mismatch)
        else:
            torch.testing.assert_close(run_graph(traced, batch), wanted)


def test_what_python_decides_by_the_number_of_values_is_refused() -> None:
    spec = by_count(lambda loss, count: loss + sum(range(count)))
    with pytest.raises(EngineError, match="decided by the number of values"):
        trace_step(spec, rows_of(20))


def test_fewer_than_two_values_are_for_eager() -> None:
    spec, batch = started(CASES["sparse"], OPTIMIZERS["sgd"])
    traced = trace_step(spec, batch)
    for count in (0, 1):
        assert isinstance(traced.inputs(rows_of(count)), Mismatch)
        with pytest.raises(EngineError, match="fewer than two"):
            trace_step(spec, rows_of(count))
    assert not isinstance(traced.inputs(rows_of(2)), Mismatch)


# A capture changes nothing.


def test_a_trace_leaves_the_weights_that_a_recurrent_layer_lists() -> None:
    spec, batch = started(CASES["lstm"], OPTIMIZERS["sgd"])
    cell: Any = spec.model.get_submodule("cell")
    before = list(cell._flat_weights)
    trace_step(spec, batch)
    assert all(a is b for a, b in zip(cell._flat_weights, before, strict=True))


def process_state(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a capture could change, besides the user's own objects; compared by ==."""
    tensors = [*model.parameters(), *(batch[0].values, batch[0].offsets, batch[1])]
    return {
        "module class": dict(vars(nn.Module)),
        "module hooks": [dict(table) for table in global_module_hooks()],
        "globals": {name: id(value) for name, value in globals().items()},
        "attributes of tensors": [dict(vars(tensor)) for tensor in tensors],
        "gradients": [tensor.grad for tensor in tensors],
        "modules": [list(vars(module)) for module in model.modules()],
        "torch's generator": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "dynamo's config": {name: repr(getattr(dynamo_config, name)) for name in _OPTIONS},
        "warnings": list(warnings.filters),
    }


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_capture_changes_nothing(is_refused: bool) -> None:
    def forward(model: nn.Module, batch: Batch) -> Any:
        loss = model(batch[0]).square().sum() * WEIGHT + torch.rand(())
        return loss * (2 if is_refused and loss > 0 else 1)

    spec, batch = started(CASES["sparse"], OPTIMIZERS["sgd"])
    trace_step(spec, batch)  # what torch imports and makes once in a process
    before = process_state(spec.model, batch)
    with pytest.raises(EngineError) if is_refused else nullcontext():
        trace_step(with_forward(spec, forward), batch)
    after = process_state(spec.model, batch)
    assert {name for name in before if before[name] != after[name]} == set()


def test_the_users_own_compiled_functions_and_ours_do_not_meet() -> None:
    counter = CompileCounter()
    model = nn.Linear(4, 1)

    @torch.compile(backend=counter)
    def users(batch: Batch) -> Tensor:
        return mean_square(model, batch)[0]

    [batch] = pairs(1)
    spec = spec_of(model, mean_square)
    wanted = users(batch)
    traced = trace_step(spec, batch)
    assert torch.equal(users(batch), wanted)
    assert counter.frame_count == 1, "the user's function was compiled anew"
    assert not isinstance(traced.inputs(batch), Mismatch)
    torch._dynamo.reset()
    assert not isinstance(traced.inputs(batch), Mismatch)
    torch.testing.assert_close(run_graph(traced, batch), wanted.detach(), rtol=1e-12, atol=1e-12)
    assert not isinstance(trace_step(spec, batch).inputs(batch), Mismatch)
    users(batch)
    assert counter.frame_count == 2


def test_a_capture_holds_in_another_thread() -> None:
    [batch] = pairs(1)
    traced = trace_step(spec_of(Net(), mean_square), batch)
    with ThreadPoolExecutor(1) as pool:
        assert not isinstance(pool.submit(traced.inputs, batch).result(), Mismatch)
        assert pool.submit(trace_step, traced.spec, batch).result().parts
