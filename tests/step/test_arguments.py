"""What a step is made of: objects that cannot work are refused at construction, with what to do instead."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset

from fasttrain import ConfigError, EngineError, FastLoop, TrainStep

MSE = nn.MSELoss()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def data(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=generator).double(), torch.randn(8, 3, generator=generator).double())
        for _ in range(count)
    ]


def sgd(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.1)


def compiled_in_place() -> nn.Module:
    model = nn.Sequential(net())
    model[0].compile()
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: (net(), net()), "it is a tuple of 2: write one module that holds these, or make one TrainStep"),
        (lambda: [net()], "a list of 1"),
        (lambda: {"g": net()}, "of type dict: write one module"),
        (lambda: nn.Linear, r"the class Linear: give an instance, Linear\(...\)"),
        (lambda: None, "it is None"),
        (lambda: F.relu, "it is of type function"),
        (lambda: torch.compile(net()), "the model was compiled by torch.compile"),
        (compiled_in_place, "its module '0' was compiled"),
    ],
)
@pytest.mark.parametrize("kind", [TrainStep, FastLoop])
def test_a_model_that_is_none(kind: Any, model: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(model(), sgd(net()), loss=MSE, engine="eager")


def test_model_and_optimizer_that_changed_places() -> None:
    model: Any = net()
    with pytest.raises(ConfigError, match=r"the order is \(model, optimizer\)"):
        TrainStep(sgd(model), model, loss=MSE)  # pyright: ignore
    with pytest.raises(ConfigError, match=r"the order is \(model, optimizer\)"):
        TrainStep(model, model, loss=MSE)


class Duck:
    """Has what an optimizer has, and is none."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters()), "lr": 0.1}]
        self.state: dict[Any, Any] = {}

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda _: None, "it is None: give one over the model's parameters"),
        (lambda m: [sgd(m), sgd(m)], "a list of 2: put all parameters into groups of one optimizer, or make one Tr"),
        (lambda m: (sgd(m),), "a tuple of 1"),
        (lambda _: optim.Adam, r"the class Adam: make one, such as Adam\(model.parameters\(\)\)"),
        (lambda m: optim.lr_scheduler.StepLR(sgd(m), 1), r"the scheduler to fit\(scheduler"),
        (Duck, "of type Duck: .* derives from torch.optim.Optimizer"),
        (lambda m: partial(optim.SGD, lr=0.1), "of type partial"),
    ],
)
def test_an_optimizer_that_is_none(optimizer: Callable[[nn.Module], Any], message: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=message):
        TrainStep(model, optimizer(model), loss=MSE)


def test_a_parameter_that_the_optimizer_has_twice() -> None:
    model: Any = net()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = optim.SGD([model.weight, model.bias, model.weight], lr=0.1)
    with pytest.raises(ConfigError, match=r"has 'weight' twice \(the second time in group 0\)"):
        TrainStep(model, optimizer, loss=MSE)


# The optimizer of another model.

OTHER = net()


def by_global(model: nn.Module, batch: Any) -> Tensor:
    return deeper(model(batch[0]))


def deeper(predictions: Tensor) -> Tensor:
    return OTHER(F.pad(predictions, (0, 1))).sum()


class Trainer:
    def __init__(self) -> None:
        self.parts = {"critic": OTHER}

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return self.parts["critic"](F.pad(model(batch[0]), (0, 1))).sum()


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = [OTHER]
        self.own = nn.Linear(1, 1)


def plain_forward(model: nn.Module, batch: Any) -> Tensor:
    return MSE(model(batch[0]), batch[1])


@pytest.mark.parametrize("given", [{"loss": MSE}, {"forward": plain_forward}, {"loss": F.mse_loss}])
def test_the_optimizer_of_another_model_is_refused(given: dict[str, Any]) -> None:
    model = net()
    with pytest.raises(ConfigError, match=r"none of the optimizer's 2 parameters belongs to the model \(Linear\)"):
        TrainStep(copy.deepcopy(model), sgd(model), **given)


def closing_over() -> Any:
    other = OTHER
    return lambda model, batch: other(F.pad(model(batch[0]), (0, 1))).sum()


@pytest.mark.parametrize(
    "forward",
    [
        by_global,
        closing_over(),
        Trainer().forward,
        partial(lambda other, model, batch: other(model(batch[0])).sum(), OTHER),
        lambda model, batch, other=OTHER: other(model(batch[0])).sum(),
    ],
)
def test_the_optimizer_of_a_module_that_forward_holds_is_none_of_these(forward: Any) -> None:
    TrainStep(net(), sgd(OTHER), forward, engine="eager")


def test_nor_is_one_of_a_loss_with_weights_of_unregistered_parts_or_of_some_of_the_parameters() -> None:
    class Weighted(nn.MSELoss):
        weighing = OTHER

    model: Any = net()
    TrainStep(model, sgd(OTHER), loss=Weighted())
    TrainStep(Unregistered(), sgd(OTHER), loss=MSE)
    TrainStep(model, optim.SGD([model.bias, nn.Parameter(torch.zeros(1))], lr=0.1), loss=MSE)


