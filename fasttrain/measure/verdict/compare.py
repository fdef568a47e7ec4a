"""`compare`: which of two trainings is faster, how sure that is, and why. Works on stored files, without torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fasttrain.comparison import Comparison, Outcome, Pair, Side, Timing
from fasttrain.errors import ConfigError, DataError
from fasttrain.measure.bench.record import ArmRecord
from fasttrain.measure.verdict.explain import compare_counters, explain, memory_use
from fasttrain.measure.verdict.revision_record import RevisionRecord, read_revisions
from fasttrain.measure.verdict.sides import (
    BenchArm,
    StoredProfile,
    contradictions,
    differences_of,
    open_profile,
    open_side,
)
from fasttrain.measure.verdict.stats import FEWEST_PAIRS, MOST_PAIRS, margin_for, verdict
from fasttrain.measure.verdict.whole import excess_of, judge_whole

__all__ = ["compare", "compare_arms", "compare_profiles", "compare_record", "compare_stored"]

TEXTBOOK = "textbook"
PEERS = ("jax-scan", "jax-step", "native", "scikit-learn", "lightning", "lightning-barebones", "accelerate")
"""The arms that are a yardstick between two results unasked: any other one's own speed may be what has changed.

A checkout has the peers' names in `benchmarks.peers`, which an installed fasttrain cannot read.
"""


@dataclass(frozen=True, kw_only=True)
class _Judged:
    outcome: Outcome
    timing: Timing | None
    reasons: tuple[str, ...]


def compare(
    a: str,
    b: str,
    *,
    command: str,
    profiles: tuple[Path, Path] | None = None,
    through: str | None = None,
) -> Comparison:
    """Compares two stored measurements.

    Args:
        a: a file, or `file:arm` for an arm of a benchmark's record.
        b: likewise; the one that is judged.
        command: what repeats this comparison.
        profiles: of A and of B, to explain the difference of two arms.
        through: an arm of both records, to judge arms of two records by; by default the textbook, or a peer.

    Raises:
        DataError: a file cannot be read, or is no record.
        ConfigError: the two are not of one kind, there is no such arm, or a profile is of something else.
    """
    first, second = open_side(a), open_side(b)
    if isinstance(first, BenchArm) and isinstance(second, BenchArm):
        opened = None if profiles is None else (open_profile(profiles[0]), open_profile(profiles[1]))
        return compare_arms(first, second, command=command, profiles=opened, through=through)
    if isinstance(first, StoredProfile) and isinstance(second, StoredProfile):
        if profiles is not None or through is not None:
            raise ConfigError("--profiles and --through go with two arms of benchmarks, not with two profiles")
        return compare_profiles(first, second, command=command)
    raise ConfigError(f"{a} and {b}: compare two arms of benchmarks, or two profiles, not one of each")


def compare_arms(
    a: BenchArm,
    b: BenchArm,
    *,
    command: str,
    profiles: tuple[StoredProfile, StoredProfile] | None = None,
    through: str | None = None,
) -> Comparison:
    """Compares two arms: of the same figures by their blocks, of two measurements through an arm that both have.

    Raises:
        ConfigError: there is no arm `through`, it is what is compared, or a profile is of something else.
    """
    # Where all other arms have as many threads, a number of its own is part of an arm, and is compared with it.
    harmless = ("threads",) if a.record.design.threads == b.record.design.threads else ()
    found = _begin(a.side(), b.side(), command, is_time_asked=True, harmless=harmless)
    if found.outcome == "NOT COMPARABLE":
        return found
    judged = _judged(a, b) if a.record.arms == b.record.arms else _judge_across(a, b, through)
    found = replace(
        found,
        outcome=judged.outcome,
        timing=judged.timing,
        reasons=(*judged.reasons, *_told_of("A", a), *_told_of("B", b)),
    )
    if profiles is None:
        return found
    for stored, side in zip(profiles, (a, b), strict=True):
        _check_is_of_arm(stored, side.label)
    return _explained(found, *profiles)


def compare_stored(path: Path, *, command: str) -> Comparison:
    """Compares the two revisions of a stored record.

    Raises:
        DataError: the file cannot be read, or is no such record.
    """
    return compare_record(read_revisions(path), (path, path), command=command)


def compare_record(record: RevisionRecord, sources: tuple[Path, Path], *, command: str) -> Comparison:
    """Compares two revisions that were measured in the same blocks.

    Args:
        record: of both.
        sources: where A and B are said to be from.
        command: what repeats this comparison.
    """
    found = compare_arms(*record.sides(sources), command=command)
    return replace(found, reasons=(*found.reasons, *record.bench.notes))


def compare_profiles(a: StoredProfile, b: StoredProfile, *, command: str) -> Comparison:
    """Compares counters, phases and operators; time is not judged by the one pass of a profile."""
    found = _begin(a.side(), b.side(), command, is_time_asked=False)
    if found.outcome == "NOT COMPARABLE":
        return found
    reason = "time not judged: a profile times one pass; compare two arms of a benchmark to judge time"
    return _explained(replace(found, reasons=(reason,)), a, b)


def _begin(a: Side, b: Side, command: str, *, is_time_asked: bool, harmless: Collection[str] = ()) -> Comparison:
    """A comparison of which nothing is known but whether it can be made."""
    differences = differences_of(a, b, harmless=harmless)
    fatal = [each for each in differences if each.is_fatal]
    return Comparison(
        a=a,
        b=b,
        outcome="NOT COMPARABLE" if fatal else "TIME NOT JUDGED",
        is_time_asked=is_time_asked,
        timing=None,
        reasons=tuple(f"{each.name}: {each.a} against {each.b}" for each in fatal),
        differences=tuple(differences),
        why=None,
        counters=(),
        memory=None,
        command=command,
    )


def _judge_across(a: BenchArm, b: BenchArm, through: str | None) -> _Judged:
    """Pairs of ratios: both arms in units of the shared one, each in its own record.

    Blocks of two records have nothing in common but their number; differences of independent ratios are spread
    symmetrically whichever way they are paired.
    """
    yardstick = _yardstick(a, b, through)
    if yardstick is None:
        return _Judged(
            outcome="TIME NOT JUDGED",
            timing=None,
            reasons=(
                "time not judged: the two results share no arm that is the same in both, such as textbook; "
                "--through names another one",
            ),
        )
    judged = _judged(a, b, through=yardstick)
    reason = (
        f"the two were measured at different times, and are judged through {yardstick}, which is taken to be equally "
        "fast in both: the interval holds what varied within each measurement, not what changed between them"
    )
    return replace(judged, reasons=(reason, *judged.reasons))


def _judged(a: BenchArm, b: BenchArm, *, through: str | None = None) -> _Judged:
    """By the pairs of their blocks; their times are in units of the arm `through`, if one is given."""
    pairs, whole = (
        _pairs(_in_units(a, through, is_whole=is_whole), _in_units(b, through, is_whole=is_whole))
        for is_whole in (False, True)
    )
    if not pairs:
        reason = "time not judged: the two arms have no block in common"
        return _Judged(outcome="TIME NOT JUDGED", timing=None, reasons=(reason,))
    noise_floor = _noise_floor(a, b)
    found = verdict([math.log(pair.a) - math.log(pair.b) for pair in pairs], margin_for(noise_floor))
    judged = judge_whole(found, excess_of(pairs, whole))
    reasons = [*judged.reasons, *_left_out(a, b, len(pairs))]
    if found.low is None:
        reasons.append(f"{found.pairs} pairs are too few for an interval: it takes {FEWEST_PAIRS}")
    if found.kind == "INCONCLUSIVE":
        is_extended = a.record.design.extended or b.record.design.extended
        reasons.append(_advice(found.pairs, found.blocks_needed, is_extended=is_extended))
    if noise_floor is None:
        reasons.append("the machine's noise floor is not known (bench --aa measures it): the margin is 1%")
    timing = Timing(
        speedup=found.speedup,
        low=found.low,
        high=found.high,
        margin=found.margin,
        noise_floor=noise_floor,
        blocks_needed=found.blocks_needed,
        through=through,
        pairs=tuple(pairs),
    )
    return _Judged(outcome=judged.kind, timing=timing, reasons=tuple(reasons))


def _left_out(a: BenchArm, b: BenchArm, num_pairs: int) -> list[str]:
    """The blocks that have no partner, as a process died or one measurement was shorter."""
    counts = [(name, len(side.arm.blocks)) for name, side in (("A", a), ("B", b))]
    told = [f"{total - num_pairs} of {name}'s {total} blocks" for name, total in counts if total > num_pairs]
    return [f"left out, as they make no pair: {' and '.join(told)}"] if told else []


def _advice(num_pairs: int, blocks_needed: int | None, *, is_extended: bool) -> str:
    """What would decide an open question. A benchmark looks twice at most: its one extension may have been made."""
    if blocks_needed is None:
        return (
            f"more than {MOST_PAIRS} pairs would be needed, which is the most that are judged: beside the noise of "
            "these, the difference is too small, or too near the margin"
        )
    if is_extended:
        return f"measure anew with --blocks {num_pairs + blocks_needed} to decide it"
    return f"about {blocks_needed} further blocks would decide it"


def _pairs(a: Mapping[int, float], b: Mapping[int, float]) -> list[Pair]:
    """Pairs of one block each, from times by block."""
    blocks = sorted({*a} & {*b})
    return [Pair(block=block, a=a[block], b=b[block], speedup=_quotient(a[block], b[block])) for block in blocks]


def _in_units(side: BenchArm, yardstick: str | None, *, is_whole: bool) -> dict[int, float]:
    """Times by block: in seconds a row, or divided by those of another arm of the record."""
    ours = side.seconds(is_whole=is_whole)
    if yardstick is None:
        return ours
    theirs = side.seconds(yardstick, is_whole=is_whole)
    return {block: _quotient(ours[block], theirs[block]) for block in {*ours} & {*theirs}}


def _quotient(a: float, b: float) -> float:
    """The ratio of two times from a file.

    Raises:
        DataError: it is beyond what a float holds.
    """
    quotient = a / b if b else math.inf  # seconds a row may be less than a float holds
    if not 0 < quotient < math.inf:
        raise DataError(f"{a:g} s and {b:g} s cannot be times of one job: is a record damaged?")
    return quotient


def _yardstick(a: BenchArm, b: BenchArm, through: str | None) -> str | None:
    """The arm to judge two records through; None without a fit one.

    Raises:
        ConfigError: not both have the one that is asked for, or it is what is compared.
    """
    shared = [label for label in a.record.arms if label in b.record.arms]
    if through is not None:
        if through not in shared:
            raise ConfigError(f"--through {through!r:.80}: both results must have it; they share {', '.join(shared)}")
        if through == a.label == b.label:
            raise ConfigError(f"--through {through!r:.80}: it is what is compared; name another arm that both have")
        return through
    fit = [label for label in PEERS if label in shared and label not in (a.label, b.label)]
    if not _is_textbook(a.label) and not _is_textbook(b.label):
        # With threads of its own, it changes as the textbook itself does.
        fit = [*sorted(filter(_is_textbook, shared), key=lambda label: label != TEXTBOOK), *fit]
    return next(iter(fit), None)


def _is_textbook(label: str) -> bool:
    """Whether it is the textbook's loop, with the benchmark's threads or with others: "textbook, 4 threads"."""
    return label == TEXTBOOK or label.startswith(f"{TEXTBOOK}, ")


def _noise_floor(a: BenchArm, b: BenchArm) -> float | None:
    floors = [side.record.noise.floor for side in (a, b) if side.record.noise is not None]
    return max(floors, default=None)


def _told_of(name: str, side: BenchArm) -> list[str]:
    """What a reader has to know of an arm's figures."""
    arm = side.arm
    told: list[str] = []
    if arm.agreement is None:
        told.append(f"{name}: another algorithm, whose losses are not the textbook's")
    else:
        told.append(f"{name}: losses within {arm.agreement:.1g} of the textbook's, {arm.tolerance:.1g} is allowed")
    if arm.repeated:
        told.append(f"{name}: {_repeats(arm)}")
    flagged = sum(bool(block.flags) for block in arm.blocks)
    if flagged:
        told.append(f"{name}: {flagged} of {len(arm.blocks)} blocks stayed flagged: the machine was not quiet")
    return told


