"""Graphs of steps as they were recorded, with what their inputs are like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fasttrain.step.function import Part, StepFunction
from fasttrain.step.torch_private import tensor_check
from fasttrain.step.unroll import Unrolling, unroll

__all__ = ["InputKind", "TracedGraph", "TracedPart"]

InputKind = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Size, stride, dtype and device of an input."""

ALIGNMENT = 16
"""Bytes. Torch's own memory begins on such boundaries; slices and views of it need not."""


class TracedGraph:
    """A graph, and what its inputs are like.

    Args:
        recorded: the operators of a step.
        inputs: like those that the graph takes.
        open_dims: for each of these, the dimensions whose size is left open.
        unrolling: how the graph is made of the recorded one; None: it is that.
        anywhere: the places of the inputs that begin anywhere in memory, such as slices: a batch's tensors.

    Attributes:
        recorded, open_dims, unrolling, anywhere: see above.
        kinds: of each input.
        differ: says what differs in inputs from those that were traced, None if nothing does.
    """

    def __init__(
        self,
        recorded: torch.fx.GraphModule,
        inputs: Sequence[Tensor],
        open_dims: Sequence[frozenset[int]],
        unrolling: Unrolling | None = None,
        anywhere: Sequence[int] = (),
    ) -> None:
        self.recorded = recorded
        self.anywhere = tuple(anywhere)
        self.unrolling = unrolling
        self.open_dims = list(open_dims)
        self.kinds: list[InputKind] = [(each.shape, each.stride(), each.dtype, each.device) for each in inputs]
        self.differ = tensor_check(inputs, self.open_dims)
        if inputs[0].device.type == "cuda":
            self.differ = _aligned(self.differ, [at for at in range(len(inputs)) if at not in self.anywhere])

    @cached_property
    def graph(self) -> torch.fx.GraphModule:
        """The graph itself. Unrolling one takes 0.1 s: a child does it where it is only compiled."""
        return self.recorded if self.unrolling is None else unroll(self.recorded, self.unrolling)


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
