"""Kernels of our own in programs for the CPU, for what is small: products of matrices, places of largest values.

ATen's product of two small matrices is mostly its calls: 10 and 7 us for 128 x 64 by 64 x 32 and 128 x 32 by 32 x 10
(Xeon with AMX), where the loops below, made for the sizes at hand, take 5 and 1. Inductor's argmax over 10 classes goes
through memory for each row: 11 us for 128 rows, 1 below.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from fasttrain.step.torch_private.loops import Loop, loop_class

__all__ = ["register_small_kernels"]

MAX_SECOND = 1 << 14
"""Values of the second factor, which is packed on the stack and is to stay in the first caches: 64 KB."""

MAX_PRODUCTS = 1 << 20
"""Multiplications: up to here the loops take 0.5 to 1.1 of the time of ATen's products (AVX-512), beyond as long."""

MIN_ROWS = 8
"""Of the first factor: fewer do not repay packing the second."""

WIDEST = 16
"""Values of a vector."""

MAX_CLASSES = 64
"""More are worth vectors along the classes, which is what Inductor writes."""

_PRODUCT = """
#include <ATen/cpu/vec/vec.h>
namespace {
using Vec = at::vec::Vectorized<float>;
constexpr int kWidth = Vec::size();
// Vectors that are summed up at a time, as many as the registers hold: several, since an addition waits for the last.
constexpr int kSums = kWidth >= 16 ? 16 : 8;

// made[ROWS][N] = bias + a[ROWS][K] b[K][COLS vectors], the last vector of TAIL values.
template <int ROWS, int COLS, int TAIL, int N, int K, int64_t A_ROW, int64_t A_COL, int64_t B_ROW>
inline void multiply_rows(const float* bias, int64_t bias_row, const float* a, const float* b, float* made) {
    Vec sums[ROWS * COLS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
        for (int col = 0; col < COLS; ++col)
            sums[row * COLS + col] = bias == nullptr
                ? Vec(0.0f)
                : Vec::loadu(bias + row * bias_row + col * kWidth, col == COLS - 1 ? TAIL : kWidth);
    for (int k = 0; k < K; ++k) {
        Vec right[COLS];
#pragma GCC unroll 16
        for (int col = 0; col < COLS; ++col) right[col] = Vec::loadu(b + k * B_ROW + col * kWidth);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const Vec left(a[row * A_ROW + k * A_COL]);
#pragma GCC unroll 16
            for (int col = 0; col < COLS; ++col)
                sums[row * COLS + col] = at::vec::fmadd(left, right[col], sums[row * COLS + col]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
        for (int col = 0; col < COLS; ++col)
            sums[row * COLS + col].store(made + row * N + col * kWidth, col == COLS - 1 ? TAIL : kWidth);
}

template <int M, int COLS, int TAIL, int N, int K, int64_t A_ROW, int64_t A_COL, int64_t B_ROW>
inline void multiply_columns(const float* bias, int64_t bias_row, const float* a, const float* b, float* made) {
    constexpr int ROWS = kSums / COLS, REST = M % ROWS;
    for (int m = 0; m < M - REST; m += ROWS)
        multiply_rows<ROWS, COLS, TAIL, N, K, A_ROW, A_COL, B_ROW>(
            bias == nullptr ? bias : bias + m * bias_row, bias_row, a + m * A_ROW, b, made + m * N);
    if constexpr (REST > 0)
        multiply_rows<REST, COLS, TAIL, N, K, A_ROW, A_COL, B_ROW>(
            bias == nullptr ? bias : bias + (M - REST) * bias_row, bias_row, a + (M - REST) * A_ROW, b,
            made + (M - REST) * N);
}

// Rows of whole vectors, filled up with zeros.
template <int N, int K, int64_t B_ROW, int64_t B_COL, int PADDED>
inline void pack(const float* b, float* packed) {
    for (int n = 0; n < PADDED; n += kWidth)
        for (int k = 0; k < K; k += kWidth)
            if (B_ROW == 1 && n + kWidth <= N && k + kWidth <= K)
                at::vec::transpose_mxn<float, kWidth, kWidth>(
                    b + n * B_COL + k, B_COL, packed + k * PADDED + n, PADDED);
            else
                for (int row = k; row < std::min(k + kWidth, K); ++row)
                    for (int col = n; col < n + kWidth; ++col)
                        packed[row * PADDED + col] = col < N ? b[row * B_ROW + col * B_COL] : 0.0f;
}

// made[M][N] = bias + a[M][K] b[K][N]; of a and b, what a step by a row and by a column is.
template <int M, int N, int K, int64_t A_ROW, int64_t A_COL, int64_t B_ROW, int64_t B_COL>
inline void multiply(const float* bias, int64_t bias_row, const float* a, const float* b, float* made) {
    constexpr int PADDED = (N + kWidth - 1) / kWidth * kWidth, TAIL = N - (PADDED - kWidth);
    constexpr bool PACKED = B_COL != 1 || TAIL != kWidth;
    constexpr int64_t ROW = PACKED ? PADDED : B_ROW;
    alignas(64) float packed[PACKED ? K * PADDED : 1];
    if constexpr (PACKED) {
        pack<N, K, B_ROW, B_COL, PADDED>(b, packed);
        b = packed;
    }
    constexpr int WIDE = 4 * kWidth, LAST = (PADDED - 1) / WIDE * WIDE;
    for (int n = 0; n < LAST; n += WIDE)
        multiply_columns<M, 4, kWidth, N, K, A_ROW, A_COL, ROW>(
            bias == nullptr ? bias : bias + n, bias_row, a, b + n, made + n);
    multiply_columns<M, (PADDED - LAST) / kWidth, TAIL, N, K, A_ROW, A_COL, ROW>(
        bias == nullptr ? bias : bias + LAST, bias_row, a, b + LAST, made + LAST);
}
}  // namespace
"""