def _repeats(arm: ArmRecord) -> str:
    """How many attempts were made again, and why: all arms of a block are, whichever was flagged or died."""
    own, every = sum(bool(attempt.flags) for attempt in arm.repeated), len(arm.repeated)
    if own == every:
        return f"attempts that were flagged and repeated: {every}"
    return f"attempts that were repeated: {own} for a flag of their own, {every - own} for another arm of the block"


def _check_is_of_arm(stored: StoredProfile, label: str) -> None:
    """Refuses the profile of another arm, such as the other side's.

    Raises:
        ConfigError: it is one.
    """
    arm = stored.profile.workload.get("arm")
    if isinstance(arm, str) and not label.startswith(arm):  # labels may say more: "textbook, 4 threads"
        raise ConfigError(f"{stored.path} is a profile of {arm:.80}, not of {label}: give A's first, then B's")


def _explained(found: Comparison, a: StoredProfile, b: StoredProfile) -> Comparison:
    """The comparison with what two profiles of its sides tell.

    Raises:
        ConfigError: a profile is of other work, or of another machine.
    """
    for stored, side in ((a, found.a), (b, found.b)):
        if contradicting := contradictions(side, stored.side()):
            what = ", ".join(f"{each.name} {each.b} instead of {each.a}" for each in contradicting)
            raise ConfigError(f"{stored.path} is no profile of {side.label}: {what}")
    counters = compare_counters(a.profile, b.profile)
    risen = tuple(f"{each.name} rose from {each.a:g} to {each.b:g}" for each in counters if each.is_failure)
    return replace(
        found,
        reasons=(*risen, *found.reasons),
        why=explain(a.profile, b.profile),
        counters=counters,
        memory=(memory_use(a.profile), memory_use(b.profile)),
    )
