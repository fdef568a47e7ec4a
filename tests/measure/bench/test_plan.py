"""The plan of a benchmark."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import ConfigError
from fasttrain.commands.bench import Bench
from fasttrain.measure.bench.plan import ArmSpec, log_ratios, orders
from fasttrain.measure.bench.sources import DEFAULT_ARMS
from tests.measure.bench.bench_fakes import arm, figures, plan


@given(num_blocks=st.integers(1, 20), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_the_order_is_a_permutation_in_each_block(num_blocks: int, seed: int) -> None:
    labels = ["a", "b", "c", "d"]
    first, second = (list(itertools.islice(orders(labels, seed), num_blocks)) for _ in range(2))
    assert all(sorted(order) == labels for order in first)
    assert first == second


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, [*DEFAULT_ARMS[:1], "textbook, 4 threads", *DEFAULT_ARMS[1:]]),
        ({"cpu_threads": 4}, list(DEFAULT_ARMS)),
        ({"arms": ("textbook", "auto")}, ["textbook", "auto"]),
    ],
)
def test_the_textbook_has_torchs_own_threads_too_where_no_arms_are_asked_for(
    options: dict[str, Any], labels: list[str]
) -> None:
    found = Bench(**options).plan(4, torch.device("cpu"))
    assert [each.label for each in found.arms] == labels
    own = [each.threads for each in found.arms if each.label == "textbook, 4 threads"]
    assert {each.threads for each in found.arms} == {options.get("cpu_threads", 1), *own}


def test_the_order_varies() -> None:
    assert len({tuple(order) for order in itertools.islice(orders(["a", "b", "c"], 0), 50)}) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 0}, "blocks 0"),
        ({"threads": 0}, "threads 0"),
        ({"seed": -1}, "seed -1"),
        ({"warmup_s": -1.0}, "warmup -1 s"),
        ({"timed_s": 0.0}, "timed 0 s"),
        ({"timed_s": math.inf}, "timed inf s"),
        ({"timed_s": math.nan}, "timed nan s"),
        ({"against": "nobody"}, "against 'nobody'"),
        ({"arms": ()}, "none"),
        ({"arms": (ArmSpec(label="a", source="a", threads=1),) * 2}, "each once"),
        ({"aa": ("a", "b"), "blocks": 6}, "noise needs 7"),
        ({"blocks": 501}, "500 pairs are the most that are judged"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan("eager", **changes)


@given(
    first=st.dictionaries(st.integers(0, 9), st.floats(1e-6, 1e3), min_size=1),
    second=st.dictionaries(st.integers(0, 9), st.floats(1e-6, 1e3), min_size=1),
)
@settings(deadline=None)
def test_pairs_are_formed_by_block(first: dict[int, float], second: dict[int, float]) -> None:
    one, other = (
        arm(blocks=tuple(figures(block, seconds) for block, seconds in sorted(each.items())))
        for each in (first, second)
    )
    shared = sorted(first.keys() & second.keys())
    assert log_ratios(one, other) == pytest.approx([math.log(first[block] / second[block]) for block in shared])
    assert log_ratios(other, one) == pytest.approx([-ratio for ratio in log_ratios(one, other)])


def test_pairs_of_steps_of_other_sizes_are_compared_by_the_sample() -> None:
    small, large = arm(1e-3), arm(blocks=(figures(0, 2e-3, samples_per_step=256),))
    assert log_ratios(small, large) == pytest.approx([0.0])
