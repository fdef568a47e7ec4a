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
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS_TYPES = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}
"""By the size of a value in bytes: what its bits are copied as."""

_INCLUDES = """#include <algorithm>
#include <stdexcept>
"""

# Ids, offsets and rows are the user's data: a row's are checked, as index_select checks them, before anything is done
# by them; its ids are in the first cache then. Those of rows of a table are fetched in advance. A negative id, without
# its sign, is larger than any. Sixteen at once: a reduction that the compiler has to find takes 14 us for a batch
# whose sums take 6.
_ROWS = """{{{before}
    for (int64_t row = 0; row < num_rows; ++row) {{{fetch}
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
            if (most[lane] >= u{index}(num_values))
                throw std::out_of_range("index out of range in the {ids} of rows");{body}
    }}
}}
"""

_FETCH = """
        if (row + 8 < num_rows && chosen[row + 8] >= 0 && chosen[row + 8] < num_offsets)
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
    std::fill(made, made + num_values, {real}(0));"""

_DENSE = """
        {real}* full = made + row * num_values;
        std::fill(full, full + num_values, {real}(0));
        for (; at < end; ++at) full[ids[at]] = {entry};"""


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

    def made(size: list[Any], dtype: Any, describe: Any, inputs: dict[str, Any]) -> Any:
        named = {name: flat(x) for name, x in inputs.items() if x is not None}
        layout = ir.FixedLayout(device=named["ids"].get_device(), dtype=dtype, size=size)
        return ir.TensorBox.create(loop_class()(layout, [*named.values()], partial(describe, [*named])))

    def sum_rows(values: Any, ids: Any, offsets: Any, chosen: Any = None) -> Any:
        size = offsets.get_size()[0] - 1 if chosen is None else chosen.get_size()[0]
        inputs = {"given": values, "ids": ids, "offsets": offsets, "chosen": chosen}
        return made([size], values.get_dtype(), _describe_sums, inputs)

    def spread_rows(gradient: Any, ids: Any, offsets: Any, num_values: Any, chosen: Any = None) -> Any:
        inputs = {"given": gradient, "ids": ids, "offsets": offsets, "chosen": chosen}
        return made([num_values], gradient.get_dtype(), _describe_spread, inputs)

    def dense_rows(values: Any, ids: Any, offsets: Any, num_values: Any, dtype: Any, chosen: Any) -> Any:
        inputs = {"given": values, "ids": ids, "offsets": offsets, "chosen": chosen}
        return made([chosen.get_size()[0], num_values], dtype, _describe_dense, inputs)

    register_lowering(torch.ops.fasttrain.sum_rows.default, type_promotion_kind=None)(sum_rows)
    register_lowering(torch.ops.fasttrain.spread_rows.default, type_promotion_kind=None)(spread_rows)
    register_lowering(torch.ops.fasttrain.dense_rows.default, type_promotion_kind=None)(dense_rows)


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


def _describe_sums(names: list[str], node: Any, wrapper: Any) -> Loop:
    from torch._inductor.utils import sympy_product

    real = _TYPES[node.get_dtype()]
    sizes = {"num_rows": node.get_size()[0], "num_values": sympy_product(node.inputs[0].get_size())}
    return _loop_over_rows("sum", dict(zip(names, node.inputs, strict=True)), node, wrapper, sizes, real, _SUM)


def _describe_spread(names: list[str], node: Any, wrapper: Any) -> Loop:
    real = _TYPES[node.get_dtype()]
    sizes = {"num_rows": node.inputs[0].get_size()[0], "num_values": node.get_size()[0]}
    inputs = dict(zip(names, node.inputs, strict=True))
    return _loop_over_rows("spread", inputs, node, wrapper, sizes, real, _SPREAD, _CLEAR)


def _describe_dense(names: list[str], node: Any, wrapper: Any) -> Loop:
    dtype, inputs = node.get_dtype(), dict(zip(names, node.inputs, strict=True))
    real = _BITS_TYPES[dtype.itemsize]
    num_rows, num_values = node.get_size()
    sizes = {"num_rows": num_rows, "num_values": num_values}
    if "given" in inputs:
        kind, entry = "dense", f"{real}(given[at])"
    else:
        one = int(torch.ones(1, dtype=dtype).view(_BITS[dtype.itemsize]))
        kind, entry = f"dense_{one}", f"{real}({one})"
    return _loop_over_rows(kind, inputs, node, wrapper, sizes, real, _DENSE.replace("{entry}", entry))


def _loop_over_rows(
    kind: str,
    inputs: dict[str, Any],
    node: Any,
    wrapper: Any,
    sizes: dict[str, Any],
    real: str,
    body: str,
    before: str = "",
) -> Loop:
    """The call of a loop.

    Args:
        kind: a name for what `body` and `before` are.
        inputs: given (if it reads some), ids, offsets, and chosen, if not all rows are meant.
        node: what it makes.
        wrapper: of the program.
        sizes: num_rows and num_values: of the rows, and that ids are below.
        real: the type in C++ of what is given and made.
        body: what is done for each row, from its first entry `at` to its `end`.
        before: what is done before all rows.
    """
    dtypes = {name: each.get_dtype() for name, each in inputs.items()}
    types = {"real": real, "index": _TYPES[dtypes["ids"]]}
    is_same = dtypes.get("given", node.get_dtype()) == node.get_dtype()
    of_input = {"given": real if is_same else _TYPES[dtypes["given"]], "ids": types["index"]}
    pointers = {name: f"const {of_input.get(name, 'int64_t')}*" for name in inputs} | {"made": f"{real}*"}
    counts = {name: inputs[name[4:]].get_size()[0] for name in ("num_ids", "num_offsets")} | sizes
    parts_of_name = [kind, *(["chosen"] if "chosen" in inputs else []), real, types["index"]]
    name = "_".join(["fasttrain", *parts_of_name, *([] if is_same else [of_input["given"]])])
    parameters = [f"{of} {each}" for each, of in (pointers | dict.fromkeys(counts, "const int64_t")).items()]
    place = "chosen[row]" if "chosen" in inputs else "row"
    fetch = _FETCH if "chosen" in inputs else ""
    # The places of entries are fasttrain's own; ids are the user's, and PyTorch has an error for them.
    told = "places" if kind.startswith("dense") else "ids"
    parts = {"before": before.format(**types), "body": body.format(**types), "fetch": fetch, "place": place}
    return Loop(
        name=name,
        shared=_INCLUDES,
        head=f'extern "C" void {name}({", ".join(parameters)})',
        body=_ROWS.format(**types, **parts, ids=told),
        arguments=[
            *(each.get_name() for each in (*inputs.values(), node)),
            *map(wrapper.codegen_sizevar, counts.values()),
        ],
        types=[*pointers.values(), *["int64_t"] * len(counts)],
    )
