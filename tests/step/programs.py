"""Functions compiled as steps are, with the source that the compiler has written."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.step.program import compile_graph
from fasttrain.step.torch_private import flat_runner, prepare_for_inductor, trace_graph


class Program(NamedTuple):
    """A compiled function of tensors; `source` is what calls its kernels."""

    source: str
    run: Callable[[list[Tensor]], Tensor]


def compiled(function: Callable[..., Tensor], inputs: list[Tensor], folder: Path) -> Program:
    """Compiles a function for inputs like these."""
    fixed = [frozenset[int]()] * len(inputs)
    graph = trace_graph(function, inputs, fixed)
    prepare_for_inductor(graph)
    package = folder / "function.pt2"
    kinds = [(each.shape, each.stride(), each.dtype, each.device) for each in inputs]
    compile_graph(graph, kinds, fixed, package)
    with zipfile.ZipFile(package) as files:
        [name] = [name for name in files.namelist() if name.endswith(".wrapper.cpp")]
        source = files.read(name).decode()
    run_all = flat_runner(str(package), torch.device("cpu"))

    def run(given: list[Tensor]) -> Tensor:
        return run_all(list(given))[0]

    return Program(source, run)
