"""A traced step compiled ahead of time: exported, compiled by AOTInductor, loaded and replayed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import EngineError
from fasttrain.step.torch_private import flat_runner
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["StepProgram", "compile_program", "export_step"]

Batch = Any

# Random numbers must be eager's own; its kernels are called for them.
_INDUCTOR = {"fallback_random": True}


def export_step(traced: TracedStep, batch: Batch) -> torch.export.ExportedProgram:
    """The traced step as a program that can be saved and compiled elsewhere, without the user's code.

    Raises:
        EngineError: torch cannot export the graph.
    """
    inputs = traced.inputs(batch)
    if isinstance(inputs, Mismatch):
        raise EngineError(f"this step cannot be exported: it was traced before a change of {inputs.reason}")
    example = tuple(tensor.detach() for tensor in inputs)
    dynamic: Any = tuple({dim: torch.export.Dim.DYNAMIC for dim in dims} or None for dims in traced.open_dims)
    try:
        return torch.export.export(traced.graph, example, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise EngineError(f"this step cannot be exported: {error}") from error


def compile_program(program: torch.export.ExportedProgram, package: Path) -> None:
    """Compiles an exported step into `package` (a .pt2 file). Takes tens of seconds.

    The generated code keeps the number of threads that torch has now (`torch.get_num_threads()`).

    Raises:
        EngineError: the compiler failed.
    """
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=dict(_INDUCTOR))
    except Exception as error:
        raise EngineError(f"this step cannot be compiled: {error}") from error


class StepProgram:
    """A compiled step that is ready to run.

    Args:
        package: the compiled package; read here and not needed afterwards.
        device: where the program runs.
    """

    def __init__(self, package: Path, device: torch.device) -> None:
        self._run: Callable[[list[Tensor]], list[Tensor]] = flat_runner(str(package), device)

    @classmethod
    def compile(cls, traced: TracedStep, batch: Batch) -> StepProgram:
        """Exports, compiles and loads a traced step, and waits for it.

        Raises:
            EngineError: it cannot be exported or compiled.
        """
        with tempfile.TemporaryDirectory(prefix="fasttrain-") as folder:
            package = Path(folder) / "step.pt2"
            compile_program(export_step(traced, batch), package)
            return cls(package, traced.spec.device)

    def run(self, inputs: list[Tensor]) -> Tensor:
        """One step. Makes no host read.

        Args:
            inputs: what `TracedStep.inputs` gives; a program trusts them, and empties the list.

        Returns:
            The batch's loss, detached, on the device.
        """
        return self._run(inputs)[0]
