"""A traced step compiled ahead of time: exported, compiled by AOTInductor, loaded and replayed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import EngineError
from fasttrain.step.torch_private import compile_package, flat_runner
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["StepProgram", "compile_graph"]

Batch = Any


def compile_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[Tensor], open_dims: Sequence[frozenset[int]], package: Path
) -> None:
    """Exports and compiles a traced step into `package` (a .pt2 file). Takes 10 to 30 s, for large models minutes.

    It needs none of the user's code. The program keeps the number of threads that torch has now
    (`torch.get_num_threads()`).

    Args:
        graph: of `TracedStep`.
        inputs: examples; nothing but their metadata is looked at.
        open_dims: of `TracedStep`.
        package: where it goes.

    Raises:
        EngineError: torch cannot export or compile the graph.
    """
    dynamic: Any = tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) or None for dims in open_dims)
    examples = tuple(tensor.detach() for tensor in inputs)
    try:
        program = torch.export.export(graph, examples, dynamic_shapes=dynamic, strict=False)
        compile_package(program, str(package))
    except Exception as error:
        raise EngineError(f"this step cannot be compiled: {error}") from error


class StepProgram:
    """A compiled step that is ready to run.

    Args:
        package: the compiled package; read here and not needed afterwards.
        device: where the program runs.

    Raises:
        EngineError: it cannot be loaded.
    """

    def __init__(self, package: Path, device: torch.device) -> None:
        try:
            self._run: Callable[[list[Tensor]], list[Tensor]] = flat_runner(str(package), device)
        except RuntimeError as error:
            raise EngineError(f"the compiled program cannot be loaded: {error}") from error

    @classmethod
    def compile(cls, traced: TracedStep, batch: Batch) -> StepProgram:
        """Exports, compiles and loads a traced step, and waits for it.

        Raises:
            EngineError: it cannot be exported or compiled.
        """
        inputs = traced.inputs(batch)
        if isinstance(inputs, Mismatch):
            raise EngineError(f"this step cannot be compiled: since it was traced, there is a change: {inputs.reason}")
        with tempfile.TemporaryDirectory(prefix="fasttrain-") as folder:
            package = Path(folder) / "step.pt2"
            compile_graph(traced.graph, inputs, traced.open_dims, package)
            return cls(package, traced.spec.device)

    def run(self, inputs: list[Tensor]) -> Tensor:
        """One step. Makes no host read.

        Args:
            inputs: what `TracedStep.inputs` gives; a program trusts them, and empties the list.

        Returns:
            The batch's loss, detached, on the device.
        """
        return self._run(inputs)[0]
