"""Time: clocks of devices, what steps have waited for, trials of several ways to run a step, the number of threads."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch

from fasttrain.device import Choice
from fasttrain.metrics import RunningMetrics
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import Gathered, StepSpec

__all__ = [
    "Clock",
    "CudaClock",
    "HostClock",
    "ThreadChoice",
    "Trial",
    "Waits",
    "candidates",
    "choose_threads",
    "clock_of",
]

T = TypeVar("T")
Arm = TypeVar("Arm", bound=int | str)

ROUNDS = 10
"""Rounds of each arm that count, after one that warms up."""

MARGIN = 0.98
"""An arm is chosen over one before it if its step takes less than this share of the time."""


class Clock(Protocol):
    """Times calls, in seconds. In tests something else stands in for it."""

    def timed(self, run: Callable[[], T]) -> tuple[T, float]:
        """What `run` returns, and how long it took."""
        ...


class HostClock:
    """For what is over when the call returns."""

    def timed(self, run: Callable[[], T]) -> tuple[T, float]:
        """See `Clock.timed`."""
        begin = time.perf_counter()
        result = run()
        return result, time.perf_counter() - begin


class CudaClock:
    """For what a call has queued on a CUDA device: from when the device could begin until it is done. Waits for it.

    Args:
        device: whose current stream is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def timed(self, run: Callable[[], T]) -> tuple[T, float]:
        """See `Clock.timed`."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        result = run()
        end.record(stream)
        end.synchronize()  # HOST READ: in a measurement or a trial, some hundred times an engine
        return result, begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock for what runs on a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Waits:
    """What steps have waited for: traces, compilers, captures.

    Attributes:
        seconds: in all; None where there was no wait yet.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None

    def add(self, seconds: float) -> None:
        """Notes one more."""
        self.seconds = (self.seconds or 0.0) + seconds


class Trial(Generic[Arm]):
    """Rounds of several arms in turn.

    Args:
        arms: in the order of their turns; the first is what the others have to beat.
        steps: of a round, which must be long enough for the clock.
    """

    def __init__(self, arms: Iterable[Arm], steps: int = 1) -> None:
        self._steps = steps
        self._seconds: dict[Arm, list[float]] = {arm: [] for arm in arms}

    @property
    def turn(self) -> Arm:
        """The arm that runs the next step. The order of the arms is reversed after each round."""
        rounds = [self._rounds(arm) for arm in self._seconds]
        arms = list(self._seconds)
        return min(arms if min(rounds) % 2 == 0 else arms[::-1], key=self._rounds)

    @property
    def is_over(self) -> bool:
        """Whether every arm has had its rounds."""
        return all(self._rounds(arm) > ROUNDS for arm in self._seconds)

    def add(self, arm: Arm, seconds: float) -> None:
        """What a step took by an arm."""
        self._seconds[arm].append(seconds)

    def step_s(self) -> dict[Arm, float]:
        """Seconds of a step by each arm: the lower quartile over rounds of their mean.

        Other processes only add to a round, and they may add to most rounds of one arm: a scheduler's time slice is as
        long as one or two rounds.
        """
        return {arm: _lower_quartile(self._means(seconds)[1:]) for arm, seconds in self._seconds.items()}

    def fastest(self) -> Arm:
        """The arm to go on with."""
        step_s = self.step_s()
        first, *others = step_s
        for arm in others:
            first = arm if step_s[arm] < MARGIN * step_s[first] else first
        return first

    def _rounds(self, arm: Arm) -> int:
        return len(self._seconds[arm]) // self._steps

    def _means(self, seconds: list[float]) -> list[float]:
        whole = len(seconds) - len(seconds) % self._steps
        return [statistics.fmean(seconds[at : at + self._steps]) for at in range(0, whole, self._steps)]


