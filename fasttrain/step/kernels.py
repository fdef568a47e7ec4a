"""Kernels of our own for what the compiler has no good code for: rows of unequal length, and rows of mostly zeros.

`torch.segment_reduce(values.index_select(0, ids), "sum", offsets=offsets)` is a gather into memory and an operator of
ATen; its gradient is another one and a scatter. In a compiled step on the CPU each direction is one loop instead, and
so is a product of a matrix with the rows of a sparse column, which needs their entries alone. `dense_rows` makes these
rows in full, for whatever else is done with them. On other devices `spelled_out` says the same in operators of torch:
rows are padded to the longest, so that every size is known, as a CUDA graph needs it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, Transformer

from fasttrain.data.ragged import Ragged, gather_by_index

__all__ = ["define_operators", "dense_rows", "spelled_out", "spread_rows", "sum_rows", "use_kernels"]

_DTYPES = (torch.float32, torch.float64)
_INDICES = (torch.int32, torch.int64)

_aten = torch.ops.aten


@cache
def define_operators() -> Any:
    """Makes the operators known to torch, once in a process; the library that it returns keeps them there."""
    library = torch.library.Library("fasttrain", "DEF")
    library.define(
        "sum_rows(Tensor values, Tensor ids, Tensor offsets, Tensor? chosen=None, Tensor? scales=None, "
        "bool is_product=False) -> Tensor"
    )
    library.define(
        "spread_rows(Tensor gradient, Tensor ids, Tensor offsets, SymInt num_values, Tensor? chosen=None, "
        "Tensor? scales=None, bool is_product=False) -> Tensor"
    )
    library.define(
        "dense_rows(Tensor? values, Tensor ids, Tensor offsets, SymInt num_values, ScalarType dtype, Tensor chosen)"
        " -> Tensor"
    )
    for name, (compute, shape) in {
        "sum_rows": (sum_rows, _shape_of_sums),
        "spread_rows": (spread_rows, _shape_of_values),
        "dense_rows": (dense_rows, _shape_of_dense),
    }.items():
        for device in ("CPU", "CUDA"):
            library.impl(name, compute, device)
        library.impl(name, shape, "Meta")
    return library


def use_kernels(graph: torch.fx.GraphModule) -> None:
    """Puts `sum_rows` and `spread_rows` where a traced graph says the same in more operators, in place.

    Args:
        graph: as it was traced, its nodes' `val` being there.
    """
    define_operators()
    for node in list(graph.graph.nodes):
        if node.target is _aten.segment_reduce.default:
            _use_sum_rows(node)
        elif node.target is _aten.index_add.default:
            _use_spread_rows(node)
    graph.recompile()


def sum_rows(
    values: Tensor,
    ids: Tensor,
    offsets: Tensor,
    chosen: Tensor | None = None,
    scales: Tensor | None = None,
    is_product: bool = False,
) -> Tensor:
    """For each row, or each chosen one, the sum of `values.view(-1)[ids[offsets[row] : offsets[row + 1]]]`, [rows].

    As a product it is `dense_rows(scales, ids, offsets, ..., chosen) @ values.T`, [rows, outputs], for values of
    [outputs, num_values]. A value that is infinite or NaN makes all sums with its output NaN, also those whose rows
    have no zero where the value is: there the product would be infinite.
    """
    if is_product:
        assert chosen is not None
        return dense_rows(scales, ids, offsets, values.shape[1], values.dtype, chosen) @ values.t()
    ids, offsets = _rows(ids, offsets, chosen)
    return torch.segment_reduce(values.reshape(-1).index_select(0, ids), "sum", offsets=offsets, unsafe=True)


def spread_rows(
    gradient: Tensor,
    ids: Tensor,
    offsets: Tensor,
    num_values: int,
    chosen: Tensor | None = None,
    scales: Tensor | None = None,
    is_product: bool = False,
) -> Tensor:
    """The gradient of the values, [num_values], from that of the sums, [rows].

    Of a product, whose gradient is [rows, outputs], it is [outputs, num_values]: `gradient.T @ dense_rows(...)`. An
    infinity or a NaN in an output's gradient makes NaN of all its values' gradients, also of those of values that are
    not zero in any row that it is of: there the product would be infinite.
    """
    if is_product:
        assert chosen is not None
        return gradient.t() @ dense_rows(scales, ids, offsets, num_values, gradient.dtype, chosen)
    ids, offsets = _rows(ids, offsets, chosen)
    gathered = gradient.new_empty(ids.shape)  # of what was summed, torch looks at the shape alone
    by_entry = _aten._segment_reduce_backward(gradient, gradient, gathered, "sum", offsets=offsets)
    return gradient.new_zeros(num_values).index_add(0, ids, by_entry)


def dense_rows(
    values: Tensor | None, ids: Tensor, offsets: Tensor, num_values: int, dtype: torch.dtype, chosen: Tensor
) -> Tensor:
    """Each chosen row of a sparse column as it is in full, [rows, num_values]: zeros but for its entries.

    Args:
        values: [num_entries], the entries; None: all are 1.
        ids: [num_entries], their places in the row.
        offsets: [table rows + 1], where each row begins and ends among the entries.
        num_values: of a row in full.
        dtype: of the result, which the entries are converted to.
        chosen: [rows], the rows' numbers.
    """
    found, of_rows = _rows(ids, offsets, chosen)
    begins = torch.arange(0, len(chosen) * num_values, num_values, device=ids.device)
    places = begins.repeat_interleave(of_rows.diff(), output_size=len(found)) + found
    made = torch.zeros(len(chosen) * num_values, dtype=dtype, device=ids.device)
    if values is None:
        made.index_fill_(0, places, 1)
    else:
        made.index_copy_(0, places, _rows(values, offsets, chosen)[0].to(dtype))
    return made.view(len(chosen), num_values)


def _shape_of_sums(
    values: Tensor,
    _ids: Tensor,
    offsets: Tensor,
    chosen: Tensor | None = None,
    _scales: Tensor | None = None,
    is_product: bool = False,
) -> Tensor:
    rows = offsets.shape[0] - 1 if chosen is None else chosen.shape[0]
    return values.new_empty((rows, values.shape[0]) if is_product else rows)


def _shape_of_values(gradient: Tensor, _ids: Tensor, _offsets: Tensor, num_values: int, *_others: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[1:], num_values))


def _shape_of_dense(
    _values: Tensor | None, ids: Tensor, _offsets: Tensor, num_values: int, dtype: torch.dtype, chosen: Tensor
) -> Tensor:
    return ids.new_empty((chosen.shape[0], num_values), dtype=dtype)


def _rows(ids: Tensor, offsets: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids and offsets of the chosen rows alone."""
    if chosen is None:
        return ids, offsets
    lengths = offsets.diff().index_select(0, chosen)
    picked = Ragged.of_lengths(gather_by_index(ids, offsets, chosen, int(lengths.sum())), lengths)
    return picked.values, picked.offsets


