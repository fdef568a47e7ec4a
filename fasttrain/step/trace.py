"""From the user's model, forward, optimizer and one batch: the graphs of the whole training step.

Forward, loss, backward, scaling, clipping, the user's own optimizer and the running metrics are recorded together. A
graph changes the very tensors of the user's objects in place, so that their `state_dict()`s are right at any moment.

One graph is a step. Where gradients are accumulated there are two: one gathers them, one ends each group of batches.
Where the optimizer's step cannot be recorded there is the first of these alone, and the optimizer steps eagerly.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasttrain.errors import EngineError, first_line
from fasttrain.step.capture import Capture
from fasttrain.step.function import Gradients, Part, StepFunction, TracedPart
from fasttrain.step.guards import Guards
from fasttrain.step.kernels import use_kernels
from fasttrain.step.optimizer import MOVED, GroupOptions, OptimizerNotTracedError
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import StepState
from fasttrain.step.torch_private import (
    has_gradient_hooks,
    has_onednn_lstm,
    is_changed,
    prepare_for_inductor,
    trace_graph,
    without_onednn,
)

__all__ = ["Mismatch", "TracedStep", "trace_step"]

Batch = Any


class Mismatch(NamedTuple):
    """Why a traced step does not hold now."""

    reason: str


class TracedStep:
    """A training step as graphs, and what they hold for.

    Args:
        spec: the step.
        parts: its graphs: one for the whole step; or one that gathers gradients and one that ends a group of batches;
            or the first of these alone.
        capture: of forward, loss and metrics.
        state: the tensors that they change.
        options: of the optimizer's groups.
        why_eager: why the optimizer steps eagerly after the graph; None where its step is recorded.

    Attributes:
        spec, parts, why_eager: see above.
        tensors: the state that the graphs change, the user's own tensors.
        kinds: what each of them is (see `StepState`).
    """

    def __init__(
        self,
        spec: StepSpec,
        parts: Sequence[TracedPart],
        capture: Capture,
        state: StepState,
        options: GroupOptions,
        why_eager: str | None = None,
    ) -> None:
        self.spec = spec
        self.parts = parts
        self.why_eager = why_eager
        self._capture = capture
        self._options = options
        of_others = {id(tensor): number for number, tensor in enumerate(capture.others)}
        self._others = [[of_others.get(id(tensor)) for tensor in part.closed_over] for part in parts]
        self._bind(state, self._new_guards())

    @property
    def is_whole(self) -> bool:
        """True where one graph holds all of the step."""
        return self.parts[0].part == "whole"

    @property
    def open_dims(self) -> Sequence[frozenset[int]]:
        """For each tensor of a batch that forward reads, the dimensions whose size is left open."""
        return self._capture.open_dims

    @property
    def leaf_places(self) -> Sequence[int | None]:
        """For each tensor of a batch that forward reads, its number among all; None where a walk does not meet it."""
        return self._capture.leaf_places

    @property
    def remark(self) -> str:
        """What the reason of a choice is to say of this step besides; mostly nothing."""
        if self.why_eager is None:
            return ""
        optimizer = type(self.spec.optimizer).__name__
        return f"; forward and backward are compiled, {optimizer} steps eagerly: {self.why_eager}"

    @property
    def gradients(self) -> list[Tensor]:
        """The parameters whose gradients are kept from step to step."""
        return [] if self.parts[0].part == "whole" else [self.tensors[place] for place in self.parts[0].reached]

    @property
    def due(self) -> int:
        """Which of the parts the next step runs."""
        return int(len(self.parts) > 1 and self.spec.gathered.count == self.spec.accumulate - 1)

    def inputs(self, batch: Batch) -> list[Tensor] | Mismatch:
        """The due graph's inputs for a batch, or why it does not hold for it or for the user's objects as they are.

        Makes no host read.
        """
        standing = self._standing()
        if isinstance(standing, Mismatch):
            return standing
        leaves = self._capture.leaves(batch)
        if isinstance(leaves, str):
            return Mismatch(leaves)
        due = self.due
        part = self.parts[due]
        gradients = [] if part.part == "whole" else self._gradients[due].current()
        if gradients is None:
            return Mismatch("gradients that other steps have left")
        found = [*standing, *gradients, *leaves, *part.closed_over]
        reason = part.differ(found)
        return found if reason is None else Mismatch(reason)

    def standing_inputs(self) -> list[Tensor] | Mismatch:
        """The first inputs of the due graph, which are the same for every batch: state and options."""
        standing = self._standing()
        if not isinstance(standing, Mismatch) and isinstance(reason := self._capture.leaves(), str):
            return Mismatch(reason)
        return standing

    def standing_examples(self) -> list[Tensor]:
        """Tensors like these, whether the step holds now or not."""
        return [*self.tensors, *self._options.examples]

    def _standing(self) -> list[Tensor] | Mismatch:
        reason = self._guards.mismatch()
        if reason is not None:
            return Mismatch(reason)
        if self.parts[self.due].part == "gather":
            return self.tensors
        options = self._options.current()
        return Mismatch("an option of a parameter group") if options is None else [*self.tensors, *options]

    def leaves(self, batch: Batch) -> list[Tensor] | None:
        """The tensors of a batch in the graphs' order, None where the graphs do not hold for it."""
        found = self._capture.leaves(batch)
        return None if isinstance(found, str) else found

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> Tensor:
        """The due part, operator by operator as recorded: what a compiled program must agree with.

        Returns:
            The batch's loss, detached.
        """
        return self.parts[self.due].graph(*inputs)

    def finish(self) -> None:
        """What is left to do in Python once the due part has run, by graph or by program."""
        due = self.due
        if self.parts[due].part == "gather":
            self._gradients[due].keep()
        elif self.parts[due].part == "last":
            self._gradients[due].drop()

    def rebind(self, batch: Batch | None = None) -> bool:
        """Binds the step to tensors that have replaced its own, as `load_state_dict` of an optimizer does.

        Args:
            batch: one for which the step is to hold; None: the example that was traced.

        Returns:
            False where nothing was replaced, or more has changed than that: trace anew.
        """
        if self._guards.mismatch() is None and not isinstance(self._capture.leaves(batch), str):
            return False
        state, guards = StepState(self.spec), self._new_guards()
        if guards.mismatch() is not None or state.signature != self._signature or not guards.agree(self._guards):
            return False
        with suppress(EngineError):
            state.refuse_overlaps()
            if self._capture.bind(state, batch):
                for part, others in zip(self.parts, self._others, strict=True):
                    for place, number in enumerate(others):
                        if number is not None:
                            part.closed_over[place] = self._capture.others[number]
                self._bind(state, guards)
                return True
        return False

    def _new_guards(self) -> Guards:
        options = None if self.why_eager is not None else self._options
        return Guards(self.spec, options, self._capture, is_gathering=self.parts[0].part != "whole")

    def _bind(self, state: StepState, guards: Guards) -> None:
        self.tensors = state.tensors
        self.kinds = state.kinds
        self._signature = state.signature
        self._guards = guards
        self._gradients = [
            Gradients(self.spec, [state.tensors[place] for place in part.reached]) for part in self.parts
        ]


