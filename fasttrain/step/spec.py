"""What a training step is made of: the user's objects and options, checked, before any engine runs it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, IterableDataset

from fasttrain.data.resident import ResidentEpoch, Span
from fasttrain.device import Choice, Precision
from fasttrain.errors import ConfigError
from fasttrain.metrics import RunningMetrics
from fasttrain.step.torch_private import has_own_step, was_compiled_by_user

__all__ = [
    "Engine",
    "Forward",
    "Gathered",
    "StepOutput",
    "StepSpec",
    "check_batches",
    "check_functions",
    "check_model",
    "check_optimizer",
    "check_train_method",
    "describe",
    "normalise_forward",
    "run_passes",
    "run_steps",
]

Batch = Any


class StepOutput(NamedTuple):
    """What a forward pass returns: the scalar loss, and predictions and targets for accuracy and metrics.

    Predictions and targets may be anything (tuples, dicts); accuracy is computed where both are tensors.
    """

    loss: Tensor
    predictions: Any
    targets: Any


Forward = Callable[[nn.Module, Batch], StepOutput]


@dataclass
class Gathered:
    """How many batches `p.grad` holds that the optimizer has not stepped with yet; whoever runs a step counts on."""

    count: int = 0


@dataclass
class Meanwhile:
    """Why the steps of a pass run eagerly, whatever is compiled; empty where nothing asks for that."""

    why_eager: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSpec:
    """The user's objects and options that define one training step.

    Attributes:
        model: the user's model; its parameters are where the step runs.
        optimizer: the user's optimizer over (some of) these parameters.
        forward: (model, batch) -> StepOutput.
        device: where the step runs.
        precision: of the forward pass; parameters stay as they are.
        accumulate: N: each batch adds the gradients of `loss / N`; the optimizer steps at each Nth batch and at the
            last.
        clip_norm: bound on the norm of the gradients of `model.parameters()` together, None for none.
        clip_value: bound on each entry of these gradients, None for none.
        metrics: the running metrics of training.
        scaler: of fp16's loss, None for other precisions.
        gathered: the batches of an unfinished accumulation.
        meanwhile: what asks for eager steps.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward: Forward
    device: torch.device
    precision: Precision
    accumulate: int
    clip_norm: float | None
    clip_value: float | None
    metrics: RunningMetrics
    scaler: torch.amp.GradScaler | None
    gathered: Gathered = field(default_factory=Gathered)
    meanwhile: Meanwhile = field(default_factory=Meanwhile)

    def __post_init__(self) -> None:
        """Checks the options and their combinations.

        Raises:
            ConfigError: one cannot work.
        """
        given: Any = self.accumulate
        if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
            raise ConfigError(f"accumulate {given!r}: use a whole number of batches, 1 (no accumulation) or more")
        bounds: dict[str, Any] = {"clip_norm": self.clip_norm, "clip_value": self.clip_value}
        for name, bound in bounds.items():
            is_number = not isinstance(bound, bool) and isinstance(bound, Real)
            if bound is not None and not (is_number and float(bound) > 0):  # NaN is not
                raise ConfigError(f"{name} {bound!r}: use a positive number, or None for no clipping")
        if self.needs_closure and (self.accumulate > 1 or self.scaler is not None):
            what = "accumulate" if self.accumulate > 1 else "precision='fp16'"
            use = "1, with larger batches" if self.accumulate > 1 else "'fp32' or 'bf16'"
            raise ConfigError(f"{what} does not work with this optimizer: {self.why_closure}; use {use}")

    @property
    def needs_closure(self) -> bool:
        """Whether the optimizer steps only with a closure that computes the loss, as LBFGS does.

        Raises:
            ConfigError: its step needs something else.
        """
        optimizer: Any = self.optimizer
        # Bound, and without a scheduler's wrapper, which Python takes for a function of (self, closure).
        step = optimizer.step if has_own_step(optimizer) else MethodType(type(optimizer).step, optimizer)
        try:
            parameters = inspect.signature(step).parameters.values()
        except (TypeError, ValueError):  # unknown to Python
            return False
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [each.name for each in parameters if each.default is each.empty and each.kind not in variadic]
        if needed and (len(needed) > 1 or "closure" not in needed[0]):
            raise ConfigError(
                f"{type(self.optimizer).__name__}.step needs {', '.join(needed)}, but a step calls it without "
                "arguments, or with one that is named closure"
            )
        return bool(needed)

    @property
    def why_closure(self) -> str:
        """Why such an optimizer steps eagerly."""
        return f"{type(self.optimizer).__name__} evaluates the loss several times a step"

    def trained(self) -> Iterator[Tensor]:
        """The parameters that the optimizer steps, group by group."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def untrained(self) -> list[Tensor]:
        """The model's parameters that the optimizer does not have."""
        trained = {id(parameter) for parameter in self.trained()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in trained]

    def with_gradients(self) -> list[Tensor]:
        """The parameters whose gradients a step is made of: those trained, and with clip_norm all of the model's."""
        return [*self.trained(), *(self.untrained() if self.clip_norm is not None else ())]


