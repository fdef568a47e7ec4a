"""What a training step is made of, before any engine runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MethodType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fasttrain.data.resident import ResidentEpoch, Span
from fasttrain.device import Choice, Precision
from fasttrain.errors import ConfigError
from fasttrain.metrics import RunningMetrics
from fasttrain.step.arguments import check_functions, describe
from fasttrain.step.torch_private import has_own_step

__all__ = ["Engine", "Forward", "Gathered", "StepOutput", "StepSpec", "normalise_forward", "run_passes", "run_steps"]

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
        """How many steps it would run as one now, where the next batches are rows of resident data; 1: one by one."""
        ...

    @property
    def calls(self) -> int:
        """How many times as many steps `steps` should be given at once, where there are so many."""
        ...

    def steps(self, span: Span) -> Tensor:
        """The steps of a span, as `step` does them one after the other. No host read.

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
    """Runs steps on all the batches, several as one where engine and batches allow that.

    Yields:
        What each call of the engine was given.
    """
    epoch = batches if isinstance(batches, ResidentEpoch) else None
    while True:
        span = epoch.take(engine.span, engine.calls) if epoch is not None and engine.span > 1 else None
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
