"""The training step as a function of its tensors, for a trace to record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from fasttrain.errors import EngineError
from fasttrain.metrics import Scoring, scoring_of
from fasttrain.step.capture import Capture, Captured
from fasttrain.step.optimizer import OptimizerStep
from fasttrain.step.options import GroupOptions
from fasttrain.step.scaling import LossScaling
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import StepState
from fasttrain.step.torch_private import recorded_as

__all__ = ["Part", "StepFunction"]

Part = Literal["whole", "gather", "last"]
"""whole: forward, backward, optimizer; gather: forward, backward, gradients added to those that are there; last: gather
and optimizer."""


class StepFunction:
    """A part of the step as a function of its tensors.

    Its inputs are, in this order: state, options (unless it gathers), gradients (unless it is whole; one for each
    parameter of `differentiated`), leaves of the batch. It changes state and gathered gradients in place and returns
    the loss.

    Args:
        spec: the step.
        part: what it computes.
        state: where everything is.
        options: of the optimizer's groups; is told what the optimizer's code asks for.
        capture: of forward, loss and metrics.

    Attributes:
        differentiated: the places (in the state) of the parameters whose gradients the step needs: those that are
            trained, then, where the norm is clipped, the model's others.
        reached: those of them that have gradients; known once the function has run.
    """

    def __init__(self, spec: StepSpec, part: Part, state: StepState, options: GroupOptions, capture: Capture) -> None:
        self._spec = spec
        self._part = part
        self._state = state
        self._options = options
        self._capture = capture
        trained = [place for group in state.groups for place in group]
        others = [] if spec.clip_norm is None else [each for each in state.parameters.values() if each not in trained]
        self._trained = [place for place in trained if state.tensors[place].requires_grad]
        self.differentiated = self._trained + [place for place in others if state.tensors[place].requires_grad]
        self.reached: list[int] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Runs the part: see the class for its inputs and what it does with them."""
        spec, part = self._spec, self._part
        rest = iter(inputs)
        state = [next(rest) for _ in self._state.tensors]
        options = [] if part == "gather" else [next(rest) for _ in self._options.examples]
        gathered = [] if part == "whole" else [next(rest) for _ in self.differentiated]
        leaves = list(rest)
        scaling = None if spec.scaler is None else LossScaling(spec.scaler, *[state[at] for at in self._state.scaler])
        captured, scoring, gradients = self._backward(state, leaves, scaling)
        self.reached = list(gradients)
        with torch.no_grad():
            with recorded_as("backward"):
                for place, held in zip(self.differentiated, gathered, strict=False):
                    if place in gradients:
                        gradients[place] = (held.add_ if part == "gather" else held.add)(gradients[place])
            if part != "gather":
                with recorded_as("optimizer"):
                    self._apply(state, gradients, options, scaling)
            with recorded_as("metrics"):
                cells = list(state[self._state.totals].unbind())
                spec.metrics.accumulate(cells, *captured.output, 1.0, scoring, captured.metrics)
                loss = captured.output.loss.detach()
            with recorded_as("forward"):
                self._capture.replace_buffers(state, captured)
            return loss

    def _backward(
        self, state: list[Tensor], leaves: list[Tensor], scaling: LossScaling | None
    ) -> tuple[Captured, Scoring | None, dict[int, Tensor]]:
        """Forward and backward: what forward gives, how it is scored and, by place of its parameter, each gradient."""
        with torch.enable_grad(), recorded_as("forward"):
            variables = {place: state[place].detach().requires_grad_() for place in self.differentiated}
            others = [each.detach().requires_grad_(each.requires_grad) for each in self._capture.others]
            frozen = [each for each in others if each.requires_grad]
            tensors = [variables.get(place, tensor) for place, tensor in enumerate(state)]
            captured = self._capture.call(tensors, leaves, others)
            loss, scoring = captured.output.loss, scoring_of(*captured.output)
            loss = loss if self._spec.accumulate == 1 else loss / self._spec.accumulate
            loss = loss if scaling is None else scaling.scaled(loss)
        with recorded_as("backward"):
            wanted = [*variables.values(), *frozen]
            found = cast("Sequence[Tensor | None]", torch.autograd.grad(loss, wanted, allow_unused=True))
            named = [self._capture.name_of(each) for each in self._capture.others if each.requires_grad]
            for name, gradient in zip(named, found[len(variables) :], strict=True):
                if gradient is not None:
                    raise EngineError(
                        f"forward needs the gradient of {name}, which is neither in the step's model nor in its "
                        "optimizer: give the step a model that holds all networks which forward runs, such as "
                        "nn.ModuleDict({'generator': ..., 'discriminator': ...}), or read the tensor under "
                        "torch.no_grad()"
                    )
            gradients = list(zip(self.differentiated, found, strict=False))
            for place, gradient in gradients:
                if gradient is not None and gradient.layout is not torch.strided:
                    raise EngineError(
                        f"the gradient of {self._state.names[place]} is sparse, and only dense ones are compiled: make "
                        "the embedding with sparse=False, or use engine 'eager'"
                    )
            # A copy, as autograd makes where a gradient is shared or expanded; it costs a compiled step nothing.
            return captured, scoring, {place: gradient.clone() for place, gradient in gradients if gradient is not None}

    def _apply(
        self, state: list[Tensor], gradients: dict[int, Tensor], options: list[Tensor], scaling: LossScaling | None
    ) -> None:
        """Clipping and the optimizer's step, undone where the scaled gradients have overflowed."""
        for place, gradient in gradients.items():
            state[place].grad = gradient
        changed = [state[at] for place in self._trained for at in (place, *self._state.slots.get(place, {}).values())]
        own, others = [
            [gradients[at] for at in gradients if (at in self._trained) == is_own] for is_own in (True, False)
        ]
        is_skipped = None if scaling is None else scaling.unscale(own, others)
        before = [] if is_skipped is None else [tensor.clone() for tensor in changed]
        self._clip([state[place] for place in self._state.parameters.values()])
        OptimizerStep(self._spec.optimizer, self._state, state, self._options, options).run()
        if scaling is not None and is_skipped is not None:
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(torch.where(is_skipped, old, tensor))
            scaling.update(is_skipped)

    def _clip(self, parameters: list[Tensor]) -> None:
        spec = self._spec
        if spec.clip_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, spec.clip_value, foreach=False)
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm, foreach=False)