class Engine(Protocol):
    """Runs training steps of one `StepSpec`. All engines give the same numbers at equal precision."""

    @property
    def compile_s(self) -> float | None:
        """Seconds that steps have waited for a trace or a compiler so far; None where there was no wait."""
        ...

    @property
    def choice(self) -> Choice:
        """What runs the steps now (such as "eager" or "compiled"), and why."""
        ...

    def step(self, batch: Batch) -> Tensor:
        """Forward, loss, backward; an optimizer step every `accumulate` batches; metrics. No host read.

        Returns:
            The batch's loss, detached, on the device.
        """
        ...

    @property
    def span(self) -> int:
        """How many steps `steps` should be given at once, where the next batches are rows of resident data.

        0: none, it takes their batches one by one.
        """
        ...

    def steps(self, span: Span) -> Tensor:
        """The steps of a span, as `step` does them one after the other. Makes no host sync.

        Returns:
            The batches' losses, [steps], detached, on the device.
        """
        ...

    def flush(self) -> None:
        """Steps the optimizer with what an unfinished accumulation has gathered, if anything, after the last batch.

        The gradients are as they are: each batch of the short group counts as much as any other.
        """
        ...

    def expect(self, steps: int) -> None:
        """Tells how many steps are to come, as far as the caller knows: whether compiling can pay depends on it."""
        ...

    def settle(self, batches: Iterable[Batch]) -> None:
        """Trains on until it is decided what runs the steps; waits for the compiler.

        Args:
            batches: where one pass over them is too short, there are more.
        """
        ...

    def close(self) -> None:
        """Ends what runs beside the training (a compiling child).

        Steps may follow; those of "auto" compile nothing until more are expected (`expect`).
        """
        ...


def run_steps(engine: Engine, batches: Iterator[Batch]) -> Iterator[Batch | Span]:
    """Runs steps on all the batches, several a call where engine and batches allow that.

    Yields:
        What each call of the engine was given.
    """
    epoch = batches if isinstance(batches, ResidentEpoch) else None
    while True:
        span = epoch.take(engine.span) if epoch is not None and engine.span else None
        if span is not None:
            engine.steps(span)
            yield span
            continue
        try:
            batch = next(batches)
        except StopIteration:
            return
        engine.step(batch)
        yield batch


def run_passes(engine: Engine, batches: Iterable[Batch], most_steps: int) -> Iterator[Batch | Span]:
    """`run_steps` on one pass over the batches after the other, until so many steps have run or a pass is empty."""
    left, is_empty = most_steps, False
    while left > 0 and not is_empty:
        is_empty = True
        for ran in run_steps(engine, iter(batches)):
            is_empty = False
            left -= ran.steps if isinstance(ran, Span) else 1
            yield ran
            if left <= 0:
                return


def normalise_forward(
    forward: Callable[[nn.Module, Batch], Any] | None, loss: Callable[[Tensor, Tensor], Tensor] | None
) -> Forward:
    """Brings the two ways of saying what a step computes to one.

    Args:
        forward: (model, batch) -> loss, or (loss, predictions, targets).
        loss: (predictions, targets) -> scalar; batches are then (inputs, targets).

    Raises:
        ConfigError: both are given, or neither, or it cannot be called so.
    """
    check_functions(forward, loss, None)
    if forward is not None:
        return _CheckedForward(forward)
    assert loss is not None
    return _SupervisedForward(loss)


class _CheckedForward:
    def __init__(self, forward: Callable[[nn.Module, Batch], Any]) -> None:
        self._forward = forward

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        output = self._forward(model, batch)
        if isinstance(output, Tensor):
            output = (output, None, None)
        if not isinstance(output, tuple) or len(output) != 3:
            raise ConfigError(
                f"forward must return a loss or (loss, predictions, targets); it returned {describe(output)}"
            )
        return _checked(StepOutput(*output))