# A vector holds as many rows: each entry is compared with the largest of its row so far. As in torch, the first of
# equals counts, and a NaN is larger than any number.
_PLACES = """
#include <ATen/cpu/vec/vec.h>
namespace {
template <int ROWS, int CLASSES, int64_t X_ROW, int64_t X_COL>
inline void place_largest(const float* x, int64_t* made) {
    using Vec = at::vec::Vectorized<float>;
    constexpr int WIDTH = Vec::size();
    for (int first = 0; first < ROWS; first += WIDTH) {
        const int count = std::min(WIDTH, ROWS - first);
        int32_t rows[WIDTH];
        for (int row = 0; row < WIDTH; ++row) rows[row] = std::min(row, count - 1) * X_ROW;
        const auto where = at::vec::Vectorized<int32_t>::loadu(rows);
        Vec largest(-std::numeric_limits<float>::infinity()), place(0.0f);
        for (int col = 0; col < CLASSES; ++col) {
            const Vec value = at::vec::gather<sizeof(float)>(x + first * X_ROW + col * X_COL, where);
            const Vec is_larger = (value > largest) | ((value != value) & (largest == largest));
            largest = Vec::blendv(largest, value, is_larger);
            place = Vec::blendv(place, Vec(float(col)), is_larger);
        }
        float places[WIDTH];
        place.store(places);
        for (int row = 0; row < count; ++row) made[first + row] = int64_t(places[row]);
    }
}
}  // namespace
"""

_CALL_PRODUCT = "{{ multiply<{sizes}>({bias}, {bias_row}, a + {a_offset}, b + {b_offset}, made); }}"
_CALL_PLACES = "{{ place_largest<{sizes}>(x + {offset}, made); }}"


@cache
def register_small_kernels() -> None:
    """Has Inductor, from now on in this process, write small products and places of largest values as these loops."""
    from torch._inductor.lowering import lowerings

    aten = torch.ops.aten
    for operator, ours in ((aten.mm, _mm), (aten.addmm, _addmm), (aten.argmax, _argmax)):
        lowerings[operator.default] = _either(ours, lowerings[operator.default])


