"""Timing several ways to run the same steps in turn."""

from __future__ import annotations

import pytest

from fasttrain.step import trial as module
from fasttrain.step.trial import Trial


def test_rounds_alternate_and_a_slow_start_does_not_mislead() -> None:
    trial, turns = Trial(["first", "second"], steps=2), list[str]()
    while not trial.is_over:
        turns.append(trial.turn)
        is_start = len(turns) <= 4
        trial.add(trial.turn, 9.0 if is_start else {"first": 2.0, "second": 1.0}[trial.turn])
    assert turns[:6] == ["first", "first", "second", "second", "first", "first"]
    assert len(turns) == 2 * 2 * (module.ROUNDS + 1)
    assert trial.medians() == {"first": 2.0, "second": 1.0}
    assert trial.fastest() == "second"


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ({1: 1.0, 4: 0.97, 16: 0.5}, 16),
        ({1: 1.0, 4: 0.99, 16: 0.985}, 1),
        ({1: 1.0, 4: 0.5, 16: 0.495}, 4),  # as good as the one before, which was found first
        ({1: 1.0}, 1),
    ],
)
def test_an_arm_must_be_clearly_faster_than_those_before_it(seconds: dict[int, float], fastest: int) -> None:
    trial = Trial(seconds)
    while not trial.is_over:
        trial.add(trial.turn, seconds[trial.turn])
    assert trial.fastest() == fastest


def test_an_arm_may_leave() -> None:
    trial = Trial([1, 4])
    assert 4 in trial
    for _ in range(module.ROUNDS + 1):
        trial.add(1, 1.0)
    assert not trial.is_over
    trial.drop(4)
    trial.drop(4)
    assert 4 not in trial
    assert trial.is_over
    assert trial.fastest() == 1