def _lower_quartile(values: list[float]) -> float:
    return sorted(values)[len(values) // 4]


Batch = Any

SHARE = 0.01
MOST_S = 0.1
"""Measuring takes at most this share of the job's steps; and no more rounds are begun after so long."""

LEAST_ROUNDS, MOST_ROUNDS = 5, 15
"""Of a turn for each count; one more goes before, to warm up."""

TURN_S = 1e-3
"""Least seconds of a turn, for the clock's sake; one step before it, which wakes the threads, is not timed."""

WARM_STEPS = 3
"""Steps with one thread before anything is timed: caches and the optimizer's state are made in them."""

HOPELESS = 2.0
"""A count that takes so many times as long as one thread when it is first tried is left out, with all above it. On a
machine at work threads wait for each other: a CNN's step with two took up to 16 times as long as with one."""

THREADS_MARGIN = 0.97
"""More threads are taken where a step with them takes less than this share, and less in three of four rounds."""


@dataclass(frozen=True, kw_only=True)
class ThreadChoice:
    """How many threads, and why; times in the reason are microseconds a step."""

    count: int
    reason: str


def candidates(most: int) -> list[int]:
    """1, 2, 4 and so on, and `most` itself."""
    return sorted({*(1 << power for power in range(most.bit_length())), most})


def choose_threads(
    spec: StepSpec, batches: Iterable[Batch], *, steps: int, clock: Callable[[], float] = time.perf_counter
) -> ThreadChoice:
    """Times eager steps with 1, 2, 4 ... threads, up to as many as torch has now, in rounds that alternate.

    The steps are those of a copy of model and optimizer. Model, optimizer, metrics, torch's number of threads and its
    random generator are left as they were; where `batches` counts its passes, the caller brings that back.

    Args:
        spec: the step, before any of an unfinished accumulation.
        batches: of the job, on its device; those of one pass are kept, and gone through again at their end.
        steps: that are to come; where measuring would take too large a share of them, it is left.
        clock: tells seconds.

    Returns:
        The fewest threads that no other count is clearly faster than. One, where the job is too short to measure; on
        another device than the CPU as many as torch has, unmeasured.
    """
    most = torch.get_num_threads()
    if spec.device.type != "cpu":
        return ThreadChoice(count=most, reason=f"torch's own: steps on {spec.device.type} are not measured")
    if most == 1:
        return ThreadChoice(count=1, reason="torch has one here: there is one core, or OMP_NUM_THREADS is 1")
    trial = _Trial(counts=candidates(most), steps=steps, clock=clock)
    if not trial.pays(1):
        return trial.too_short()
    try:
        with torch.random.fork_rng(devices=[]):
            return trial.run(EagerEngine(_copy_of(spec), Choice("eager", "measured")), itertools.cycle(batches))
    finally:
        torch.set_num_threads(most)


def _copy_of(spec: StepSpec) -> StepSpec:
    """The same step over a model, an optimizer, metrics and a scaler of its own."""
    # Together: the parameters of the one are those of the other.
    model, optimizer = copy.deepcopy((spec.model, spec.optimizer))
    model.train()
    return replace(
        spec,
        model=model,
        optimizer=optimizer,
        metrics=RunningMetrics(spec.device, spec.metrics.user_metrics),
        scaler=None if spec.scaler is None else torch.amp.GradScaler(spec.device.type),
        gathered=Gathered(),
    )


Round = Mapping[int, float]
"""Seconds a step, by the number of threads."""


class _Trial:
    """Rounds of one turn for each count, within what the job allows.

    Args:
        counts: of threads, rising from 1.
        steps: of the job.
        clock: tells seconds.
    """

    def __init__(self, *, counts: Sequence[int], steps: int, clock: Callable[[], float]) -> None:
        self._counts = list(counts)
        self._steps = steps
        self._clock = clock
        self._begin = clock()

    def pays(self, turn_steps: int) -> bool:
        """Whether the fewest rounds, of turns of so many timed steps, are a small share of the job."""
        needed = WARM_STEPS + len(self._counts) * (1 + LEAST_ROUNDS) * (1 + turn_steps)
        return needed <= SHARE * self._steps

    def too_short(self) -> ThreadChoice:
        """What is chosen where measuring does not pay."""
        return ThreadChoice(
            count=1, reason=f"not measured: the job is too short, with at most {self._steps:,} steps to come"
        )

    def run(self, engine: EagerEngine, batches: Iterator[Batch]) -> ThreadChoice:
        """Measures and chooses; leaves torch's threads anywhere."""
        torch.set_num_threads(1)
        for batch in itertools.islice(batches, WARM_STEPS):
            engine.step(batch)
        step_s = self._turn(engine, 1, list(itertools.islice(batches, 2)))
        turn_steps = math.ceil(TURN_S / step_s) if step_s < TURN_S else 1
        if not self.pays(turn_steps):
            return self.too_short()
        chunks = (list(itertools.islice(batches, 1 + turn_steps)) for _ in itertools.count())
        counts = self._climb(engine, next(chunks))
        if counts == [1]:
            return ThreadChoice(
                count=1,
                reason=f"measured {step_s * 1e6:,.0f} us a step, and over {HOPELESS:g} times that with 2 threads",
            )
        most_s = max(MOST_S, SHARE * self._steps * step_s)
        rounds: list[Round] = []
        while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and self._seconds < MOST_S):
            chunk = next(chunks)
            rounds.append({count: self._turn(engine, count, chunk, most_s) for count in counts})
            if self._seconds > most_s and len(rounds) < LEAST_ROUNDS:
                return ThreadChoice(count=1, reason=f"not measured to the end: it took longer than {most_s:.2g} s")
            counts.reverse()
        return ThreadChoice(count=_fewest(rounds), reason=self._told(rounds))

    def _climb(self, engine: EagerEngine, batches: Sequence[Batch]) -> list[int]:
        """Warms every count up, from the fewest threads, as far as more are not hopeless; the counts that are not."""
        hopeless_s = HOPELESS * self._turn(engine, 1, batches)
        turn_s = hopeless_s * (len(batches) - 1)
        for place, count in enumerate(self._counts):
            # Twice, for a single turn may have been interrupted by other work.
            if place and all(self._turn(engine, count, batches, turn_s) > hopeless_s for _ in range(2)):
                return self._counts[:place]
        return list(self._counts)

    def _told(self, rounds: Sequence[Round]) -> str:
        counts = sorted(rounds[0])
        medians = {count: statistics.median(each[count] for each in rounds) for count in counts}
        times = ", ".join(f"{_named(count)} {median * 1e6:,.0f}" for count, median in medians.items())
        left = [count for count in self._counts if count not in counts]
        rest = f"; {_named(left[0])} over {HOPELESS:g} times as long as one" if left else ""
        return f"measured us a step: {times} (medians of {len(rounds)} rounds, {self._seconds:.2g} s){rest}"

    @property
    def _seconds(self) -> float:
        return self._clock() - self._begin

    def _turn(self, engine: EagerEngine, count: int, batches: Sequence[Batch], within_s: float = math.inf) -> float:
        """Seconds a step with so many threads: of all batches but the first, or of those begun within some seconds."""
        torch.set_num_threads(count)
        begin = self._clock()
        engine.step(batches[0])
        seconds, steps = self._clock() - begin, 1
        if seconds <= within_s:  # else the threads were not just waking up
            begin, steps = self._clock(), 0
            for batch in batches[1:]:
                engine.step(batch)
                steps, seconds = steps + 1, self._clock() - begin
                if seconds > within_s:
                    break
        return seconds / steps


def _fewest(rounds: Sequence[Round]) -> int:
    """The fewest threads that no more are clearly faster than."""
    counts = sorted(rounds[0])
    return next(count for count in counts if not any(_is_faster(more, count, rounds) for more in counts))


def _named(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _is_faster(count: int, fewer: int, rounds: Sequence[Round]) -> bool:
    """Whether more threads are clearly faster than fewer, by the ratios of each round."""
    if count <= fewer:
        return False
    _, median, upper = statistics.quantiles([each[count] / each[fewer] for each in rounds], n=4, method="inclusive")
    return median < THREADS_MARGIN and upper < 1.0
