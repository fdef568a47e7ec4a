"""How Inductor writes the operators of `kernels` into a program: each as one loop in C++, called with bare pointers.

The private APIs of torch's compiler that this needs stand here alone; tests/step/test_kernels.py has their canaries.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fasttrain.step.kernels import define_operators

__all__ = ["KERNEL_SOURCE", "register_lowerings"]

_TYPES = {torch.float32: "float", torch.float64: "double", torch.int32: "int32_t", torch.int64: "int64_t"}

_HEAD = """
extern "C" void {name}(const {real}* given, const {index}* ids, const int64_t* offsets, {real}* made,
                       const int64_t num_given, const int64_t num_ids, const int64_t num_made)"""

# Ids and offsets are the user's data: they are checked, as index_select checks them, before anything is done by them.
_CHECK = """ {{
    {index} least = 0, most = -1;
    #pragma omp simd reduction(min : least) reduction(max : most)
    for (int64_t at = 0; at < num_ids; ++at) {{
        least = ids[at] < least ? ids[at] : least;
        most = ids[at] > most ? ids[at] : most;
    }}
    bool is_good = least >= 0 && most < {num_values} && offsets[0] >= 0 && offsets[{num_rows}] <= num_ids;
    for (int64_t row = 0; row < {num_rows}; ++row) is_good = is_good && offsets[row] <= offsets[row + 1];
    if (!is_good) throw std::out_of_range("index out of range in the ids or offsets of rows");"""

# Eight sums at once, since each addition waits for the one before: 5.7 us instead of 6.9 for 128 rows of 66 ids; a
# gather by vectors takes 8.4 (Xeon with AMX).
_SUM = """
    for (int64_t row = 0; row < num_made; ++row) {{
        const int64_t end = offsets[row + 1];
        int64_t at = offsets[row];
        {real} sums[8] = {{0}}, rest = 0;
        for (; at + 8 <= end; at += 8)
            for (int lane = 0; lane < 8; ++lane) sums[lane] += given[ids[at + lane]];
        for (; at < end; ++at) rest += given[ids[at]];
        made[row] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])) + rest;
    }}
}}
"""

_SPREAD = """
    for (int64_t value = 0; value < num_made; ++value) made[value] = 0;
    for (int64_t row = 0; row < num_given; ++row) {{
        const {real} gradient = given[row];
        const int64_t end = offsets[row + 1];
        for (int64_t at = offsets[row]; at < end; ++at) made[ids[at]] += gradient;
    }}
}}
"""

_BODIES = {"sum": (_SUM, "num_given", "num_made"), "spread": (_SPREAD, "num_made", "num_given")}
"""By name: the loop, how many values there are, how many rows."""

KERNEL_SOURCE = _HEAD + _CHECK + _SUM + _SPREAD
"""What a program holds of this file: another source makes another program."""


@cache
def register_lowerings() -> None:
    """Tells Inductor, once in a process, what it is to write for the operators."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering

    define_operators()
    kernel = _kernel_class()

    def flat(x: Any) -> Any:
        x = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(x))
        return ir.ExternKernel.copy_input(x) if isinstance(x, ir.ReinterpretView) else x

    def made(body: str, size: Any, *inputs: Any) -> Any:
        device, dtype = inputs[0].get_device(), inputs[0].get_dtype()
        layout = ir.FixedLayout(device=device, dtype=dtype, size=[size])
        return ir.TensorBox.create(kernel(layout, [flat(x) for x in inputs], body))

    def sum_rows(values: Any, ids: Any, offsets: Any) -> Any:
        return made("sum", offsets.get_size()[0] - 1, values, ids, offsets)

    def spread_rows(gradient: Any, ids: Any, offsets: Any, num_values: Any) -> Any:
        return made("spread", num_values, gradient, ids, offsets)

    register_lowering(torch.ops.fasttrain.sum_rows.default, type_promotion_kind=None)(sum_rows)
    register_lowering(torch.ops.fasttrain.spread_rows.default, type_promotion_kind=None)(spread_rows)


@cache
def _kernel_class() -> Any:
    from torch._inductor import ir
    from torch._inductor.utils import sympy_product

    class RowKernel(ir.ExternKernelOut):
        def __init__(self, layout: Any, inputs: list[Any], body: str) -> None:
            self._body = body
            super().__init__(layout, inputs)

        def codegen(self, wrapper: Any) -> None:
            given, ids, offsets = self.inputs
            types = {"real": _TYPES[given.get_dtype()], "index": _TYPES[ids.get_dtype()]}
            name = f"fasttrain_{self._body}_{types['real']}_{types['index']}"
            self._define(wrapper, name, types)
            counts = [sympy_product(given.get_size()), ids.get_size()[0], self.get_size()[0]]
            wrapper.generate_kernel_call(
                name,
                [*(each.get_name() for each in (given, ids, offsets, self)), *map(wrapper.codegen_sizevar, counts)],
                device=self.get_device(),
                triton=False,
                arg_types=[
                    *(f"const {kind}*" for kind in (types["real"], types["index"], "int64_t")),
                    f"{types['real']}*",
                    *["int64_t"] * len(counts),
                ],
            )

        def _define(self, wrapper: Any, name: str, types: dict[str, str]) -> None:
            written = vars(wrapper).setdefault("fasttrain_kernels", set())
            if name in written:
                return
            head = _HEAD.format(name=name, **types)
            written.add(name)
            loop, num_values, num_rows = _BODIES[self._body]
            body = (_CHECK + loop).format(**types, num_values=num_values, num_rows=num_rows)
            wrapper.define_kernel(name, f"#include <stdexcept>\n{head}{body}", cpp_definition=f"{head};", gpu=False)

    return RowKernel
