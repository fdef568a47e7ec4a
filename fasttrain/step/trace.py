"""From the user's model, forward, optimizer and one batch: one graph of the whole training step.

Forward, loss, backward, clipping, the user's own optimizer and the running metrics are recorded together. The graph
changes the very tensors of the user's objects in place, so that their `state_dict()`s are right at any moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fasttrain.errors import EngineError
from fasttrain.step.eager import run_forward
from fasttrain.step.guards import BatchLayout, Guards
from fasttrain.step.optimizer import OptimizerStep
from fasttrain.step.spec import StepOutput, StepSpec
from fasttrain.step.state import LearningRates, StepState
from fasttrain.step.torch_private import (
    has_gradient_hooks,
    optimizer_hooks,
    prepare_for_inductor,
    tensor_check,
    trace_graph,
    without_onednn,
)

__all__ = ["Mismatch", "TracedStep", "trace_step"]

Batch = Any


class Mismatch(NamedTuple):
    """Why a traced step does not hold now."""

    reason: str


class TracedStep:
    """A whole training step as a graph, and what it holds for.

    Args:
        spec: the step.
        graph: takes state, rates, batch and closed-over tensors, in this order; changes the state in place and returns
            the loss.
        batch: the example that was traced.
        state: the tensors that it changes.
        rates: the learning rates.
        closed_over: tensors that forward reads without being given them.

    Attributes:
        spec: the step.
        graph: see above.
        open_dims: for each input of the graph, the dimensions whose size is left open.
        tensors: the state that the graph changes, the user's own tensors.
        kinds: what each of them is (see `StepState`).
    """

    def __init__(
        self,
        spec: StepSpec,
        graph: torch.fx.GraphModule,
        batch: Batch,
        state: StepState,
        rates: LearningRates,
        closed_over: list[Tensor],
    ) -> None:
        self.spec = spec
        self.graph = graph
        self._layout = BatchLayout(batch)
        self._rates = rates
        self._closed_over = closed_over
        self._bind(state, Guards(spec))
        leaves = self._layout.flatten(batch)
        assert leaves is not None
        closed: frozenset[int] = frozenset()
        num_before = len(state.tensors) + len(state.groups)
        self.open_dims = [*[closed] * num_before, *self._layout.open_dims, *[closed] * len(closed_over)]
        self._differ = tensor_check(self._all_inputs(leaves), self.open_dims)

    def inputs(self, batch: Batch) -> list[Tensor] | Mismatch:
        """The graph's inputs for a batch, or why the graph does not hold for it or for the user's objects as they are.

        Makes no host read.
        """
        reason = self._guards.mismatch()
        if reason is not None:
            return Mismatch(reason)
        leaves = self._layout.flatten(batch)
        if leaves is None:
            return Mismatch("the structure of the batch")
        inputs = self._all_inputs(leaves)
        reason = self._differ(inputs)
        return inputs if reason is None else Mismatch(reason)

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> Tensor:
        """One step, operator by operator as recorded: what a compiled program must agree with.

        Returns:
            The batch's loss, detached.
        """
        return self.graph(*inputs)

    def rebind(self) -> bool:
        """Takes up tensors that were replaced by others of the same kind, as `load_state_dict` does.

        Returns:
            False where nothing was replaced, or more has changed than that: trace anew.
        """
        if self._guards.mismatch() is None:
            return False
        state, guards = StepState(self.spec), Guards(self.spec)
        if state.signature != self._signature or not guards.agree(self._guards):
            return False
        self._bind(state, guards)
        return True

    def _all_inputs(self, leaves: list[Tensor]) -> list[Tensor]:
        return [*self.tensors, *self._rates.current(), *leaves, *self._closed_over]

    def _bind(self, state: StepState, guards: Guards) -> None:
        self.tensors = state.tensors
        self.kinds = state.kinds
        self._signature = state.signature
        self._guards = guards


def trace_step(spec: StepSpec, batch: Batch) -> TracedStep:
    """Records one whole step. Nothing is run and nothing of the user's objects is changed.

    Args:
        spec: the step; its optimizer must have made its state, so run the first step eagerly.
        batch: an example, on the device.

    Raises:
        EngineError: the step cannot be traced; the message says why.
    """
    _refuse_unsupported(spec)
    layout = BatchLayout(batch)
    leaves = layout.flatten(batch)
    assert leaves is not None
    state = StepState(spec)
    state.refuse_overlaps()
    rates = LearningRates(spec.optimizer, spec.device)
    inputs = [*state.tensors, *rates.current(), *leaves]
    fixed: list[frozenset[int]] = [frozenset()] * (len(inputs) - len(leaves))
    try:
        # The oneDNN LSTM has no backward that can be compiled; without it, torch records the cell's own operators.
        with without_onednn():
            graph = trace_graph(_WholeStep(spec, state, layout), inputs, [*fixed, *layout.open_dims])
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"this step cannot be traced: {_first_line(error)}") from error
    closed_over = _lift_closed_over(graph)
    prepare_for_inductor(graph)
    return TracedStep(spec, graph, batch, state, rates, closed_over)


class _WholeStep:
    """The step as a function of its tensors; see `TracedStep.graph` for their order."""

    def __init__(self, spec: StepSpec, state: StepState, layout: BatchLayout) -> None:
        self._spec = spec
        self._state = state
        self._layout = layout
        self._places = [place for group in state.groups for place in group]
        self._trained = [place for place in self._places if state.tensors[place].requires_grad]

    def __call__(self, *inputs: Tensor) -> Tensor:
        num_state, num_rates = len(self._state.tensors), len(self._state.groups)
        state = list(inputs[:num_state])
        rates = inputs[num_state : num_state + num_rates]
        batch = self._layout.rebuild(inputs[num_state + num_rates :])
        with torch.enable_grad():
            variables = {place: state[place].detach().requires_grad_() for place in self._trained}
            output = self._forward({**dict(enumerate(state)), **variables}, batch)
            found = torch.autograd.grad(output.loss, list(variables.values()), allow_unused=True)
            gradients = cast("Sequence[Tensor | None]", found)
        with torch.no_grad():
            for place, gradient in zip(self._trained, gradients, strict=True):
                # A copy, as autograd makes where a gradient is shared or expanded; it costs a compiled step nothing.
                state[place].grad = None if gradient is None else gradient.clone()
            self._clip([state[place] for place in self._trained])
            OptimizerStep(self._spec.optimizer, self._state, state, rates).run()
            cells = list(state[self._state.totals].unbind())
            self._spec.metrics.accumulate(cells, *output, 1.0)
        return output.loss.detach()

    def _forward(self, tensors: dict[int, Tensor], batch: Batch) -> StepOutput:
        places = {**self._state.parameters, **self._state.buffers}
        members = {f"model.{name}": tensors[place] for name, place in places.items()}
        given = dict(members)
        output = torch.func.functional_call(_ForwardModule(self._spec), members, (batch,))
        for name, place in self._state.buffers.items():
            # A buffer that forward replaces instead of changing it: the user's own tensor takes the new value.
            if members[f"model.{name}"] is not given[f"model.{name}"]:
                tensors[place].copy_(members[f"model.{name}"].detach())
        return output

    def _clip(self, parameters: list[Tensor]) -> None:
        spec = self._spec
        if spec.clip_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, spec.clip_value, foreach=False)
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm, foreach=False)


class _ForwardModule(nn.Module):
    """Brings the user's function into a module, so that `functional_call` can swap the model's tensors for it."""

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        self.model = spec.model
        self._spec = spec

    def forward(self, batch: Batch) -> StepOutput:
        return run_forward(self._spec, self._spec.forward, batch)


def _refuse_unsupported(spec: StepSpec) -> None:
    """Raises EngineError for what a trace would silently get wrong."""
    if spec.accumulate != 1:
        raise EngineError(f"a compiled step cannot accumulate gradients yet (accumulate={spec.accumulate})")
    if spec.scaler is not None:
        raise EngineError("a compiled step cannot scale gradients yet (precision fp16)")
    if any(optimizer_hooks(spec.optimizer)):
        raise EngineError("the optimizer has hooks: a compiled step would not call them")
    if any("lr" not in group for group in spec.optimizer.param_groups):
        raise EngineError(f"{type(spec.optimizer).__name__} has a parameter group without 'lr'")
    for parameter in (*spec.model.parameters(), *spec.trained()):
        if type(parameter) not in (Tensor, nn.Parameter):
            raise EngineError(
                f"the model has a parameter of type {type(parameter).__name__}: only plain tensors are traced"
            )
        if has_gradient_hooks(parameter):
            raise EngineError("a parameter has gradient hooks: a compiled step would not call them")


def _lift_closed_over(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Turns the real tensors that were met while tracing into inputs of the graph, after the others."""
    lifted: dict[int, tuple[Tensor, torch.fx.Node]] = {}
    nodes = list(graph.graph.nodes)
    last = [node for node in nodes if node.op == "placeholder"][-1]
    for node in nodes:
        if node.op != "get_attr" or all(user.target is _LIFT_FRESH for user in node.users):
            continue  # the second kind is a constant made in forward: torch.tensor(2.0)
        tensor = getattr(graph, node.target)
        if tensor.requires_grad:
            raise EngineError(
                f"forward uses a tensor of shape {list(tensor.shape)} that requires a gradient and is no parameter of "
                "the model: register it as one"
            )
        if id(tensor) not in lifted:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"closed_over_{len(lifted)}")
            last.meta = dict(node.meta)
            lifted[id(tensor)] = tensor, last
        node.replace_all_uses_with(lifted[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [tensor for tensor, _ in lifted.values()]


_LIFT_FRESH = torch.ops.aten.lift_fresh_copy.default


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
