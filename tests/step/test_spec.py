"""What steps are run on: batches one by one, spans where engine and batches allow them, pass after pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.data.resident import Span, resident
from fasttrain.step.spec import run_passes, run_steps


class Engine:
    """Notes what it is given: one number a batch, a list a span."""

    def __init__(self, span: int) -> None:
        self.span = span
        self.given: list[Any] = []

    def step(self, batch: Any) -> None:
        self.given.append(number(batch))

    def steps(self, span: Span) -> None:
        self.given.append([number(batch) for batch in span.batches()])


def number(batch: Any) -> int:
    return int(batch[0][0] if isinstance(batch, tuple) else batch)


def rows(count: int, batch_size: int = 1) -> Any:
    return resident(torch.arange(count), batch_size=batch_size, device="cpu", shuffle=False, drop_last=False)


def flat(given: list[Any]) -> list[int]:
    return [each for call in given for each in (call if isinstance(call, list) else [call])]


def of(engine: Engine) -> Any:
    return engine


def test_spans_come_first_and_a_short_batch_by_itself() -> None:
    engine = Engine(3)
    ran = list(run_steps(of(engine), iter(rows(17, 2))))
    assert engine.given == [[0, 2, 4], [6, 8, 10], [12, 14], 16]
    assert [each.steps if isinstance(each, Span) else 1 for each in ran] == [3, 3, 2, 1]


def test_an_engine_without_spans_is_given_batches() -> None:
    engine = Engine(0)
    assert not any(isinstance(each, Span) for each in run_steps(of(engine), iter(rows(3))))
    assert engine.given == [0, 1, 2]


def test_the_engine_says_before_each_call_how_many_it_wants() -> None:
    engine = Engine(0)
    for done, _ in enumerate(run_steps(of(engine), iter(rows(10)))):
        engine.span = {0: 1, 1: 4, 2: 2}.get(done, 0)
    assert engine.given == [0, [1], [2, 3, 4, 5], [6, 7], 8, 9]


@pytest.mark.parametrize("batches", [[0, 1, 2, 3], (each for each in range(4)), (each for each in rows(4))])
def test_other_batches_are_never_taken_several_at_a_time(batches: Iterable[Any]) -> None:
    engine = Engine(2)
    assert len(list(run_steps(of(engine), iter(batches)))) == 4
    assert engine.given == [0, 1, 2, 3]


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 6), st.integers(1, 40))
def test_passes_go_on_until_there_were_enough_steps(num_rows: int, batch_size: int, span: int, most: int) -> None:
    engine, data = Engine(span), rows(num_rows, batch_size)
    num_batches = len(data)
    ran = list(run_passes(of(engine), data, most))
    steps = flat(engine.given)
    assert len(ran) == len(engine.given)
    assert steps == [place % num_batches * batch_size for place in range(len(steps))]
    assert most <= len(steps) < most + max(1, span)
    assert data.epoch == -(-len(steps) // num_batches), "no epoch is begun for nothing"


def test_an_empty_pass_ends_it() -> None:
    class Dwindling:
        def __init__(self) -> None:
            self.left = 3

        def __iter__(self) -> Iterator[int]:
            self.left -= 1
            return iter(range(self.left))

    engine = Engine(2)
    assert len(list(run_passes(of(engine), Dwindling(), 100))) == 3
    assert engine.given == [0, 1, 0]
    assert list(run_passes(of(engine), iter([]), 100)) == []
