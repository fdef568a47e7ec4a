"""The eager engine: the textbook's step without its waits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.device import Choice, autocast_dtype
from fasttrain.metrics import LossObserver
from fasttrain.step.spec import Forward, StepOutput, StepSpec
from fasttrain.step.torch_private import note_step, run_backward, step_optimizer, was_step_taken

__all__ = ["EagerEngine", "run_forward"]

Batch = Any


class EagerEngine:
    """Runs each step operator by operator: fused optimizer where left open, gradients set to None, no host read.

    One exception: a `GradScaler` (fp16) reads the device once a step, unless the optimizer was made with `fused=True`.

    Args:
        spec: the step.
        choice: why it is this engine.
        forward: what runs in place of the spec's forward (a compiled form of it), None for itself.

    Attributes:
        choice: what runs, and why.
        compile_s: None: nothing is compiled.
        span, calls: 1: nothing is gained by running several steps as one.
        has_stepped: whether the optimizer has stepped, and so made its state.
    """

    def __init__(self, spec: StepSpec, choice: Choice, forward: Forward | None = None) -> None:
        self.choice = choice
        self._spec = spec
        self._forward = forward or spec.forward
        self._fused_where_open = FusedWhereOpen(spec.optimizer)
        self.compile_s: float | None = None
        self.span = self.calls = 1
        self.has_stepped = False
        self._is_observed = False

    def step(self, batch: Batch) -> Tensor:
        """See `Engine.step`."""
        loss = self.gather(batch)
        self.apply_if_due()
        return loss

    def gather(self, batch: Batch) -> Tensor:
        """The first half of a step: forward, backward, metrics. Returns the loss as `step` does."""
        spec = self._spec
        if not spec.gathered.count:
            self._zero_gradients()  # the user may have left some, or have given the optimizer new parameters
        output = self._observed_forward(batch)
        scaled = output.loss if spec.accumulate == 1 else output.loss / spec.accumulate
        self._backward(scaled if spec.scaler is None else spec.scaler.scale(scaled))
        loss = output.loss.detach()
        spec.metrics.update(loss, output.predictions, output.targets)
        spec.gathered.count += 1
        return loss

    def apply_if_due(self) -> None:
        """The second half: clipping and the optimizer's step, where the gradients hold all batches of a group."""
        if self._spec.gathered.count == self._spec.accumulate:
            self._apply()

    def flush(self) -> None:
        """See `Engine.flush`."""
        if self._spec.gathered.count:
            rescale = self._spec.accumulate / self._spec.gathered.count
            for parameter in self._spec.trained():
                if parameter.grad is not None:
                    parameter.grad.mul_(rescale)
            self._apply()

    def steps(self, span: Span) -> Tensor:
        """See `Engine.steps`."""
        return torch.stack([self.step(batch) for batch in span.batches()])

    def expect(self, steps: int) -> None:
        """See `Engine.expect`: eager has nothing to plan."""

    def settle(self, batches: Iterable[Batch]) -> None:
        """See `Engine.settle`: nothing is to be decided."""

    def close(self) -> None:
        """See `Engine.close`: nothing runs beside eager."""

    def _observed_forward(self, batch: Batch) -> StepOutput:
        if self._is_observed:
            return run_forward(self._spec, self._forward, batch)
        with LossObserver() as observer:
            output = run_forward(self._spec, self._spec.forward, batch)
        self._spec.metrics.rule = observer.rule(output.predictions, output.targets)
        self._is_observed = True
        return output

    def _backward(self, loss: Tensor) -> None:
        if type(loss) is not Tensor:
            loss.backward()
            return
        # A new one each time: autograd may hand it on as a parameter's gradient, which is changed in place.
        run_backward(loss, torch.ones_like(loss))

    def _apply(self) -> None:
        spec = self._spec
        spec.gathered.count = 0  # first: a step that fails is not gone on with
        if spec.clip_norm is not None or spec.clip_value is not None:
            self._clip()
        with self._fused_where_open:
            if spec.scaler is None:
                step_optimizer(spec.optimizer)
            else:
                spec.scaler.step(spec.optimizer)
                spec.scaler.update()
        if not self.has_stepped and (spec.scaler is None or was_step_taken(spec.scaler)):
            self.has_stepped = True
            note_step(spec.optimizer)
        self._zero_gradients()

    def _zero_gradients(self) -> None:
        """By hand: `Optimizer.zero_grad` takes 13 us for two parameters, this takes 1."""
        for parameter in self._spec.trained():
            parameter.grad = None

    def _clip(self) -> None:
        spec = self._spec
        if spec.scaler is not None:
            spec.scaler.unscale_(spec.optimizer)
        parameters = list(spec.trained())
        if spec.clip_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, spec.clip_value)
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm)


def run_forward(spec: StepSpec, forward: Forward, batch: Batch) -> StepOutput:
    """The forward pass at the spec's precision."""
    dtype = autocast_dtype(spec.precision)
    if dtype is None:
        return forward(spec.model, batch)
    # No weight cache: it would outlive the step in a captured graph (pytorch#71631); each weight is cast once anyway.
    with torch.autocast(spec.device.type, dtype=dtype, cache_enabled=False):
        return forward(spec.model, batch)


_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class FusedWhereOpen:
    """Runs the optimizer's fused kernels where the user left `fused` and `foreach` open, which they stay.

    On a CPU the default is one operator after the other: 117 us for a linear model's Adam where the fused kernel
    takes 64 (Xeon with AMX, one thread).

    Use it as a context around `optimizer.step()`; what can be fused is looked at again when the groups change.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._seen: tuple[list[dict[str, Any]], int] | None = None
        self._candidates: list[dict[str, Any]] = []
        self._fused: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        """Sets `fused` in the groups that leave it open."""
        groups = self._optimizer.param_groups
        if self._seen is None or self._seen[0] is not groups or self._seen[1] != len(groups):
            self._candidates = [group for group in groups if self._can_fuse(group)]
            self._seen = (groups, len(groups))
        is_open = [each for each in self._candidates if each["fused"] is None and each["foreach"] is None]
        self._fused = [group for group in is_open if not any(map(_has_sparse_gradient, group["params"]))]
        for group in self._fused:
            group["fused"] = True

    def __exit__(self, *error: object) -> None:
        """Leaves `fused` open again."""
        for group in self._fused:
            group["fused"] = None

    def _can_fuse(self, group: dict[str, Any]) -> bool:
        is_supported = type(self._optimizer) in _FUSED and not group.get("differentiable")
        if not is_supported or isinstance(group["lr"], Tensor):
            return False
        kinds = {"cpu"} if isinstance(self._optimizer, torch.optim.Adagrad) else {"cpu", "cuda"}
        return all(p.device.type in kinds and p.is_floating_point() and self._is_at_home(p) for p in group["params"])

    def _is_at_home(self, parameter: Tensor) -> bool:
        """False where earlier unfused steps left the step count on another device: the fused kernel refuses it."""
        step = self._optimizer.state.get(parameter, {}).get("step")
        return not isinstance(step, Tensor) or step.device == parameter.device


def _has_sparse_gradient(parameter: Tensor) -> bool:
    """Fused kernels refuse those, which are known only once they are there."""
    return parameter.grad is not None and parameter.grad.layout is not torch.strided