# Functions and options.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "mse"}, r"loss must be a function of \(predictions, targets\); it is of type str"),
        ({"loss": nn.MSELoss}, r"loss is the class MSELoss: give an instance, MSELoss\(...\)"),
        ({"loss": lambda predictions: predictions.sum()}, r"loss is called with .*but it takes \(predictions\)"),
        ({"forward": 3}, "forward must be a function"),
        ({"forward": MSE}, "forward is a loss, MSELoss: give it as loss="),
        ({"forward": lambda batch: batch}, r"forward is called with \(model, batch\), but it takes \(batch\)"),
        ({"loss": MSE, "metrics": [MSE]}, "metrics must be a dict of names and functions; it is a list of 1"),
        ({"loss": MSE, "metrics": {1: MSE}}, "the name of a metric must be a string"),
        ({"loss": MSE, "metrics": {"f1": 0.5}}, r"metrics\['f1'\] must be a function"),
        ({"loss": MSE, "metrics": {"f1": lambda p, t: p}}, r"metrics\['f1'\] is called with \(loss, pred"),
        ({"loss": MSE, "accumulate": 1.5}, "accumulate 1.5: use a whole number"),
        ({"loss": MSE, "accumulate": True}, "accumulate True"),
        ({"loss": MSE, "accumulate": "2"}, "accumulate '2'"),
        ({"loss": MSE, "accumulate": 0}, "accumulate 0"),
        ({"loss": MSE, "clip_norm": float("nan")}, "clip_norm nan: use a positive number"),
        ({"loss": MSE, "clip_norm": "1.0"}, "clip_norm '1.0'"),
        ({"loss": MSE, "clip_norm": True}, "clip_norm True"),
        ({"loss": MSE, "clip_value": -1}, "clip_value -1"),
        ({"loss": MSE, "precision": torch.float16}, "precision torch.float16: use one of"),
        ({"loss": MSE, "precision": None}, "precision None: use one of"),
        ({"loss": MSE, "engine": None}, "engine None: use one of"),
        ({"loss": MSE, "engine": ["eager"]}, "engine .'eager'.: use one of"),
        ({"loss": MSE, "device": 0}, "device must be a name such as 'cpu'"),
        ({"loss": MSE, "device": 1.5}, "device must be a name"),
    ],
)
def test_functions_and_options_that_cannot_work(given: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=message):
        TrainStep(model, sgd(model), **given)


class ForwardForward(nn.Linear):
    def train(self, x_pos: Any, x_neg: Any) -> Any:  # pyright: ignore
        return x_pos, x_neg


def test_a_train_method_of_other_arguments() -> None:
    for model in (ForwardForward(4, 3).double(), nn.Sequential(nn.ReLU(), ForwardForward(4, 3).double())):
        with pytest.raises(ConfigError, match=r"ForwardForward\.train takes \(x_pos.* another name"):
            FastLoop(model, sgd(model), loss=MSE)
        TrainStep(model, sgd(model), loss=MSE, engine="eager")(data()[0])  # which calls no train()
    flagged: Any = net()
    flagged.train = True
    with pytest.raises(ConfigError, match=r"Linear\.train is of type bool"):
        FastLoop(flagged, sgd(flagged), loss=MSE)

    class Frozen(nn.Linear):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    model = Frozen(4, 3).double()
    FastLoop(model, sgd(model), loss=MSE, engine="eager").train(data())


# Closures.


def plain_lbfgs(clip: float | None = None) -> tuple[nn.Module, list[float]]:
    model = net()
    optimizer = optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    losses: list[float] = []
    for x, y in data():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = MSE(model(x), y)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss.detach()

        losses.append(float(optimizer.step(closure)))  # pyright: ignore
    return model, losses


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_lbfgs_steps_as_in_a_plain_loop(engine: str, clip: float | None) -> None:
    wanted, losses = plain_lbfgs(clip)
    model = net()
    optimizer = optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    loop = FastLoop(model, optimizer, loss=MSE, engine=engine, clip_norm=clip)
    found: list[float] = []
    result = loop.train(data(), watch=lambda *given: found.append(given[3].compute().loss or 0.0))
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert found[0] == pytest.approx(losses[0], rel=1e-12)
    torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=1e-12, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    reason = "asked for" if engine == "eager" else "LBFGS evaluates the loss several times a step"
    assert (loop.step.engine.value, loop.step.engine.reason) == ("eager", reason)


