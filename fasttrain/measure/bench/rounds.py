"""The rounds of a block: the processes of its arms take turns, a slice of steps each, all others asleep.

On a shared machine the speed of a core swings by a factor of two within seconds, and each core's at other times. Arms
that are timed one after the other meet different speeds; arms that alternate every 50 ms and, of one thread each, go
from core to core together, meet nearly the same one in each round, and it is taken out. The more arms, the longer the
rounds, and the less of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fasttrain.measure.bench.messages import ArmState, ProcessDiedError, Slice, Started

__all__ = ["LEAST_ROUNDS", "SLICE_S", "Process", "Timing", "levels", "run_rounds"]

SLICE_S = 0.05
"""What a slice is meant to take: it is as many calls as took so long last, or one that takes longer. With the MLP's
eager loop against itself, the root mean square of log ratios in 12 blocks of a second each was about 0.02 with slices
of 0.02 or 0.05 s, 0.03 with 0.1 s, and 0.36 one after the other."""

LEAST_ROUNDS = 20

POLISHES = 20
"""So often at most medians are taken out; it has mostly settled after three or four."""


class Process(Protocol):
    """An arm in a process of its own; see `ArmProcess`."""

    @property
    def started(self) -> Started:
        """What it told once it was ready."""
        ...

    def slice(self, seconds: float, core: int, /) -> Slice:
        """Has it run steps for about so long, on one of the cores if it has one thread; raises `ProcessDiedError`."""
        ...

    def state(self) -> ArmState:
        """What is known of its arm by now; raises `ProcessDiedError`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What the rounds tell of an arm.

    Attributes:
        step_s: seconds of a step, at the speed that the machine had in the middle of the rounds; see `levels`.
        steps: that were timed.
        seconds: that they took.
        rounds: in which they were.
        waited_share: of that time, for a core.
        awake_share: of the others' time, in which this arm used a core all the same.
    """

    step_s: float
    steps: int
    seconds: float
    rounds: int
    waited_share: float
    awake_share: float


def run_rounds(
    processes: Mapping[str, Process], seconds: float, draw: random.Random
) -> tuple[dict[str, Timing], dict[str, ProcessDiedError]]:
    """Lets the arms take turns, in random order in each round, until they have so many seconds each on average.

    In a round, arms of one thread run on one core, in the next on another: left alone, each process would stay on a
    core of its own. Arms of several threads stay where the system puts them.

    Args:
        processes: by label.
        seconds: of each arm, on average; there are 20 rounds at least.
        draw: of the orders.

    Returns:
        What each arm that lived through all rounds took, and how the others died.
    """
    slices: dict[str, list[Slice]] = {label: [] for label in processes}
    died: dict[str, ProcessDiedError] = {}
    total_s, rounds = 0.0, 0
    while slices and (rounds < LEAST_ROUNDS or total_s < seconds * len(slices)):
        for label in draw.sample(list(slices), len(slices)):
            try:
                found = processes[label].slice(SLICE_S, rounds)
            except ProcessDiedError as error:
                died[label] = error
                del slices[label]
                continue
            slices[label].append(found)
            total_s += found.seconds
        rounds += 1
    return _timings(slices), died


def _timings(slices: Mapping[str, list[Slice]]) -> dict[str, Timing]:
    if not slices:
        return {}
    log_times = np.array([[math.log(each.seconds / each.steps) for each in found] for found in slices.values()])
    return {
        label: Timing(
            step_s=math.exp(level),
            steps=sum(each.steps for each in found),
            seconds=sum(each.seconds for each in found),
            rounds=len(found),
            waited_share=sum(each.waited_s for each in found) / sum(each.seconds for each in found),
            awake_share=sum(each.awake_s for each in found) / max(1e-9, sum(each.others_s for each in found)),
        )
        for (label, found), level in zip(slices.items(), levels(log_times), strict=True)
    }


def levels(log_times: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is each arm's own in log times that arm and round add up to: Tukey's median polish.

    Of two arms, the levels differ by the median of the rounds' differences. What an arm does in fewer than half of its
    slices does not show in its level: a disturbance, or a rare cost of its own. `Timing.seconds` holds both.

    Args:
        log_times: [arms, rounds].

    Returns:
        [arms], at the median round.
    """
    rest = log_times.copy()
    of_rounds, of_arms = np.zeros(rest.shape[1]), np.zeros(rest.shape[0])
    for _ in range(POLISHES):
        shift = np.median(rest, axis=0)
        rest -= shift
        of_rounds += shift
        shift = np.median(rest, axis=1)
        rest -= shift[:, None]
        of_arms += shift
        if np.abs(shift).max() < 1e-6:
            break
    return of_arms + np.median(of_rounds)
