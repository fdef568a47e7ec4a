"""What counts as growth: exactly what stays of every call, by how many bytes, and which line is named for it."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.measure.places import Place
from fasttrain.measure.profiling.growth import GraphWatch, StayWatch, inner_calls
from fasttrain.measure.profiling.suspects import CopyWatch, TorchCalls
from fasttrain.measure.profiling.tensor_memory import Allocations, AllocationTrace

STEPS_A_CALL = 5


def traced(body: Callable[[int], object], num_calls: int) -> Allocations:
    """A loop of so many calls, each said to be of several steps."""
    trace = AllocationTrace("cpu")
    trace.start()
    for call in range(num_calls):
        body(call)
        trace.step(STEPS_A_CALL)
    trace.stop()
    return trace.result()


@settings(deadline=None, max_examples=8)
@given(st.lists(st.sampled_from([True, True, True, False]), min_size=6, max_size=12))
def test_memory_grows_if_every_call_but_at_the_edges_leaves_something(is_kept: list[bool]) -> None:
    kept: list[Tensor] = []

    def body(call: int) -> None:
        made = torch.zeros(1000)
        if is_kept[call]:
            kept.append(made.clone())

    found = traced(body, len(is_kept)).growing_bytes
    is_growing = all(is_kept[call] for call in inner_calls(len(is_kept)))
    assert found == (4000 / STEPS_A_CALL if is_growing else None)


def test_a_ring_that_is_full_does_not_grow() -> None:
    ring = [torch.zeros(1000) for _ in range(100)]

    def body(call: int) -> None:
        ring[call] = torch.zeros(1000)

    assert traced(body, 10).growing_bytes is None


@contextmanager
def no_collection() -> Iterator[None]:
    """Python leaves its garbage alone, so that a test knows where it is collected."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def cycle_of(tensor: Tensor) -> None:
    cycle: list[object] = [tensor]
    cycle.append(cycle)


def test_garbage_does_not_grow() -> None:
    with no_collection():
        assert traced(lambda _: cycle_of(torch.zeros(1000)), 10).growing_bytes is None


@pytest.mark.parametrize(("num_calls", "inner"), [(6, range(1, 5)), (10, range(2, 8)), (12, range(2, 10))])
def test_the_edges_of_a_pass(num_calls: int, inner: range) -> None:
    assert inner_calls(num_calls) == inner


def watched(body: Callable[[int], object], num_calls: int = 10) -> tuple[dict[int, int], list[int]]:
    """Lines of this file: bytes that stay, by the line that makes them; and lines that join graphs."""
    graphs, stay = GraphWatch(), StayWatch()
    with TorchCalls(CopyWatch(), graphs, stay):
        for call in range(num_calls):
            body(call)
            graphs.step()
            stay.step()
    return {line_of(place): size for place, size in stay.staying().items()}, [*map(line_of, graphs.joining())]


def line_of(place: Place) -> int:
    assert place[0] == __file__
    return place[1]


def line() -> int:
    """The line that calls it."""
    return sys._getframe(1).f_lineno


def test_what_stays_is_of_the_line_that_makes_it() -> None:
    kept: list[Tensor] = []

    def body(_: int) -> None:
        made, used = torch.zeros(100), torch.zeros(500)
        here.append(line() - 1)
        view = made.add_(1)[:50]
        kept.append(view + used[:50].sum())
        here.append(line() - 1)
        kept.append(view)

    here: list[int] = []
    staying, joining = watched(body)
    assert staying == {here[0]: 6 * 400, here[1]: 6 * 200}
    assert joining == []


def test_what_is_saved_for_a_backward_pass_stays_too() -> None:
    """Only the graph holds it: Python has no tensor of it any more."""
    weight, kept = torch.ones(100, requires_grad=True), []

    def body(_: int) -> None:
        kept.append((weight * 2).exp().sum())
        here.append(line() - 1)

    here: list[int] = []
    staying, _ = watched(body)
    assert staying == {here[0]: 6 * 404}


def test_what_a_backward_pass_makes_is_of_the_line_that_calls_it() -> None:
    weight, kept = torch.ones(100, requires_grad=True), []

    def body(_: int) -> None:
        loss = (weight * torch.ones(100)).sum()
        loss.backward()
        here.append(line() - 1)
        kept.append(weight.grad)
        weight.grad = None

    here: list[int] = []
    staying, _ = watched(body)
    assert staying == {here[0]: 6 * 400}


def test_what_does_not_stay() -> None:
    recent, cache = deque(maxlen=100), {}

    def body(call: int) -> None:
        recent.append(torch.zeros(100))
        if call < 7:
            cache[call] = torch.zeros(100)
        cycle_of(torch.zeros(100))

    with no_collection():
        assert watched(body) == ({}, [])


def test_a_chain_of_graphs_is_of_the_line_that_joins_them() -> None:
    """Not of one that reads it, and through functions of which nothing is seen."""
    weight, totals, here = torch.ones(3, requires_grad=True), [torch.zeros(3)], []

    def body(_: int) -> None:
        _ = totals[0] * 2
        totals[0] = torch.nn.functional.softmin(totals[0] + weight, dim=0)  # minus, then softmax
        here.append(line() - 1)

    _, joining = watched(body)
    assert joining == [here[0]]


@pytest.mark.parametrize("num_joined", [2, 5, 8])
def test_a_graph_over_some_calls_is_no_chain(num_joined: int) -> None:
    weight, totals = torch.ones(3, requires_grad=True), [torch.zeros(())]

    def body(call: int) -> None:
        totals[0] = totals[0] + (weight * weight).sum()
        if call % num_joined == num_joined - 1:
            totals[0].backward()
            totals[0] = torch.zeros(())

    assert watched(body)[1] == []


def test_a_carried_state_that_is_detached_is_no_chain() -> None:
    weight, states = torch.ones(3, requires_grad=True), [torch.zeros(3)]

    def body(_: int) -> None:
        states[0] = (states[0].detach() * weight).tanh()

    assert watched(body)[1] == []
