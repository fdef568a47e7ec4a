"""A benchmark: blocks of fresh processes, every arm once in each, in random order.

The replicate is the block: what differs from process to process (addresses, clocks, neighbours) differs between
blocks, and pairs of arms are formed within them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fasttrain.errors import ConfigError, FasttrainError
from fasttrain.measure.bench.record import ArmRecord, BenchRecord, BlockFigures, Design
from fasttrain.measure.bench.task import BlockResult, BlockTask
from fasttrain.measure.verdict.stats import FEWEST_PAIRS, MOST_PAIRS, Noise, margin_for, noise_of, verdict

__all__ = ["ArmSpec", "BenchPlan", "Watcher", "log_ratios", "measured_noise", "orders", "run_bench"]

MAX_REPEATS = 2
"""So often a block of an arm that was flagged, or whose process died, is run again."""

RunBlock = Callable[[BlockTask], BlockResult]


class Watcher(Protocol):
    """Looks at the machine around each block; see `Machine`."""

    def before(self) -> int | None:
        """Threads of others that run or wait for a core."""
        ...

    def flags(self, wanted: int | None, /) -> tuple[str, ...]:
        """What was wrong since, where so many threads wanted to run, the block's own among them."""
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
        timed_s: least seconds of timed steps in a process.
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
    timed_s: float = 1.0
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


def run_bench(
    plan: BenchPlan,
    run_block: RunBlock,
    watcher: Watcher,
    log: Callable[[str], None],
    *,
    environment: dict[str, Any],
    command: str,
    created: str,
) -> tuple[BenchRecord, bool]:
    """Measures what was planned.

    Args:
        plan: what to measure.
        run_block: runs a task in a fresh process.
        watcher: of the machine.
        log: told how far it is.
        environment: for the record, which adds nothing to it.
        command: for the record.
        created: for the record.

    Returns:
        The record, and whether an interrupt (Ctrl-C) ended it early.

    Raises:
        FasttrainError: the reference cannot run, or no arm could be timed.
        KeyboardInterrupt: an interrupt came before any arm was timed.
    """
    log(f"{plan.workload}: the reference's losses")
    reference = _reference(plan, run_block)
    progress = _Progress(plan, reference, run_block, watcher, log)
    is_extended = is_interrupted = False
    try:
        progress.run(range(plan.blocks))
        extension = range(plan.blocks, min(2 * plan.blocks, MOST_PAIRS))
        is_extended = len(extension) > 0 and (plan.extend or progress.is_undecided())
        if is_extended:
            log(f"the extension: {len(extension)} blocks more")
            progress.run(extension)
    except KeyboardInterrupt:
        is_interrupted = True
    arms = progress.records()
    if not arms and is_interrupted:
        raise KeyboardInterrupt
    if not arms:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in progress.refused.items())
        raise FasttrainError(f"no arm could be timed: {reasons}")
    record = BenchRecord(
        workload=reference.workload or {},
        command=command,
        created=created,
        environment=environment,
        design=_design(plan, is_extended),
        arms=arms,
        refused=progress.refused,
        noise=measured_noise(plan, arms) or plan.noise,
        notes=(*progress.notes, *(("interrupted: fewer blocks than planned",) if is_interrupted else ())),
    )
    return record, is_interrupted


def _design(plan: BenchPlan, is_extended: bool) -> Design:
    return Design(
        blocks=plan.blocks,
        extended=is_extended,
        warmup_s=plan.warmup_s,
        timed_s=plan.timed_s,
        threads=plan.threads,
        seed=plan.seed,
    )


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


def measured_noise(plan: BenchPlan, arms: Mapping[str, ArmRecord]) -> Noise | None:
    """What an arm against itself told; None where that was not planned, or gave too few pairs."""
    if plan.aa is None or not set(plan.aa) <= set(arms):
        return None
    pairs = log_ratios(arms[plan.aa[0]], arms[plan.aa[1]])
    return noise_of(pairs) if len(pairs) >= FEWEST_PAIRS else None


def _reference(plan: BenchPlan, run_block: RunBlock) -> BlockResult:
    task = BlockTask(
        source="textbook", workload=plan.workload, device=plan.device, threads=plan.threads, reference=None
    )
    found = run_block(task)
    problem = found.refused or found.died
    if problem is not None:
        raise FasttrainError(f"the reference, the textbook's loop, cannot run: {problem}")
    return found


@dataclass
class _Measured:
    """What is known of an arm so far."""

    description: str
    agreement: float | None
    tolerance: float
    blocks: list[BlockFigures] = field(default_factory=list[BlockFigures])
    repeated: list[BlockFigures] = field(default_factory=list[BlockFigures])

    def add(self, result: BlockResult) -> None:
        if result.agreement is not None:
            self.agreement = max(self.agreement or 0.0, result.agreement)


