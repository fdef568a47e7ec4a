"""Does a program give eager's numbers? Judged on a real batch, from the same state, before and while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.batch import tensors as tensors_of
from fasttrain.data.ragged import Ragged
from fasttrain.device import autocast_dtype
from fasttrain.metrics import FIRST_USER_TOTAL
from fasttrain.step.changes import NOISE_LIMIT, NOISE_SHARE, distance, gradients_seen, is_judged, other_change
from fasttrain.step.snapshot import Snapshot
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import METRICS, PARAMETERS
from fasttrain.step.torch_private import without_cudnn_tf32

__all__ = ["compare_steps"]

LOSS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative, by the loss's dtype. Rounding is far below; a lost term is not."""

STATE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""By dtype, of the largest change that a step makes to tensors of one kind."""

METRICS_TOLERANCE = 0.02
"""Of the largest change: a prediction at the threshold may fall to either side. The loss is judged apart."""

PARAMETER_SLACK = 10.0
"""Parameters may differ by so many times more, and a hundredth of their entries by more still: where a gradient is zero
but for rounding (a bias in front of BatchNorm), an optimizer that divides by its size makes whole steps of noise."""


def compare_steps(
    tensors: Sequence[Tensor],
    kinds: Sequence[str],
    device: torch.device,
    eager: Callable[[Any], Tensor],
    program: Callable[[Any], Tensor],
    batch: Any,
    spec: StepSpec | None = None,
    is_excused: Callable[[Snapshot, Tensor, Sequence[Tensor | None]], bool | None] | None = None,
    current: Callable[[], Sequence[Tensor]] | None = None,
    followed: Sequence[Tensor | None] | None = None,
    slack: Sequence[float] | None = None,
) -> tuple[Tensor, str | None]:
    """Runs one step both ways from the same state, and leaves the state as eager made it. Waits for the device.

    On CUDA, both run without TF32 in cuDNN; the setting is put back.

    Args:
        tensors: the whole state of the step.
        kinds: of each tensor: those of one kind are judged by the largest change among them.
        device: where they are.
        eager: one step, the reference.
        program: one step, the candidate.
        batch: what both are given.
        spec: whose gradients and precision count too, None for a step that keeps no gradients.
        is_excused: asked where something differs, with the state before the step, eager's loss and `followed`; where it
            cannot tell (None), the rules for kinds decide.
        current: the state after eager's step, whose forward may have put other tensors in place of these.
        followed: the gradient that each tensor follows, see `gradients_seen`; None: seen in eager's step, by `spec`.
        slack: by how much each entry of these may differ besides; None: 0.

    Returns:
        Eager's loss, and what differs beyond the tolerance (None if nothing does).
    """
    before = Snapshot.of(tensors, device, spec)
    # TF32 rounds a convolution's inputs to 10 bits. Both sides may call other kernels of cuDNN, of which some use it.
    with without_cudnn_tf32() if device.type == "cuda" else nullcontext():
        tried = _try_program(program, batch, before, tensors, device, spec)
        if isinstance(tried, str):
            return eager(batch), tried
        program_loss, got = tried
        with gradients_seen(spec, tensors) as seen:
            loss = eager(batch)
    followed = seen if followed is None else followed
    owners = [] if spec is None else spec.with_gradients()
    gradients = [parameter.grad for parameter in owners]
    wanted = [*(tensors if current is None else current()), *_or_zero(gradients, owners)]
    old, new = [[*each.copies, *_or_zero(each.gradients, owners)] for each in (before, got)]
    kinds = [*kinds, *["gradients"] * len(gradients)]
    precision = None if spec is None else autocast_dtype(spec.precision)
    slack = [0.0] * len(tensors) if slack is None else slack

    def differs(finely: Sequence[Tensor | None]) -> str | None:
        return _difference(old, new, wanted, kinds, program_loss, loss, precision or loss.dtype, finely, slack)

    # Gradients of half precision are too uncertain to tell more than the rules for kinds do.
    difference = differs(followed if precision is None else [])
    if difference is None or is_excused is None:
        return loss, difference
    is_right = is_excused(before, loss, followed)
    return loss, differs([]) if is_right is None else None if is_right else difference


def _try_program(
    program: Callable[[Any], Tensor],
    batch: Any,
    before: Snapshot,
    tensors: Sequence[Tensor],
    device: torch.device,
    spec: StepSpec | None,
) -> tuple[Tensor, Snapshot] | str:
    """One step by program: its loss and the state as it made it, or why it cannot run. State and batch are put back."""
    given = [leaf.clone() for leaf in _leaves(batch)]
    try:
        loss = program(batch)
    except RuntimeError as error:  # some operators compile and then refuse to run (oneDNN's LSTM)
        return f"it cannot run: {error}"
    else:
        return loss, Snapshot.of(tensors, device, spec)
    finally:
        before.restore(tensors, device, spec)
        _put_back(batch, given)


def _leaves(batch: Any) -> list[Tensor]:
    return [leaf for each in tensors_of(batch) for leaf in (each if isinstance(each, Ragged) else (each,))]


def _put_back(batch: Any, given: list[Tensor]) -> None:
    """What a forward that changes its batch in place has made of it must not be what the next one is given."""
    with torch.no_grad():
        for leaf, copy in zip(_leaves(batch), given, strict=True):
            if not torch.equal(leaf, copy):
                leaf.copy_(copy)


def _or_zero(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients; for None a zero of the parameter's dtype on its device, which takes no memory worth naming."""
    return [
        parameter.new_zeros(()) if gradient is None else gradient
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


def _difference(
    before: Sequence[Tensor],
    got: Sequence[Tensor],
    wanted: Sequence[Tensor],
    kinds: Sequence[str],
    got_loss: Tensor,
    wanted_loss: Tensor,
    precision: torch.dtype,
    followed: Sequence[Tensor | None],
    slack: Sequence[float],
) -> str | None:
    """HOST READ: all of it; it runs once when a program is taken up, and at each audit."""
    tolerance = max(
        LOSS_TOLERANCE.get(dtype, LOSS_TOLERANCE[torch.float32]) for dtype in (precision, wanted_loss.dtype)
    )
    if not torch.allclose(got_loss, wanted_loss, rtol=tolerance, atol=0.0, equal_nan=True):
        return f"the loss is {got_loss.item():.9g}, eager's is {wanted_loss.item():.9g}"
    for place in [place for place, kind in enumerate(kinds) if kind == METRICS]:
        loss_bound = tolerance * wanted_loss.double().abs()
        reason = _totals_differ(before[place], got[place], wanted[place], loss_bound)
        if reason is not None:
            return reason
    finely = {place for place, gradient in enumerate(followed) if is_judged(wanted[place], gradient)}
    groups = {place: (kinds[place], wanted[place].dtype) for place in range(len(kinds)) if place not in finely}
    for group in dict.fromkeys(groups.values()):  # by dtype, too: a count of batches must not set the scale of means
        members = [place for place, each in groups.items() if each == group]
        old, new, right = [[side[index] for index in members] for side in (before, got, wanted)]
        allowed = max(STATE_TOLERANCE.get(dtype, 0.0) for dtype in (group[1], precision))
        reason = _kind_differs(group[0], old, new, right, allowed)
        if reason:
            return f"{group[0]}: {reason}"
    return other_change(before, got, wanted, kinds, followed, slack)


def _totals_differ(before: Tensor, got: Tensor, wanted: Tensor, loss_bound: Tensor) -> str | None:
    """What differs in the totals of metrics, one by one: next to a large one, a small one could be missing unseen."""
    if not _is_close(got[:1], wanted[:1], loss_bound):
        return f"the total of the loss is {got[0].item():.9g}, eager's is {wanted[0].item():.9g}"
    if not torch.equal(got[2:FIRST_USER_TOTAL], wanted[2:FIRST_USER_TOTAL]):
        return "the counts of what accuracy is of differ"
    got, wanted, before = (each[FIRST_USER_TOTAL:] for each in (got, wanted, before))
    if not _is_close(got, wanted, METRICS_TOLERANCE * distance(wanted, before) + 1e-4):
        return "the totals of the user's metrics differ"
    return None


def _kind_differs(
    kind: str, before: Sequence[Tensor], got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float
) -> str | None:
    for old, after, right in zip(before, got, wanted, strict=True):
        change = _largest(distance(right, old))
        if change > 1e-6 * _largest(right.double().abs()) and torch.equal(after, old):
            return f"a tensor of shape {list(old.shape)} stays as it is, eager changes it by {change:.3g}"
    largest = max(_largest(distance(after, old)) for after, old in zip(wanted, before, strict=True))
    is_exact = not wanted[0].is_floating_point()
    rounding = 0.0 if is_exact else 1e-6 * max(_largest(right.double().abs()) for right in wanted)
    tolerance = METRICS_TOLERANCE if kind == METRICS else 0.0 if is_exact else tolerance
    bound = tolerance * largest * (PARAMETER_SLACK if kind == PARAMETERS else 1.0) + rounding
    errors = [distance(after, right) for after, right in zip(got, wanted, strict=True)]
    count, beyond = sum(error.numel() for error in errors), sum(int((~(error <= bound)).sum()) for error in errors)
    worst = max((error.max().item() for error in errors if error.numel()), default=0.0)
    allowed = NOISE_SHARE * count if kind == PARAMETERS else 0
    if beyond > allowed or not worst <= max(bound, NOISE_LIMIT * largest):
        return f"{beyond} of {count} entries differ by more than {bound:.3g}, at most by {worst:.3g}"
    return None


def _is_close(got: Tensor, wanted: Tensor, bound: Tensor) -> bool:
    return not (distance(got, wanted) > bound + 1e-9 * wanted.abs()).any()


def _largest(distances: Tensor) -> float:
    """The largest that is finite."""
    return distances.nan_to_num(nan=0.0, posinf=0.0).max().item() if distances.numel() else 0.0