def _use_sum_rows(node: Node) -> None:
    """Replaces `segment_reduce(index_select(values, 0, ids), "sum", offsets=offsets)`."""
    gathered, reduce = node.args[0], node.args[1]
    offsets = _only_option(node, "offsets")
    if reduce != "sum" or not isinstance(gathered, Node) or gathered.target is not _aten.index_select.default:
        return
    values, dim, ids = cast("Any", gathered.args)
    if dim != 0 or not _is_flat(values, *_DTYPES) or not _is_flat(ids, *_INDICES) or not _is_flat(offsets, torch.int64):
        return
    if offsets.op == "placeholder":  # else they may be made after the gather, which is where values must be read
        arguments = (_base(values), ids, offsets)
        _replace(node, torch.ops.fasttrain.sum_rows.default, arguments, [gathered], at=gathered)


def _use_spread_rows(node: Node) -> None:
    """Replaces `index_add(zeros, 0, ids, _segment_reduce_backward(gradient, ..., "sum", offsets=offsets))`."""
    zeros, dim, ids, spread = node.args[:4]
    if not isinstance(zeros, Node) or zeros.target is not _aten.new_zeros.default or not _is_flat(zeros, *_DTYPES):
        return
    if dim != 0 or not isinstance(spread, Node) or spread.target is not _aten._segment_reduce_backward.default:
        return
    gradient, _sums, gathered, reduce = cast("Any", spread.args)
    offsets = _only_option(spread, "offsets")
    if reduce != "sum" or node.kwargs.get("alpha", 1) != 1 or not _is_flat(gradient, *_DTYPES):
        return
    if not _is_flat(ids, *_INDICES) or not _is_flat(offsets, torch.int64):
        return
    [num_values] = cast("Any", zeros.args[1])
    arguments = (gradient, ids, offsets, num_values)
    _replace(node, torch.ops.fasttrain.spread_rows.default, arguments, [zeros, spread, gathered], at=node)


