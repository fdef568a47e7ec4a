"""What a comparison of two trainings found: plain data, for the terminal, for JSON and for a page."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = [
    "Change",
    "Comparison",
    "CounterChange",
    "Difference",
    "MemoryUse",
    "Outcome",
    "Pair",
    "Side",
    "Timing",
    "Why",
]

Outcome = Literal["FASTER", "SAME", "SLOWER", "INCONCLUSIVE", "NOT COMPARABLE", "TIME NOT JUDGED"]

EXIT_CODES: dict[Outcome, int] = {
    "FASTER": 0,
    "SAME": 0,
    "SLOWER": 1,
    "INCONCLUSIVE": 3,
    "TIME NOT JUDGED": 3,
    "NOT COMPARABLE": 4,
}

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of what Ctrl-C ended, by the shells' convention."""

OTHER = "other"
"""The phase that explains nothing."""

ROUNDED_TO = 6
"""Digits of a microsecond: what sums of floats leave behind is not a part of a step."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two.

    Attributes:
        label: the arm, the profile or the revision.
        source: the file or the repository that it is from.
        created: when it was measured, ISO 8601.
        command: what measures it again.
        step_s: median seconds of a step; of a profile, those of its clean pass.
        workload: what was trained, as its job describes itself.
        environment: hardware, versions and load.
    """

    label: str
    source: str
    created: str
    command: str
    step_s: float
    workload: Mapping[str, Any]
    environment: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One block.

    Attributes:
        block: its number.
        a: seconds that A took for a row; through a shared arm, how many times that arm's.
        b: likewise.
        speedup: a / b.
    """

    block: int
    a: float
    b: float
    speedup: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What the pairs say.

    Attributes:
        speedup: time(A) / time(B): above 1, B is faster.
        low: lower end of its interval; None where there are too few pairs for one.
        high: upper end, likewise.
        margin: relative; what is within it counts as the same.
        noise_floor: of the machine, relative; None where it was not measured.
        blocks_needed: about so many further ones would decide it; None where it is decided, or it would take too many.
        through: the arm that both results share and both times are divided by; None where pairs are direct.
        pairs: in order of their blocks.
    """

    speedup: float
    low: float | None
    high: float | None
    margin: float
    noise_floor: float | None
    blocks_needed: int | None
    through: str | None
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """The time of a part of a step in A and in B, us.

    Attributes:
        name: of the phase or operator.
        phase: of an operator; "" for a phase.
        a_us: None where A has no such part.
        b_us: None where B has no such part.
    """

    name: str
    phase: str = ""
    a_us: float | None
    b_us: float | None

    @property
    def us(self) -> float:
        """How much longer B takes."""
        return (self.b_us or 0.0) - (self.a_us or 0.0)


