"""Compiled steps in CUDA graphs: captured once, replayed as one launch."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.errors import EngineError, first_line
from fasttrain.step.clock import Waits
from fasttrain.step.program import Runner, StepProgram
from fasttrain.step.recorded import TracedGraph, TracedPart
from fasttrain.step.snapshot import Snapshot, fits_in_memory
from fasttrain.step.span import TracedSpan
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import cudnn_precision, end_failed_capture, reserve_workspace
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["CapturedSpan", "CapturedStep", "CudaLane", "Lane"]

WARM_RUNS = 3
"""Runs before a capture, in which kernels are loaded and tuned and libraries get their memory; they are undone."""


class Lane(Protocol):
    """What the device does. In tests something else stands in for it.

    Attributes:
        failures: captures that failed; graphs that were captured before one are not to be replayed.
    """

    failures: int

    def aside(self) -> AbstractContextManager[None]:
        """A stream beside the current one, which waits for it before and is waited for after."""
        ...

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Records what `run` launches, without running it.

        Returns:
            A function that launches it; its result is the same tensor each time, with other values.

        Raises:
            RuntimeError: `run` does what cannot be recorded.
        """
        ...


class CudaLane:
    """Captures in a stream of its own, into a pool of memory that all graphs of an engine share.

    They can share it because they run one after the other, and what one returns is copied before the next begins. The
    workspace that cuBLAS has for the stream is not part of it (see `reserve_workspace`).

    Args:
        device: whose.

    Raises:
        EngineError: it is not a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise EngineError(
                f"CUDA graphs need a CUDA device, and the job is on {device}: use another engine there, such as "
                "'compiled'"
            )
        self.failures = 0
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Generator[None]:
        """See `Lane.aside`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                reserve_workspace(self._device)
                yield
        finally:
            current.wait_stream(self._stream)  # what was launched there before an error may still run

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Lane.capture`."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        refusals: list[BaseException] = []

        def noting_errors() -> Tensor:
            try:
                return run()
            except BaseException as error:
                refusals.append(error)
                raise

        with torch.cuda.device(self._device):
            # Only this thread's calls count: another one may be bringing the next batch meanwhile.
            mode = "thread_local"
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                    result = noting_errors()
            except BaseException as error:
                self._recover(graph, before)
                # If CUDA invalidated the capture, its end fails too; the error inside says more.
                raise refusals.pop() if refusals else error from None

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _recover(self, graph: torch.cuda.CUDAGraph, before: torch.cuda.Stream) -> None:
        """Puts back what torch leaves as if the capture went on, so that training goes on and the next capture works.

        Where CUDA invalidated the capture, `capture_end` raises first: the thread stays on the capture stream, the
        allocator goes on allocating to the pool, and the random generator refuses every draw, eager's too. The graphs
        before it hold the generator's old state.
        """
        torch.cuda.set_stream(before)
        device = torch.cuda.current_device()
        end_failed_capture(graph, device, self._pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        self._pool = torch.cuda.graph_pool_handle()
        self.failures += 1


class CapturedStep:
    """A compiled step that runs by CUDA graphs, one for each of its parts, captured where the part is first due.

    Args:
        program: the step, compiled.
        traced: what it was compiled from; no size of it is open.
        lane: of its device.
        waits: is told the seconds that each capture took.
    """

    def __init__(self, program: StepProgram, traced: TracedStep, lane: Lane, waits: Waits) -> None:
        self._traced = traced
        self._parts = [
            _CapturedPart(part, runner, traced, lane, waits)
            for part, runner in zip(traced.parts, program.runners, strict=True)
        ]

    @property
    def due(self) -> TracedPart:
        """The part that the next run is of."""
        return self._traced.parts[self._traced.due]

    def run(self, inputs: list[Tensor]) -> Tensor:
        """The part of the step that is due. Makes no host read unless it captures.

        Args:
            inputs: what `TracedStep.inputs` gives. What is not where it was when the part was captured (state that was
                loaded or replaced) makes it capture again.

        Returns:
            The batch's loss, detached: a tensor of its own.

        Raises:
            EngineError: the step cannot be captured.
        """
        return self._parts[self._traced.due].run(inputs)


class _CapturedPart:
    """A part of a step: state, options and closed-over tensors where they are, gradients and batch copied in."""

    def __init__(self, part: TracedPart, runner: Runner, traced: TracedStep, lane: Lane, waits: Waits) -> None:
        end = len(part.kinds) - len(part.closed_over)
        num_gradients = 0 if part.part == "whole" else len(part.reached)
        self._moving = slice(end - len(traced.open_dims) - num_gradients, end)
        self._num_returned = num_gradients if part.part == "gather" else 0
        self._statics = [
            torch.empty_strided(size, stride, dtype=dtype, device=device)
            for size, stride, dtype, device in part.kinds[self._moving]
        ]
        self._runner = runner
        self._graph = _Graph(self._step, self._statics, part, traced.spec, lane, waits)

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> Tensor:
        moving = inputs[self._moving]
        for static, given in zip(self._statics, moving, strict=True):
            static.copy_(given, non_blocking=True)
        loss = self._graph.run([*inputs[: self._moving.start], *inputs[self._moving.stop :]]).clone()
        for given, static in zip(moving[: self._num_returned], self._statics, strict=False):
            given.copy_(static, non_blocking=True)
        return loss

    def _step(self, standing: list[Tensor]) -> Tensor:
        begin = self._moving.start
        return self._runner([*standing[:begin], *self._statics, *standing[begin:]])[0]


class CapturedSpan:
    """Several steps over the rows of one resident source as one CUDA graph.

    Args:
        program: of fewer steps, which gathers their batches by itself; it is captured as often as it takes.
        traced: what it was compiled from; its guards are the span's.
        steps: how many.
        lane: of its device.
        waits: is told the seconds that each capture took.

    Attributes:
        calls: of the program, in the graph.
    """

    def __init__(self, program: StepProgram, traced: TracedSpan, steps: int, lane: Lane, waits: Waits) -> None:
        self.calls = steps // traced.steps
        self._traced = traced
        self._runner = program.runners[0]
        num_rows = traced.steps * traced.source.batch_size
        self._rows = torch.zeros(self.calls * num_rows, dtype=torch.int64, device=traced.source.device)
        self._pieces = self._rows.split(num_rows)
        self._graph = _Graph(self._steps, [self._rows], traced.parts[0], traced.spec, lane, waits)

    def run(self, span: Span) -> Tensor | Mismatch:
        """The steps of a span; returns the losses, [steps], a tensor of their own, or why the graph does not hold.

        Raises:
            EngineError: the steps cannot be captured.
        """
        inputs = self.inputs_of(span)
        if isinstance(inputs, Mismatch):
            return inputs
        with torch.no_grad():  # not before: whether there are gradients is guarded
            self._rows.copy_(span.rows, non_blocking=True)
            own = self._own_inputs
            return self._graph.run([*inputs[: own.start], *inputs[own.stop :]], self._traced.tables).clone()

    @property
    def due(self) -> TracedGraph:
        """What each call of the program runs."""
        return self._traced.parts[0]

    def inputs_of(self, span: Span) -> list[Tensor] | Mismatch:
        """What the first call of the program is given, or why the graph does not hold."""
        return self._traced.inputs_of(span.source, self._pieces[0])

    @property
    def _own_inputs(self) -> slice:
        """The places of tables and rows among a program's inputs."""
        traced = self._traced
        end = len(traced.parts[0].kinds) - len(traced.step.parts[0].closed_over)
        return slice(end - len(traced.tables) - 1, end)

    def _steps(self, standing: list[Tensor]) -> Tensor:
        begin = self._own_inputs.start
        given = [[*standing[:begin], *self._traced.tables, rows, *standing[begin:]] for rows in self._pieces]
        return torch.cat([self._runner(inputs)[0] for inputs in given])


class _Graph:
    """A function of tensors at fixed addresses as a CUDA graph, which is captured anew where they have others.

    A graph also keeps the kernels that cuDNN chose, so it is captured anew where TF32 was turned on or off there.

    Args:
        function: of tensors that it may change; beyond them and `own` it changes nothing. It runs to be captured alone.
        own: tensors of its own, which stay where they are.
        traced: what the function runs.
        spec: of the step.
        lane: of its device.
        waits: is told the seconds that each capture took.
    """

    def __init__(
        self,
        function: Callable[[list[Tensor]], Tensor],
        own: Sequence[Tensor],
        traced: TracedGraph,
        spec: StepSpec,
        lane: Lane,
        waits: Waits,
    ) -> None:
        self._function = function
        self._own = own
        self._uses_cudnn = _uses_cudnn(traced.recorded)
        self._device = spec.device
        self._lane = lane
        self._waits = waits
        self._captured_for: tuple[list[int], tuple[str, ...]] = [], ()
        self._failures = lane.failures
        self._replay: Callable[[], Tensor] | None = None

    def run(self, tensors: Sequence[Tensor], read: Sequence[Tensor] = ()) -> Tensor:
        """Replays the function; the next run overwrites its result.

        Args:
            tensors: what the function is given.
            read: what it reads besides.

        Raises:
            EngineError: it cannot be captured.
        """
        # By address and not by identity: `parameter.data = other` moves the values and leaves the parameter.
        addresses = [tensor.data_ptr() for tensor in (*tensors, *read)]
        wanted = addresses, cudnn_precision() if self._uses_cudnn else ()
        if self._replay is None or wanted != self._captured_for or self._failures != self._lane.failures:
            self._replay, self._failures = None, self._lane.failures
            begin = time.perf_counter()
            replay = self._captured([tensor.detach() for tensor in tensors])
            self._waits.add(time.perf_counter() - begin)
            self._replay, self._captured_for = replay, wanted
        return self._replay()

    def _captured(self, tensors: list[Tensor]) -> Callable[[], Tensor]:
        changed = [*tensors, *self._own]
        if not fits_in_memory(changed, self._device):
            raise EngineError(
                "there is no memory for two copies of the step's state, which it takes to warm a CUDA graph up: "
                "use engine 'eager'"
            )
        before = Snapshot.of(changed, self._device)
        try:
            with self._lane.aside():
                for _ in range(WARM_RUNS):
                    self._function(tensors)
        except RuntimeError as error:  # the compiler's are such, too
            raise EngineError(f"the step cannot be compiled for a CUDA graph: {first_line(error)}") from error
        finally:
            before.restore(changed, self._device)
        try:
            return self._lane.capture(lambda: self._function(tensors))
        except RuntimeError as error:
            raise EngineError(
                "the step cannot be captured in a CUDA graph: it waits for the device, or copies from or to the host "
                f"({first_line(error)}); use engine 'eager' or 'torch-compile'"
            ) from error


def _uses_cudnn(graph: torch.fx.GraphModule) -> bool:
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return any("convolution" in name or "cudnn" in name for name in names)
