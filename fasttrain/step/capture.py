"""Traced steps in CUDA graphs: captured once, replayed as one launch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from fasttrain.data.resident import Span
from fasttrain.errors import EngineError
from fasttrain.step.optimizer import first_line
from fasttrain.step.parity import Snapshot, fits_in_memory
from fasttrain.step.recorded import TracedPart
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["CapturedSpan", "CapturedStep", "CudaLane", "Lane", "compile_operators"]

WARM_RUNS = 3
"""Runs before a capture, in which kernels are loaded and tuned and libraries get their memory; they are undone."""


class Lane(Protocol):
    """What the device does. In tests something else stands in for it."""

    def compiled(self, graph: GraphModule) -> Callable[..., Tensor]:
        """Fewer, larger kernels for a graph; compiled in the first call."""
        ...

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

    def timed(self, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """Runs, and waits for the device; the result, and the seconds that it took there."""
        ...


class CudaLane:
    """Captures in a stream of its own, into a pool of memory that all graphs of an engine share.

    They can share it because they run one after the other, and what one returns is copied before the next begins.

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
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def compiled(self, graph: GraphModule) -> Callable[..., Tensor]:
        """See `Lane.compiled`."""
        return compile_operators(graph)

    @contextmanager
    def aside(self) -> Generator[None]:
        """See `Lane.aside`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)  # what was launched there before an error may still run

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Lane.capture`."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls count: another one may be bringing the next batch meanwhile.
        capturing = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capturing:
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def timed(self, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """See `Lane.timed`."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        result = run()
        end.record(stream)
        end.synchronize()  # HOST READ: in a trial, some times an engine
        return result, begin.elapsed_time(end) / 1e3


def compile_operators(graph: GraphModule) -> Callable[..., Tensor]:
    """Has torch compile the operators of a traced graph into fewer kernels, in the first call.

    One by one they would not pay: the optimizer alone is some fifteen of them for each parameter, and each costs
    more than a microsecond in a replay too. Random numbers stay those of eager's kernels.

    Args:
        graph: of a `TracedPart`; it stays as it is.
    """
    plain = copy.deepcopy(graph)
    for node in reversed(list(plain.graph.nodes)):
        if getattr(node.target, "namespace", "") == "profiler":  # the optimizer's range, which is not compiled
            plain.graph.erase_node(node)
    plain.recompile()
    options: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": False}
    return torch.compile(plain, fullgraph=True, dynamic=False, options=options)


class CapturedStep:
    """A traced step that runs by CUDA graphs, one for each of its parts, captured where the part is first due.

    Args:
        traced: the step; no size of it is open.
        num_leaves: tensors of a batch.
        lane: of its device.
        note_wait: is told the seconds that each capture took.

    Attributes:
        traced: see above.
    """

    def __init__(self, traced: TracedStep, num_leaves: int, lane: Lane, note_wait: Callable[[float], None]) -> None:
        self.traced = traced
        self._parts = [_CapturedPart(part, num_leaves, traced, lane, note_wait) for part in traced.parts]

    @property
    def operators(self) -> Callable[..., Tensor]:
        """The first part, compiled: what was captured."""
        return self._parts[0].operators

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
        return self._parts[self.traced.due].run(inputs)


class _CapturedPart:
    """A part of a step: state, options and closed-over tensors where they are, gradients and batch copied in.

    Attributes:
        operators: the part, compiled.
    """

    def __init__(
        self, part: TracedPart, num_leaves: int, traced: TracedStep, lane: Lane, note_wait: Callable[[float], None]
    ) -> None:
        end = len(part.kinds) - len(part.closed_over)
        num_gradients = 0 if part.part == "whole" else len(part.reached)
        self._moving = slice(end - num_leaves - num_gradients, end)
        self._num_returned = num_gradients if part.part == "gather" else 0
        self._statics = [
            torch.empty_strided(size, stride, dtype=dtype, device=device)
            for size, stride, dtype, device in part.kinds[self._moving]
        ]
        self.operators = lane.compiled(part.graph)
        self._graph = _Graph(self._step, self._statics, traced, lane, note_wait)

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
        return self.operators(*standing[:begin], *self._statics, *standing[begin:])


