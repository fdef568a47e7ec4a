"""Whether an arm trains the same numbers as the reference: its running losses against the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from fasttrain.errors import DataError

__all__ = ["check_losses", "running_means"]


def running_means(losses: Sequence[float]) -> list[float]:
    """The mean of the first loss, of the first two, and so on."""
    return [total / number for number, total in enumerate(accumulate(losses), start=1)]


def check_losses(found: Sequence[float], wanted: Sequence[float], tolerance: float) -> float:
    """The largest relative difference between an arm's running losses and the reference's.

    Args:
        found: as many as `wanted`, or more.
        wanted: of the reference.
        tolerance: what the difference may be.

    Raises:
        DataError: it is beyond the tolerance, or there are too few losses.
    """
    if len(found) < len(wanted):
        raise DataError(f"{len(found)} losses where the reference has {len(wanted)}: losses() gives one for each step")
    differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(found, wanted, strict=False)]
    largest = max(differences)
    if not all(difference <= tolerance for difference in differences):  # so that what is no number is refused too
        at = next(number for number, each in enumerate(differences, start=1) if not each <= tolerance)
        raise DataError(
            f"its losses leave the reference's: by {differences[at - 1]:.2g} relative at step {at}, "
            f"allowed is {tolerance:g}"
        )
    return largest