class _Progress:
    """The blocks so far."""

    def __init__(
        self,
        plan: BenchPlan,
        reference: BlockResult,
        run_block: RunBlock,
        watcher: Watcher,
        log: Callable[[str], None],
    ) -> None:
        self.refused: dict[str, str] = {}
        self.notes: list[str] = []
        self._plan = plan
        self._reference = reference
        self._run_block = run_block
        self._watcher = watcher
        self._log = log
        self._specs = {spec.label: spec for spec in plan.arms}
        self._taking_part = set(self._specs)
        self._orders = orders(list(self._specs), plan.seed)
        self._measured: dict[str, _Measured] = {}

    def run(self, blocks: range) -> None:
        """Runs these blocks. An arm that is refused, or whose process keeps dying, takes no further part."""
        for block in blocks:
            for position, label in enumerate(next(self._orders)):
                if label in self._taking_part:
                    self._run_arm(block, position, label)

    def records(self) -> dict[str, ArmRecord]:
        """Of the arms that were timed, in the order of the plan."""
        found = {label: self._measured[label] for label in self._specs if label in self._measured}
        return {
            label: ArmRecord(
                description=arm.description,
                agreement=arm.agreement,
                tolerance=arm.tolerance,
                blocks=tuple(arm.blocks),
                repeated=tuple(arm.repeated),
            )
            for label, arm in found.items()
            if label not in self.refused and arm.blocks
        }

    def is_undecided(self) -> bool:
        """Whether a comparison that was asked for is inconclusive."""
        arms, against = self.records(), self._plan.against
        if against not in arms:
            return False
        margin = margin_for(None if self._plan.noise is None else self._plan.noise.floor)
        pairs = [log_ratios(arms[against], arm) for label, arm in arms.items() if label != against]
        return any(verdict(each, margin).kind == "INCONCLUSIVE" for each in pairs if each)

    def _run_arm(self, block: int, position: int, label: str) -> None:
        """One arm's turn, run again while it is flagged or its process dies."""
        for repeats in range(MAX_REPEATS + 1):
            spec, others = self._specs[label], self._watcher.before()
            result = self._run_block(self._task(block, position, spec))
            seen = self._watcher.flags(None if others is None else others + spec.threads)
            if result.refused is not None:
                self._refuse(label, block, result.refused)
                return
            is_last = repeats == MAX_REPEATS
            if result.figures is None:
                self._died(label, block, result, is_last=is_last)
                continue
            flags = (*result.figures.flags, *seen)
            figures = replace(result.figures, runnable=others, flags=flags, repeats=repeats)
            self._keep(label, result, figures, is_good=is_last or not flags)
            if is_last or not flags:
                return

    def _keep(self, label: str, result: BlockResult, figures: BlockFigures, *, is_good: bool) -> None:
        arm = self._measured.setdefault(label, _Measured(result.description, result.agreement, result.tolerance or 0.0))
        arm.add(result)
        (arm.blocks if is_good else arm.repeated).append(figures)
        flagged = f" ({', '.join(figures.flags)})" if figures.flags else ""
        again = "" if is_good else ", to be repeated"
        rate = f"{figures.step_s * 1e6:,.1f} us a step, {figures.samples_per_s:,.0f} samples/s"
        self._log(f"block {figures.block + 1}: {label}: {rate}{flagged}{again}")

    def _died(self, label: str, block: int, result: BlockResult, *, is_last: bool) -> None:
        self._log(f"block {block + 1}: {label}: the process died: {result.died}{'' if is_last else ', to be repeated'}")
        if not is_last:
            return
        self._log(result.last_words)
        reason = f"its process died {MAX_REPEATS + 1} times: {result.died}"
        if label in self._measured:  # what it gave before stands
            self._taking_part.discard(label)
            self.notes.append(f"{label}: takes no part from block {block + 1} on: {reason}")
        else:
            self._refuse(label, block, reason)

    def _refuse(self, label: str, block: int, reason: str) -> None:
        self._taking_part.discard(label)
        self.refused[label] = reason if block == 0 else f"in block {block + 1}: {reason}"
        self._log(f"not timed: {label}: {self.refused[label]}")

    def _task(self, block: int, position: int, spec: ArmSpec) -> BlockTask:
        return BlockTask(
            source=spec.source,
            workload=self._plan.workload,
            device=self._plan.device,
            threads=spec.threads,
            reference=self._reference.running_losses,
            warmup_s=self._plan.warmup_s,
            timed_s=self._plan.timed_s,
            block=block,
            position=position,
        )
