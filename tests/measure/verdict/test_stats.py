"""Estimates, intervals and verdicts: against definitions written out, and by simulation."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.errors import DataError
from fasttrain.measure.verdict.stats import (
    FEWEST_PAIRS,
    LEVEL,
    MOST_PAIRS,
    VerdictKind,
    hodges_lehmann,
    margin_for,
    noise_of,
    signed_rank_interval,
    verdict,
)

pairs = st.lists(st.floats(-3, 3), min_size=1, max_size=20)
enough_pairs = st.lists(st.floats(-3, 3), min_size=FEWEST_PAIRS, max_size=20)

Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
NOISES: dict[str, Noise] = {
    "normal": lambda generator, shape: 0.01 * generator.standard_normal(shape),
    "heavy tails": lambda generator, shape: 0.01 * generator.standard_t(2.5, shape),
    "a shared machine": lambda generator, shape: (
        0.01 * generator.standard_normal(shape) + np.where(generator.random(shape) < 0.1, 0.2, 0)
        * generator.standard_normal(shape)
    ),
}  # fmt: skip


def test_the_estimate_is_the_median_of_all_averages_of_two() -> None:
    values = [0.1, 0.5, -0.2, 0.9]
    averages = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2)]
    assert hodges_lehmann(values) == pytest.approx(np.median(averages))


@pytest.mark.parametrize("num_values", [7, 8, 10])
def test_the_interval_leaves_out_what_the_signed_rank_test_rejects(num_values: int) -> None:
    """Against the definition: all 2**n signs of the ranks, written out."""
    sums = [sum(ranks) for n in range(num_values + 1) for ranks in itertools.combinations(range(1, num_values + 1), n)]
    values = np.random.default_rng(num_values).standard_normal(num_values)
    interval = signed_rank_interval(values.tolist())
    assert interval is not None

    def p_value(centre: float) -> float:
        shifted = values - centre
        ranks = np.argsort(np.argsort(np.abs(shifted))) + 1
        statistic = min(ranks[shifted > 0].sum(), ranks[shifted < 0].sum())
        return min(1.0, 2 * sum(each <= statistic for each in sums) / len(sums))

    step = 1e-9
    for end, inwards in ((interval.low, step), (interval.high, -step)):
        assert p_value(end + inwards) > LEVEL
        assert p_value(end - inwards) <= LEVEL


def test_too_few_pairs_have_no_interval() -> None:
    assert signed_rank_interval([1.0] * (FEWEST_PAIRS - 1)) is None
    assert signed_rank_interval([1.0] * FEWEST_PAIRS) == (1.0, 1.0)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("num_values", [7, 10, 20])
def test_the_interval_holds_the_truth_as_often_as_it_says(noise: Noise, num_values: int) -> None:
    samples = noise(np.random.default_rng(0), (2000, num_values))
    intervals = [signed_rank_interval(sample.tolist()) for sample in samples]
    missed = sum(interval is None or not interval.low <= 0 <= interval.high for interval in intervals)
    # Four standard errors of 2,000 draws above the level, which the steps of the statistic keep it below.
    assert missed / 2000 <= LEVEL + 4 * math.sqrt(LEVEL / 2000)
    assert missed > 0, "an interval that never misses is not an interval of this level"


@settings(deadline=None, max_examples=60)
@given(enough_pairs)
def test_the_interval_lies_around_the_estimate_and_within_the_values(values: list[float]) -> None:
    interval = signed_rank_interval(values)
    assert interval is not None
    assert min(values) <= interval.low <= hodges_lehmann(values) <= interval.high <= max(values)


@settings(deadline=None, max_examples=60)
@given(pairs, st.floats(0.001, 0.5))
def test_swapping_a_and_b_turns_the_verdict_round(values: list[float], margin: float) -> None:
    opposite: dict[VerdictKind, VerdictKind] = {"FASTER": "SLOWER", "SLOWER": "FASTER"}
    there, back = verdict(values, margin), verdict([-value for value in values], margin)
    assert back.kind == opposite.get(there.kind, there.kind)
    assert back.speedup == pytest.approx(1 / there.speedup)
    assert back.blocks_needed == there.blocks_needed


@settings(deadline=None, max_examples=60)
@given(pairs, st.floats(0.001, 0.5))
def test_a_verdict_keeps_its_promises(values: list[float], margin: float) -> None:
    found = verdict(values, margin)
    assert (found.low is None) == (len(values) < FEWEST_PAIRS)
    if found.kind == "FASTER":
        assert found.low is not None
        assert found.low > 1
        assert found.speedup > 1 + margin
    if found.kind == "SAME":
        assert found.low is not None
        assert found.high is not None
        assert 1 / (1 + margin) * (1 - 1e-12) <= found.low <= found.high <= (1 + margin) * (1 + 1e-12)
    assert found.kind == "INCONCLUSIVE" or found.blocks_needed is None
    assert found.blocks_needed is None or found.blocks_needed >= 1


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.05] * 10, "FASTER"),
        ([-0.05] * 10, "SLOWER"),
        ([0.005] * 10, "SAME"),
        ([0.0] * 10, "SAME"),
        ([0.05] * 6, "INCONCLUSIVE"),
        ([0.3, -0.3] * 5, "INCONCLUSIVE"),
    ],
)
def test_verdicts(values: list[float], kind: str) -> None:
    assert verdict(values, 0.01).kind == kind


def test_the_blocks_that_are_needed() -> None:
    assert verdict([0.05] * 4, 0.01).blocks_needed == 3
    spread = [0.02 + 0.05 * each for each in (-2, -1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5, 2)]
    found = verdict(spread, 0.01)
    assert found.kind == "INCONCLUSIVE"
    assert found.blocks_needed is not None
    more = np.random.default_rng(1).choice(spread, size=10 + 2 * found.blocks_needed)
    assert verdict(more.tolist(), 0.01).kind == "FASTER"
    assert verdict([0.05] * 9 + [-0.08], 0.01).blocks_needed == 1, "narrow enough, but not about its centre"
    at_the_margin = [math.log1p(0.01) * (1 + 1e-9 * each) + 0.1 * each for each in range(-5, 6)]
    assert verdict(at_the_margin, 0.01).blocks_needed != 0


def test_hopeless_pairs_ask_for_no_number_of_blocks() -> None:
    assert verdict([3.0, -3.0] * 5 + [1e-9], 1e-6).blocks_needed is None


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_an_arm_against_itself_is_hardly_ever_told_apart(noise: Noise) -> None:
    """At most 5% FASTER or SLOWER with both looks taken, whatever the margin, 1% at the least."""
    generator = np.random.default_rng(2)
    called = 0
    for sample in noise(generator, (1000, 20)):
        looks = [verdict(sample[:10].tolist(), 0.01), verdict(sample.tolist(), 0.01)]
        called += any(look.kind in ("FASTER", "SLOWER") for look in looks)
    assert called / 1000 <= 0.05


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_twice_the_smallest_effect_is_found(noise: Noise) -> None:
    generator = np.random.default_rng(3)
    kinds: Counter[str] = Counter()
    for _ in range(400):
        machine = noise_of(noise(generator, (10,)).tolist())
        slowed = noise(generator, (20,)) - math.log1p(2 * machine.smallest_effect)
        kinds[_after_two_looks(slowed, margin_for(machine.floor))] += 1
    assert kinds["SLOWER"] / 400 >= 0.95, kinds


def _after_two_looks(values: np.ndarray, margin: float) -> str:
    first = verdict(values[:10].tolist(), margin).kind
    return first if first != "INCONCLUSIVE" else verdict(values.tolist(), margin).kind


def test_noise_of_quiet_and_of_loud_pairs() -> None:
    quiet = noise_of([0.001, -0.001] * 5)
    assert quiet.floor == pytest.approx(0.001, rel=0.01)
    assert quiet.smallest_effect == pytest.approx(0.011, rel=0.01)
    loud = noise_of([0.1, -0.1] * 5)
    assert margin_for(loud.floor) == loud.floor > 0.05
    assert loud.smallest_effect > loud.floor
    one_sided = [-0.1] * 10
    assert noise_of(one_sided).floor == pytest.approx(math.expm1(0.1)), "the first in a block may always be the slower"
    with pytest.raises(DataError, match="measure 7 blocks or more"):
        noise_of([0.0] * 6)
    assert margin_for(None) == margin_for(0.002) == 0.01


@pytest.mark.parametrize("values", [[], [math.nan], [0.1, math.inf], [0.1] * 501])
def test_pairs_that_are_none(values: list[float]) -> None:
    with pytest.raises(DataError, match="give 1 to 500 finite pairs"):
        verdict(values, 0.01)


@settings(deadline=None, max_examples=200)
@given(
    enough_pairs.map(lambda values: [0.01 * value for value in values]),
    st.integers(1, MOST_PAIRS // 20),
    st.floats(0.001, 0.5),
)
def test_no_more_pairs_are_asked_for_than_are_judged(values: list[float], times: int, margin: float) -> None:
    found = verdict(values * times, margin)
    if found.blocks_needed is not None:
        num_pairs = len(values) * times + found.blocks_needed
        assert num_pairs <= MOST_PAIRS
        assert verdict([0.05] * num_pairs, margin).kind != "INCONCLUSIVE"


def test_the_last_number_of_pairs_that_is_asked_for() -> None:
    """Pairs of 1 and -1 about a centre: the interval ends 1 beside it, so it asks for 1 / centre**2 times as many."""
    asked = [
        verdict([centre + sign for sign in (1.0, -1.0)] * 5, 1e-9).blocks_needed for centre in (0.21, 0.1415, 0.14)
    ]
    assert asked == [217, 490, None]


def test_as_many_pairs_as_are_allowed() -> None:
    assert verdict([0.05, 0.06] * 250, 0.01).kind == "FASTER"


def test_pairs_as_far_apart_as_floats_can_be() -> None:
    extreme = math.log(1e308) - math.log(5e-324)
    assert verdict([extreme] * 10, 0.01).kind == "FASTER"
    assert math.isfinite(verdict([extreme] * 10, 0.01).speedup)
