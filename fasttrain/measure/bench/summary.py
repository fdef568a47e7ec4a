"""What a benchmark's record says, arm by arm, and its tables: on a terminal and in Markdown."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fasttrain.measure.bench.plan import log_ratios
from fasttrain.measure.bench.record import ArmRecord, BenchRecord
from fasttrain.printable import printable

__all__ = [
    "ArmSummary",
    "Spread",
    "command",
    "commit_of",
    "compared_with",
    "conditions",
    "conditions_of",
    "fastest",
    "machine_of",
    "markdown",
    "num_blocks",
    "number",
    "ranged",
    "summarise",
    "table",
    "terminal",
    "text",
]

RARE_COSTS = 0.1
"""An arm's excess over the median of the others' from which on it is told."""

COMPARED = ("textbook", "tuned", "jax")
"""Kinds of arms that all are compared with, each the fastest of its kind, where a record has them."""

HEADER = ["arm", "samples/s", "us a step"]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A quantity over the blocks."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, smallest and largest of one value or more."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), count=len(values))


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """An arm's figures.

    Attributes:
        label: its name.
        description: what it is.
        rate: samples/s.
        step_us: of a step.
        ratios: by another arm's label, how many times faster than that one, pair by pair.
        first_compile_s: in its first process, which finds no program of this arm in the cache; None: no compiler ran.
        warm_compile_s: median of the later processes; None: no compiler ran, or there are none.
        import_s: median.
        first_step_s: median.
        peak_bytes: median; None: unknown.
        agreement: see `ArmRecord`.
        engines: what ran the steps, most often first, as "compiled: why" with the reason in the last such block, and in
            how many blocks; empty where that is no question.
    """

    label: str
    description: str
    rate: Spread
    step_us: Spread
    ratios: dict[str, Spread]
    first_compile_s: float | None
    warm_compile_s: float | None
    import_s: float
    first_step_s: float
    peak_bytes: float | None
    agreement: float | None
    engines: tuple[tuple[str, int], ...]


def summarise(record: BenchRecord) -> list[ArmSummary]:
    """Each arm's figures, in the record's order."""
    others = compared_with(record)
    return [_summary(label, record, others) for label in record.arms]


def fastest(record: BenchRecord, kind: str) -> str | None:
    """The label of the fastest arm of a kind ("textbook, 4 threads" and "jax-scan" are a "textbook" and a "jax")."""
    labels = [label for label in record.arms if re.split("[,-]", label)[0] == kind]
    return min(labels, key=lambda label: record.arms[label].step_s, default=None)


def compared_with(record: BenchRecord) -> list[str]:
    """Labels of the arms that all are compared with."""
    return [label for kind in COMPARED if (label := fastest(record, kind)) is not None]


def _summary(label: str, record: BenchRecord, others: Sequence[str]) -> ArmSummary:
    arm = record.arms[label]
    peaks = [block.peak_bytes for block in arm.blocks if block.peak_bytes is not None]
    first, *later = arm.blocks
    warm = [block.compile_s for block in later if block.compile_s is not None]
    return ArmSummary(
        label=label,
        description=arm.description,
        rate=Spread.of(arm.samples_per_s),
        step_us=Spread.of([block.step_s * 1e6 for block in arm.blocks]),
        ratios={other: ratio for other in others if (ratio := _ratio(record.arms[other], arm)) is not None},
        first_compile_s=first.compile_s,
        warm_compile_s=statistics.median(warm) if warm else None,
        import_s=statistics.median(block.import_s for block in arm.blocks),
        first_step_s=statistics.median(block.first_step_s for block in arm.blocks),
        peak_bytes=statistics.median(peaks) if peaks else None,
        agreement=arm.agreement,
        engines=_engines(arm),
    )


def _engines(arm: ArmRecord) -> tuple[tuple[str, int], ...]:
    said = [block.engine for block in arm.blocks if block.engine is not None]
    last = {engine.partition(":")[0]: engine for engine in said}
    counts = Counter(engine.partition(":")[0] for engine in said)
    return tuple((last[name], count) for name, count in counts.most_common())


def _ratio(other: ArmRecord, arm: ArmRecord) -> Spread | None:
    pairs = [math.exp(ratio) for ratio in log_ratios(other, arm)]
    return Spread.of(pairs) if pairs else None


def rows(record: BenchRecord) -> list[list[str]]:
    """A table, its header first: rates and ratios with their ranges, then what each process took beside its steps."""
    others = compared_with(record)
    header = [*HEADER, *(f"times {other}" for other in others)]
    found = [[*header, "blocks", "import, s", "compile, s: first, later", "first step, s", "peak, MB"]]
    for arm in summarise(record):
        ratios = [arm.ratios.get(other) for other in others]
        compiled = (arm.first_compile_s, arm.warm_compile_s)
        found.append(
            [
                arm.label,
                ranged(arm.rate),
                number(arm.step_us.median),
                *("" if ratio is None else ranged(ratio, "x") for ratio in ratios),
                str(arm.rate.count),
                number(arm.import_s),
                "" if compiled == (None, None) else ", ".join("-" if s is None else number(s) for s in compiled),
                number(arm.first_step_s),
                "" if arm.peak_bytes is None else number(arm.peak_bytes / 1e6),
            ]
        )
    return found


def notes(record: BenchRecord) -> list[str]:
    """What a reader of the table has to know, a line each."""
    arms = [(arm, record.arms[arm.label].tolerance) for arm in summarise(record)]
    return [
        *(f"{arm.label}: {arm.description}; {_agreement(arm.agreement, tolerance)}" for arm, tolerance in arms),
        *(f"{arm.label}: ran {_ran(arm)}" for arm, _ in arms if arm.engines),
        *(f"not timed: {label}: {reason}" for label, reason in record.refused.items()),
        *_rare_costs(record),
        *_flags(record),
        _noise(record),
        *record.notes,
    ]


def _ran(arm: ArmSummary) -> str:
    if len(arm.engines) == 1:
        return arm.engines[0][0]
    return "; ".join(f"in {count} of {arm.rate.count} blocks {engine}" for engine, count in arm.engines)


def _agreement(agreement: float | None, tolerance: float) -> str:
    if agreement is None:
        return "another algorithm, whose losses are not the textbook's"
    return f"running loss within {agreement:.1g} of the textbook's (allowed: {tolerance:g})"


def _rare_costs(record: BenchRecord) -> list[str]:
    """Of arms whose steps took longer in all than the median turn tells, by more than those of the others."""
    found = {label: statistics.median(block.excess for block in arm.blocks) for label, arm in record.arms.items()}
    told: list[str] = []
    for label, excess in found.items():
        others = [each for other, each in found.items() if other != label]
        if others and excess > (usual := statistics.median(others)) + RARE_COSTS:
            told.append(
                f"{label}: its steps took {excess:.0%} longer in all than this tells (median of the other arms: "
                f"{usual:.0%}): it has costs that most of its turns do not meet, or was disturbed"
            )
    return told


def _flags(record: BenchRecord) -> list[str]:
    """How many figures were taken under a flag, and how many blocks were run again because of one, or of a death."""
    kept = [block for arm in record.arms.values() for block in arm.blocks]
    flags = [flag for block in kept for flag in block.flags]
    repeated = len({block.block for block in kept if block.repeats})
    if not flags and not repeated:
        return [f"none of {len(kept)} timings was flagged"]
    counts = ", ".join(f"{flags.count(flag)} under {flag!r}" for flag in sorted(set(flags))) or "none"
    return [
        f"of {len(kept)} timings, flagged all the same after repeats: {counts}; "
        f"blocks with repeats: {repeated} of {num_blocks(record)}"
    ]


def _noise(record: BenchRecord) -> str:
    if record.noise is None:
        return "this machine's noise is not known: bench --aa ARM measures it"
    noise = record.noise
    return (
        f"an arm against itself on this machine: noise floor {noise.floor:.1%}, smallest detectable effect "
        f"{noise.smallest_effect:.1%} ({noise.pairs} pairs)"
    )


def num_blocks(record: BenchRecord) -> int:
    """Blocks that were measured: fewer than planned after an interrupt, more with the extension."""
    return len({block.block for arm in record.arms.values() for block in arm.blocks})


def _blocks(record: BenchRecord) -> str:
    measured, design = num_blocks(record), record.design
    if design.extended:
        return f"{measured} blocks, extended once from {design.blocks}"
    return f"{measured} blocks" if measured == design.blocks else f"{measured} of {design.blocks} blocks"


def conditions(record: BenchRecord) -> str:
    """One line: where, when and how the figures were measured."""
    design = record.design
    turns = f"arms in turn, {design.slice_s * 1e3:.0f} ms each, {design.timed_s:g} s a block, threads {design.threads}"
    return f"{conditions_of(record.environment, record.created)}; {_blocks(record)}, {turns}."


def conditions_of(environment: dict[str, Any], created: str) -> str:
    """Where and when figures were measured, without a full stop.

    Args:
        environment: as `environment` in `environment.py` gives it, with `load_average_after`.
        created: ISO 8601.
    """
    found = environment
    changed = " with uncommitted changes" if found.get("has_uncommitted_changes") else ""
    return (
        f"{machine_of(found)}, fasttrain {found['fasttrain']}, {commit_of(found)}{changed}; {created[:10]}; "
        f"load average {found['load_average']} before, {found['load_average_after']} after"
    )


def commit_of(environment: dict[str, Any]) -> str:
    """The commit of an environment, in ten digits."""
    commit = environment.get("commit")
    return "no commit" if commit is None else f"commit {commit[:10]}"


def machine_of(environment: dict[str, Any]) -> str:
    """The machine of an environment, and what ran on it."""
    found = environment
    name = found["device"] if found["device"] == found["cpu"] else f"{found['device']}, {found['cpu']}"
    return f"{name}, {found['cores']} cores; torch {found['torch']}, Python {found['python']}"


def terminal(record: BenchRecord) -> str:
    """The table for a terminal, with its notes."""
    cells = [[printable(cell) for cell in row] for row in rows(record)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    said = [printable(line) for line in [*notes(record), conditions(record)]]
    return "\n".join([*(line.rstrip() for line in lines), "", *said])


def markdown(record: BenchRecord, title: str) -> str:
    """A section in Markdown: the table, its notes, its conditions and what measures it again."""
    header, *body = [[text(cell) for cell in row] for row in rows(record)]
    workload = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record.workload.items())
    said = "".join(f"- {text(note)}\n" for note in [f"workload: {workload}", *notes(record)])
    return (
        f"## {text(title)}\n\n{table(header, body)}\n{text(conditions(record))}\n\n{said}\n"
        f"Measured by {command(record.command)}.\n"
    )


def command(given: str) -> str:
    """A command as code in Markdown."""
    return f"`{printable(' '.join(given.replace('`', ' ').split()))}`"


def table(header: Sequence[str], body: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A Markdown table; all but the first `num_left` columns to the right."""
    rule = ["---" if column < num_left else "---:" for column in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *body])


def ranged(spread: Spread, unit: str = "") -> str:
    """Median and range."""
    shown = f"{number(spread.median)}{unit}"
    return shown if spread.count == 1 else f"{shown} ({number(spread.low)} to {number(spread.high)})"


def number(value: float) -> str:
    """Three significant digits, thousands set apart, no exponent."""
    digits = 0
    while abs(value) * 10**digits < 99.95 and digits < 9:
        digits += 1
    return f"{float(f'{value:.3g}'):,.{digits}f}"


def text(given: str) -> str:
    """Text that cannot break out of a cell or a paragraph of Markdown, or start a tag, a link or a picture."""
    line = printable(" ".join(given.split()))
    for active in "\\|[":  # the backslash first: one that was given would take the effect from one that is added
        line = line.replace(active, f"\\{active}")
    return line.replace("<", "&lt;")
