"""Sums of rows of unequal length in torch's own operators, for devices that `kernels` has no loops for.

Chosen rows of a table are padded to the longest: every size is known then, as a CUDA graph needs it, and torch's
compiler makes one kernel of gather, mask and sum, and another one of the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Transformer

from fasttrain.step.kernels import define_operators, spread_rows, sum_rows

__all__ = ["spelled_out"]


def spelled_out(graph: GraphModule, device: torch.device, longest: int | None) -> GraphModule:
    """A graph that says in torch's operators what another one says in `sum_rows` and `spread_rows`.

    Args:
        graph: the other one; it stays as it is.
        device: where it is to run.
        longest: entries of the longest row that may be chosen; None where it chooses none.
    """
    define_operators()
    return _Speller(graph, device, longest or 0).transform()


class _Speller(Transformer):
    def __init__(self, graph: GraphModule, device: torch.device, longest: int) -> None:
        super().__init__(graph)
        self._device = device
        self._longest = longest

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operator of the graph; its tensors are stand-ins, which record what is done with them."""
        of_rows = {
            torch.ops.fasttrain.sum_rows.default: (sum_rows, self._sum_padded),
            torch.ops.fasttrain.spread_rows.default: (spread_rows, self._spread_padded),
        }.get(target)
        if of_rows is None:
            return super().call_function(target, args, kwargs)
        return of_rows["chosen" in kwargs](*args, **kwargs)

    def _sum_padded(self, values: Tensor, ids: Tensor, offsets: Tensor, *, chosen: Tensor) -> Tensor:
        found, is_there, _ = self._ids_of(ids, offsets, chosen)
        return torch.where(is_there, values.reshape(-1)[found], 0).sum(1)

    def _spread_padded(
        self, gradient: Tensor, ids: Tensor, offsets: Tensor, num_values: int, *, chosen: Tensor
    ) -> Tensor:
        found, is_there, columns = self._ids_of(ids, offsets, chosen)
        # What pads a row goes to places after the last, one a column: in one place it would all wait in line.
        places = torch.where(is_there, found, num_values + columns)
        spread = torch.where(is_there, gradient.unsqueeze(1), 0)
        made = gradient.new_zeros(num_values + self._longest).index_put((places,), spread, accumulate=True)
        return made.narrow(0, 0, num_values)

    def _ids_of(self, ids: Tensor, offsets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' ids, [rows, longest]; whether each is there (else it is some other one); the columns' numbers."""
        columns = super().call_function(torch.arange, (self._longest,), {"device": self._device})
        places = offsets[chosen].unsqueeze(1) + columns
        is_there = places < offsets[chosen + 1].unsqueeze(1)
        return ids[torch.where(is_there, places, 0)], is_there, columns