def _only_option(node: Node, name: str) -> Any:
    """A keyword argument, None where it is not there or another one (but `unsafe`) says more."""
    given = {each for each, value in node.kwargs.items() if value is not None and each != "unsafe"}
    return node.kwargs[name] if given == {name} else None


def _is_flat(node: Any, *dtypes: torch.dtype) -> bool:
    """Whether a node is a tensor of one dimension, without gaps, of one of these dtypes."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.dim() == 1 and value.is_contiguous() and value.dtype in dtypes


def _base(node: Node) -> Node:
    """What a flat view is of, so that the kernel reads that very memory."""
    while node.target in (_aten.view.default, _aten.detach.default):
        above = node.args[0]
        if not isinstance(above, Node) or not above.meta["val"].is_contiguous():
            break
        node = above
    return node


def _replace(node: Node, target: Any, arguments: tuple[Any, ...], gone: list[Any], *, at: Node) -> None:
    """Has a call made at a node, in place of another; of `gone`, what nothing else reads goes with it."""
    with node.graph.inserting_before(at):
        call = node.graph.call_function(target, arguments)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    for dead in (node, *gone):
        if isinstance(dead, Node) and not dead.users and dead.op == "call_function":
            dead.graph.erase_node(dead)


def spelled_out(graph: GraphModule, device: torch.device, longest: int | None) -> GraphModule:
    """A graph that says in torch's operators what another one says in the operators of this module.

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
        if target is torch.ops.fasttrain.dense_rows.default:
            return self._dense_padded(*args)
        of_rows = {
            torch.ops.fasttrain.sum_rows.default: (sum_rows, self._sum_padded),
            torch.ops.fasttrain.spread_rows.default: (spread_rows, self._spread_padded),
        }.get(target)
        if of_rows is None:
            return super().call_function(target, args, kwargs)
        return of_rows["chosen" in kwargs](*args, **kwargs)

    def _sum_padded(self, values: Tensor, ids: Tensor, offsets: Tensor, *, chosen: Tensor) -> Tensor:
        entries, is_there, _ = self._entries_of(offsets, chosen)
        return torch.where(is_there, values.reshape(-1)[ids[entries]], 0).sum(1)

    def _spread_padded(
        self, gradient: Tensor, ids: Tensor, offsets: Tensor, num_values: int, *, chosen: Tensor
    ) -> Tensor:
        entries, is_there, columns = self._entries_of(offsets, chosen)
        # What pads a row goes to places after the last, one a column: in one place it would all wait in line.
        places = torch.where(is_there, ids[entries], num_values + columns)
        spread = torch.where(is_there, gradient.unsqueeze(1), 0)
        made = gradient.new_zeros(num_values + self._longest).index_put((places,), spread, accumulate=True)
        return made.narrow(0, 0, num_values)

    def _dense_padded(
        self,
        values: Tensor | None,
        ids: Tensor,
        offsets: Tensor,
        num_values: int,
        dtype: torch.dtype,
        chosen: Tensor,
    ) -> Tensor:
        entries, is_there, columns = self._entries_of(offsets, chosen)
        places = torch.where(is_there, ids[entries], num_values + columns).long()
        found = torch.ones_like(is_there, dtype=dtype) if values is None else values[entries].to(dtype)
        zeros = torch.zeros_like(chosen, dtype=dtype).unsqueeze(1).expand(-1, num_values + self._longest)
        return zeros.scatter(1, places, found).narrow(1, 0, num_values).contiguous()

    def _entries_of(self, offsets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers of the rows' entries, [rows, longest]; whether each is there, else it is 0; the columns'."""
        columns = super().call_function(torch.arange, (self._longest,), {"device": self._device})
        places = offsets[chosen].unsqueeze(1) + columns
        is_there = places < offsets[chosen + 1].unsqueeze(1)
        return torch.where(is_there, places, 0), is_there, columns
