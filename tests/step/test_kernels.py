"""Sums of gathered values by rows: the graph that says them, the kernels that compute them, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.step.kernels import define_operators, use_kernels
from fasttrain.step.program import compile_graph
from fasttrain.step.torch_private import flat_runner, prepare_for_inductor, trace_graph

OPEN = [frozenset[int](), frozenset({0}), frozenset[int](), frozenset[int]()]
Inputs = list[Tensor]


def step(values: Tensor, ids: Tensor, offsets: Tensor, wanted: Tensor) -> Tensor:
    """A step whose parameters are `values`, [1, num_values], as the review classifier makes it."""
    return reducing(values, ids, wanted, reduce="sum", offsets=offsets, unsafe=True)


def reducing(values: Tensor, ids: Tensor, wanted: Tensor, **options: Any) -> Tensor:
    leaf = values.detach().requires_grad_()
    sums = torch.segment_reduce(leaf.reshape(-1).index_select(0, ids), **options)
    loss = (sums - wanted).square().sum()
    [gradient] = torch.autograd.grad(loss, [leaf])
    values.sub_(0.1 * gradient)
    return loss.detach()


def rows(lengths: list[int], *, num_values: int = 50, dtype: Any = torch.float64, index: Any = torch.int32) -> Inputs:
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    ids = torch.randint(0, num_values, (sum(lengths),), generator=generator).to(index)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randn(1, num_values, generator=generator, dtype=dtype)
    return [values, ids, offsets, torch.randn(len(lengths), generator=generator, dtype=dtype)]


def traced(function: Callable[..., Tensor], inputs: Inputs) -> torch.fx.GraphModule:
    graph = trace_graph(function, inputs, OPEN)
    use_kernels(graph)
    return graph


def operators(graph: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


def copies(inputs: Inputs) -> Inputs:
    return [tensor.clone() for tensor in inputs]


def test_a_graph_says_sums_of_rows_in_one_operator_each_way() -> None:
    found = operators(traced(step, rows([3, 0, 9])))
    assert {"fasttrain.sum_rows.default", "fasttrain.spread_rows.default"} <= found
    assert not [name for name in found if "segment" in name or "index" in name or "new_zeros" in name]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=4, max_size=4))
def test_the_operators_give_the_same_numbers(lengths: list[int]) -> None:
    graph = traced(step, rows([3, 0, 9, 1]))
    ours, theirs = rows(lengths), rows(lengths)
    torch.testing.assert_close(graph(*ours), step(*theirs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_chosen_rows_of_a_table_are_summed_as_if_they_were_all(lengths: list[int], data: st.DataObject) -> None:
    """In any order, and one more than once; backward, too."""
    table, ids, offsets, _ = rows(lengths)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    picked = [ids[offsets[row] : offsets[row + 1]] for row in chosen]
    gradient = torch.linspace(-1, 1, len(chosen), dtype=torch.float64)
    sums = operator("sum_rows")(table, ids, offsets, torch.tensor(chosen))
    torch.testing.assert_close(sums, torch.stack([table.view(-1)[each].sum() for each in picked]))
    wanted = torch.zeros(50, dtype=torch.float64)
    for each, of_row in zip(picked, gradient, strict=True):
        wanted.index_add_(0, each, of_row.expand(len(each)))
    torch.testing.assert_close(operator("spread_rows")(gradient, ids, offsets, 50, torch.tensor(chosen)), wanted)


def operator(name: str) -> Callable[..., Tensor]:
    define_operators()
    return getattr(torch.ops.fasttrain, name)


@pytest.mark.parametrize("row", [3, -1])
def test_chosen_rows_that_there_are_not_raise(row: int) -> None:
    table, ids, offsets, wanted = rows([3, 0, 9])
    chosen = torch.tensor([0, row, 1])
    with pytest.raises((IndexError, RuntimeError)):
        operator("sum_rows")(table, ids, offsets, chosen)
    with pytest.raises((IndexError, RuntimeError)):
        operator("spread_rows")(wanted, ids, offsets, 50, chosen)


@pytest.mark.parametrize("changed", [{"reduce": "mean"}, {"initial": 1.0}])
def test_what_means_something_else_stays(changed: dict[str, Any]) -> None:
    def other(values: Tensor, ids: Tensor, offsets: Tensor, wanted: Tensor) -> Tensor:
        return reducing(values, ids, wanted, **{"reduce": "sum", "offsets": offsets, "unsafe": True, **changed})

    assert not [name for name in operators(traced(other, rows([3, 0, 9]))) if "fasttrain" in name]


def test_lengths_instead_of_offsets_stay() -> None:
    def other(values: Tensor, ids: Tensor, offsets: Tensor, wanted: Tensor) -> Tensor:
        return reducing(values, ids, wanted, reduce="sum", lengths=offsets.diff(), unsafe=True)

    assert not [name for name in operators(traced(other, rows([3, 0, 9]))) if "fasttrain" in name]


def test_values_are_read_where_they_were_gathered() -> None:
    def other(values: Tensor, ids: Tensor, offsets: Tensor, wanted: Tensor) -> Tensor:
        gathered = values.view(-1).index_select(0, ids)
        values.mul_(2.0)
        return (torch.segment_reduce(gathered, "sum", offsets=offsets, unsafe=True) - wanted).sum()

    graph = traced(other, rows([3, 0, 9]))
    assert "fasttrain.sum_rows.default" in operators(graph)
    torch.testing.assert_close(graph(*rows([3, 0, 9])), other(*rows([3, 0, 9])))


@pytest.mark.parametrize(("dtype", "index"), [(torch.float32, torch.int32), (torch.float64, torch.int64)])
def test_a_program_sums_rows(dtype: torch.dtype, index: torch.dtype, tmp_path: Path) -> None:
    examples = rows([3, 0, 9, 1], dtype=dtype, index=index)
    graph = traced(step, examples)
    prepare_for_inductor(graph)
    package = tmp_path / "step.pt2"
    kinds = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in examples]
    compile_graph(graph, kinds, OPEN, package)
    run = flat_runner(str(package), torch.device("cpu"))
    exact = 1e-5 if dtype == torch.float32 else 1e-12
    for lengths in ([3, 0, 9, 1], [0, 0, 0, 0], [40, 8, 16, 7], [0, 1, 0, 100]):
        ours, theirs = rows(lengths, dtype=dtype, index=index), rows(lengths, dtype=dtype, index=index)
        values = ours[0]
        torch.testing.assert_close(run(list(ours))[0], step(*theirs), rtol=exact, atol=exact)
        torch.testing.assert_close(values, theirs[0], rtol=exact, atol=exact)
    for change in (bad_id(50), bad_id(-1), bad_offset(2, 14), bad_offset(0, -1), bad_offset(1, 9)):
        wrong = rows([3, 0, 9, 1], dtype=dtype, index=index)
        change(wrong)
        values, before = wrong[0], wrong[0].clone()
        with pytest.raises(RuntimeError):
            run(wrong)
        assert torch.equal(values, before)


def bad_id(value: int) -> Callable[[Inputs], None]:
    return lambda inputs: inputs[1].__setitem__(5, value)


def bad_offset(place: int, value: int) -> Callable[[Inputs], None]:
    return lambda inputs: inputs[2].__setitem__(place, value)