def test_lbfgs_under_a_scheduler() -> None:
    model = net()
    optimizer = optim.LBFGS(model.parameters())
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    FastLoop(model, optimizer, loss=MSE).fit(data(), epochs=2, scheduler=scheduler, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "compiled"}, EngineError, "'compiled' cannot run this step: LBFGS evaluates the loss several"),
        ({"accumulate": 2}, ConfigError, "accumulate does not work with this optimizer: LBFGS"),
        ({"precision": "fp16"}, ConfigError, "precision='fp16' does not work with this optimizer"),
    ],
)
def test_what_does_not_go_with_a_closure(
    options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttrain.device._cpu_has", lambda *_: True)
    model = net()
    with pytest.raises(error, match=message):
        TrainStep(model, optim.LBFGS(model.parameters()), loss=MSE, **options)


def test_an_optimizer_whose_step_needs_something_else() -> None:
    class Odd(optim.SGD):
        def step(self, losses: Any) -> None:  # pyright: ignore
            ...

    class Lazy(optim.SGD):
        def step(self, closure: Any) -> None:  # pyright: ignore
            ...

    model = net()
    with pytest.raises(ConfigError, match=r"Odd\.step needs losses"):
        TrainStep(model, Odd(model.parameters(), lr=0.1), loss=MSE)
    with pytest.raises(ConfigError, match=r"Lazy\.step did not call its closure"):
        TrainStep(model, Lazy(model.parameters(), lr=0.1), loss=MSE)(data()[0])


# Predictions and targets.


@pytest.mark.parametrize("wrap", [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}])
def test_predictions_and_targets_may_be_containers(wrap: Callable[[Any, Any], Any]) -> None:
    model, seen = net(), []

    def forward(model: nn.Module, batch: Any) -> Any:
        out = model(batch[0])
        return MSE(out, batch[1]), wrap(out, out), wrap(batch[1], batch[1])

    def first(loss: Tensor, predictions: Any, targets: Any) -> Tensor:
        seen.append((type(predictions), type(targets)))
        return loss

    loop = FastLoop(model, sgd(model), forward, engine="eager", metrics={"first": first})
    result, other = loop.train(data()), loop.evaluate(data())
    assert result.accuracy is other.accuracy is None
    assert result.metrics["first"] == result.loss
    assert set(seen) == {(type(wrap(1, 2)), type(wrap(1, 2)))}


def test_containers_may_come_after_tensors() -> None:
    model = nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))

    def forward(model: nn.Module, batch: Any) -> Any:
        out = model(batch[0])
        loss = F.cross_entropy(out, batch[1])
        return (loss, out, batch[1]) if batch[2] else (loss, (out,), (batch[1],))

    FastLoop(model, sgd(model), forward, engine="eager").train([(x, y, True), (x, y, False)])


# Schedulers and lengths of a fit.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1.5}, "epochs 1.5: use a whole number"),
        ({"epochs": True}, "epochs True"),
        ({"epochs": 2, "patience": "3"}, "patience '3': use a whole number"),
        ({"epochs": 1, "scheduler": optim.lr_scheduler.StepLR}, "it is the class StepLR"),
        ({"epochs": 1, "scheduler": []}, "a list of 0"),
        ({"epochs": 1, "scheduler": optim.lr_scheduler.StepLR(sgd(net()), 1)}, "of another optimizer"),
    ],
)
def test_fits_that_cannot_work(options: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=message):
        FastLoop(model, sgd(model), loss=MSE, engine="eager").fit(data(), **options)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_dataset_is_not_taken_for_batches(kind: str) -> None:
    model = net()
    loop = FastLoop(model, sgd(model), loss=MSE)
    with pytest.raises(ConfigError, match=r"a dataset, TensorDataset, whose items are rows: give DataLoader\(dataset"):
        getattr(loop, kind)(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)))


def test_a_plateau_of_the_largest_value_is_refused() -> None:
    model = net()
    optimizer = sgd(model)
    loop = FastLoop(model, optimizer, loss=MSE, engine="eager")
    plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
    with pytest.raises(ConfigError, match=r"ReduceLROnPlateau\(mode='max'\) .* keep the loop over the epochs"):
        loop.fit(data(), epochs=1, scheduler=plateau)


# Copies.


@pytest.mark.parametrize(
    "make", [lambda p: optim.Adam(p, lr=0.01), lambda p: optim.LBFGS(p, lr=0.5, max_iter=2)], ids=["adam", "lbfgs"]
)
def test_a_copied_loop_goes_on_alone_from_the_same_point(make: Callable[..., optim.Optimizer]) -> None:
    model = net()
    loop = FastLoop(model, make(model.parameters()), loss=MSE, engine="eager", clip_value=10.0)
    loop.train(data())
    before = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(loop)
    assert other.model is other.step.spec.model
    assert other.optimizer is other.step.spec.optimizer
    assert other.step.metrics is other.step.spec.metrics
    results = [other.train(data()) for _ in range(2)]
    assert other.step.metrics.read_late() is None
    late = other.step.metrics.read_late()
    assert late is not None
    assert late.loss == results[-1].loss
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [loop.train(data()).loss for _ in range(2)] == [result.loss for result in results]
    torch.testing.assert_close(model.state_dict(), other.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy])
def test_loops_and_steps_are_not_pickled(copied: Callable[[Any], Any]) -> None:
    model = net()
    loop = FastLoop(model, sgd(model), loss=MSE, engine="eager")
    for each in (loop, loop.step):
        with pytest.raises(TypeError, match=r"cannot be pickled .* save model.state_dict\(\)"):
            copied(each)
