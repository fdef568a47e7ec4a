"""The engine to measure against: forward and loss through `torch.compile`, the rest of the step eager."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fasttrain.device import Choice, cpp_compiler
from fasttrain.errors import EngineError
from fasttrain.metrics import Scoring, scoring_of
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import StepOutput, StepSpec
from fasttrain.step.torch_private import dynamo_error

__all__ = ["TorchCompileEngine", "require_compiler"]


class TorchCompileEngine(EagerEngine):
    """Runs forward and loss (and, through autograd, backward) as compiled programs. The second step waits for them.

    A compiled forward does not show which loss it calls: accuracy is found as in the first step, which runs eagerly, in
    all batches whose predictions and targets have as many dimensions and the dtypes of the first.

    Args:
        spec: the step.
        choice: why it is this engine.

    Raises:
        EngineError: this machine has no compiler for the device, or torch cannot compile this forward.
    """

    def __init__(self, spec: StepSpec, choice: Choice) -> None:
        if spec.device.type == "cpu":
            require_compiler()
        super().__init__(spec, choice)
        self._kinds: Any = None
        self._first_scoring: Scoring | None = None

    def step(self, batch: Any) -> Tensor:
        """See `Engine.step`."""
        if self._kinds is None:  # the very first step runs eagerly
            return super().step(batch)
        if self.compile_s is None:
            self._forward = torch.compile(self._spec.forward)
            return self._compiling_step(batch)
        return super().step(batch)

    def _scoring(self, output: StepOutput) -> Scoring | None:
        kinds = [(each.dim(), each.dtype) for each in output[1:] if each is not None]
        if self._kinds is None:
            self._kinds, self._first_scoring = kinds, scoring_of(*output)
        return self._first_scoring if kinds == self._kinds else None

    def _compiling_step(self, batch: Any) -> Tensor:
        begin = time.perf_counter()
        try:
            loss = super().step(batch)
        except dynamo_error() as error:
            raise EngineError(f"engine 'torch-compile' cannot compile this forward: {error}") from error
        self.compile_s: float | None = time.perf_counter() - begin
        return loss


def require_compiler() -> None:
    """Checks that there is a C++ compiler.

    Raises:
        EngineError: there is none.
    """
    if cpp_compiler() is None:
        raise EngineError(
            "a compiled engine needs a C++ compiler, and none is on the PATH (set CXX or install g++); engine 'eager' "
            "needs none"
        )
