"""How Inductor writes loops of our own in C++ into a program, called with bare pointers.

`lowering` and `small` say which; tests/step/test_kernels.py and tests/step/test_small.py have the canaries.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from fasttrain.step.torch_private.marking import recorded_call

__all__ = ["Loop", "loop_class"]


class Loop(NamedTuple):
    """A function in C++ and a call of it.

    Attributes:
        name: of the function; it tells all that the function depends on, so that two of one name are one.
        shared: the source of what it calls, which is written once in a program, however many functions call it.
        head: its declaration, without a semicolon.
        body: in braces.
        arguments: buffers by name, then whole numbers.
        types: of the arguments.
    """

    name: str
    shared: str
    head: str
    body: str
    arguments: Sequence[str]
    types: Sequence[str]


@cache
def loop_class() -> Any:
    """The class of Inductor's nodes that are loops: of a layout, inputs and a function (node, wrapper) -> `Loop`."""
    from torch._inductor import ir

    class LoopKernel(ir.ExternKernelOut):
        def __init__(self, layout: Any, inputs: list[Any], describe: Callable[[Any, Any], Loop]) -> None:
            self._describe = describe
            super().__init__(layout, inputs)

        def codegen(self, wrapper: Any) -> None:
            loop = self._describe(self, wrapper)
            _define(wrapper, loop)
            with recorded_call(self, wrapper, loop.name):
                wrapper.generate_kernel_call(
                    loop.name, [*loop.arguments], device=self.get_device(), triton=False, arg_types=[*loop.types]
                )

    return LoopKernel


def _define(wrapper: Any, loop: Loop) -> None:
    written: set[str] = vars(wrapper).setdefault("fasttrain_loops", set())
    if loop.name in written:
        return
    shared = "" if loop.shared in written else loop.shared
    written.update((loop.name, loop.shared))
    wrapper.define_kernel(loop.name, f"{shared}{loop.head} {loop.body}", cpp_definition=f"{loop.head};", gpu=False)
