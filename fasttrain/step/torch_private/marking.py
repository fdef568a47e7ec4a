"""Programs whose kernels torch's profiler sees, one by one, and which part of the step each of them is of.

Inductor can have its kernels report themselves, and keeps for each the "stack traces" of the operators that it is made
of, in a file of the package. Those are here the parts of the step that the operators were recorded in.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import zipfile
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn

__all__ = [
    "EMPTY_EVENT",
    "MARKS",
    "ORIGINS",
    "KernelCall",
    "kernel_calls",
    "kernels_apart",
    "origins_of",
    "record_empty_events",
    "recorded_as",
    "recorded_call",
    "with_origins",
]

MARKS = {"cpp.enable_kernel_profile": True, "trace.provenance_tracking_level": 1}
"""Inductor's options for such a program."""

ORIGINS = ("forward", "backward", "optimizer", "metrics")
"""The parts of a step."""

EMPTY_EVENT = "fasttrain: an empty event"

_NOTE = "fasttrain_origin"
_INFORMATION = "/kernel_information.json"


class KernelCall(NamedTuple):
    """A kernel at the place in a program where it is called.

    Attributes:
        name: as the profiler has it, but for the number of the graph that Inductor puts in front.
        origins: the parts of the step whose operators it computes, in the order of a step.
    """

    name: str
    origins: tuple[str, ...]


def recorded_as(origin: str) -> AbstractContextManager[None]:
    """Notes on all that a graph records meanwhile which of `ORIGINS` it is of."""
    return fx_traceback.annotate({_NOTE: origin})


def origins_of(graph: torch.fx.GraphModule) -> list[str]:
    """Which part of a step each call of a graph is of, in order.

    What was put into the graph since it was recorded is of the same part as the call that it was put in front of.
    """
    found: list[str] = []
    origin = ""
    for node in reversed(_calls(graph)):
        origin = node.meta.get("custom", {}).get(_NOTE, origin)
        found.append(origin)
    return found[::-1]


def _calls(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """Those that compute. Ranges for the profiler, which optimizers open, are lost where a graph is pickled."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    return [node for node in calls if getattr(node.target, "namespace", "") != "profiler"]


def with_origins(graph: torch.fx.GraphModule, origins: Sequence[str]) -> nn.Module:
    """A graph as a module that tells whoever traces it which part of the step each of its calls is of.

    Args:
        graph: of a step, or what unpickling made of it.
        origins: of its calls, in order (see `origins_of`).
    """
    for node, origin in zip(_calls(graph), origins, strict=True):
        node.stack_trace = origin
    return _Interpreted(graph)


class _Interpreted(nn.Module):
    """Runs a graph node by node: its code, when it is run, has forgotten what is noted on the nodes."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> Any:
        with fx_traceback.preserve_node_meta():
            return torch.fx.Interpreter(self.graph).run(*inputs)


@contextmanager
def kernels_apart() -> Generator[None]:
    """Has every loop compiled as a kernel of its own, where Inductor puts all between two calls of ATen into one.

    It also leaves out a note of each kernel's stack traces at run time, which would take up to 1 us a kernel.
    """
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    with (
        mock.patch.object(CppScheduling, "MAX_FUSED_KERNEL_ARGS_NUM", 0),
        mock.patch.object(CppWrapperCpu, "write_kernel_context_guard", create=True),
    ):
        yield


@contextmanager
def recorded_call(kernel: Any, wrapper: Any, name: str) -> Generator[None]:
    """Has the profiler see the call of a kernel of our own, which is written meanwhile, if it is to see kernels at all.

    Args:
        kernel: Inductor's node.
        wrapper: the program that is written.
        name: of the kernel.
    """
    from torch._inductor import config

    if not config.cpp.enable_kernel_profile:
        yield
        return
    kernel.codegen_comment(wrapper, name)
    wrapper.writeline("{")
    wrapper.writeline(f'RAIIAtenRecordFunctionHandle record_kernel("{name}", nullptr);')
    yield
    wrapper.writeline("}")


def record_empty_events() -> None:
    """Has the profiler see events of no length, one right after the other: they tell what recording an event costs."""
    from torch._C._profiler import _RecordFunctionFast

    for _ in range(256):
        with _RecordFunctionFast(EMPTY_EVENT):
            pass


def kernel_calls(package: Path) -> list[KernelCall]:
    """The kernels of a package that was compiled with `MARKS`, in the order in which it calls them."""
    with zipfile.ZipFile(package) as files:
        [information] = [name for name in files.namelist() if name.endswith(_INFORMATION)]
        known: dict[str, dict[str, list[str]]] = json.loads(files.read(information))
    # A kernel that is called twice is there twice; the numbers behind the names count calls.
    return [
        KernelCall(name, tuple(origin for origin in ORIGINS if origin in known[f"{name}:{number}"]["stack_traces"]))
        for name, number in sorted((_split(each) for each in known), key=itemgetter(1))
    ]


def _split(numbered: str) -> tuple[str, int]:
    name, _, number = numbered.rpartition(":")
    return name, int(number)