class CapturedSpan:
    """Several steps over the rows of one resident source as one CUDA graph: each gathers its batch by itself.

    Args:
        traced: the step, in one part; its guards are the span's.
        operators: the step, compiled.
        span: an example: `steps` batches of the source.
        lane: of its device.
        note_wait: is told the seconds that each capture took.

    Attributes:
        steps: how many.

    Raises:
        EngineError: batches are not, tensor by tensor, rows of the source's columns.
    """

    def __init__(
        self,
        traced: TracedStep,
        operators: Callable[..., Tensor],
        span: Span,
        lane: Lane,
        note_wait: Callable[[float], None],
    ) -> None:
        self.steps = span.steps
        self._traced = traced
        self._operators = operators
        self._source = span.source
        self._columns, self._leaves = _columns_and_leaves(traced, span)
        self._rows = torch.empty_like(span.rows)
        self._graph = _Graph(self._steps, [self._rows, *self._leaves], traced, lane, note_wait)

    def run(self, span: Span) -> Tensor | Mismatch:
        """The steps of a span; returns the losses, [steps], a tensor of their own, or why the graph does not hold.

        Raises:
            EngineError: the steps cannot be captured.
        """
        if span.source is not self._source or span.steps != self.steps:
            return Mismatch("the resident data")
        standing = self._traced.standing_inputs()
        if isinstance(standing, Mismatch):
            return standing
        part = self._traced.parts[0]
        differs = part.differ([*standing, *self._leaves, *part.closed_over])
        if differs is not None:
            return Mismatch(differs)
        with torch.no_grad():  # not before: whether there are gradients is guarded
            self._rows.copy_(span.rows, non_blocking=True)
            return self._graph.run([*standing, *part.closed_over], self._columns).clone()

    def _steps(self, state: list[Tensor]) -> Tensor:
        first = len(state) - len(self._traced.parts[0].closed_over)
        losses: list[Tensor] = []
        for rows in self._rows.view(self.steps, -1).unbind():
            for leaf, column in zip(self._leaves, self._columns, strict=True):
                torch.index_select(column, 0, rows, out=leaf)
            losses.append(self._operators(*state[:first], *self._leaves, *state[first:]))
        return torch.stack(losses)


def _columns_and_leaves(traced: TracedStep, span: Span) -> tuple[list[Tensor], list[Tensor]]:
    """The source's columns, and for each of them a tensor to gather a batch of it into."""
    columns, leaves = span.source.columns, traced.leaves(span.batches()[0])
    plain = [column for column in columns if isinstance(column, Tensor)]
    wanted = [(column.dtype, (span.source.batch_size, *column.shape[1:])) for column in plain]
    if leaves is None or len(plain) < len(columns) or wanted != [(leaf.dtype, tuple(leaf.shape)) for leaf in leaves]:
        raise EngineError("batches hold other tensors than the columns that they are gathered from")
    return plain, [torch.empty_like(leaf) for leaf in leaves]


class _Graph:
    """A function of tensors at fixed addresses as a CUDA graph, which is captured anew where they have others.

    Args:
        function: of tensors that it may change; beyond them and `own` it changes nothing. It runs to be captured alone.
        own: tensors of its own, which stay where they are.
        traced: the step that it is of.
        lane: of its device.
        note_wait: is told the seconds that each capture took.
    """

    def __init__(
        self,
        function: Callable[[list[Tensor]], Tensor],
        own: Sequence[Tensor],
        traced: TracedStep,
        lane: Lane,
        note_wait: Callable[[float], None],
    ) -> None:
        self._function = function
        self._own = own
        self._device = traced.spec.device
        self._lane = lane
        self._note_wait = note_wait
        self._addresses: list[int] = []
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
        if self._replay is None or addresses != self._addresses:
            self._replay = None
            begin = time.perf_counter()
            replay = self._captured([tensor.detach() for tensor in tensors])
            self._note_wait(time.perf_counter() - begin)
            self._replay, self._addresses = replay, addresses
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