@dataclass(frozen=True, kw_only=True)
class Why:
    """The change in the time of a step, taken apart twice: by phase, and by operator.

    Attributes:
        step: the whole step.
        phases: every phase with a name, in the order of a step; "other" is not one of them.
        operators: every operator that either profile lists, the largest change first.
        is_complete: neither profile left operators out of its list, so that one that is missing did not run.
    """

    step: Change
    phases: tuple[Change, ...]
    operators: tuple[Change, ...]
    is_complete: bool

    @property
    def unexplained_by_phases_us(self) -> float:
        """What is left of the change: the phase "other", and what the phases do not add up to."""
        return round(self.step.us - sum(phase.us for phase in self.phases), ROUNDED_TO)

    @property
    def unexplained_by_operators_us(self) -> float:
        """What is left of the change: operators that are not listed, and those of the phase "other"."""
        explained = sum(operator.us for operator in self.operators if operator.phase != OTHER)
        return round(self.step.us - explained, ROUNDED_TO)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the differences spelt out."""
        return {
            "step": _with_change(self.step),
            "phases": [_with_change(phase) for phase in self.phases],
            "unexplained_by_phases_us": self.unexplained_by_phases_us,
            "operators": [_with_change(operator) for operator in self.operators],
            "unexplained_by_operators_us": self.unexplained_by_operators_us,
            "is_complete": self.is_complete,
        }


@dataclass(frozen=True, kw_only=True)
class CounterChange:
    """An exact count in A and in B.

    Attributes:
        name: what is counted.
        a: in A; None where it was not counted.
        b: in B; None where it was not counted.
        is_gate: a rise of it is a failure by itself.
        details: where B's come from, such as files and lines.
    """

    name: str
    a: float | None
    b: float | None
    is_gate: bool
    details: tuple[str, ...] = ()

    @property
    def is_failure(self) -> bool:
        """It must not rise, and did: by more than the rounding of a profile's figures."""
        return self.is_gate and self.a is not None and self.b is not None and self.b > self.a * 1.0005 + 1e-9


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory of tensors: the peak, what it was by kind, and (step, bytes) over time."""

    peak_bytes: int
    by_kind: Mapping[str, int]
    timeline: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A condition that differs. `is_fatal`: times under both cannot be compared."""

    name: str
    a: str
    b: str
    is_fatal: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was found.

    Attributes:
        a: the one that is compared with.
        b: the one that is judged.
        outcome: the verdict on time.
        is_time_asked: which one is faster is the question, as it is of two arms and is not of two profiles.
        timing: what it rests on; None where time is not judged.
        reasons: in words: why this outcome, and what a reader has to know.
        differences: conditions that differ, those that forbid a comparison first.
        why: None without two profiles.
        counters: empty without two profiles.
        memory: of A and of B; None without two profiles.
        command: what repeats this comparison.
        is_interrupted: Ctrl-C ended the measurement early.
    """

    a: Side
    b: Side
    outcome: Outcome
    is_time_asked: bool
    timing: Timing | None
    reasons: tuple[str, ...]
    differences: tuple[Difference, ...]
    why: Why | None
    counters: tuple[CounterChange, ...]
    memory: tuple[MemoryUse, MemoryUse] | None
    command: str
    is_interrupted: bool = False

    @property
    def risen(self) -> tuple[CounterChange, ...]:
        """The counters that rose and must not."""
        return tuple(counter for counter in self.counters if counter.is_failure)

    @property
    def exit_code(self) -> int:
        """0 FASTER or SAME; 1 SLOWER, or a counter rose; 3 INCONCLUSIVE or TIME NOT JUDGED; 4 NOT COMPARABLE.

        Two profiles, of which time is not asked, give 0 where no counter rose; an interrupt gives 130 in any case.
        """
        if self.is_interrupted:
            return INTERRUPTED
        if self.risen and self.outcome != "NOT COMPARABLE":
            return EXIT_CODES["SLOWER"]
        is_unasked = self.outcome == "TIME NOT JUDGED" and not self.is_time_asked
        return 0 if is_unasked else EXIT_CODES[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the verdict first, the figures of `Timing` beside it."""
        timing = self.timing
        return {
            "verdict": self.outcome,
            "exit_code": self.exit_code,
            "speedup": None if timing is None else timing.speedup,
            "interval": None if timing is None or timing.low is None else [timing.low, timing.high],
            "pairs": 0 if timing is None else len(timing.pairs),
            "margin": None if timing is None else timing.margin,
            "blocks_needed": None if timing is None else timing.blocks_needed,
            "reasons": list(self.reasons),
            "a": asdict(self.a),
            "b": asdict(self.b),
            "timing": None if timing is None else asdict(timing),
            "differences": [asdict(each) for each in self.differences],
            "why": None if self.why is None else self.why.to_dict(),
            "counters": [{**asdict(each), "is_failure": each.is_failure} for each in self.counters],
            "memory": None if self.memory is None else [asdict(each) for each in self.memory],
            "command": self.command,
        }


def _with_change(change: Change) -> dict[str, Any]:
    return {**asdict(change), "change_us": change.us}
