"""Inductor lowerings: C++ loops for the operators of `kernels`, and random operators that draw in eager's order.

The private APIs of torch's compiler that this needs stand in `loops`; tests/step/test_kernels.py has their canaries.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

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

# In vectors by name: programs are compiled without the compiler's own search for them.
_LANES = """#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>
#include <ATen/cpu/vec/vec.h>
namespace {
constexpr int kLanes = 16;

template <typename T> struct Lanes {
    using Vec = at::vec::Vectorized<T>;
    static constexpr int kVecs = kLanes / Vec::size();
    Vec vecs[kVecs];

    static Lanes of(T value) {
        Lanes made;
        for (int at = 0; at < kVecs; ++at) made.vecs[at] = Vec(value);
        return made;
    }
    static Lanes load(const T* from) {
        Lanes made;
        for (int at = 0; at < kVecs; ++at) made.vecs[at] = Vec::loadu(from + at * Vec::size());
        return made;
    }
    void store(T* to) const {
        for (int at = 0; at < kVecs; ++at) vecs[at].store(to + at * Vec::size());
    }
    Lanes operator+(const Lanes& other) const {
        Lanes made;
        for (int at = 0; at < kVecs; ++at) made.vecs[at] = vecs[at] + other.vecs[at];
        return made;
    }
    Lanes operator*(T scale) const {
        Lanes made;
        for (int at = 0; at < kVecs; ++at) made.vecs[at] = vecs[at] * Vec(scale);
        return made;
    }
};

// Memory for so many values of each lane, on a boundary of cache lines, which stays with the thread.
template <typename T> T* lanes_of(int64_t num_values) {
    static thread_local std::vector<T> kept;
    kept.resize(num_values * kLanes + 64 / sizeof(T));
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(kept.data()) + 63) / 64 * 64);
}

// made[value][lane] = given[lane][value], 0 for lanes from `count` on; returns 0 times the values of each lane.
template <typename T>
Lanes<T> pack_lanes(const T* given, int64_t by_lane, int64_t by_value, int count, int64_t num_values, T* made) {
    constexpr int kWidth = at::vec::Vectorized<float>::size();
    Lanes<T> zeros = Lanes<T>::of(0);
    int64_t value = 0;
    if constexpr (std::is_same_v<T, float>)
        if (by_value == 1 && count == kLanes)
            for (; value + kWidth <= num_values; value += kWidth) {
                for (int lane = 0; lane < kLanes; lane += kWidth)
                    at::vec::transpose_mxn<float, kWidth, kWidth>(
                        given + lane * by_lane + value, by_lane, made + value * kLanes + lane, kLanes);
                for (int at = 0; at < kWidth; ++at)
                    zeros = zeros + Lanes<T>::load(made + (value + at) * kLanes) * T(0);
            }
    for (; value < num_values; ++value) {
        for (int lane = 0; lane < kLanes; ++lane)
            made[value * kLanes + lane] = lane < count ? given[lane * by_lane + value * by_value] : T(0);
        zeros = zeros + Lanes<T>::load(made + value * kLanes) * T(0);
    }
    return zeros;
}

