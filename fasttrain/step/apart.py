"""Program and eager differ in single precision: is the program wrong, or are eager's kernels less exact?

Some of torch's are: on one thread of a CPU, batch norm on channels_last images sums 50,000 values one after the other.
That puts its gradients off by up to a fiftieth of the largest; a program does better. So the two things that can go
wrong on the way to a program are judged apart, each against what rounds as it does, by the usual tolerances:

- the trace: the recorded operators, run one by one, against eager, which runs the same kernels;
- the compiler: the program against the recorded operators in double precision, from which eager's own distance tells
  how exact a single-precision step of this model can be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fasttrain.step.changes import distance
from fasttrain.step.parity import compare_steps
from fasttrain.step.snapshot import Snapshot, fits_in_memory
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["is_eagers_rounding"]

Batch = Any

SLACK = 4.0
"""Times the root mean square of eager's error: where a program rounds as eager does, one entry in 16,000 is beyond."""


def is_eagers_rounding(
    traced: TracedStep,
    program: Callable[[Batch], Tensor],
    batch: Batch,
    before: Snapshot,
    loss: Tensor,
    followed: Sequence[Tensor | None],
) -> bool | None:
    """True where both the trace and the compiler are right, so that what differs is eager's own rounding.

    Waits for the device, for the time of some five steps; leaves the state as it finds it. Only a whole step in single
    precision can be judged, and only where there is memory for it in double precision.

    Args:
        traced: what was compiled; it holds for the batch.
        program: one step, the candidate.
        batch: what it and eager were given.
        before: the state before that step; what is there now is eager's.
        loss: eager's.
        followed: of each tensor, the gradient in eager's step (see `gradients_seen`).

    Returns:
        None where it cannot be judged.
    """
    if not traced.is_whole or traced.spec.precision != "fp32":
        return None
    tensors, kinds, device = traced.tensors, traced.kinds, traced.spec.device
    has_replaced = isinstance(traced.inputs(batch), Mismatch)  # eager, in its step: a buffer that forward assigns anew
    if has_replaced or not fits_in_memory([*tensors] * 3, device):
        return None
    after = Snapshot.of(tensors, device)

    def differs(program: Callable[[Batch], Tensor], right: Snapshot, loss: Tensor, slack: list[float]) -> str | None:
        def reference(_: Batch) -> Tensor:
            right.restore(tensors, device)
            return loss

        before.restore(tensors, device)
        found = compare_steps(tensors, kinds, device, reference, program, batch, followed=followed, slack=slack)
        return found[1]

    before.restore(tensors, device)
    try:
        exact_loss = _exactly(traced, batch)
        exact = Snapshot.of(tensors, device)
        in_compiler = differs(program, exact, exact_loss, _typical_errors(after, exact))
        in_trace = differs(partial(_as_recorded, traced), after, loss, [0.0] * len(tensors))
    except RuntimeError:  # an operator that is not made for double precision
        return None
    finally:
        after.restore(tensors, device)
    return in_compiler is None and in_trace is None


def _typical_errors(eager: Snapshot, exact: Snapshot) -> list[float]:
    """Of each tensor, some times eager's own error: what a program that is as exact stays below."""
    pairs = zip(eager.copies, exact.copies, strict=True)
    # HOST READ: of each tensor, where a program and eager differ.
    return [SLACK * distance(mine, right).square().mean().sqrt().item() for mine, right in pairs]


def _exactly(traced: TracedStep, batch: Batch) -> Tensor:
    """The recorded step in double precision, rounded at its end."""
    exact = [each.double() if each.dtype == torch.float32 else each for each in _inputs(traced, batch)]
    with torch.no_grad():
        loss = _in_double(traced.parts[traced.due].graph)(*exact)
        for tensor, result in zip(traced.tensors, exact, strict=False):
            tensor.copy_(result)
    return loss.float()


def _in_double(graph: GraphModule) -> GraphModule:
    """The same operators; where one makes single precision (forward's `.float()`), it makes double."""
    doubled = copy.deepcopy(graph).double()
    for node in doubled.graph.nodes:
        if node.kwargs.get("dtype") == torch.float32:
            node.kwargs = {**node.kwargs, "dtype": torch.float64}
    doubled.recompile()
    return doubled


def _as_recorded(traced: TracedStep, batch: Batch) -> Tensor:
    return traced.run(_inputs(traced, batch))


def _inputs(traced: TracedStep, batch: Batch) -> list[Tensor]:
    inputs = traced.inputs(batch)
    assert not isinstance(inputs, Mismatch), inputs.reason
    return inputs
