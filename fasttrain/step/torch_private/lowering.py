"""How Inductor writes the operators of `kernels` into a program: each as one loop in C++, called with bare pointers.

The private APIs of torch's compiler that this needs stand here alone; tests/step/test_kernels.py has their canaries.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fasttrain.step.kernels import define_operators
from fasttrain.step.torch_private.marking import recorded_call

__all__ = ["KERNEL_SOURCE", "register_lowerings"]

_TYPES = {torch.float32: "float", torch.float64: "double", torch.int32: "int32_t", torch.int64: "int64_t"}

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

KERNEL_SOURCE = _HEAD + _ROWS + _FETCH + _SUM + _SPREAD + _CLEAR
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

    def sum_rows(values: Any, ids: Any, offsets: Any, chosen: Any = None) -> Any:
        if chosen is None:
            return made("sum", offsets.get_size()[0] - 1, values, ids, offsets)
        return made("sum", chosen.get_size()[0], values, ids, offsets, chosen)

    def spread_rows(gradient: Any, ids: Any, offsets: Any, num_values: Any, chosen: Any = None) -> Any:
        return made("spread", num_values, gradient, ids, offsets, *([] if chosen is None else [chosen]))

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
            given, ids, offsets, *chosen = self.inputs
            types = {"real": _TYPES[given.get_dtype()], "index": _TYPES[ids.get_dtype()]}
            name = f"fasttrain_{self._body}{'_chosen' if chosen else ''}_{types['real']}_{types['index']}"
            self._define(wrapper, name, types, is_chosen=bool(chosen))
            counts = [sympy_product(given.get_size()), ids.get_size()[0], offsets.get_size()[0], self.get_size()[0]]
            pointers = (types["real"], types["index"], *["int64_t"] * (1 + len(chosen)))
            with recorded_call(self, wrapper, name):
                wrapper.generate_kernel_call(
                    name,
                    [*(each.get_name() for each in (*self.inputs, self)), *map(wrapper.codegen_sizevar, counts)],
                    device=self.get_device(),
                    triton=False,
                    arg_types=[
                        *(f"const {kind}*" for kind in pointers),
                        f"{types['real']}*",
                        *["int64_t"] * len(counts),
                    ],
                )

        def _define(self, wrapper: Any, name: str, types: dict[str, str], *, is_chosen: bool) -> None:
            written = vars(wrapper).setdefault("fasttrain_kernels", set())
            if name in written:
                return
            written.add(name)
            body = _BODIES[self._body]
            head = _HEAD.format(name=name, chosen="const int64_t* chosen, " if is_chosen else "", **types)
            parts = {key: value.format(**types) for key, value in body.items()}
            place = "chosen[row]" if is_chosen else "row"
            fetch = _FETCH.format(**parts) if is_chosen else ""
            loop = _ROWS.format(**types, **parts, place=place, fetch=fetch)
            wrapper.define_kernel(
                name, f"#include <algorithm>\n#include <stdexcept>\n{head}{loop}", cpp_definition=f"{head};", gpu=False
            )

    return RowKernel
