"""Compiling in the process of the test: functions, with the source that the compiler has written, and whole steps."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.step import compiler
from fasttrain.step.build import GraphJob
from fasttrain.step.program import compile_graph
from fasttrain.step.torch_private import flat_runner, prepare_for_inductor, trace_graph, unpickle_with_graph


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


class CompiledHere:
    """In place of the compiling child: compiles in this process, which spares each program the import of torch."""

    def __init__(self, job: GraphJob, _folder: Path | None = None) -> None:
        begin = time.perf_counter()
        self._folder = tempfile.TemporaryDirectory(prefix="conformance-")
        package = Path(self._folder.name) / "step.pt2"
        given: GraphJob = unpickle_with_graph(pickle.dumps(job)).unrolled()
        compile_graph(given.graph, given.inputs, given.open_dims, package, given.origins, given.anywhere)
        self._package = package
        self.seconds = time.perf_counter() - begin

    def wait(self) -> Path:
        return self._package

    poll = wait

    def close(self) -> None:
        self._folder.cleanup()


def compile_here(folder: str) -> None:
    """Has this process, for the rest of its life, compile steps itself; `folder` holds the caches."""
    os.environ.update(XDG_CACHE_HOME=folder, TORCHINDUCTOR_CACHE_DIR=folder, TORCHINDUCTOR_COMPILE_THREADS="1")
    compiler.Build = CompiledHere
