"""The statistics of pairs: an estimate, an exact interval, and a verdict. Nothing here knows where pairs come from.

A pair is log(time of A / time of B) of one block: above 0, B is the faster one. The estimate is Hodges and Lehmann's,
the median of all averages of two pairs; the interval holds every shift that Wilcoxon's exact signed-rank test does not
reject (Hodges & Lehmann 1963; Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, 3rd ed., sections 3.1 to
3.3). It asks of the pairs that they are independent and spread symmetrically, not that they are normal.

A design may look twice, at its planned blocks and once more after its extension. Each look gets half of the
allowed error (Bonferroni), so both intervals together hold the truth with at least 95%, however the looks depend on
each other. Pocock's bound for two looks (0.0294 each instead of 0.025) would be a little narrower, but it is
exact for normal sums only, and at 10 pairs signed ranks have no level between them but 0.0273.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.errors import DataError

__all__ = [
    "FEWEST_PAIRS",
    "MOST_PAIRS",
    "Interval",
    "Noise",
    "Verdict",
    "VerdictKind",
    "as_ratio",
    "hodges_lehmann",
    "margin_for",
    "noise_of",
    "signed_rank_interval",
    "verdict",
]

LEAST = sys.float_info.epsilon
"""Of a logarithm: what is told is the ratio, and less does not make another one of it."""

VerdictKind = Literal["FASTER", "SAME", "SLOWER", "INCONCLUSIVE"]

LEVEL = 0.05 / 2
"""Two-sided error of one of two looks."""

FEWEST_PAIRS = 7
"""With fewer pairs no signed-rank interval reaches `LEVEL`: 2 / 2**6 is above it, 2 / 2**7 is not."""

LEAST_MARGIN = 0.01
"""A difference of less than 1% is none that anybody would act on."""

MOST_PAIRS = 500
"""Of more, the exact distribution would take seconds, and no benchmark has them: none is advised to have."""


class Interval(NamedTuple):
    """Both ends, which belong to it."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a set of pairs says about the speed of B against A.

    Attributes:
        kind: FASTER or SLOWER: B is, as the interval leaves out "no difference", and the estimate is beyond the margin
            (the true difference may be within it); SAME: the whole interval is within the margin; INCONCLUSIVE: none of
            these can be said.
        speedup: time(A) / time(B).
        low: lower end of its interval; None with fewer than `FEWEST_PAIRS` pairs.
        high: upper end of its interval; None with fewer than `FEWEST_PAIRS` pairs.
        pairs: how many pairs there were.
        margin: relative; 0.01 is 1%.
        blocks_needed: about so many further blocks decide it, if they spread as these do; None where it is decided, or
            where it would take more than `MOST_PAIRS` in all.
    """

    kind: VerdictKind
    speedup: float
    low: float | None
    high: float | None
    pairs: int
    margin: float
    blocks_needed: int | None


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What a machine shows where nothing differs: an arm against itself.

    Attributes:
        floor: relative; a true difference of A and A is below it with the confidence of one look.
        smallest_effect: relative; the smallest true difference that this many pairs will mostly find.
        pairs: how many pairs it was taken from.
    """

    floor: float
    smallest_effect: float
    pairs: int


def hodges_lehmann(values: Sequence[float]) -> float:
    """The median of the averages of every two values, each value with itself too.

    Raises:
        DataError: there is no value, there are more than 500, or one is not finite.
    """
    return float(np.median(_walsh_averages(values)))


def signed_rank_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """The exact interval of Wilcoxon's signed-rank test around `hodges_lehmann`.

    Args:
        values: any number of them; ties make the interval wider than it had to be, never narrower.
        level: the chance that it misses the centre, at most.

    Returns:
        Its ends; None where no interval of this level exists, for want of values.

    Raises:
        DataError: there is no value, there are more than 500, or one is not finite.
    """
    averages = np.sort(_walsh_averages(values))
    cumulated = np.cumsum(_signed_rank_distribution(len(values)))
    # The interval leaves out the averages beyond every statistic that is rejected on either side.
    num_left_out = int(np.searchsorted(2 * cumulated, level * (1 + 1e-12), side="right"))
    if num_left_out == 0:
        return None
    return Interval(float(averages[num_left_out - 1]), float(averages[-num_left_out]))


