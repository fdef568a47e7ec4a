"""Verdicts on blocks that were recorded of an arm against itself: few false ones, and planted slow-downs are found."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fasttrain.measure.bench.plan import log_ratios
from fasttrain.measure.bench.record import read_record
from fasttrain.measure.verdict.stats import Noise, margin_for, noise_of, verdict

RECORDS = sorted((Path(__file__).parents[3] / "benchmarks" / "results" / "noise").glob("*.json"))
COMPARISONS, BLOCKS = 100, 10


def recorded(path: Path) -> tuple[np.ndarray, Noise]:
    """log(A / B) of each block, and the noise that they tell."""
    first, second = read_record(path).arms.values()
    pairs = log_ratios(first, second)
    return np.array(pairs), noise_of(pairs)


def verdicts(path: Path, slow_down: float) -> Counter[str]:
    """Of comparisons that are drawn from recorded blocks, A and B being exchanged by chance; B is slowed down.

    As live ones, they look a second time, at twice the blocks, where the first look decides nothing.
    """
    pairs, noise = recorded(path)
    draw = np.random.default_rng(0)
    found: Counter[str] = Counter()
    for _ in range(COMPARISONS):
        drawn = draw.choice(pairs, 2 * BLOCKS) * draw.choice([-1.0, 1.0], 2 * BLOCKS) - math.log1p(slow_down)
        looks = (verdict(drawn[:size], margin_for(noise.floor)).kind for size in (BLOCKS, 2 * BLOCKS))
        found[next((kind for kind in looks if kind != "INCONCLUSIVE"), "INCONCLUSIVE")] += 1
    return found


def test_there_are_recorded_blocks() -> None:
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_an_arm_against_itself_is_seldom_faster_or_slower(path: Path) -> None:
    found = verdicts(path, slow_down=0.0)
    assert found["FASTER"] + found["SLOWER"] <= 0.05 * COMPARISONS, found


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_twice_the_smallest_detectable_slow_down_is_found(path: Path) -> None:
    found = verdicts(path, slow_down=2 * recorded(path)[1].smallest_effect)
    assert found["SLOWER"] >= 0.95 * COMPARISONS, found
