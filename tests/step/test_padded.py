"""Sums of rows padded to the longest, in torch's own operators: what the kernels of the CPU give, they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule

from fasttrain.data.ragged import Ragged
from fasttrain.errors import EngineError
from fasttrain.step import walk as walk_module
from fasttrain.step.build import GraphJob
from fasttrain.step.kernels import define_operators, spelled_out
from tests.step.models import CASES, CPU, OPTIMIZERS, started
from tests.step.spans import data_of, taken, trace_walk

NUM_VALUES = 20


def both_ways(*, is_chosen: bool) -> GraphModule:
    """A graph of both operators: (values, ids, offsets[, chosen]) -> sums, and what they spread."""
    define_operators()
    graph = Graph()
    names = ("values", "ids", "offsets", *["chosen"] * is_chosen)
    values, ids, offsets, *chosen = map(graph.placeholder, names)
    options = {"chosen": chosen[0]} if is_chosen else {}
    sums = graph.call_function(torch.ops.fasttrain.sum_rows.default, (values, ids, offsets), options)
    spread = graph.call_function(torch.ops.fasttrain.spread_rows.default, (sums, ids, offsets, NUM_VALUES), options)
    graph.output((sums, spread))
    return GraphModule({}, graph)


def table(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, NUM_VALUES, (sum(lengths),), generator=generator, dtype=torch.int32)
    values = torch.randn(NUM_VALUES, generator=generator, dtype=torch.float64)
    return [values, *Ragged.of_lengths(ids, torch.tensor(lengths))]


def operators(graph: GraphModule) -> str:
    return " ".join(str(node.target) for node in graph.graph.nodes)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    st.lists(st.integers(0, 7), min_size=1, max_size=12),
    st.integers(0, 3),
)
def test_chosen_rows_give_the_kernels_numbers(lengths: list[int], chosen: list[int], more: int) -> None:
    inputs = [*table(lengths), torch.tensor(chosen) % len(lengths)]
    graph = both_ways(is_chosen=True)
    padded = spelled_out(graph, CPU, max(lengths) + more)
    assert "rows" not in operators(padded)
    torch.testing.assert_close(padded(*inputs), graph(*inputs))


def test_a_row_that_is_longer_than_all_is_cut() -> None:
    """So a graph must not be used for data with longer rows: what it holds for is one source's."""
    inputs = [*table([5, 2]), torch.tensor([0, 1])]
    found, wanted = (
        each(*inputs)[0] for each in (spelled_out(both_ways(is_chosen=True), CPU, 4), both_ways(is_chosen=True))
    )
    assert found[1] == wanted[1]
    assert found[0] != wanted[0]


def test_whole_batches_are_left_to_torchs_segments() -> None:
    graph = both_ways(is_chosen=False)
    spelled = spelled_out(graph, CPU, None)
    assert "segment_reduce" in operators(spelled)
    assert "sum_rows" not in operators(spelled)
    inputs = table([3, 0, 4])
    torch.testing.assert_close(spelled(*inputs), graph(*inputs))


@pytest.mark.usefixtures("in_double")
def test_a_walk_gives_the_same_numbers() -> None:
    """Forward, backward and optimizer of a sparse model over resident rows, as a GPU would run them."""
    data = data_of(CASES["sparse"])
    spec, _ = started(CASES["sparse"], OPTIMIZERS["adam"])
    traced = trace_walk(spec, data)
    state = traced.new_state()
    state.begin(taken(iter(data), 2))
    inputs: Any = traced.inputs(data, state)
    graph = GraphJob.of(traced.parts[0]).graph
    assert "sum_rows" in operators(graph)
    found: list[list[Tensor]] = []
    for each in (graph, spelled_out(graph, CPU, data.longest)):
        copies = [tensor.detach().clone() for tensor in inputs]
        with torch.no_grad():
            each(*copies)
            each(*copies)
        found.append(copies)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_only_devices_without_kernels_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(CASES["sparse"])
    assert walk_module._padded_to(data) is None  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(data, "device", torch.device("cuda"))
    assert walk_module._padded_to(data) == data.longest > 0  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(walk_module, "MOST_PADDED", data.longest)
    with pytest.raises(EngineError, match="5 rows padded to it are too many"):
        walk_module._padded_to(data)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(walk_module, "MOST_PADDED", 1 << 22)
    plain = data_of(CASES["mlp"])
    monkeypatch.setattr(plain, "device", torch.device("cuda"))
    assert walk_module._padded_to(plain) is None  # pyright: ignore[reportPrivateUsage]
