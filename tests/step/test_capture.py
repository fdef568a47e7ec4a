"""What the captured graph reads of Python: a change is noticed, or the step is refused with the user's line.

Each change is run three times: by a plain loop, by the eager engine, and by the compiled engine with the captured graph
in place of a compiled program (see `graph_backend`). All are in double precision and must give the same numbers.
"""

from __future__ import annotations

import enum
import fractions
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain import TrainStep
from fasttrain.step import candidate, ladder
from tests.step.graph_backend import use_graphs

pytestmark = pytest.mark.usefixtures("in_double")

Batch = Any
Forward = Callable[[nn.Module, Batch], Any]

BEFORE, AFTER = 3, 5
"""Steps before and after a change. The graph is captured at the second step and, where it no longer holds, anew at the
second one after the change."""


@pytest.fixture(autouse=True)
def captured_graphs(monkeypatch: pytest.MonkeyPatch, own_programs: object) -> None:
    """`compiled` runs captured graphs, each after one comparison, and makes another once one step was missed."""
    use_graphs(monkeypatch)
    monkeypatch.setattr(candidate, "VERIFIED_BATCHES", 1)
    monkeypatch.setattr(ladder, "ENOUGH_MISSED", 1)


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
    runs_compiled = not is_eager and step._engine._missed.in_a_row == 0  # pyright: ignore
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