class _SupervisedForward:
    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss = loss

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ConfigError(
                f"loss= needs batches of (inputs, targets); this one is {describe(batch)}: give forward= instead"
            )
        inputs, targets = batch
        predictions = model(inputs)
        return _checked(StepOutput(self._loss(predictions, targets), predictions, targets))


def _checked(output: StepOutput) -> StepOutput:
    loss: Any = output.loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(f"the loss must be a tensor with one element; it is {describe(loss)}")
    return output if loss.dim() == 0 else output._replace(loss=loss.reshape(()))


MAX_OBJECTS = 20_000
"""So many objects are searched for the optimizer's parameters; where there are more, the optimizer is accepted."""


def describe(value: object) -> str:
    """A value in an error message: what it is, not what it holds."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"of type {type(value).__name__}"


def check_model(model: Any) -> None:
    """Checks that the model is one uncompiled module.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(model, torch.optim.Optimizer):
        raise ConfigError("the model is an optimizer: the order is (model, optimizer)")
    if isinstance(model, list | tuple | Mapping):
        raise ConfigError(
            f"the model must be one torch.nn.Module; it is {describe(model)}: write one module that holds these, or "
            "make one TrainStep for each, with its own optimizer"
        )
    if isinstance(model, type):
        raise ConfigError(f"the model is the class {model.__name__}: give an instance, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module; it is {describe(model)}")
    for name, module in model.named_modules():
        if was_compiled_by_user(module):
            whose = f"its module {name!r}" if name else "the model"
            raise ConfigError(
                f"{whose} was compiled by torch.compile or Module.compile: give the model as it was before that "
                "(model = torch.compile(model) keeps it in model._orig_mod). fasttrain compiles the whole step by "
                "itself; engine='torch-compile' compiles the forward pass as torch.compile does"
            )