def verdict(log_ratios: Sequence[float], margin: float) -> Verdict:
    """Judges pairs of log(time(A) / time(B)), one a block.

    FASTER and SLOWER need both: an interval that leaves out "no difference", and an estimate beyond the margin.

    Args:
        log_ratios: natural logarithms.
        margin: relative, positive; see `margin_for`.

    Raises:
        DataError: there is no pair, there are more than 500, or one is not finite.
    """
    centre, interval, tolerated = hodges_lehmann(log_ratios), signed_rank_interval(log_ratios), math.log1p(margin)
    kind = _kind(centre, interval, tolerated)
    needed = _blocks_needed(centre, interval, tolerated, len(log_ratios)) if kind == "INCONCLUSIVE" else None
    return Verdict(
        kind=kind,
        speedup=as_ratio(centre),
        low=None if interval is None else as_ratio(interval.low),
        high=None if interval is None else as_ratio(interval.high),
        pairs=len(log_ratios),
        margin=margin,
        blocks_needed=needed,
    )


def margin_for(noise_floor: float | None) -> float:
    """The margin of a verdict, relative: 1%, or the machine's noise floor where that is larger."""
    return max(LEAST_MARGIN, noise_floor or 0.0)


def noise_of(log_ratios: Sequence[float]) -> Noise:
    """The noise floor and the smallest detectable effect, from pairs of an arm with itself.

    The floor is the far end of the interval. An effect is mostly found if the interval around it, as wide as this
    one, still begins beyond the margin.

    Raises:
        DataError: there are fewer than `FEWEST_PAIRS` pairs, or one is not finite.
    """
    interval = signed_rank_interval(log_ratios)
    if interval is None:
        raise DataError(f"{len(log_ratios)} pairs tell no noise floor: measure {FEWEST_PAIRS} blocks or more")
    floor = math.expm1(max(abs(interval.low), abs(interval.high)))
    half_width = (interval.high - interval.low) / 2
    smallest = math.expm1(math.log1p(margin_for(floor)) + half_width)
    return Noise(floor=floor, smallest_effect=smallest, pairs=len(log_ratios))


def as_ratio(logarithm: float) -> float:
    """Its exponential, within what a float holds: a pair may be as far apart as two floats can be."""
    return math.exp(min(max(logarithm, -700.0), 700.0))


def _kind(centre: float, interval: Interval | None, tolerated: float) -> VerdictKind:
    if interval is None:
        return "INCONCLUSIVE"
    if interval.low > LEAST and centre > tolerated:
        return "FASTER"
    if interval.high < -LEAST and centre < -tolerated:
        return "SLOWER"
    return "SAME" if -tolerated <= interval.low and interval.high <= tolerated else "INCONCLUSIVE"


def _blocks_needed(centre: float, interval: Interval | None, tolerated: float, num_pairs: int) -> int | None:
    """So many that the half width, which falls with the square root of their number, meets what is asked of it."""
    if interval is None:
        return FEWEST_PAIRS - num_pairs
    effect = abs(centre)
    asked = effect if effect > tolerated else tolerated - effect
    times_too_wide = (interval.high - interval.low) / 2 / asked if asked else math.inf
    # An interval that is not symmetric about its centre can be undecided while it is narrow enough: one more, then.
    pairs_needed = max(num_pairs + 1, num_pairs * times_too_wide * times_too_wide)
    return None if pairs_needed > MOST_PAIRS else math.ceil(pairs_needed) - num_pairs


def _walsh_averages(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not 1 <= array.size <= MOST_PAIRS or not np.isfinite(array).all():
        kind = "all finite" if np.isfinite(array).all() else "not all finite"
        raise DataError(f"{array.size} pairs, {kind}: give 1 to {MOST_PAIRS} finite pairs")
    rows, columns = np.triu_indices(array.size)
    return array[rows] / 2 + array[columns] / 2


def _signed_rank_distribution(num_values: int) -> NDArray[np.float64]:
    """P(T = t) for t = 0 ... n(n+1)/2, T the sum of the ranks of positive values: each rank is in it or not, alike."""
    distribution = np.zeros(num_values * (num_values + 1) // 2 + 1)
    distribution[0] = 1.0
    for rank in range(1, num_values + 1):
        shifted = np.concatenate((np.zeros(rank), distribution[:-rank]))
        distribution = (distribution + shifted) / 2
    return distribution
