"""The phase `program` by where it comes from: every kernel in one part, all parts together the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.measure.profiling.origins import NOT_ATTRIBUTED, UNKNOWN, in_order, split_program
from fasttrain.measure.profiling.program_kernels import kernel_namer, without_graph
from fasttrain.step.compiler import KernelCall

MM, RELU, ADAM = "aoti_torch_cpu_mm_out", "cpp_fused_relu_2", "cpp_fused_addcdiv_lerp_3"
PROGRAM = [
    KernelCall(MM, ("forward",)),
    KernelCall(RELU, ("forward",)),
    KernelCall("aoti_torch_cpu_silent", ("forward",)),
    KernelCall(MM, ("backward",)),
    KernelCall(ADAM, ("backward", "optimizer")),
]


@pytest.mark.parametrize(
    ("event", "kernel"),
    [
        ("graph_0_cpp_fused_relu_2", RELU),
        (RELU, RELU),
        (MM, MM),
        ("fasttrain_sum_float_int32_t", "fasttrain_sum_float_int32_t"),
        ("aten::mm", None),
        ("AddmmBackward0", None),
        ("my cpp_fused_relu_2", None),
    ],
)
def test_kernels_are_told_from_operators(event: str, kernel: str | None) -> None:
    assert without_graph(event) == kernel


def test_a_kernels_place_in_the_run_tells_what_it_computes() -> None:
    named = kernel_namer([PROGRAM])((MM, RELU, MM, ADAM))
    assert named == [
        "forward: mm_out",
        f"forward: {RELU}",
        "backward: mm_out",
        f"backward + optimizer: {ADAM}",
    ]


def test_several_steps_of_a_call_are_each_told_as_one_is() -> None:
    run = (MM, RELU, MM, ADAM)
    namer = kernel_namer([PROGRAM])
    assert namer(run * 3) == namer(run) * 3
    assert namer((*run, MM, RELU, MM)) == [f"{UNKNOWN}: {each}" for each in ("mm_out", RELU, "mm_out", ADAM) * 2][:7]


def test_the_program_that_ran_is_told_by_its_kernels() -> None:
    other = [KernelCall(RELU, ("metrics",)), KernelCall(MM, ("optimizer",))]
    namer = kernel_namer([PROGRAM, other])
    assert namer((RELU, MM)) == [f"forward: {RELU}", "backward: mm_out"]  # as the first program may have run
    assert namer((RELU, MM, RELU)) == [f"{UNKNOWN}: {RELU}", f"{UNKNOWN}: mm_out", f"{UNKNOWN}: {RELU}"]
    assert kernel_namer([other])((RELU, MM)) == [f"metrics: {RELU}", "optimizer: mm_out"]


def test_a_program_that_walks_runs_its_kernels_once_for_each_step() -> None:
    step = (MM, RELU, MM, ADAM)
    namer = kernel_namer([[KernelCall(RELU, ("metrics",))], PROGRAM])
    assert namer(3 * step) == 3 * namer(step)
    assert UNKNOWN not in " ".join(namer(step))
    assert all(name.startswith(UNKNOWN) for name in namer((*step, *step, MM)))


def test_kernels_that_fuse_much_keep_their_numbers() -> None:
    names = [f"cpp_fused_{'mul_' * 50}{number}" for number in (7, 12)]
    named = kernel_namer([[KernelCall(name, ("metrics",)) for name in names]])(tuple(names))
    assert [name.endswith(end) for name, end in zip(named, ("…_7", "…_12"), strict=True)] == [True, True]
    assert all(len(name) <= len("metrics: ") + 48 for name in named)


def test_the_order_is_that_of_a_step() -> None:
    names = ["python", "metrics", "backward + optimizer", "optimizer", "backward", "forward", "made up", NOT_ATTRIBUTED]
    mixed = dict.fromkeys(names, 1.0)
    assert list(in_order(mixed)) == [
        *("forward", "backward", "optimizer", "backward + optimizer", "metrics"),
        *("python", NOT_ATTRIBUTED, "made up"),
    ]


names = st.one_of(
    st.sampled_from(["guards and inputs", "python", "generated code", "aten::mm", "aten::_foo: bar"]),
    st.sampled_from(["forward", "backward + optimizer", UNKNOWN]).map(lambda origin: f"{origin}: {RELU}"),
    st.text(max_size=12),
)


@settings(deadline=None)
@given(st.dictionaries(names, st.floats(0, 1e6)))
def test_the_split_adds_up(times: dict[str, float]) -> None:
    split = split_program(times)
    assert sum(split.values()) == pytest.approx(sum(times.values()))
    kernels = sum(us for name, us in times.items() if name.startswith("forward: "))
    assert split.get("forward", 0.0) == pytest.approx(kernels)
    assert split.get(NOT_ATTRIBUTED, 0.0) >= times.get("generated code", 0.0)
