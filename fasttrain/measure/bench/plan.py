"""The plan of a benchmark: blocks of fresh processes, every arm once in each, started one by one and timed in turn.

The replicate is the block: what differs from process to process (addresses, what is compiled) differs between blocks,
and pairs of arms are formed within them. What differs from second to second hits all arms of a block; see `rounds.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from fasttrain.errors import ConfigError
from fasttrain.measure.bench.messages import ArmTask
from fasttrain.measure.bench.record import ArmRecord
from fasttrain.measure.bench.rounds import Process
from fasttrain.measure.verdict.stats import FEWEST_PAIRS, MOST_PAIRS, Noise

__all__ = ["ArmSpec", "BenchPlan", "StartArm", "Watcher", "log_ratios", "orders"]

StartArm = Callable[[ArmTask], AbstractContextManager[Process]]
"""Starts a process that lives within the context; raises `ProcessDiedError`."""


class Watcher(Protocol):
    """Looks at the machine around each block; see `Machine`."""

    def before(self) -> int | None:
        """Threads of others that run or wait for a core."""
        ...

    def flags(self, wanted: int | None, /) -> tuple[str, ...]:
        """What was wrong since, where so many threads wanted to run, the arm's own among them."""
        ...


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """An arm of a plan.

    Attributes:
        label: its name in the record.
        source: what makes it, as `find_factory` takes it.
        threads: torch's.
    """

    label: str
    source: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What is to be measured, fixed before it begins.

    Attributes:
        workload: name of the job.
        device: where every arm trains.
        arms: each label once.
        blocks: how many; when it is extended, twice as many, but no more than can be judged.
        extend: make the extension in any case.
        against: label of the arm that the others are asked to be compared with: the extension is made if one of these
            comparisons is inconclusive after the blocks. None: no question is asked.
        aa: labels of one arm that is in the plan twice, to measure the machine's noise; None: it is not measured.
        noise: what is known of the machine's noise.
        warmup_s: least seconds of steps before any is timed.
        timed_s: seconds of timed steps of an arm in a block, on average over the arms; there are 20 rounds at least.
        threads: see `Design.threads`.
        seed: of the order of the arms.

    Raises:
        ConfigError: a number is out of range, there is no arm, a label is there twice or not at all, or there are too
            few blocks to tell noise from.
    """

    workload: str
    device: str
    arms: tuple[ArmSpec, ...]
    blocks: int = 10
    extend: bool = False
    against: str | None = None
    aa: tuple[str, str] | None = None
    noise: Noise | None = None
    warmup_s: float = 0.5
    timed_s: float = 2.0
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks it."""
        labels = [arm.label for arm in self.arms]
        if not labels or len(set(labels)) < len(labels):
            raise ConfigError(f"arms {', '.join(labels) or '(none)'}: give one or more, each once")
        if self.against is not None and self.against not in labels:
            raise ConfigError(f"against {self.against!r}: it must be one of the arms {', '.join(labels)}")
        if self.blocks < 1 or self.threads < 1 or self.seed < 0:
            raise ConfigError(f"blocks {self.blocks}, threads {self.threads}, seed {self.seed}: use 1, 1, 0 or more")
        if self.blocks > MOST_PAIRS:
            raise ConfigError(f"blocks {self.blocks}: {MOST_PAIRS} pairs are the most that are judged")
        if self.aa is not None and self.blocks < FEWEST_PAIRS:
            raise ConfigError(f"blocks {self.blocks}: noise needs {FEWEST_PAIRS} or more")
        if not (0 <= self.warmup_s < math.inf and 0 < self.timed_s < math.inf):
            raise ConfigError(f"warmup {self.warmup_s:g} s, timed {self.timed_s:g} s: use 0 or more, and more than 0")


def orders(labels: Sequence[str], seed: int) -> Iterator[list[str]]:
    """For each block every label once, in random order: what drifts on the machine then hits all alike."""
    draw = random.Random(seed)
    while True:
        yield draw.sample(labels, len(labels))


def log_ratios(first: ArmRecord, second: ArmRecord) -> list[float]:
    """log(time of the first / time of the second) in each block that both have: above 0, the second is faster."""
    theirs = {block.block: block.step_s / block.samples_per_step for block in second.blocks}
    return [
        math.log(block.step_s / block.samples_per_step / theirs[block.block])
        for block in first.blocks
        if block.block in theirs
    ]
