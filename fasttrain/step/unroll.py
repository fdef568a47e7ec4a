"""Several steps over resident rows as one graph, made from the graph of one step on a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fasttrain.data.ragged import Ragged
from fasttrain.step.kernels import define_operators

__all__ = ["Unrolling", "takes_rows", "unroll"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Unrolling:
    """How a step's graph is repeated.

    Attributes:
        first_leaf: which of its inputs is the first tensor of a batch.
        is_ragged: for each column that batches are gathered from, whether its rows are of unequal length.
        steps: how many.
        rows: in a batch.
        longest: entries of the longest row of unequal length, where the graph is to hold for no longer ones; None: for
            any.
    """

    first_leaf: int
    is_ragged: tuple[bool, ...]
    steps: int
    rows: int
    longest: int | None = None

    @classmethod
    def of(
        cls, first_leaf: int, columns: Sequence[Tensor | Ragged], steps: int, rows: int, longest: int | None = None
    ) -> Unrolling:
        """For batches that are gathered from these columns, in the order of the batch's tensors."""
        is_ragged = tuple(isinstance(column, Ragged) for column in columns)
        return cls(first_leaf=first_leaf, is_ragged=is_ragged, steps=steps, rows=rows, longest=longest)

    @property
    def end(self) -> int:
        """The input after the last tensor of a batch."""
        return self.first_leaf + sum(2 if is_ragged else 1 for is_ragged in self.is_ragged)


def unroll(graph: GraphModule, unrolling: Unrolling) -> GraphModule:
    """Repeats the graph of a step, and has each repetition take its batch from the columns by itself.

    Args:
        graph: of a step on a batch, which `takes_rows`; its inputs are what stays the same, the batch's tensors, and
            what stays the same.
        unrolling: how.

    Returns:
        A graph that takes the columns' tensors in place of the batch's and, after them, the numbers of the rows of all
        batches, [steps * rows], int64. It returns the losses, [steps].
    """
    define_operators()
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    leaves, after = placeholders[unrolling.first_leaf : unrolling.end], placeholders[unrolling.end :]
    made = Graph()
    kept = {node: made.placeholder(f"before_{at}") for at, node in enumerate(placeholders[: unrolling.first_leaf])}
    tables = [made.placeholder(f"column_{at}") for at in range(len(leaves))]
    all_rows = made.placeholder("rows")
    kept.update({node: made.placeholder(f"after_{at}") for at, node in enumerate(after)})
    losses: list[Any] = []
    for number in range(unrolling.steps):
        begin = number * unrolling.rows
        chosen = made.call_function(_aten.slice.Tensor, (all_rows, 0, begin, begin + unrolling.rows))
        place = dict(kept)
        for leaf, table, is_ragged in zip(leaves, tables, _of_leaves(unrolling), strict=True):
            batch = (table, 0, chosen)
            place[leaf] = table if is_ragged else made.call_function(_aten.index_select.default, batch)
        losses.append(_append(made, graph, place, _ragged_leaves(graph, unrolling), chosen))
    made.output(made.call_function(_aten.stack.default, (losses,)))
    return GraphModule(graph, made)


def takes_rows(graph: GraphModule, unrolling: Unrolling) -> bool:
    """Whether a graph sums the rows of unequal length that it is given, and does nothing else with them."""
    readers = [user for leaf in _ragged_leaves(graph, unrolling) for user in leaf.users]
    return all(getattr(user.target, "namespace", "") == "fasttrain" for user in readers)


def _of_leaves(unrolling: Unrolling) -> list[bool]:
    """For each tensor of a batch, whether it is one of the two of rows of unequal length."""
    return [is_ragged for is_ragged in unrolling.is_ragged for _ in range(2 if is_ragged else 1)]


def _ragged_leaves(graph: GraphModule, unrolling: Unrolling) -> set[Node]:
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    leaves = placeholders[unrolling.first_leaf : unrolling.end]
    return {leaf for leaf, is_ragged in zip(leaves, _of_leaves(unrolling), strict=True) if is_ragged}


def _append(made: Graph, graph: GraphModule, place: dict[Node, Node], ragged: set[Node], chosen: Node) -> Any:
    """One more step; returns its loss."""
    for node in graph.graph.nodes:
        if node.op == "output":
            return torch.fx.map_arg(node.args[0], place.__getitem__)
        if node.op == "placeholder":
            continue
        copied = place[node] = made.node_copy(node, place.__getitem__)
        if not ragged.isdisjoint(node.all_input_nodes):
            copied.kwargs = {"chosen": chosen}
    raise AssertionError("a graph has an output")