def _either(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Our lowering of an operator, or torch's where ours gives None."""

    def lowered(*args: Any, **kwargs: Any) -> Any:
        made = ours(*args, **kwargs)
        return theirs(*args, **kwargs) if made is None else made

    return lowered


def _mm(first: Any, second: Any, **options: Any) -> Any:
    return None if options or not _is_small_product(first, second) else _product(first, second)


def _addmm(bias: Any, first: Any, second: Any, **options: Any) -> Any:
    is_plain = all(value == 1 for value in options.values())
    if not is_plain or not _is_small_product(first, second) or not _is_known(bias):
        return None
    made = [first.get_size()[0], second.get_size()[1]]
    return _product(first, second, bias) if list(bias.get_size()) in (made, made[1:]) else None


def _product(first: Any, second: Any, *bias: Any) -> Any:
    from torch._inductor import ir

    size = [first.get_size()[0], second.get_size()[1]]
    layout = ir.FixedLayout(device=first.get_device(), dtype=torch.float32, size=size)
    added = [ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(each)) for each in bias]
    inputs = [*map(ir.ExternKernel.realize_input, (first, second)), *added]
    return ir.TensorBox.create(loop_class()(layout, inputs, _describe_product))


def _describe_product(node: Any, _wrapper: Any) -> Loop:
    (first, second, *bias) = node.inputs
    (m, k), n = first.get_size(), second.get_size()[1]
    sizes = [m, n, k, *first.get_stride(), *second.get_stride()]
    bias_row = bias[0].get_stride()[0] if bias and len(bias[0].get_size()) == 2 else 0
    offsets = [each.get_layout().offset for each in (first, second, *bias)]
    added = f"bias + {offsets[2]}" if bias else "nullptr"
    name = "_".join(map(str, ["fasttrain_product", *sizes, *(["with", bias_row] if bias else []), "at", *offsets]))
    parameter = "const float* bias, " if bias else ""
    return Loop(
        name=name,
        shared=_PRODUCT,
        head=f'extern "C" void {name}(const float* a, const float* b, {parameter}float* made)',
        body=_CALL_PRODUCT.format(
            sizes=_listed(sizes), bias=added, bias_row=bias_row, a_offset=offsets[0], b_offset=offsets[1]
        ),
        arguments=[each.get_name() for each in (*node.inputs, node)],
        types=[*["const float*"] * len(node.inputs), "float*"],
    )


def _argmax(x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    from torch._inductor import ir

    if keepdim or dim not in (1, -1) or len(x.get_size()) != 2 or not _is_known(x):
        return None
    rows, classes = x.get_size()
    if not 0 < classes <= MAX_CLASSES:
        return None
    layout = ir.FixedLayout(device=x.get_device(), dtype=torch.int64, size=[rows])
    return ir.TensorBox.create(loop_class()(layout, [ir.ExternKernel.realize_input(x)], _describe_places))


def _describe_places(node: Any, _wrapper: Any) -> Loop:
    [x] = node.inputs
    sizes, offset = [*x.get_size(), *x.get_stride()], x.get_layout().offset
    name = "_".join(map(str, ["fasttrain_places", *sizes, "at", offset]))
    return Loop(
        name=name,
        shared=_PLACES,
        head=f'extern "C" void {name}(const float* x, int64_t* made)',
        body=_CALL_PLACES.format(sizes=_listed(sizes), offset=offset),
        arguments=[x.get_name(), node.get_name()],
        types=["const float*", "int64_t*"],
    )


def _listed(numbers: Sequence[Any]) -> str:
    return ", ".join(map(str, numbers))


def _is_small_product(first: Any, second: Any) -> bool:
    if not _is_known(first) or not _is_known(second):
        return False
    (m, k), n = first.get_size(), second.get_size()[1]
    padded = -(-n // WIDEST) * WIDEST  # the second factor is filled up to whole vectors; a vector is ATen's
    return m >= MIN_ROWS and n > 1 and 0 < k * padded <= MAX_SECOND and m * k * padded <= MAX_PRODUCTS


def _is_known(x: Any) -> bool:
    """Whether it is a tensor of single precision, all sizes known, on a CPU with vectors of eight values or more."""
    are_numbers = all(isinstance(size, int) or size.is_number for size in x.get_size())
    return x.get_device().type == "cpu" and x.get_dtype() == torch.float32 and are_numbers and _has_vectors()


def _has_vectors() -> bool:
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return pick_vec_isa().bit_width() >= 256
    except InvalidCxxCompiler:  # which the compiler itself says in a moment, as a lack of the machine
        return False
