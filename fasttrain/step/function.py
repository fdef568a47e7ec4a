"""The training step as a function of its tensors, and the graphs that a trace records of it.

Forward, loss, scaling of the loss, backward, clipping and the optimizer's step are called in this order on the inputs
of the graph. `TracedPart` is one recorded graph, with a check that inputs are like those that it was traced with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from fasttrain.errors import EngineError
from fasttrain.metrics import Scoring, scoring_of
from fasttrain.step.capture import Capture, Captured
from fasttrain.step.optimizer import GroupOptions, OptimizerStep
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import StepState
from fasttrain.step.torch_private import recorded_as, tensor_check

__all__ = ["Gradients", "InputKind", "LossScaling", "Part", "StepFunction", "TracedGraph", "TracedPart"]

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
        loss_dtype: of the loss that it returns; known then, too.
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
        self.loss_dtype = torch.float32

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
                self.loss_dtype = loss.dtype
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


class Gradients:
    """The gradients that a graph adds to, or takes up: the parameters' `grad`, as eager steps keep them.

    Because they are the user's own, an eager step may follow a compiled one in the middle of a group, and the reverse.

    Args:
        spec: the step.
        parameters: those of `spec.with_gradients()` that the graph has gradients for.
    """

    def __init__(self, spec: StepSpec, parameters: Sequence[Tensor]) -> None:
        own = {id(parameter) for parameter in parameters}
        self._spec = spec
        self._parameters = list(parameters)
        self._others = [parameter for parameter in spec.with_gradients() if id(parameter) not in own]
        self._fresh: list[Tensor] = []

    def current(self) -> list[Tensor] | None:
        """One tensor a parameter, new ones where a group begins; None where other steps have left other gradients."""
        self._fresh = []
        if any(parameter.grad is not None for parameter in self._others):
            return None
        found = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._spec.gathered.count:
            return found if len(found) == len(self._parameters) else None
        if found:
            return None
        self._fresh = [torch.zeros_like(parameter) for parameter in self._parameters]
        return list(self._fresh)

    def keep(self) -> None:
        """After a graph has added a batch's gradients to what `current` gave."""
        for parameter, gradient in zip(self._parameters, self._fresh, strict=False):
            parameter.grad = gradient
        self._fresh = []
        self._spec.gathered.count += 1

    def drop(self) -> None:
        """After a graph has stepped the optimizer with them."""
        for parameter in self._parameters:
            parameter.grad = None
        self._spec.gathered.count = 0


class LossScaling:
    """The scaler of fp16's loss, over stand-ins for its tensors.

    Args:
        scaler: the user's; its factors are constants of the graph.
        scale: stand-in for the factor of the loss, a scalar.
        good_steps: stand-in for its count of steps without an infinity, a scalar.
    """

    def __init__(self, scaler: torch.amp.GradScaler, scale: Tensor, good_steps: Tensor) -> None:
        self._growth = scaler.get_growth_factor()
        self._backoff = scaler.get_backoff_factor()
        self._interval = scaler.get_growth_interval()
        self._scale = scale
        self._good_steps = good_steps

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return loss * self._scale

    def unscale(self, gradients: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Tensor:
        """Divides gradients by the scale, in place.

        Args:
            gradients: of the optimizer's parameters.
            others: of other parameters of the model, which count in the norm that is clipped.

        Returns:
            Whether there is an infinity or NaN among `gradients` (as `GradScaler` looks), a scalar of bool.
        """
        inverse = self._scale.double().reciprocal().float()  # as GradScaler does: rounded once
        found = torch.stack([gradient.isfinite().logical_not().any() for gradient in gradients]).any()
        for gradient in (*gradients, *others):
            gradient.mul_(inverse)
        return found

    def update(self, is_skipped: Tensor) -> None:
        """Backs off after a step that is skipped, grows after so many that are not."""
        good_steps = torch.where(is_skipped, 0, self._good_steps + 1)
        is_due = good_steps == self._interval
        grown = self._scale * self._growth
        grown = torch.where(is_due & grown.isfinite(), grown, self._scale)
        self._scale.copy_(torch.where(is_skipped, self._scale * self._backoff, grown))
        self._good_steps.copy_(torch.where(is_due, 0, good_steps))


InputKind = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Size, stride, dtype and device of an input."""

ALIGNMENT = 16
"""Bytes. Torch's own memory begins on such boundaries; slices and views of it need not."""


class TracedGraph:
    """A graph, and what its inputs are like.

    Args:
        graph: the operators of a step.
        inputs: like those that the graph takes.
        open_dims: for each of these, the dimensions whose size is left open.
        longest: entries of the longest row of unequal length that the graph may be given; None: any.
        anywhere: the places of the inputs that begin anywhere in memory, such as slices: a batch's tensors.

    Attributes:
        graph, open_dims, longest, anywhere: see above.
        kinds: of each input.
        differ: says what differs in inputs from those that were traced, None if nothing does.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        inputs: Sequence[Tensor],
        open_dims: Sequence[frozenset[int]],
        longest: int | None = None,
        anywhere: Sequence[int] = (),
    ) -> None:
        self.graph = graph
        self.anywhere = tuple(anywhere)
        self.longest = longest
        self.open_dims = list(open_dims)
        self.kinds: list[InputKind] = [(each.shape, each.stride(), each.dtype, each.device) for each in inputs]
        self.differ = tensor_check(inputs, self.open_dims)
        if inputs[0].device.type == "cuda":
            self.differ = _aligned(self.differ, [at for at in range(len(inputs)) if at not in self.anywhere])


def _aligned(
    differ: Callable[[Sequence[Tensor]], str | None], places: Sequence[int]
) -> Callable[[Sequence[Tensor]], str | None]:
    """A check that these inputs, besides, begin where torch's compiler takes for granted that tensors on a GPU do.

    It would change a copy of one that does not, and the user's own tensor would stay as it was.
    """

    def check(found: Sequence[Tensor]) -> str | None:
        at = next((at for at in places if found[at].data_ptr() % ALIGNMENT), None)
        return differ(found) if at is None else f"input {at} does not begin on a boundary of {ALIGNMENT} bytes"

    return check


class TracedPart(TracedGraph):
    """One graph of a step.

    Args:
        function: what was traced.
        part: which part of the step that is.
        graph: takes state, options, gradients, batch and closed-over tensors, in this order (see `StepFunction`).
        inputs: what it was traced with, without the closed-over tensors.
        open_dims: for each of these, the dimensions whose size is left open.
        closed_over: tensors that forward reads besides the state and the batch, and constants of the graph.
        num_leaves: tensors of a batch.

    Attributes:
        part, closed_over: see above.
        reached: the places (in the state) of the parameters that get gradients.
        loss_dtype: of the loss that the graph returns.
    """

    def __init__(
        self,
        function: StepFunction,
        part: Part,
        graph: torch.fx.GraphModule,
        inputs: Sequence[Tensor],
        open_dims: Sequence[frozenset[int]],
        closed_over: Sequence[Tensor],
        num_leaves: int,
    ) -> None:
        fixed = [frozenset[int]()] * len(closed_over)
        leaves = range(len(inputs) - num_leaves, len(inputs))
        super().__init__(graph, [*inputs, *closed_over], [*open_dims, *fixed], anywhere=leaves)
        self.part = part
        self.closed_over = list(closed_over)
        self.reached = function.reached
        self.loss_dtype = function.loss_dtype
