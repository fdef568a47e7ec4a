"""A traced step compiled ahead of time: exported, compiled by AOTInductor, loaded and replayed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttrain.errors import EngineError
from fasttrain.step.torch_private import compile_package, examples_of, flat_runner
from fasttrain.step.torch_private.marking import with_origins

if TYPE_CHECKING:  # the compiling child needs none of what these import
    from fasttrain.step.function import InputKind, TracedGraph
    from fasttrain.step.trace import TracedStep

__all__ = ["Runner", "StepProgram", "compile_graph", "load_runner"]

Runner = Callable[[list[Tensor]], list[Tensor]]
"""Runs one graph: takes its inputs (and empties the list), returns its outputs."""


def compile_graph(
    graph: torch.fx.GraphModule,
    inputs: Sequence[InputKind],
    open_dims: Sequence[frozenset[int]],
    package: Path,
    origins: Sequence[str] | None = None,
    anywhere: Sequence[int] = (),
) -> None:
    """Exports and compiles a traced step into `package` (a .pt2 file). Takes 10 to 30 s, for large models minutes.

    It needs none of the user's code. The program keeps the number of threads that torch has now
    (`torch.get_num_threads()`).

    Args:
        graph: of a `GraphJob`, spelled out.
        inputs: what its inputs are like.
        open_dims: of a `TracedPart`.
        package: where it goes.
        origins: of the graph's calls (see `origins_of`), where the profiler is to see the program's kernels.
        anywhere: the places of the inputs that may begin anywhere in memory, where the compiler asks for that.

    Raises:
        EngineError: torch cannot export or compile the graph.
    """
    from fasttrain.step.torch_private.lowering import register_lowerings  # which only the child that compiles needs

    register_lowerings()
    model = graph if origins is None else with_origins(graph, origins)
    sizes = tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) or None for dims in open_dims)
    dynamic: Any = sizes if model is graph else (sizes,)
    try:
        program = torch.export.export(model, examples_of(inputs, anywhere), dynamic_shapes=dynamic, strict=False)
        compile_package(program, str(package), is_marked=origins is not None)
    except Exception as error:
        raise EngineError(f"this step cannot be compiled: {error}") from error


class StepProgram:
    """A compiled step that is ready to run.

    Args:
        packages: the compiled package of each part; read here and not needed afterwards.
        traced: what they were compiled from.

    Attributes:
        runners: of each part.

    Raises:
        EngineError: one cannot be loaded.
    """

    def __init__(self, packages: Sequence[Path], traced: TracedStep) -> None:
        self._traced = traced
        self.runners = self._loaded(packages)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._traced.spec.device

    @property
    def parts(self) -> Sequence[TracedGraph]:
        """What was compiled."""
        return self._traced.parts

    @property
    def due(self) -> TracedGraph:
        """The part that the next run is of."""
        return self.parts[self._traced.due]

    def run(self, inputs: list[Tensor]) -> Tensor:
        """The part of the step that is due. Makes no host read.

        Args:
            inputs: what `TracedStep.inputs` gives; a program trusts them, and empties the list.

        Returns:
            The batch's loss, detached, on the device.
        """
        return self.runners[self._traced.due](inputs)[0]

    @contextmanager
    def running(self, packages: Sequence[Path]) -> Generator[None]:
        """Has other packages run meanwhile, compiled from the same parts.

        Raises:
            EngineError: one cannot be loaded.
        """
        before, self.runners = self.runners, self._loaded(packages)
        try:
            yield
        finally:
            self.runners = before

    def _loaded(self, packages: Sequence[Path]) -> list[Runner]:
        return [load_runner(package, self.device) for package in packages]


def load_runner(package: Path, device: torch.device) -> Runner:
    """What runs the program in a package.

    Raises:
        EngineError: it cannot be loaded.
    """
    try:
        return flat_runner(str(package), device)
    except RuntimeError as error:
        raise EngineError(f"the compiled program cannot be loaded: {error}") from error