def trace_step(spec: StepSpec, batch: Batch) -> TracedStep:
    """Records one step. Nothing is run and nothing of the user's objects is changed.

    Args:
        spec: the step; its optimizer must have made its state, so run steps eagerly until it has stepped once.
        batch: an example, on the device.

    Raises:
        EngineError: the step cannot be traced; the message says why.
    """
    try:
        _refuse_unsupported(spec)
        StepState(spec).refuse_overlaps()
        return _trace(spec, batch)
    except EngineError:
        raise
    except Exception as error:  # of the user's code, or of torch's over what it was not made for
        raise EngineError(f"this step cannot be traced: {first_line(error)}") from error


def _trace(spec: StepSpec, batch: Batch) -> TracedStep:
    """The step as far as it can be recorded."""
    parts: list[Part] = ["whole"] if spec.accumulate == 1 else ["gather", "last"]
    capture = Capture(spec, batch)
    try:
        return _trace_parts(spec, batch, capture, parts, MOVED)
    except OptimizerNotTracedError as error:
        if any(name in group for group in spec.optimizer.param_groups for name in MOVED[1:]):
            # Its code may ask more of an option than its sign.
            with suppress(OptimizerNotTracedError):
                return _trace_parts(spec, batch, capture, parts, MOVED[:1])
        return _trace_parts(spec, batch, capture, ["gather"], (), str(error))


def _trace_parts(
    spec: StepSpec,
    batch: Batch,
    capture: Capture,
    parts: Sequence[Part],
    moved: Sequence[str],
    why_eager: str | None = None,
) -> TracedStep:
    state, options = StepState(spec), GroupOptions(spec.optimizer, spec.device, moved)
    capture.bind(state, batch)
    try:
        traced = [_trace_part(spec, part, batch, capture, state, options) for part in parts]
    except RuntimeError as error:
        if capture.checkpointed is None:
            raise
        raise EngineError(
            "torch.utils.checkpoint recomputes a part of forward that draws random numbers or changes a buffer (as "
            f"dropout and batch norm do), which cannot be recorded{capture.checkpointed}"
        ) from error
    return TracedStep(spec, traced, capture, state, options, why_eager)


