"""Runs what was planned: block by block, each in rounds, and again what was flagged or died."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fasttrain.errors import FasttrainError
from fasttrain.measure.bench.messages import ArmTask, ProcessDiedError, Started
from fasttrain.measure.bench.plan import ArmSpec, BenchPlan, StartArm, Watcher, log_ratios, orders
from fasttrain.measure.bench.record import ArmRecord, BenchRecord, BlockFigures, Design
from fasttrain.measure.bench.rounds import SLICE_S, Process, Timing, run_rounds
from fasttrain.measure.verdict.stats import FEWEST_PAIRS, MOST_PAIRS, Noise, margin_for, noise_of, verdict

__all__ = ["measured_noise", "run_bench"]

MAX_REPEATS = 2
"""So often the rounds of a block that was flagged are run again, and a process that died is started again."""

MOST_WAITED = 0.05
"""A process that waits for a core for more than this share of its time is flagged."""

MOST_AWAKE = 0.05
"""A process whose threads use cores for more than this share of the others' time each is flagged: those of OpenMP look
for more work a while before they sleep."""


def run_bench(
    plan: BenchPlan,
    start: StartArm,
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
        start: starts the process of an arm.
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
    reference = _reference(plan, start)
    progress = _Progress(plan, reference, start, watcher, log)
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
        slice_s=SLICE_S,
        threads=plan.threads,
        seed=plan.seed,
    )


def measured_noise(plan: BenchPlan, arms: Mapping[str, ArmRecord]) -> Noise | None:
    """What an arm against itself told; None where that was not planned, or gave too few pairs."""
    if plan.aa is None or not set(plan.aa) <= set(arms):
        return None
    pairs = log_ratios(arms[plan.aa[0]], arms[plan.aa[1]])
    return noise_of(pairs) if len(pairs) >= FEWEST_PAIRS else None


def _reference(plan: BenchPlan, start: StartArm) -> Started:
    task = ArmTask(source="textbook", workload=plan.workload, device=plan.device, threads=plan.threads, reference=None)
    try:
        with start(task) as process:
            found = process.started
    except ProcessDiedError as error:
        raise FasttrainError(f"the reference, the textbook's loop, cannot run: {error}") from error
    if found.refused is not None:
        raise FasttrainError(f"the reference, the textbook's loop, cannot run: {found.refused}")
    return found


@dataclass
class _Measured:
    """What is known of an arm so far."""

    description: str
    agreement: float | None
    tolerance: float
    blocks: list[BlockFigures] = field(default_factory=list[BlockFigures])
    repeated: list[BlockFigures] = field(default_factory=list[BlockFigures])


class _Progress:
    """The blocks so far."""

    def __init__(
        self, plan: BenchPlan, reference: Started, start: StartArm, watcher: Watcher, log: Callable[[str], None]
    ) -> None:
        self.refused: dict[str, str] = {}
        self.notes: list[str] = []
        self._plan = plan
        self._reference = reference
        self._start = start
        self._watcher = watcher
        self._log = log
        self._specs = {spec.label: spec for spec in plan.arms}
        self._taking_part = set(self._specs)
        self._orders = orders(list(self._specs), plan.seed)
        self._draw = random.Random(f"rounds {plan.seed}")
        self._measured: dict[str, _Measured] = {}

    def run(self, blocks: range) -> None:
        """Runs these blocks. An arm that is refused, or whose process keeps dying, takes no further part."""
        for block in blocks:
            order = [label for label in next(self._orders) if label in self._taking_part]
            with ExitStack() as stack:
                self._run_block(_Block(block, order, stack))

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

    def _run_block(self, block: _Block) -> None:
        """The rounds of a block, run again while one of its arms is flagged or dies in them."""
        for repeats in range(MAX_REPEATS + 1):
            for label in block.order:
                while label in self._taking_part and label not in block.processes:
                    self._start_arm(block, label)
            others = self._watcher.before()
            timed, died = run_rounds(block.processes, self._plan.timed_s, self._draw)
            figures: dict[str, BlockFigures] = {}
            for label, timing in timed.items():
                seen = self._watcher.flags(None if others is None else others + self._specs[label].threads)
                try:
                    figures[label] = _figures(block, self._specs[label], timing, seen, others, repeats)
                except ProcessDiedError as error:
                    died[label] = error
            is_good = not died and not any(each.flags for each in figures.values())
            is_last = is_good or repeats == MAX_REPEATS
            for label, error in died.items():
                del block.processes[label]
                self._died(block, label, error, is_last=is_last)
            for label, each in figures.items():
                self._keep(label, block.processes[label].started, each, is_good=is_last)
            if is_last:
                return

    def _start_arm(self, block: _Block, label: str) -> None:
        """Starts the process of an arm, if it can run."""
        spec = self._specs[label]
        task = ArmTask(
            source=spec.source,
            workload=self._plan.workload,
            device=self._plan.device,
            threads=spec.threads,
            reference=self._reference.running_losses,
            warmup_s=self._plan.warmup_s,
        )
        try:
            process = block.stack.enter_context(self._start(task))
        except ProcessDiedError as error:
            self._died(block, label, error, is_last=False)
            return
        if process.started.refused is None:
            block.processes[label] = process
        else:
            self._refuse(label, block.number, process.started.refused)

    def _keep(self, label: str, started: Started, figures: BlockFigures, *, is_good: bool) -> None:
        arm = self._measured.setdefault(label, _Measured(started.description, started.agreement, started.tolerance))
        if started.agreement is not None:
            arm.agreement = max(arm.agreement or 0.0, started.agreement)
        (arm.blocks if is_good else arm.repeated).append(figures)
        flagged = f" ({', '.join(figures.flags)})" if figures.flags else ""
        again = "" if is_good else ", to be repeated"
        rate = f"{figures.step_s * 1e6:,.1f} us a step, {figures.samples_per_s:,.0f} samples/s"
        self._log(f"block {figures.block + 1}: {label}: {rate}{flagged}{again}")

    def _died(self, block: _Block, label: str, error: ProcessDiedError, *, is_last: bool) -> None:
        """A process of an arm has died; `is_last`: these were the last rounds of the block."""
        block.deaths[label] = deaths = block.deaths.get(label, 0) + 1
        is_out = deaths > MAX_REPEATS
        again = "" if is_out or is_last else ", to be started again"
        self._log(f"block {block.number + 1}: {label}: the process died: {error}{again}")
        if not is_out:
            if is_last:
                self.notes.append(f"{label}: not in block {block.number + 1}: its process died: {error}")
            return
        self._log(error.last_words)
        reason = f"its process died {deaths} times: {error}"
        if label in self._measured and self._measured[label].blocks:  # what it gave before stands
            self._taking_part.discard(label)
            self.notes.append(f"{label}: takes no part from block {block.number + 1} on: {reason}")
        else:
            self._refuse(label, block.number, reason)

    def _refuse(self, label: str, block: int, reason: str) -> None:
        self._taking_part.discard(label)
        self.refused[label] = reason if block == 0 else f"in block {block + 1}: {reason}"
        self._log(f"not timed: {label}: {self.refused[label]}")


@dataclass
class _Block:
    """A block that runs.

    Attributes:
        number: from 0.
        order: the arms in the order in which their processes are started.
        stack: what these live in.
        processes: those that live and can be timed, by label.
        deaths: how many processes of an arm have died in this block.
    """

    number: int
    order: list[str]
    stack: ExitStack
    processes: dict[str, Process] = field(default_factory=dict[str, Process])
    deaths: dict[str, int] = field(default_factory=dict[str, int])


def _figures(
    block: _Block, arm: ArmSpec, timing: Timing, seen: tuple[str, ...], others: int | None, repeats: int
) -> BlockFigures:
    """Of an arm in a block; raises `ProcessDiedError`."""
    process = block.processes[arm.label]
    started, state = process.started, process.state()
    waited = ("waited",) if timing.waited_share > MOST_WAITED else ()
    awake = ("awake",) if timing.awake_share > MOST_AWAKE * arm.threads else ()
    return BlockFigures(
        block=block.number,
        position=block.order.index(arm.label),
        step_s=timing.step_s,
        steps=timing.steps,
        seconds=timing.seconds,
        rounds=timing.rounds,
        samples_per_step=started.samples_per_step,
        import_s=started.import_s,
        compile_s=state.compile_s,
        first_step_s=started.first_step_s,
        peak_bytes=state.peak_bytes,
        runnable=others,
        flags=(*waited, *awake, *seen),
        repeats=repeats,
        engine=state.engine,
    )
