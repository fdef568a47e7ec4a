"""A compiler that compiles nothing: programs run the captured graphs, operator by operator.

With it, tests and fuzzing reach guards, the swap from eager to program, and several steps a call within milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.step import compiler
from fasttrain.step.trace import TracedStep
from fasttrain.step.walk import Loop, TracedWalk, WalkingProgram


class GraphProgram:
    """Runs what was traced in place of a compiled program."""

    def __init__(self, traced: TracedStep) -> None:
        self._traced = traced

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> Tensor:
        """The due graph on these inputs; returns the loss."""
        return self._traced.parts[self._traced.due].graph(*inputs)


class GraphWalk(WalkingProgram):
    """Runs the graph of a walk over resident rows in place of a compiled program."""

    def __init__(self, traced: TracedWalk) -> None:
        super().__init__([], traced)

    def _loaded(self, packages: Sequence[Path]) -> Loop:
        graph = self.due.graph

        @torch.no_grad()
        def loop(inputs: list[Tensor], steps: int) -> None:
            for _ in range(steps):
                graph(*inputs)

        return loop


class GraphPending:
    """A program that is ready at once."""

    def __init__(self, _cache: Any, traced: Any, trace_s: float) -> None:
        self.traced: TracedStep | TracedWalk = traced
        self.trace_s = trace_s
        self.compile_s = 0.0

    def is_ready(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def load(self) -> GraphProgram | GraphWalk:
        return GraphWalk(self.traced) if isinstance(self.traced, TracedWalk) else GraphProgram(self.traced)

    def close(self) -> None:
        pass


def use_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `compiled` and `auto` run graphs in place of compiled programs."""
    monkeypatch.setattr(compiler, "Pending", GraphPending)