// made[lane][value] = given[value][lane].
template <typename T> void unpack_lanes(const T* given, int count, int64_t num_values, T* made) {
    constexpr int kWidth = at::vec::Vectorized<float>::size();
    int64_t value = 0;
    if constexpr (std::is_same_v<T, float>)
        if (count == kLanes)
            for (; value + kWidth <= num_values; value += kWidth)
                for (int lane = 0; lane < kLanes; lane += kWidth)
                    at::vec::transpose_mxn<float, kWidth, kWidth>(
                        given + value * kLanes + lane, kLanes, made + lane * num_values + value, num_values);
    for (; value < num_values; ++value)
        for (int lane = 0; lane < count; ++lane) made[lane * num_values + value] = given[value * kLanes + lane];
}
}  // namespace
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
    }}{after}
}}
"""

_FETCH = """
        if (row + 8 < num_rows && chosen[row + 8] >= 0 && chosen[row + 8] < num_offsets)
            __builtin_prefetch(ids + offsets[chosen[row + 8]]);"""

# Eight sums at once, since each addition waits for the one before: 5.7 us instead of 6.9 for 128 rows of 66 ids; a
# gather by vectors takes 8.4 (Xeon with AMX).
_SUM = """
        {real} sums[8] = {{0}}, rest = {start};
        for (; at + 8 <= end; at += 8)
            for (int lane = 0; lane < 8; ++lane) sums[lane] += given[ids[at + lane]]{times_lane};
        for (; at < end; ++at) rest += given[ids[at]]{times};
        made[row] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])) + rest;"""

_SPREAD = """
        for (; at < end; ++at) made[ids[at]] += given[row]{times};"""

_CLEAR = """
    std::fill(made, made + num_values, {real}({start}));"""

_DENSE = """
        {real}* full = made + row * num_values;
        std::fill(full, full + num_values, {real}(0));
        for (; at < end; ++at) full[ids[at]] = {entry};"""

# A product of full rows is NaN wherever it meets 0 times a weight that is infinite or NaN. Here a sum begins with 0
# times all of the weights, which is 0 or NaN.
_START = """
    {real} zeros[16] = {{0}};
    int64_t last = 0;
    for (; last + 16 <= {num_given}; last += 16)
        for (int lane = 0; lane < 16; ++lane) zeros[lane] += given[last + lane] * 0;
    {real} start = 0;
    for (; last < {num_given}; ++last) start += given[last] * 0;
    for (int lane = 0; lane < 16; ++lane) start += zeros[lane];"""

# Products with more than one column of weights, sixteen at a time: these lie together for each value of a row, so that
# an entry is one addition of vectors.
_BLOCKS = """
    const int64_t num_blocks = (num_outputs + kLanes - 1) / kLanes;{parallel}
    for (int64_t block = 0; block < num_blocks; ++block) {{
        const int64_t first = block * kLanes;
        const int count = std::min<int64_t>(kLanes, num_outputs - first);
        {real}* const packed = lanes_of<{real}>(num_values);
        const {real}* const from = given + given_begin + first * by_output;"""

_SUM_WIDE = """
        const auto start = pack_lanes(from, by_output, by_other, count, num_values, packed);
        for (int64_t row = 0; row < num_rows; ++row) {{
            int64_t at = offsets[{place}];
            const int64_t end = offsets[{place} + 1];
            auto sum = start, other = Lanes<{real}>::of(0);
            for (; at + 2 <= end; at += 2) {{
                sum = sum + Lanes<{real}>::load(packed + ids[at] * kLanes){times};
                other = other + Lanes<{real}>::load(packed + ids[at + 1] * kLanes){times_next};
            }}
            if (at < end) sum = sum + Lanes<{real}>::load(packed + ids[at] * kLanes){times};
            {real} sums[kLanes];
            (sum + other).store(sums);
            std::copy(sums, sums + count, made + row * num_outputs + first);
        }}
    }}"""

_SPREAD_WIDE = """
        {real} lanes[kLanes] = {{0}};
        auto start = Lanes<{real}>::of(0);
        for (int64_t row = 0; row < num_rows; ++row) {{
            for (int lane = 0; lane < count; ++lane) lanes[lane] = from[row * by_other + lane * by_output];
            start = start + Lanes<{real}>::load(lanes) * {real}(0);
        }}
        for (int64_t value = 0; value < num_values; ++value) start.store(packed + value * kLanes);
        for (int64_t row = 0; row < num_rows; ++row) {{
            for (int lane = 0; lane < count; ++lane) lanes[lane] = from[row * by_other + lane * by_output];
            const auto gradient = Lanes<{real}>::load(lanes);
            const int64_t end = offsets[{place} + 1];
            for (int64_t at = offsets[{place}]; at < end; ++at) {{
                {real}* const into = packed + ids[at] * kLanes;
                (Lanes<{real}>::load(into) + gradient{times}).store(into);
            }}
        }}
        unpack_lanes(packed, count, num_values, made + first * num_values);
    }}"""


class _Kernel(NamedTuple):
    """A loop over rows: what it does for each, from its first entry `at` to its `end`, and before and after all.

    Where it `is_wide`, what is given is [outputs, values or rows] with any strides.
    """

    name: str
    row: str = ""
    before: str = ""
    after: str = ""
    is_wide: bool = False


_SUMS = _Kernel("sum", _SUM)
_SPREADS = _Kernel("spread", _SPREAD, _CLEAR)
_PRODUCT = _Kernel("sum_product", _SUM, _START.replace("{num_given}", "num_values"))
_GRADIENT = _Kernel("spread_product", _SPREAD, _START.replace("{num_given}", "num_rows") + _CLEAR)
_WIDE_PRODUCT = _Kernel("sum_wide", after=_BLOCKS + _SUM_WIDE, is_wide=True)
_WIDE_GRADIENT = _Kernel("spread_wide", after=_BLOCKS + _SPREAD_WIDE, is_wide=True)


@cache
def register_lowerings() -> None:
    """Tells Inductor, once in a process, what it is to write for the operators."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering
    from torch._inductor.utils import sympy_product

    define_operators()
    register_small_kernels()
    _register_random()

    def flat(x: Any) -> Any:
        x = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(x))
        return ir.ExternKernel.copy_input(x) if isinstance(x, ir.ReinterpretView) else x

    def made(kernel: _Kernel, size: list[Any], dtype: Any, num_rows: Any, num_values: Any, **inputs: Any) -> Any:
        named = {name: x for name, x in inputs.items() if x is not None}
        place = ir.ExternKernel.realize_input if kernel.is_wide else flat
        placed = [(place if name == "given" else flat)(x) for name, x in named.items()]
        layout = ir.FixedLayout(device=named["ids"].get_device(), dtype=dtype, size=size)
        describe = partial(_loop_over_rows, kernel, [*named], {"num_rows": num_rows, "num_values": num_values})
        return ir.TensorBox.create(loop_class()(layout, placed, describe))

    def sum_rows(
        values: Any, ids: Any, offsets: Any, chosen: Any = None, scales: Any = None, is_product: bool = False
    ) -> Any:
        rows = offsets.get_size()[0] - 1 if chosen is None else chosen.get_size()[0]
        inputs = {"given": values, "ids": ids, "offsets": offsets, "chosen": chosen, "scales": scales}
        if not is_product:
            return made(_SUMS, [rows], values.get_dtype(), rows, sympy_product(values.get_size()), **inputs)
        outputs, num_values = values.get_size()
        kernel = _PRODUCT if outputs == 1 else _WIDE_PRODUCT
        return made(kernel, [rows, outputs], values.get_dtype(), rows, num_values, **inputs)

    def spread_rows(
        gradient: Any,
        ids: Any,
        offsets: Any,
        num_values: Any,
        chosen: Any = None,
        scales: Any = None,
        is_product: bool = False,
    ) -> Any:
        rows, *outputs = gradient.get_size()
        inputs = {"given": gradient, "ids": ids, "offsets": offsets, "chosen": chosen, "scales": scales}
        kernel = _SPREADS if not is_product else _GRADIENT if outputs == [1] else _WIDE_GRADIENT
        return made(kernel, [*outputs, num_values], gradient.get_dtype(), rows, num_values, **inputs)

    def dense_rows(values: Any, ids: Any, offsets: Any, num_values: Any, dtype: Any, chosen: Any) -> Any:
        one = "given[at]" if values is not None else int(torch.ones(1, dtype=dtype).view(_BITS[dtype.itemsize]))
        name = "dense" if values is not None else f"dense_{one}"
        kernel = _Kernel(name, _DENSE.replace("{entry}", f"{_BITS_TYPES[dtype.itemsize]}({one})"))
        [rows] = chosen.get_size()
        inputs = {"given": values, "ids": ids, "offsets": offsets, "chosen": chosen}
        return made(kernel, [rows, num_values], dtype, rows, num_values, **inputs)

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


