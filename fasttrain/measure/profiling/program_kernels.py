"""The kernels of compiled programs in a trace: which events they are, and which part of a step each computes."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from fasttrain.measure.profiling.origins import UNKNOWN
from fasttrain.step.compiler import KernelCall
from fasttrain.step.program import StepProgram
from fasttrain.step.walk import WalkingProgram

__all__ = ["kernel_namer", "loaded_programs", "without_graph"]

_KERNEL = re.compile(r"(?:graph_\d+_)?(?P<name>(?:cpp_|aoti_torch_|fasttrain_)\w+)", re.ASCII)
_SHIM = re.compile(r"aoti_torch_(?:cpu|cuda)_")
_LABEL = 48
"""Characters of a kernel's name that are kept; those that fuse much have hundreds."""


def loaded_programs() -> list[StepProgram | WalkingProgram]:
    """The compiled programs for the CPU that this process holds; of those on a GPU the profiler sees all kernels."""
    kinds = (StepProgram, WalkingProgram)
    return [each for each in gc.get_objects() if type(each) in kinds and each.device.type == "cpu"]


def without_graph(event: str) -> str | None:
    """The name of the kernel that an event of a trace is the run of; None: it is of an operator."""
    found = _KERNEL.fullmatch(event)
    return None if found is None else found["name"]


def kernel_namer(programs: Sequence[Sequence[KernelCall]]) -> Callable[[tuple[str, ...]], list[str]]:
    """Says what the kernels of a program's run are, from their names in the order in which they ran.

    Args:
        programs: the kernels of each of the programs that may have run.

    Returns:
        A function that gives for each kernel "ORIGINS: its name", shortened. Kernels of one name may be of different
        parts of a step: which one is told by its place in the run.
    """

    @cache
    def names(run: tuple[str, ...]) -> list[str]:
        whole = next(filter(None, (_aligned(run, calls) for calls in programs)), None)
        origins = whole or next(filter(None, (_aligned_steps(run, calls) for calls in programs)), [UNKNOWN] * len(run))
        return [f"{origin}: {_label(name)}" for origin, name in zip(origins, run, strict=True)]

    return names


def _aligned(run: Iterable[str], calls: Sequence[KernelCall]) -> list[str] | None:
    """The origins of kernels that ran; None where this program does not call them in this order.

    It may call more than the profiler has seen: what Inductor calls through other functions does not report itself.
    """
    left = iter(calls)
    found: list[str] = []
    for name in run:
        call = next((call for call in left if call.name == name), None)
        if call is None:
            return None
        found.append(" + ".join(call.origins) or UNKNOWN)
    return found


def _aligned_steps(run: Sequence[str], calls: Sequence[KernelCall]) -> list[str] | None:
    """The same for several steps of a program that walks: the kernels of one of them, again and again."""
    sizes = [size for size in range(1, len(run) // 2 + 1) if len(run) % size == 0]
    size = next((size for size in sizes if run[size:] == run[:-size]), None)
    found = None if size is None else _aligned(run[:size], calls)
    return None if found is None or size is None else found * (len(run) // size)


def _label(name: str) -> str:
    name = _SHIM.sub("", name)
    if len(name) <= _LABEL:
        return name
    head, _, number = name.rpartition("_")
    return f"{head[: _LABEL - len(number) - 2]}…_{number}" if number.isdigit() else f"{name[: _LABEL - 1]}…"
