"""What shows in fewer than half of the turns: no verdict of the medians stands against the time of all steps."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.comparison import Comparison
from fasttrain.measure.bench.plan import log_ratios
from fasttrain.measure.bench.record import read_record
from fasttrain.measure.bench.rounds import levels
from fasttrain.measure.verdict.compare import compare_arms
from fasttrain.measure.verdict.sides import BenchArm
from fasttrain.measure.verdict.stats import Verdict, VerdictKind, margin_for, noise_of, verdict
from fasttrain.measure.verdict.whole import judge_whole
from tests.measure.verdict.comparisons import SPREAD, arm, compared, record, stored

SHUFFLED = (*SPREAD[5:], *SPREAD[:5])
NOISE = Path(__file__).parents[3] / "benchmarks" / "results" / "noise"


def of_excesses(b_us: float, excess: float | list[float], of_a: float = 0.0) -> Comparison:
    """B with `excess` against A of 500 us, which has its own."""
    found = record({"eager": arm(500, excess=of_a), "auto": arm(b_us, SHUFFLED, excess)})
    return compare_arms(*(BenchArm(path=Path("r.json"), label=label, record=found) for label in found.arms), command="")


def test_a_cost_in_two_of_five_turns_is_not_the_same() -> None:
    steady = np.full(20, math.log(500e-6))
    often_twice = steady + math.log(2) * (np.arange(20) % 5 < 2)
    level_a, level_b = levels(np.array([steady, often_twice]))
    assert level_a == level_b, "the median turns do not show it"
    found = of_excesses(500, float(np.exp(often_twice).mean() / np.exp(level_b)) - 1)
    assert (found.outcome, found.exit_code) == ("INCONCLUSIVE", 3)
    assert found.reasons[0] == (
        "against A's, B's steps took 40.0% longer in all than their median turns tell: "
        "by all steps together B is 0.714 times as fast as A"
    )
    assert found.reasons[1].startswith("B is SAME by its median turns, and not by all steps: B pays for something")
    assert found.timing is not None
    assert found.timing.blocks_needed is None
    assert not any("further blocks would" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("b_us", "excess", "of_a", "outcome", "is_told"),
    [
        (500, 0.0, 0.0, "SAME", False),
        (500, 0.3, 0.3, "SAME", False),  # both alike: the machine, or the loader that both have
        (500, 0.0, 0.05, "INCONCLUSIVE", True),
        (500, 0.005, 0.0, "SAME", False),
        (400, 0.4, 0.0, "INCONCLUSIVE", True),  # slower in all
        (400, 0.25, 0.0, "INCONCLUSIVE", True),  # the same in all
        (400, 0.1, 0.0, "FASTER", True),  # what is left of the lead is beyond the margin
        (400, 0.005, 0.0, "FASTER", False),
        (490, 0.009, 0.0, "FASTER", False),  # within the margin, by no more than the margin
        (625, 0.0, 0.4, "INCONCLUSIVE", True),
        (625, 0.0, 0.1, "SLOWER", True),
    ],
)
def test_all_steps_together_have_to_bear_a_verdict_out(
    b_us: float, excess: float, of_a: float, outcome: str, is_told: bool
) -> None:
    found = of_excesses(b_us, excess, of_a)
    assert found.outcome == outcome
    assert any("longer in all" in reason for reason in found.reasons) == is_told


def test_a_disturbance_of_few_blocks_does_no_harm() -> None:
    assert of_excesses(500, [0.0, 0.8, 0.0, 0.0, 0.5, 0.0, 0.0, 0.9, 0.0, 0.0]).outcome == "SAME"


def test_an_open_question_stays_open_and_the_excess_is_told(tmp_path: Path) -> None:
    wild = arm(498, [9 * each for each in SHUFFLED], 0.4)
    file = stored(tmp_path / "r.json", {"eager": arm(500), "auto": wild})
    found = compared(f"{file}:eager", f"{file}:auto")
    assert found.outcome == "INCONCLUSIVE"
    assert any("B's steps took 40.0% longer in all" in reason for reason in found.reasons)
    assert not any("by its median turns" in reason for reason in found.reasons)


def test_through_a_shared_arm_its_own_excess_is_taken_out(tmp_path: Path) -> None:
    a = stored(tmp_path / "a.json", {"textbook": arm(9000), "auto": arm(500)})
    loud = stored(tmp_path / "loud.json", {"textbook": arm(9000, SHUFFLED, 0.3), "auto": arm(500, SHUFFLED, 0.3)})
    dear = stored(tmp_path / "dear.json", {"textbook": arm(9000, SHUFFLED), "auto": arm(500, SHUFFLED, 0.3)})
    assert compared(a, loud).outcome == "SAME"
    assert compared(a, dear).outcome == "INCONCLUSIVE"


@settings(deadline=None)
@given(
    kind=st.sampled_from(get_args(VerdictKind)),
    speedup=st.floats(1e-300, 1e300),
    excess=st.floats(-1400, 1400),
    margin=st.floats(0.01, 0.5),
)
def test_a_verdict_is_only_ever_withdrawn(kind: VerdictKind, speedup: float, excess: float, margin: float) -> None:
    found = Verdict(kind=kind, speedup=speedup, low=speedup, high=speedup, pairs=10, margin=margin, blocks_needed=None)
    whole = judge_whole(found, excess)
    assert whole.kind in (kind, "INCONCLUSIVE")
    assert judge_whole(found, 0.0).kind == kind or kind == "SAME"
    assert bool(whole.reasons) >= (abs(excess) > math.log1p(margin)), "what is beyond the margin is told"
    if whole.kind == "SAME":
        assert abs(math.log(speedup) - excess) <= math.log1p(margin)


@pytest.mark.parametrize("path", sorted(NOISE.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_blocks_of_an_arm_against_itself_keep_their_verdicts(path: Path) -> None:
    first, second = read_record(path).arms.values()
    typical = np.array(log_ratios(first, second))
    more = np.array(
        [math.log1p(b.excess) - math.log1p(a.excess) for a, b in zip(first.blocks, second.blocks, strict=True)]
    )
    margin = margin_for(noise_of(typical.tolist()).floor)
    draw = np.random.default_rng(0)
    kept: Counter[bool] = Counter()
    for _ in range(200):
        blocks, signs = draw.integers(0, len(more), 20), draw.choice([-1.0, 1.0], 20)
        found = verdict(typical[blocks] * signs, margin)
        kept[judge_whole(found, float(np.median(more[blocks] * signs))).kind == found.kind] += 1
    assert kept[False] <= 0.03 * kept.total()
