"""The receipt of a run: how many times faster it was than other loops on its data. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["TEXTBOOK", "TUNED", "Ratio", "Receipt", "ReceiptArm"]

TEXTBOOK = "textbook"
TUNED = "tuned eager"
"""The arms that a run's own are compared with, by their names."""


@dataclass(frozen=True, kw_only=True)
class ReceiptArm:
    """One of the loops.

    Attributes:
        samples_per_s: median of the rounds.
        loss_difference: the largest relative difference of its running losses to the textbook's, over the first steps.
        is_at_equal_precision: it computes in the textbook's fp32.
    """

    samples_per_s: float
    loss_difference: float
    is_at_equal_precision: bool


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster `arm` is than `to`, with its interval, from the rounds as pairs."""

    arm: str
    to: str
    speedup: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What was measured.

    Attributes:
        arms: by name.
        ratios: of the run's own loops to the textbook's and to the tuned one, and of the tuned one to the textbook's.
        refused: loops that were not timed, with the reason; where the textbook's is one, no other was tried.
        rounds: how many; 0 where nothing was timed.
        threads: torch's, in all of them.
    """

    arms: Mapping[str, ReceiptArm]
    ratios: Sequence[Ratio]
    refused: Mapping[str, str]
    rounds: int
    threads: int

    def ratio(self, arm: str, to: str) -> Ratio | None:
        """Of two arms; None where it was not measured."""
        return next((ratio for ratio in self.ratios if (ratio.arm, ratio.to) == (arm, to)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in summary.json."""
        return asdict(self)