def _loop_over_rows(kernel: _Kernel, names: list[str], sizes: dict[str, Any], node: Any, wrapper: Any) -> Loop:
    """The call of a loop.

    Args:
        kernel: what it does.
        names: of its inputs: given (if it reads some), ids, offsets, chosen (unless all rows are meant), scales.
        sizes: num_rows and num_values: of the rows, and that ids are below.
        node: what it makes.
        wrapper: of the program.
    """
    inputs = dict(zip(names, node.inputs, strict=True))
    dtypes = {name: each.get_dtype() for name, each in inputs.items()}
    is_dense = kernel.name.startswith("dense")
    real = _BITS_TYPES[node.get_dtype().itemsize] if is_dense else _TYPES[node.get_dtype()]
    is_same = dtypes.get("given", node.get_dtype()) == node.get_dtype()
    types = {name: _TYPES[dtype] for name, dtype in dtypes.items() if name != "given" or not is_same}
    pointers = {name: f"const {types.get(name, real)}*" for name in inputs} | {"made": f"{real}*"}
    counts = {name: inputs[name[4:]].get_size()[0] for name in ("num_ids", "num_offsets")} | sizes
    if kernel.is_wide:
        counts |= _places_of_wide(inputs["given"], node, kernel)
    threads = torch.get_num_threads() if kernel.is_wide else 1
    parts_of_name = [kernel.name, *(["chosen"] if "chosen" in inputs else []), real, types["ids"]]
    parts_of_name += [types[name] for name in ("given", "scales") if name in types]
    parts_of_name += [str(threads)] if threads > 1 else []
    parameters = [f"{of} {each}" for each, of in (pointers | dict.fromkeys(counts, "const int64_t")).items()]
    is_scaled = "scales" in inputs
    parts = {
        "real": real,
        "index": types["ids"],
        "place": "chosen[row]" if "chosen" in inputs else "row",
        "start": "start" if "product" in kernel.name else "0",
        "times": f" * {real}(scales[at])" if is_scaled else "",
        "times_lane": f" * {real}(scales[at + lane])" if is_scaled else "",
        "times_next": f" * {real}(scales[at + 1])" if is_scaled else "",
        "parallel": f"\n#pragma omp parallel for num_threads({threads})" if threads > 1 else "",
        # The places of entries are fasttrain's own; ids are the user's, and PyTorch has an error for them.
        "ids": "places" if is_dense else "ids",
    }
    texts = {"before": kernel.before, "body": kernel.row, "after": kernel.after}
    texts = {name: text.format(**parts) for name, text in texts.items()}
    fetch = _FETCH if "chosen" in inputs else ""
    name = "_".join(["fasttrain", *parts_of_name])
    return Loop(
        name=name,
        shared=_LANES if kernel.is_wide else _INCLUDES,
        head=f'extern "C" void {name}({", ".join(parameters)})',
        body=_ROWS.format(**parts, **texts, fetch=fetch),
        arguments=[
            *(each.get_name() for each in (*inputs.values(), node)),
            *map(wrapper.codegen_sizevar, counts.values()),
        ],
        types=[*pointers.values(), *["int64_t"] * len(counts)],
    )


def _places_of_wide(given: Any, node: Any, kernel: _Kernel) -> dict[str, Any]:
    """Where what is given to a wide kernel lies: [outputs, values], or [rows, outputs] of a gradient."""
    is_gradient = kernel is _WIDE_GRADIENT
    by_output, by_other = reversed(given.get_stride()) if is_gradient else given.get_stride()
    return {
        "num_outputs": node.get_size()[0 if is_gradient else 1],
        "by_output": by_output,
        "by_other": by_other,
        "given_begin": given.get_layout().offset,
    }
