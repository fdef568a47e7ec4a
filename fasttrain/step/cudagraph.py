"""Compiled steps on CUDA: in CUDA graphs where these can hold them, else called one by one.

A graph is captured once and replayed as one launch. Guards, options as inputs and verification are those of any
compiled step. Random numbers come from the device's default generator, whose offset each replay advances as eager's
kernels would: dropout draws eager's masks. Not measured yet: there are no figures of these graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttrain.data.resident import Span
from fasttrain.device import Choice
from fasttrain.errors import EngineError, first_line
from fasttrain.step.candidate import Program, Walking, Work
from fasttrain.step.compiler import Compiler, Pending
from fasttrain.step.function import TracedGraph, TracedPart
from fasttrain.step.program import Runner, StepProgram
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import Snapshot, fits_in_memory
from fasttrain.step.timing import Clock, Waits, clock_of
from fasttrain.step.torch_private import cudnn_precision, end_failed_capture, is_changed, reserve_workspace
from fasttrain.step.trace import Mismatch, TracedStep
from fasttrain.step.walk import TracedWalk, WalkingProgram, raise_failed

__all__ = ["CapturedStep", "CapturedWalk", "CudaLane", "GraphBackend", "Lane"]

WARM_RUNS = 3
"""Runs before a capture, in which kernels are loaded and tuned and libraries get their memory; they are undone."""

MANY = 16
"""Steps of the larger graph of a step that walks."""


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


class GraphBackend:
    """Runs a compiled step by a CUDA graph; what no graph can hold, by the program itself.

    Args:
        spec: the step.
        waits: is told the seconds that steps have waited for captures.
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
        self._spec = spec
        self._waits = waits
        self._is_required = is_required

    def begin(self, compiler: Compiler, work: Work) -> Pending:
        """See `Backend.begin`."""
        if not self._is_required:
            return compiler.begin(work)
        away = _counts_away(self._spec.optimizer)
        before = [(entries, name, entries[name]) for entries, name, _ in away]
        for entries, name, device in away:
            entries[name] = entries[name].to(device)
        try:
            return compiler.begin(work, _refuse_unfit)
        except EngineError:
            for entries, name, count in before:
                entries[name] = count
            raise

    def load(self, pending: Pending) -> Program | Walking:
        """See `Backend.load`."""
        program, traced = pending.load(), pending.traced
        step = traced.step if isinstance(traced, TracedWalk) else traced
        if self._why_without_graph(step, walks=isinstance(traced, TracedWalk)):
            return program
        try:
            if isinstance(traced, TracedWalk):
                assert isinstance(program, WalkingProgram)
                return CapturedWalk(program, traced, self._lane, self._waits)
            assert not isinstance(program, WalkingProgram)
            return CapturedStep(program, traced, self._lane, self._waits)
        except RuntimeError as error:  # no memory for the batch that its graphs read
            raise EngineError(f"the step cannot be captured in a CUDA graph: {first_line(error)}") from error

    def explain(self, step: TracedStep, *, walks: bool) -> Choice:
        """See `Backend.explain`."""
        why = self._why_without_graph(step, walks=walks)
        return Choice("compiled", f"; {why}{step.remark}") if why else Choice(self.name, step.remark)

    def _why_without_graph(self, step: TracedStep, *, walks: bool) -> str:
        if any(step.open_dims) and not walks:
            return "single batches with rows of unequal length are in no CUDA graph"
        unfit = _why_unfit(step)
        return unfit and f"without a CUDA graph: {unfit}"


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


