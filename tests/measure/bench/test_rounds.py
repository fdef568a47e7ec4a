"""Arms that take turns: the rounds, and what they tell of each arm."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fasttrain.measure.bench.messages import ArmState, ProcessDiedError, Slice, Started
from fasttrain.measure.bench.rounds import LEAST_ROUNDS, SLICE_S, levels, run_rounds


class Turns:
    """Arms that note when their turns are; a step takes what it takes, times the machine's speed by then."""

    def __init__(self, speeds: list[float] | None = None) -> None:
        self.order: list[str] = []
        self._speeds = speeds or [1.0]

    def speed(self, num_arms: int) -> float:
        return self._speeds[(len(self.order) - 1) // num_arms % len(self._speeds)]


class Turning:
    started = Started()

    def __init__(self, name: str, step_s: float, turns: Turns, num_arms: int, dies_at: int = -1) -> None:
        self._name, self._step_s, self._turns, self._num_arms, self._dies_at = name, step_s, turns, num_arms, dies_at
        self.asked: list[float] = []
        self.cores: list[int] = []

    def slice(self, seconds: float, core: int) -> Slice:
        self.asked.append(seconds)
        self.cores.append(core)
        if len(self.asked) == self._dies_at:
            raise ProcessDiedError("killed")
        self._turns.order.append(self._name)
        step_s = self._step_s * self._turns.speed(self._num_arms)
        steps = math.ceil(seconds / step_s)
        shares = {"waited_s": 0.01 * seconds, "others_s": seconds, "awake_s": 0.02 * seconds}
        return Slice(seconds=steps * step_s, steps=steps, **shares)

    def state(self) -> ArmState:
        return ArmState(compile_s=None, peak_bytes=None, engine=None)


def test_every_arm_has_a_turn_in_each_round_and_none_is_always_first() -> None:
    turns = Turns()
    arms = {name: Turning(name, 1e-3, turns, 3) for name in "abc"}
    timed, died = run_rounds(arms, 0.0, random.Random(0))
    assert died == {}
    rounds = [turns.order[at : at + 3] for at in range(0, len(turns.order), 3)]
    assert len(rounds) == LEAST_ROUNDS
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(Counter(order[0] for order in rounds)) == 3
    assert {each.rounds for each in timed.values()} == {LEAST_ROUNDS}
    assert arms["a"].asked == [SLICE_S] * LEAST_ROUNDS
    assert arms["a"].cores == arms["b"].cores == list(range(LEAST_ROUNDS))


def test_arms_have_so_many_seconds_on_average() -> None:
    turns = Turns()
    timed, _ = run_rounds(
        {"a": Turning("a", 1e-3, turns, 2), "b": Turning("b", 0.15, turns, 2)}, 10.0, random.Random(0)
    )
    assert {each.rounds for each in timed.values()} == {100}  # 0.05 s and 0.15 s a round
    assert timed["a"].steps == 100 * 50
    assert timed["b"].steps == 100
    assert timed["a"].seconds == pytest.approx(5.0)
    assert timed["a"].waited_share == pytest.approx(0.01)
    assert timed["b"].awake_share == pytest.approx(0.02)


@given(speeds=st.lists(st.floats(0.2, 5.0), min_size=1, max_size=30), ratio=st.floats(0.1, 10.0))
@settings(deadline=None)
def test_the_machines_speed_is_taken_out(speeds: list[float], ratio: float) -> None:
    turns = Turns(speeds)
    timed, _ = run_rounds(
        {"a": Turning("a", 1e-3, turns, 2), "b": Turning("b", 1e-3 * ratio, turns, 2)}, 0.0, random.Random(0)
    )
    assert timed["b"].step_s / timed["a"].step_s == pytest.approx(ratio)
    met = sorted(speeds[at % len(speeds)] for at in range(LEAST_ROUNDS))
    assert met[0] * 0.999 <= timed["a"].step_s / 1e-3 <= met[-1] * 1.001


def test_an_arm_that_dies_leaves_the_others_their_rounds() -> None:
    turns = Turns()
    arms = {"a": Turning("a", 1e-3, turns, 2), "b": Turning("b", 1e-3, turns, 2, dies_at=4)}
    timed, died = run_rounds(arms, 0.0, random.Random(0))
    assert list(timed) == ["a"]
    assert timed["a"].rounds == LEAST_ROUNDS
    assert str(died["b"]) == "killed"


def test_where_all_die_the_rounds_end() -> None:
    timed, died = run_rounds({"a": Turning("a", 1e-3, Turns(), 1, dies_at=1)}, 1e9, random.Random(0))
    assert timed == {}
    assert list(died) == ["a"]
    assert run_rounds({}, 1.0, random.Random(0)) == ({}, {})


LOGS = st.floats(-10, 10)


@given(of_arms=arrays(float, st.integers(1, 8), elements=LOGS), of_rounds=arrays(float, 21, elements=LOGS))
@settings(deadline=None)
def test_what_adds_up_is_taken_apart(of_arms: np.ndarray, of_rounds: np.ndarray) -> None:
    found = levels(of_arms[:, None] + of_rounds)
    assert found - found[0] == pytest.approx(of_arms - of_arms[0], abs=1e-9)
    low, high = of_rounds.min() + of_arms.min(), of_rounds.max() + of_arms.max()
    assert all(low - 1e-9 <= level <= high + 1e-9 for level in found)


@given(log_times=arrays(float, (2, 21), elements=LOGS))
@settings(deadline=None)
def test_two_arms_differ_by_the_median_of_the_rounds_differences(log_times: np.ndarray) -> None:
    first, second = levels(log_times)
    assert first - second == pytest.approx(np.median(log_times[0] - log_times[1]), abs=1e-9)


def test_rounds_in_which_one_arm_was_disturbed_do_not_count_much() -> None:
    draw = np.random.default_rng(0)
    of_arms = np.array([0.0, 0.5, -1.0])
    log_times = of_arms[:, None] + draw.normal(0, 0.5, 40) + draw.normal(0, 0.01, (3, 40))
    log_times[1, :12] += 2.0
    log_times[2, 12:20] -= 2.0
    found = levels(log_times)
    assert found - found[0] == pytest.approx(of_arms, abs=0.03)


def test_one_arm_alone_has_its_median() -> None:
    assert levels(np.array([[1.0, 2.0, 9.0]])) == pytest.approx([2.0])
