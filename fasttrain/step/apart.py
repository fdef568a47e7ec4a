"""Program and eager differ in single precision: is the program wrong, or are eager's kernels less exact?

Some of torch's are: on one thread of a CPU, batch norm on channels_last images sums 50,000 values one after the other.
That puts its gradients off by up to a fiftieth of the largest; a program does better. So the two things that can go
wrong on the way to a program are judged apart, each against what rounds as it does, by the usual tolerances:

- the trace: the recorded operators, run one by one, against eager, which runs the same kernels;
- the compiler: the program against the recorded operators in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttrain.step.parity import Snapshot, compare_steps, fits_in_memory
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["is_eagers_rounding"]

Batch = Any


def is_eagers_rounding(
    traced: TracedStep, program: Callable[[Batch], Tensor], batch: Batch, before: Snapshot, loss: Tensor
) -> bool:
    """True where both the trace and the compiler are right, so that what differs is eager's own rounding.

    Waits for the device, for the time of some five steps; leaves the state as it finds it. Only a whole step in single
    precision can be judged, and only where there is memory for it in double precision.

    Args:
        traced: what was compiled; it holds for the batch.
        program: one step, the candidate.
        batch: what it and eager were given.
        before: the state before that step; what is there now is eager's.
        loss: eager's.
    """
    if not traced.is_whole or traced.spec.precision != "fp32":
        return False
    tensors, kinds, device = traced.tensors, traced.kinds, traced.spec.device
    has_replaced = isinstance(traced.inputs(batch), Mismatch)  # eager, in its step: a buffer that forward assigns anew
    if has_replaced or not fits_in_memory([*tensors] * 2, device):
        return False
    after = Snapshot.of(tensors, device)

    def eager(_: Batch) -> Tensor:
        after.restore(tensors, device)
        return loss

    before.restore(tensors, device)
    try:
        _, in_compiler = compare_steps(tensors, kinds, device, partial(_exactly, traced), program, batch)
        before.restore(tensors, device)
        _, in_trace = compare_steps(tensors, kinds, device, eager, partial(_as_recorded, traced), batch)
    except RuntimeError:  # an operator was recorded with a dtype of its own, and now meets double precision
        return False
    finally:
        after.restore(tensors, device)
    return in_compiler is None and in_trace is None


def _exactly(traced: TracedStep, batch: Batch) -> Tensor:
    """The recorded step in double precision, rounded at its end."""
    exact = [each.double() if each.dtype == torch.float32 else each for each in _inputs(traced, batch)]
    loss = traced.run(exact)
    with torch.no_grad():
        for tensor, result in zip(traced.tensors, exact, strict=False):
            tensor.copy_(result)
    return loss.float()


def _as_recorded(traced: TracedStep, batch: Batch) -> Tensor:
    return traced.run(_inputs(traced, batch))


def _inputs(traced: TracedStep, batch: Batch) -> list[Tensor]:
    inputs = traced.inputs(batch)
    assert not isinstance(inputs, Mismatch), inputs.reason
    return inputs
