"""What medians do not tell: the time of all timed steps together, with the costs that most turns do not meet.

The time of a step in a block is that of its median turns (`bench.rounds.levels`): disturbances leave it alone, and so
does what an arm pays in fewer than half of its turns. No verdict may rest on the median against the whole.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from fasttrain.comparison import Pair
from fasttrain.measure.verdict.stats import Verdict, VerdictKind, as_ratio

__all__ = ["Whole", "excess_of", "judge_whole"]


class Whole(NamedTuple):
    """A verdict once all steps were looked at, and what is to be told of them."""

    kind: VerdictKind
    reasons: tuple[str, ...]


def excess_of(typical: Sequence[Pair], whole: Sequence[Pair]) -> float:
    """How much longer B's steps took in all, against A's, than their median turns tell: a logarithm.

    The median over the blocks: what disturbs fewer than half of them does not show.

    Args:
        typical: pairs of times of a step by its median turns.
        whole: pairs of the same blocks, of all timed steps together.
    """
    return statistics.median(
        math.log(one.speedup) - math.log(every.speedup) for one, every in zip(typical, whole, strict=True)
    )


def judge_whole(found: Verdict, excess: float) -> Whole:
    """Withdraws a verdict of the median turns that all steps together contradict, and tells of an excess that counts.

    Two equal arms differ by far less than the margin in this: by 0.3%, the median of 12 blocks of the MLP's eager
    loop on a shared machine of 4 cores (standard deviation 1.2%), where the margin was 2.8%.

    Args:
        found: by the median turns.
        excess: of B against A; see `excess_of`.
    """
    tolerated = math.log1p(found.margin)
    is_contradicted = _is_contradicted(found.kind, math.log(found.speedup), excess, tolerated)
    if not is_contradicted and abs(excess) <= tolerated:
        return Whole(found.kind, ())
    longer, other = ("B", "A") if excess > 0 else ("A", "B")
    told = (
        f"against {other}'s, {longer}'s steps took {as_ratio(abs(excess)) - 1:.1%} longer in all than their median "
        f"turns tell: by all steps together B is {as_ratio(math.log(found.speedup) - excess):.3f} times as fast as A"
    )
    if not is_contradicted:
        return Whole(found.kind, (told,))
    advice = (
        f"B is {found.kind} by its median turns, and not by all steps: {longer} pays for something in fewer than half "
        "of its turns, or was disturbed more often; further blocks do not decide it, a profile may show what it is"
    )
    return Whole("INCONCLUSIVE", (told, advice))


def _is_contradicted(kind: VerdictKind, speedup: float, excess: float, tolerated: float) -> bool:
    """Whether all steps together say otherwise; of logarithms.

    SAME has to hold for all steps too. FASTER and SLOWER may lose some of their lead, by no more than the margin, and
    more as long as what is left is beyond the margin.
    """
    in_all = speedup - excess
    if kind == "SAME":
        return abs(in_all) > tolerated
    if kind == "INCONCLUSIVE":
        return False
    lead = in_all if kind == "FASTER" else -in_all
    return lead <= tolerated and abs(excess) > tolerated