def check_optimizer(optimizer: Any, model: nn.Module, functions: Iterable[object]) -> None:
    """Checks that the optimizer is one, steps each parameter once and steps something that the step can reach.

    Args:
        optimizer: what was given.
        model: a checked model.
        functions: forward, loss and metrics, which may hold modules of their own.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"the optimizer must be a torch.optim.Optimizer; it is {describe(optimizer)}: {_do(optimizer)}"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) in seen:
                raise ConfigError(
                    f"the optimizer has {names.get(id(parameter), 'a parameter')!r} twice (the second time in group "
                    f"{number}) and would step it twice: give each parameter once; list(dict.fromkeys(parameters)) "
                    "drops repetitions"
                )
            seen.add(id(parameter))
    if seen and not seen & names.keys() and not _holds([model, *functions], seen):
        raise ConfigError(
            f"none of the optimizer's {len(seen)} parameters belongs to the model ({type(model).__name__}) or to a "
            "module that forward, loss or a metric holds, so a step would train nothing: make the optimizer over "
            "model.parameters(), after the model was moved, copied or replaced"
        )


def _do(optimizer: object) -> str:
    if isinstance(optimizer, list | tuple | Mapping):
        return (
            "put all parameters into groups of one optimizer, or make one TrainStep for each optimizer, with the part "
            "of the model that it trains"
        )
    if isinstance(optimizer, nn.Module):
        return "the order is (model, optimizer)"
    if isinstance(optimizer, LRScheduler):
        return "give the scheduler's optimizer here, and the scheduler to fit(scheduler=...)"
    if isinstance(optimizer, type):
        return f"make one, such as {optimizer.__name__}(model.parameters())"
    return (
        "give one over the model's parameters, such as torch.optim.Adam(model.parameters()); one of your own derives "
        "from torch.optim.Optimizer"
    )


def check_functions(forward: Any, loss: Any, metrics: Any) -> None:
    """Checks that forward or loss, and the metrics, can be called as a step calls them.

    Raises:
        ConfigError: one cannot.
    """
    if (forward is None) == (loss is None):
        given = "neither" if forward is None else "both"
        raise ConfigError(
            f"a step needs forward=(model, batch) -> (loss, predictions, targets), or loss= for (inputs, targets) "
            f"batches: {given} was given, give one"
        )
    if forward is not None:
        if type(forward).__module__ == nn.MSELoss.__module__:
            raise ConfigError(f"forward is a loss, {type(forward).__name__}: give it as loss=")
        _check_callable("forward", forward, "model", "batch")
    else:
        _check_callable("loss", loss, "predictions", "targets")
    if metrics is None:
        return
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics must be a dict of names and functions; it is {describe(metrics)}")
    for name, metric in metrics.items():
        if not isinstance(name, str):
            raise ConfigError(f"the name of a metric must be a string; {name!r} is {describe(name)}")
        if isinstance(metric, type) or not (hasattr(metric, "update") and hasattr(metric, "compute")):
            _check_callable(f"metrics[{name!r}]", metric, "loss", "predictions", "targets")


def _check_callable(name: str, value: Any, *arguments: str) -> None:
    called = f"({', '.join(arguments)})"
    if isinstance(value, type):
        raise ConfigError(f"{name} is the class {value.__name__}: give an instance, {value.__name__}(...)")
    if not callable(value):
        raise ConfigError(f"{name} must be a function of {called}; it is {describe(value)}")
    signature = _signature(value.forward if isinstance(value, nn.Module) else value)
    if signature is not None and not _takes(signature, *arguments):
        raise ConfigError(f"{name} is called with {called}, but it takes {signature}")


def check_batches(batches: Any) -> None:
    """Checks that iterating gives batches.

    Raises:
        ConfigError: it is a dataset, whose items are single rows.
    """
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise ConfigError(
            f"batches is a dataset, {type(batches).__name__}, whose items are rows: give DataLoader(dataset, "
            "batch_size=...), or batch_size=None where an item is a whole batch"
        )


def check_train_method(model: nn.Module) -> None:
    """Checks that `model.train(mode)` can be called, which `FastLoop` does to switch between training and evaluation.

    Raises:
        ConfigError: a module's `train` takes other arguments.
    """
    train: Any = model.train
    signature = _signature(train) if callable(train) else None
    if not callable(train) or (signature is not None and not _takes(signature, True)):
        what = f"takes {signature}" if callable(train) else f"is {describe(train)}"
        raise ConfigError(
            f"{type(model).__name__}.train {what}, but FastLoop calls it as torch.nn.Module.train(mode=True), to "
            "switch between training and evaluation: give it another name (or keep the loop, and use TrainStep)"
        )
    if getattr(train, "__func__", None) is nn.Module.train:  # it calls those of its children
        for child in model.children():
            check_train_method(child)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """None where Python does not know it, as of some functions in C++."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _takes(signature: inspect.Signature, *arguments: object) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _holds(roots: Iterable[object], wanted: set[int]) -> bool:
    """True where a tensor of these ids can be reached: from attributes, containers, closures and globals."""
    seen: dict[int, object] = {}  # the objects too: an id is given away again with its object
    left = list(roots)
    while left and len(seen) < MAX_OBJECTS:
        value = left.pop()
        if id(value) in wanted:
            return True
        if id(value) not in seen and not isinstance(value, _WITHOUT_MODULES):
            seen[id(value)] = value
            left += _held_by(value)
    return bool(left)  # too many to tell


_WITHOUT_MODULES = (int, float, str, bytes, type(None), Tensor, torch.optim.Optimizer, LRScheduler, ModuleType)


def _held_by(value: Any) -> Iterator[object]:
    if isinstance(value, FunctionType):
        yield from _held_by_function(value)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, property):
        yield value.fget
    elif isinstance(value, classmethod | staticmethod):
        yield value.__func__
    elif isinstance(value, type):
        if not _is_of_library(value.__module__):
            yield from (*vars(value).values(), *value.__bases__)
        return
    yield from getattr(value, "__dict__", {}).values()
    yield type(value)


def _held_by_function(function: FunctionType) -> Iterator[object]:
    """What a function closes over, its defaults, and the globals that its code names; of a module, its members."""
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    if _is_of_library(function.__module__):
        return
    names = set(_names(function.__code__))
    for name in names & function.__globals__.keys():
        found = function.__globals__[name]
        yield found
        if isinstance(found, ModuleType) and not _is_of_library(found.__name__):
            yield from (vars(found)[each] for each in names & vars(found).keys())


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_of_library(module: str | None) -> bool:
    """True of code that holds no module of the user's."""
    root = (module or "").partition(".")[0]
    return root in ("torch", "numpy", "fasttrain") or (root in sys.stdlib_module_names and root != "__main__")
