"""What a training step is made of, before any engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fasttrain.data.resident import ResidentEpoch, Span
from fasttrain.device import Choice, Precision
from fasttrain.errors import ConfigError
from fasttrain.metrics import RunningMetrics

__all__ = ["Engine", "Forward", "Gathered", "StepOutput", "StepSpec", "normalise_forward", "run_passes", "run_steps"]

Batch = Any


class StepOutput(NamedTuple):
    """What a forward pass gives: the scalar loss and, where accuracy has a meaning, predictions and targets."""

    loss: Tensor
    predictions: Tensor | None
    targets: Tensor | None


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
        accumulate: batches whose gradients are averaged before one step of the optimizer.
        clip_norm: bound on the norm of all gradients together, None for none.
        clip_value: bound on each entry of each gradient, None for none.
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
        """Checks the options."""
        if self.accumulate < 1:
            raise ConfigError(f"accumulate {self.accumulate}: use 1 (no accumulation) or more")
        for name, bound in (("clip_norm", self.clip_norm), ("clip_value", self.clip_value)):
            if bound is not None and not bound > 0:
                raise ConfigError(f"{name} {bound}: use a positive number, or None for no clipping")

    def trained(self) -> Iterator[Tensor]:
        """The parameters that the optimizer steps, group by group."""
        for group in self.optimizer.param_groups:
            yield from group["params"]


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
        """Steps the optimizer with what an unfinished accumulation has gathered (their mean), if anything."""
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
        ConfigError: both are given, or neither.
    """
    if (forward is None) == (loss is None):
        given = "neither" if forward is None else "both"
        raise ConfigError(
            f"a step needs forward=(model, batch) -> (loss, predictions, targets), or loss= for (inputs, targets) "
            f"batches: {given} was given, give one"
        )
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
                f"forward must return a loss or (loss, predictions, targets); it returned {_describe(output)}"
            )
        return _checked(StepOutput(*output))


class _SupervisedForward:
    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss = loss

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ConfigError(
                f"loss= needs batches of (inputs, targets); this one is {_describe(batch)}: give forward= instead"
            )
        inputs, targets = batch
        predictions = model(inputs)
        return _checked(StepOutput(self._loss(predictions, targets), predictions, targets))


def _checked(output: StepOutput) -> StepOutput:
    loss: Any = output.loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(f"the loss must be a tensor with one element; it is {_describe(loss)}")
    return output if loss.dim() == 0 else output._replace(loss=loss.reshape(()))


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"of type {type(value).__name__}"
