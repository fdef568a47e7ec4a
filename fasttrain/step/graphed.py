"""The uppermost rung on CUDA: the compiled step in one CUDA graph, then several steps a launch.

Guards, options as inputs and parity check are those of any compiled step. Random numbers come from the device's default
generator, whose place in its stream each replay moves on as eager's kernels would: dropout draws eager's masks. Not
measured yet: there are no figures of this rung.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.device import Choice
from fasttrain.errors import EngineError, first_line
from fasttrain.step.clock import Clock, Waits, clock_of
from fasttrain.step.compiler import Compiler, Pending
from fasttrain.step.cudagraph import CapturedSpan, CapturedStep, CudaLane, Lane
from fasttrain.step.launch import Launcher
from fasttrain.step.program import StepProgram
from fasttrain.step.replay import Program
from fasttrain.step.span import TracedSpan, fewest_launches
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import is_changed
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["GraphLauncher", "GraphRung"]

Batch = Any


class GraphRung:
    """Runs a compiled step by a CUDA graph; what no graph can hold, by the program itself.

    Args:
        spec: the step.
        waits: is told what steps have waited for captures.
        is_required: whether graphs were asked for: what no graph can hold is refused then, and step counts that the
            optimizer keeps on the host are moved to their parameters' device, where they stay.
        lane: what captures and replays; None for CUDA's.
        clock: of the device; None for CUDA's.

    Raises:
        EngineError: the step is not on CUDA.
    """

    name = "graphed"

    def __init__(
        self, spec: StepSpec, waits: Waits, *, is_required: bool, lane: Lane | None = None, clock: Clock | None = None
    ) -> None:
        self._lane = CudaLane(spec.device) if lane is None else lane
        self.clock = clock_of(spec.device) if clock is None else clock
        self.launcher: Launcher = GraphLauncher(self._lane, waits)
        self._spec = spec
        self._waits = waits
        self._is_required = is_required

    def explain(self, traced: TracedStep) -> Choice:
        """See `Rung.explain`."""
        if any(traced.open_dims):
            return Choice("compiled", "; single batches with rows of unequal length are in no CUDA graph")
        unfit = _why_unfit(traced)
        return Choice("compiled", f"; without a CUDA graph: {unfit}") if unfit else Choice(self.name, "")

    def begin(self, compiler: Compiler, batch: Batch) -> Pending[TracedStep]:
        """See `Rung.begin`."""
        if not self._is_required:
            return compiler.begin(batch)
        away = _counts_away(self._spec.optimizer)
        before = [(entries, name, entries[name]) for entries, name, _ in away]
        for entries, name, device in away:
            entries[name] = entries[name].to(device)
        try:
            return compiler.begin(batch, _refuse_unfit)
        except EngineError:
            for entries, name, count in before:
                entries[name] = count
            raise

    def program(self, pending: Pending[TracedStep]) -> Program:
        """See `Rung.program`."""
        program, traced = pending.load(), pending.traced
        if any(traced.open_dims) or _why_unfit(traced):
            return program
        try:
            return CapturedStep(program, traced, self._lane, self._waits)
        except RuntimeError as error:  # no memory for the batch that its graphs read
            raise EngineError(f"the step cannot be captured in a CUDA graph: {first_line(error)}") from error


class GraphLauncher:
    """Launches of 4 or up to 16 steps, each one CUDA graph of as many calls of a step's program.

    Args:
        lane: what captures and replays.
        waits: is told what steps have waited for captures.
    """

    SIZES = (4, 8, 12, 16)
    calls_per_check = 1  # the guards are checked while the GPU works

    def __init__(self, lane: Lane, waits: Waits) -> None:
        self._lane = lane
        self._waits = waits
        self._program: StepProgram | None = None
        self._graphs: dict[int, CapturedSpan] = {}

    def most_steps(self, traced: TracedStep, _batch: Sequence[Tensor]) -> int:
        """See `Launcher.most_steps`."""
        return self.SIZES[-1] if traced.is_whole and not _why_unfit(traced) else 1

    def sizes(self, most: int, num_batches: int) -> list[int]:
        """See `Launcher.sizes`: the smallest, and the one by which an epoch takes fewest launches."""
        sizes = [size for size in self.SIZES if size <= most]
        fewest = fewest_launches(sizes, num_batches)
        return sorted({sizes[0], fewest}) if fewest is not None else []

    def compiled_steps(self, _size: int) -> int:
        """See `Launcher.compiled_steps`."""
        return 1

    def launch(
        self,
        program: StepProgram,
        traced: TracedSpan,
        span: Span,
        *,
        is_checked: bool = False,  # noqa: ARG002
    ) -> Tensor | Mismatch:
        """See `Launcher.launch`."""
        if program is not self._program:
            self._program, self._graphs = program, {}
        graph = self._graphs.get(span.steps)
        if graph is None:
            graph = self._graphs[span.steps] = CapturedSpan(program, traced, span.steps, self._lane, self._waits)
        return graph.run(span)

    def forget(self, but: int = 0) -> None:
        """See `Launcher.forget`: graphs hold memory of the device, and the resident data."""
        self._graphs = {size: graph for size, graph in self._graphs.items() if size == but}
        if not self._graphs:
            self._program = None


def _counts_away(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], str, torch.device]]:
    """Scalars of the optimizer's state that are not where their parameters are, with the devices of these."""
    return [
        (entries, name, parameter.device)
        for parameter, entries in optimizer.state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor) and value.dim() == 0 and value.device != parameter.device
    ]


def _refuse_unfit(traced: TracedStep) -> None:
    unfit = _why_unfit(traced)
    if unfit:
        raise EngineError(f"no CUDA graph can hold this step: {unfit}")


def _why_unfit(traced: TracedStep) -> str:
    """Why no graph can hold a step; empty where one can."""
    if traced.why_eager is not None:
        return f"{type(traced.spec.optimizer).__name__} steps eagerly ({traced.why_eager})"
    if _counts_away(traced.spec.optimizer):
        return (
            "the optimizer counts its steps on the host: make it with capturable=True, or ask for engine 'graphed', "
            "which moves the counts"
        )
    for part in traced.parts:
        inputs = [node for node in part.recorded.graph.nodes if node.op == "placeholder"]
        if any(is_changed(part.recorded, inputs[place]) for place in part.anywhere):
            return "forward changes its batch in place, and a graph would change a copy: copy it first"
        for size, _, _, device in part.kinds:
            if device.type != traced.spec.device.type:
                return (
                    f"a tensor of shape {list(size)} that the step reads is on {device}, and a graph would keep the "
                    f"value that it has now: move it to {traced.spec.device}"
                )
    return ""
