"""What a step changes, tensor by tensor: a program's change against eager's, as finely as rounding allows.

A rule for all tensors of a kind together cannot see a lost weight decay: it is a thousandth of what Adam changes. Here
each entry of each parameter, and of the optimizer's state of it, has a bound of its own. How uncertain its change is
follows from its gradient: one that is small beside the others of the model is, relatively, uncertain, and where it is
zero but for rounding (a bias in front of batch norm), an optimizer that divides by its size makes whole steps of noise.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.step.spec import StepSpec

__all__ = ["NOISE_LIMIT", "NOISE_SHARE", "distance", "gradients_seen", "is_judged", "other_change"]

CHANGE_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
"""By dtype, of eager's change: the entry's, or the root mean square of its tensor's where that is more. Programs of
small models, and an exact step of a transformer of 4 layers, stayed within a tenth of the bounds that follow."""

GRADIENT_NOISE = 0.1
"""Of the tolerance: by how much each gradient is uncertain, relative to the largest of the model."""

NUM_ROUNDINGS = 4
"""An entry is rounded when it is stored: once or twice in a step, in eager and in the program."""

NOISE_SHARE = 0.01
"""Of a tensor's entries, how many may be beyond their bounds."""

NOISE_LIMIT = 2.5
"""Times the largest change among tensors of a kind: beyond it no entry may be, however uncertain its gradient is."""


@contextmanager
def gradients_seen(spec: StepSpec | None, tensors: Sequence[Tensor]) -> Generator[list[Tensor | None]]:
    """Notes the gradients of a step that is run inside.

    Args:
        spec: the step; None: nothing is noted.
        tensors: its state.

    Yields:
        For each tensor, filled in while the step runs: the gradient of the parameter that it is, or whose state of the
        same shape it is; None where there is none. They are the step's own, which it may scale or clip afterwards.
    """
    found: list[Tensor | None] = [None] * len(tensors)
    if spec is None:
        yield found
        return
    places = {id(tensor): place for place, tensor in enumerate(tensors)}

    def note(parameter: Tensor) -> None:
        for each in (parameter, *spec.optimizer.state.get(parameter, {}).values()):
            if isinstance(each, Tensor) and each.shape == parameter.shape and id(each) in places:
                found[places[id(each)]] = parameter.grad

    with ExitStack() as hooks:
        for parameter in spec.trained():
            if parameter.requires_grad:
                hooks.callback(parameter.register_post_accumulate_grad_hook(note).remove)
        yield found


def is_judged(tensor: Tensor, gradient: Tensor | None) -> bool:
    """True where `other_change` looks at a tensor with this gradient."""
    return gradient is not None and tensor.dtype in CHANGE_TOLERANCE and tensor.numel() > 0


def other_change(
    before: Sequence[Tensor],
    got: Sequence[Tensor],
    wanted: Sequence[Tensor],
    kinds: Sequence[str],
    gradients: Sequence[Tensor | None],
    slack: Sequence[float],
) -> str | None:
    """What is the first tensor that a program changes in another way than eager? Waits for the device.

    Args:
        before: the state before the step.
        got: as the program made it.
        wanted: as eager made it.
        kinds: of each tensor.
        gradients: of each tensor, as `gradients_seen` gives them; one without is not judged.
        slack: of each of these: by how much its entries may differ besides.

    Returns:
        What differs; None if nothing does.
    """
    judged = [place for place, gradient in enumerate(gradients) if is_judged(wanted[place], gradient)]
    # HOST READ: this and all that follows; it runs once when a program is taken up, and at each audit.
    largest_gradient = max((_sizes(gradients[place]).max().item() for place in judged), default=0.0)
    limits = dict.fromkeys(kinds, 0.0)
    for place in judged:
        change = _finite(distance(wanted[place], before[place])).max().item()
        limits[kinds[place]] = max(limits[kinds[place]], NOISE_LIMIT * change)
    for place in judged:
        bounds = _Bounds(_sizes(gradients[place]), largest_gradient, limits[kinds[place]], slack[place])
        reason = _differs(before[place], got[place], wanted[place], bounds)
        if reason is not None:
            return f"{kinds[place]}: a tensor of shape {list(wanted[place].shape)} {reason}"
    return None


class _Bounds(NamedTuple):
    """What the bounds of a tensor's entries are made of: its gradient's sizes, the model's largest, limit and slack."""

    sizes: Tensor
    largest_gradient: float
    limit: float
    slack: float


def _differs(before: Tensor, got: Tensor, wanted: Tensor, bounds: _Bounds) -> str | None:
    tolerance, eps = CHANGE_TOLERANCE[wanted.dtype], torch.finfo(wanted.dtype).eps
    error, change = distance(got, wanted), _finite(distance(wanted, before))
    scale = change.clamp(min=change.square().mean().sqrt())
    rounding = NUM_ROUNDINGS * eps * _finite(torch.maximum(wanted.abs(), before.abs()).double()) + bounds.slack
    # Both sides times the gradient's size, which may be 0.
    noise = scale * tolerance * (bounds.sizes + GRADIENT_NOISE * bounds.largest_gradient)
    is_close = error * bounds.sizes <= noise + rounding * bounds.sizes
    is_possible = error <= bounds.limit + rounding
    count = int((~(is_close & is_possible)).sum())
    if count <= NOISE_SHARE * error.numel() and bool(is_possible.all()):
        return None
    if torch.equal(got, before):
        return f"stays as it is, eager changes it by {change.max().item():.3g}"
    return (
        f"changes otherwise: {count} of {error.numel()} entries differ by more than rounding can do, at most by "
        f"{error.max().item():.3g}; eager changes them by {change.max().item():.3g} at most"
    )


def _sizes(gradient: Tensor | None) -> Tensor:
    """Of each entry; 0 where it is no number, of which nothing follows."""
    assert gradient is not None
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    return _finite(dense.detach().abs().double())


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def distance(tensor: Tensor, other: Tensor) -> Tensor:
    """Of each entry, in double precision; 0 where both are the same infinity (a mask's) or both no number."""
    tensor, other = tensor.double(), other.double()
    is_same = (tensor == other) | (tensor.isnan() & other.isnan())
    return (tensor - other).abs().masked_fill(is_same, 0.0)
