"""Small buffers that a program on the CPU keeps from run to run, in place of making them anew.

A tensor that a program makes for itself takes 0.4 to 0.5 us, whatever its size, and a step of a small model makes some
20 of them: a quarter of its time. The private APIs of torch's compiler that this needs stand here alone;
tests/step/test_scratch.py has their canaries.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest import mock

__all__ = ["small_buffers_kept"]

MAX_BYTES = 1 << 16
"""Of a buffer: to make a larger one takes no longer, to fill it does."""

MAX_TOTAL_BYTES = 1 << 22
"""Of the buffers that a program keeps."""

_KEPT = """static const RAIIAtenTensorHandle {name}_kept = [] {{
    constexpr int64_t size[] = {{{size}0}}, stride[] = {{{stride}0}};
    AtenTensorHandle made;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        {dims}, size, stride, {dtype}, {device}, 0, &made));
    return RAIIAtenTensorHandle(made);
}}();
AtenTensorHandle {name}_handle;
AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle({name}_kept, &{name}_handle));"""
"""A buffer: what a run holds is a new name for the tensor that is kept. C++ has no array without entries: hence 0."""


@contextmanager
def small_buffers_kept() -> Generator[None]:
    """Has the programs that are compiled meanwhile keep their small buffers.

    A run's results are never such buffers: what is not known to be made for the result alone is copied. A program must
    not be run by two threads at a time, which it must not anyway, since it changes its inputs.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    make, give, noted = CppWrapperCpu.make_buffer_allocation, CppWrapperCpu.generate_return, _Noted()

    def make_buffer_allocation(wrapper: Any, buffer: Any) -> str:
        if _is_to_be_kept(buffer, noted):
            noted.kept_bytes += _num_bytes(buffer)
            return _keep(wrapper, buffer)
        noted.made.add(buffer.get_name())
        return make(wrapper, buffer)

    def generate_return(wrapper: Any, output_refs: list[str]) -> None:
        give(wrapper, [_own(wrapper, name, number, noted) for number, name in enumerate(output_refs)])

    with (
        mock.patch.object(CppWrapperCpu, "make_buffer_allocation", make_buffer_allocation),
        mock.patch.object(CppWrapperCpu, "generate_return", generate_return),
    ):
        yield


@dataclass(kw_only=True)
class _Noted:
    """Of a program that is written.

    Attributes:
        made: the names of the buffers that each run makes.
        kept_bytes: of the others.
    """

    made: set[str] = field(default_factory=set[str])
    kept_bytes: int = 0


def _is_to_be_kept(buffer: Any, noted: _Noted) -> bool:
    from torch._inductor.virtualized import V

    size, stride = list(buffer.get_size()), list(buffer.get_stride())
    is_known = all(isinstance(each, int) or each.is_number for each in (*size, *stride))
    if buffer.get_device().type != "cpu" or not is_known or size != list(V.graph.get_allocation_size(buffer)):
        return False
    if buffer.get_name() in V.graph.get_output_names() or _num_bytes(buffer) > MAX_BYTES:
        return False
    return noted.kept_bytes + _num_bytes(buffer) <= MAX_TOTAL_BYTES


def _keep(wrapper: Any, buffer: Any) -> str:
    """Writes a buffer that is kept; returns the line that gives it its name."""
    name = buffer.get_name()
    source = _KEPT.format(
        name=name,
        dims=len(buffer.get_size()),
        size="".join(f"{each}, " for each in buffer.get_size()),
        stride="".join(f"{each}, " for each in buffer.get_stride()),
        dtype=wrapper.codegen_dtype(buffer.get_dtype()),
        device=wrapper.codegen_device(buffer.get_device()).partition(",")[0],
    )
    for line in source.splitlines():
        wrapper.wrapper_call.writeline(line)
    return f"RAIIAtenTensorHandle {name}({name}_handle);"


def _own(wrapper: Any, output: str, number: int, noted: _Noted) -> str:
    """A result that no later run changes: a copy of what may lie in a buffer that is kept."""
    if output == "nullptr" or output in noted.made or not noted.kept_bytes:
        return output
    name = f"own_output_{number}"
    wrapper.wrapper_call.writeline(f"AtenTensorHandle {name}_handle;")
    wrapper.wrapper_call.writeline(f"AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_clone({output}, &{name}_handle));")
    wrapper.wrapper_call.writeline(f"RAIIAtenTensorHandle {name}({name}_handle);")
    return name


def _num_bytes(buffer: Any) -> int:
    return int(prod(buffer.get_size())) * buffer.get_dtype().itemsize