class CapturedWalk:
    """A step that walks over one resident source as two CUDA graphs: of one call of its program, and of 16.

    Both go on from the cursor, so that a span is as many replays of the larger one as it holds, then of the smaller.

    Args:
        program: the step, compiled.
        traced: what it was compiled from; its guards are the walk's.
        lane: of its device.
        waits: is told the seconds that each capture took.
    """

    def __init__(self, program: WalkingProgram, traced: TracedWalk, lane: Lane, waits: Waits) -> None:
        assert WARM_RUNS * MANY <= traced.most_steps
        self._program = program
        self._traced = traced
        self._state = traced.new_state()
        self._many = MANY
        self._graphs = {
            steps: _Graph(partial(self._steps, steps), self._state, traced.parts[0], traced.spec, lane, waits)
            for steps in (self._many, 1)
        }

    @property
    def due(self) -> TracedGraph:
        """What every step runs."""
        return self._traced.parts[0]

    @property
    def steps_done(self) -> int:
        """How many steps of the last call are done. HOST READ: after an error in it."""
        return int(self._state.cursor)

    def inputs_of(self, span: Span) -> list[Tensor] | Mismatch:
        """What each step of a span is given, or why the graphs do not hold (see `TracedWalk.inputs`)."""
        return self._traced.inputs(span.source, self._state)

    def run(self, span: Span) -> Tensor | Mismatch:
        """The steps of a span. Makes no host read unless it captures.

        Args:
            span: of at most `TracedWalk.most_steps` steps.

        Returns:
            The losses, [steps], a tensor of their own; or why the graphs do not hold, and nothing has run.

        Raises:
            EngineError: the step cannot be captured; nothing has changed.
            StepsFailedError: a step failed.
        """
        inputs = self.inputs_of(span)
        if isinstance(inputs, Mismatch):
            return inputs
        of_many, of_one = divmod(span.steps, self._many)
        counts = {steps: count for steps, count in ((self._many, of_many), (1, of_one)) if count}
        with torch.no_grad():  # not before: whether there are gradients is guarded
            self._state.cursor.zero_()  # a step is run to be captured, and must find a batch
            replays = self._captured([*counts], inputs)
            self._state.begin(span)
            try:
                for steps, count in counts.items():
                    for _ in range(count):
                        replays[steps]()
            except RuntimeError as error:
                raise_failed(self._traced, self._state, span, error)
            return self._state.losses[: span.steps].clone()

    def _captured(self, wanted: Sequence[int], inputs: list[Tensor]) -> dict[int, Callable[[], Tensor]]:
        """The graphs of so many steps each, captured where they must be, before any of them runs."""
        own = self._own_inputs
        standing = [*inputs[: own.start], *inputs[own.stop :]]
        return {steps: self._graphs[steps].captured_for(standing, self._traced.tables) for steps in wanted}

    @property
    def _own_inputs(self) -> slice:
        """The places of tables and state among a program's inputs."""
        traced = self._traced
        end = len(traced.parts[0].kinds) - len(traced.step.parts[0].closed_over)
        return slice(end - len(traced.tables) - len(self._state), end)

    def _steps(self, count: int, standing: list[Tensor]) -> Tensor:
        begin = self._own_inputs.start
        for _ in range(count):
            self._program.once([*standing[:begin], *self._traced.tables, *self._state, *standing[begin:]])
        return self._state.losses


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
        self._uses_cudnn = _uses_cudnn(traced.graph)
        self._device = spec.device
        self._lane = lane
        self._waits = waits
        self._captured_for: tuple[list[int], tuple[str, ...]] = [], ()
        self._failures = lane.failures
        self._replay: Callable[[], Tensor] | None = None

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """Replays the function; the next run overwrites its result. See `captured_for`."""
        return self.captured_for(tensors)()

    def captured_for(self, tensors: Sequence[Tensor], read: Sequence[Tensor] = ()) -> Callable[[], Tensor]:
        """What replays the function on these tensors; the next replay overwrites its result.

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
        return self._replay

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
        inputs = [node for node in part.graph.graph.nodes if node.op == "placeholder"]
        if any(is_changed(part.graph, inputs[place]) for place in part.anywhere):
            return "forward changes its batch in place, and a graph would change a copy: copy it first"
        for size, _, _, device in part.kinds:
            if device.type != traced.spec.device.type:
                return (
                    f"a tensor of shape {list(size)} that the step reads is on {device}, and a graph would keep the "
                    f"value that it has now: move it to {traced.spec.device}"
                )
    return ""