def _trace_part(
    spec: StepSpec, part: Part, batch: Batch, capture: Capture, state: StepState, options: GroupOptions
) -> TracedPart:
    leaves = capture.leaves(batch)
    if isinstance(leaves, str):
        raise EngineError(f"forward reads what changes while it is captured: {leaves}")
    function = StepFunction(spec, part, state, options, capture)
    before = list(state.tensors) if part == "gather" else [*state.tensors, *options.examples]
    gradients = [] if part == "whole" else [torch.zeros_like(state.tensors[place]) for place in function.differentiated]
    fixed: list[frozenset[int]] = [frozenset()] * (len(before) + len(gradients))
    graph = _record(function, [*before, *gradients, *leaves], [*fixed, *capture.open_dims])
    closed_over = _lift_closed_over(graph, capture)
    if part != "whole":
        gradients = _drop_unreached(graph, function, len(before), gradients)
    use_kernels(graph)
    prepare_for_inductor(graph)
    inputs = [*before, *gradients, *leaves]
    fixed = [frozenset()] * (len(inputs) - len(leaves))
    return TracedPart(function, part, graph, inputs, [*fixed, *capture.open_dims], closed_over, len(leaves))


def _record(
    function: StepFunction, inputs: Sequence[Tensor], open_dims: Sequence[frozenset[int]]
) -> torch.fx.GraphModule:
    graph = trace_graph(function, inputs, open_dims)
    if not has_onednn_lstm(graph):
        return graph
    # Its backward cannot be compiled; without oneDNN, torch records the cell's own operators. Only where it must be:
    # without oneDNN torch also takes the results of convolutions for contiguous that are channels_last when they run.
    with without_onednn():
        return trace_graph(function, inputs, open_dims)


def _drop_unreached(
    graph: torch.fx.GraphModule, function: StepFunction, first: int, gradients: list[Tensor]
) -> list[Tensor]:
    """Takes the gradients that there are none of out of a graph's inputs; returns those that stay."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    kept: list[Tensor] = []
    for node, place, gradient in zip(placeholders[first:], function.differentiated, gradients, strict=False):
        if place in function.reached:
            kept.append(gradient)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return kept


def _refuse_unsupported(spec: StepSpec) -> None:
    """Raises EngineError for what a trace would silently get wrong."""
    if any(isinstance(module, DistributedDataParallel) for module in spec.model.modules()):
        raise EngineError("the model is wrapped by DistributedDataParallel: a compiled step would not share gradients")
    if spec.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        raise EngineError("torch.use_deterministic_algorithms is on: a compiled step on a GPU adds up in any order")
    for name in spec.metrics.epoch_metrics:
        raise EngineError(f"the metric {name!r} is computed from the whole epoch, by Python code that gets every batch")
    for parameter in (*spec.model.parameters(), *spec.trained()):
        if type(parameter) not in (Tensor, nn.Parameter):
            raise EngineError(
                f"the model has a parameter of type {type(parameter).__name__}: only plain tensors are traced"
            )
        if has_gradient_hooks(parameter):
            raise EngineError("a parameter has gradient hooks: a compiled step would not call them")


def _lift_closed_over(graph: torch.fx.GraphModule, capture: Capture) -> list[Tensor]:
    """Turns the real tensors that were met while tracing into inputs of the graph, after the others."""
    lifted: dict[int, tuple[Tensor, torch.fx.Node]] = {}
    held: set[str] = set()
    nodes = list(graph.graph.nodes)
    last = [node for node in nodes if node.op == "placeholder"][-1]
    for node in nodes:
        if node.op != "get_attr" or all(user.target is _LIFT_FRESH for user in node.users):
            continue  # the second kind is a constant made in forward: torch.tensor(2.0)
        tensor = getattr(graph, node.target)
        if id(tensor) not in lifted:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"closed_over_{len(lifted)}")
            last.meta = dict(node.meta)
            lifted[id(tensor)] = tensor, last
        node.replace_all_uses_with(lifted[id(tensor)][1])
        graph.graph.erase_node(node)
        held.add(node.target)
    for name in held:
        delattr(graph, name)  # a program does not depend on its values
    graph.recompile()
    for tensor, node in lifted.values():
        if is_changed(graph, node):
            raise EngineError(
                f"forward changes {capture.name_of(tensor)}, which is no buffer of the step's model: give the step a "
                "model that holds all networks which forward runs, such as nn.ModuleDict({'generator': ..., "
                "'discriminator': ...}), or make a buffer of a tensor of your own (register_buffer)"
            )
    return [tensor for tensor, _ in lifted.values()]


_LIFT_FRESH = torch.ops.aten.lift_fresh_copy.default
