"""Which of several ways to run the same steps is fastest, timed in turn while all of them train."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Generic, TypeVar

__all__ = ["Trial"]

ROUNDS = 10
"""Rounds of each arm that count, after one that warms up."""

MARGIN = 0.98
"""An arm is chosen over one before it if its step takes less than this share of the time."""

Arm = TypeVar("Arm", bound=int | str)


class Trial(Generic[Arm]):
    """Rounds of several arms in turn.

    Args:
        arms: in the order of their turns; the first is what the others have to beat.
        steps: of a round, which must be long enough for the clock.
    """

    def __init__(self, arms: Iterable[Arm], steps: int = 1) -> None:
        self._steps = steps
        self._seconds: dict[Arm, list[float]] = {arm: [] for arm in arms}

    def __contains__(self, arm: Arm) -> bool:
        """Whether an arm takes part."""
        return arm in self._seconds

    @property
    def turn(self) -> Arm:
        """The arm that is to run the next step."""
        return min(self._seconds, key=self._rounds)

    @property
    def is_over(self) -> bool:
        """Whether every arm has had its rounds."""
        return all(self._rounds(arm) > ROUNDS for arm in self._seconds)

    def add(self, arm: Arm, seconds: float) -> None:
        """What a step took by an arm."""
        self._seconds[arm].append(seconds)

    def drop(self, arm: Arm) -> None:
        """Goes on without an arm, if it takes part."""
        self._seconds.pop(arm, None)

    def medians(self) -> dict[Arm, float]:
        """Seconds of a step by each arm: the median over rounds of their mean."""
        return {arm: statistics.median(self._means(seconds)[1:]) for arm, seconds in self._seconds.items()}

    def fastest(self) -> Arm:
        """The arm to go on with."""
        medians = self.medians()
        first, *others = medians
        for arm in others:
            first = arm if medians[arm] < MARGIN * medians[first] else first
        return first

    def _rounds(self, arm: Arm) -> int:
        return len(self._seconds[arm]) // self._steps

    def _means(self, seconds: list[float]) -> list[float]:
        whole = len(seconds) - len(seconds) % self._steps
        return [statistics.fmean(seconds[at : at + self._steps]) for at in range(0, whole, self._steps)]
