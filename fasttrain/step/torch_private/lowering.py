"""Inductor lowerings: C++ loops for the operators of `kernels`, and random operators that draw in eager's order.

The private APIs of torch's compiler that this needs stand in `loops`; tests/step/test_kernels.py has their canaries.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from fasttrain.step.kernels import define_operators
from fasttrain.step.torch_private.loops import Loop, loop_class
from fasttrain.step.torch_private.small import register_small_kernels

__all__ = ["register_lowerings"]

_TYPES = {torch.float32: "float", torch.float64: "double", torch.int32: "int32_t", torch.int64: "int64_t"}

_INCLUDES = """#include <algorithm>
#include <stdexcept>
"""

_HEAD = """
extern "C" void {name}(const {real}* given, const {index}* ids, const int64_t* offsets, {chosen}{real}* made,
                       const int64_t num_given, const int64_t num_ids, const int64_t num_offsets,
                       const int64_t num_made)"""

# Ids, offsets and rows are the user's data: a row's are checked, as index_select checks them, before anything is done
# by them; its ids are in the first cache then. Those of rows of a table are fetched in advance. A negative id, without
# its sign, is larger than any. Sixteen at once: a reduction that the compiler has to find takes 14 us for a batch
# whose sums take 6.
_ROWS = """ {{{before}
    for (int64_t row = 0; row < {num_rows}; ++row) {{{fetch}
        if ({place} < 0 || {place} + 1 >= num_offsets) throw std::out_of_range("index out of range in the rows");
        int64_t at = offsets[{place}];
        const int64_t end = offsets[{place} + 1];
        if (at < 0 || end < at || end > num_ids) throw std::out_of_range("index out of range in the offsets of rows");
        u{index} most[16] = {{0}};
        int64_t entry = at;
        for (; entry + 16 <= end; entry += 16)
            for (int lane = 0; lane < 16; ++lane) most[lane] = std::max(most[lane], u{index}(ids[entry + lane]));
        for (; entry < end; ++entry) most[0] = std::max(most[0], u{index}(ids[entry]));
        for (int lane = 0; lane < 16; ++lane)
            if (most[lane] >= u{index}({num_values}))
                throw std::out_of_range("index out of range in the ids of rows");{body}
    }}
}}
"""

_FETCH = """
        if (row + 8 < {num_rows} && chosen[row + 8] >= 0 && chosen[row + 8] < num_offsets)
            __builtin_prefetch(ids + offsets[chosen[row + 8]]);"""

# Eight sums at once, since each addition waits for the one before: 5.7 us instead of 6.9 for 128 rows of 66 ids; a
# gather by vectors takes 8.4 (Xeon with AMX).
_SUM = """
        {real} sums[8] = {{0}}, rest = 0;
        for (; at + 8 <= end; at += 8)
            for (int lane = 0; lane < 8; ++lane) sums[lane] += given[ids[at + lane]];
        for (; at < end; ++at) rest += given[ids[at]];
        made[row] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])) + rest;"""

_SPREAD = """
        for (; at < end; ++at) made[ids[at]] += given[row];"""

_CLEAR = """
    for (int64_t value = 0; value < num_made; ++value) made[value] = 0;"""

_BODIES = {
    "sum": {"before": "", "body": _SUM, "num_values": "num_given", "num_rows": "num_made"},
    "spread": {"before": _CLEAR, "body": _SPREAD, "num_values": "num_made", "num_rows": "num_given"},
}


@cache
def register_lowerings() -> None:
    """Tells Inductor, once in a process, what it is to write for the operators."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering

    define_operators()
    register_small_kernels()
    _register_random()

    def flat(x: Any) -> Any:
        x = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(x))
        return ir.ExternKernel.copy_input(x) if isinstance(x, ir.ReinterpretView) else x

    def made(kind: str, size: Any, *inputs: Any) -> Any:
        device, dtype = inputs[0].get_device(), inputs[0].get_dtype()
        layout = ir.FixedLayout(device=device, dtype=dtype, size=[size])
        return ir.TensorBox.create(loop_class()(layout, [flat(x) for x in inputs], partial(_loop_over_rows, kind)))

    def sum_rows(values: Any, ids: Any, offsets: Any, chosen: Any = None) -> Any:
        if chosen is None:
            return made("sum", offsets.get_size()[0] - 1, values, ids, offsets)
        return made("sum", chosen.get_size()[0], values, ids, offsets, chosen)

    def spread_rows(gradient: Any, ids: Any, offsets: Any, num_values: Any, chosen: Any = None) -> Any:
        return made("spread", num_values, gradient, ids, offsets, *([] if chosen is None else [chosen]))

    register_lowering(torch.ops.fasttrain.sum_rows.default, type_promotion_kind=None)(sum_rows)
    register_lowering(torch.ops.fasttrain.spread_rows.default, type_promotion_kind=None)(spread_rows)


def _register_random() -> None:
    """Has random numbers drawn into tensors with the strides that eager's have: they are drawn in the order of memory.

    torch has this rule for `native_dropout` only (`add_layout_constraint` in its lowering.py).
    """
    from torch._inductor import lowering
    from torch._inductor.utils import convert_shape_to_inductor
    from torch._inductor.virtualized import V

    aten = torch.ops.aten

    def bernoulli(drawn: Any, *chance: Any) -> Any:
        node: Any = V.graph.current_node
        like = node.args[0].meta["val"]  # not the node's own: the functional form of `bernoulli_` is contiguous
        strides = convert_shape_to_inductor(like.stride())
        options = {"dtype": drawn.get_dtype(), "device": drawn.get_device()}
        return lowering.bernoulli_(lowering.empty_strided(drawn.get_size(), strides, **options), *chance)

    lowering.register_lowering(aten.bernoulli.p, type_promotion_kind=None)(bernoulli)
    for operator in (aten.rand_like.default, aten.randn_like.default, aten.randint_like.default):
        lowering.add_layout_constraint(operator, lowering.constrain_to_fx_strides)


def _loop_over_rows(kind: str, node: Any, wrapper: Any) -> Loop:
    from torch._inductor.utils import sympy_product

    given, ids, offsets, *chosen = node.inputs
    types = {"real": _TYPES[given.get_dtype()], "index": _TYPES[ids.get_dtype()]}
    name = f"fasttrain_{kind}{'_chosen' if chosen else ''}_{types['real']}_{types['index']}"
    parts = {key: value.format(**types) for key, value in _BODIES[kind].items()}
    fetch = _FETCH.format(**parts) if chosen else ""
    counts = [sympy_product(given.get_size()), ids.get_size()[0], offsets.get_size()[0], node.get_size()[0]]
    pointers = (types["real"], types["index"], *["int64_t"] * (1 + len(chosen)))
    return Loop(
        name=name,
        shared=_INCLUDES,
        head=_HEAD.format(name=name, chosen="const int64_t* chosen, " if chosen else "", **types),
        body=_ROWS.format(**types, **parts, place="chosen[row]" if chosen else "row", fetch=fetch),
        arguments=[*(each.get_name() for each in (*node.inputs, node)), *map(wrapper.codegen_sizevar, counts)],
        types=[*(f"const {each}*" for each in pointers), f"{types['real']}*", *["int64_t"] * len(counts)],
    )
