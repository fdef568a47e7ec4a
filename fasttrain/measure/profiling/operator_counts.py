"""FLOPs of what torch runs, by its own formulas, and the operators for which it has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fasttrain.step import eager
from fasttrain.step.cudagraph import CapturedStep, CapturedWalk
from fasttrain.step.program import StepProgram
from fasttrain.step.trace import Mismatch
from fasttrain.step.walk import WalkingProgram

__all__ = ["FlopCount", "graph_flops"]


class FlopCount:
    """A context that counts floating-point operations.

    As in `count_host_reads`, operators are seen within calls of torch's Python API, so that compiled steps still run.
    Those of fasttrain's programs are counted in the graphs that they were compiled from; what `torch.compile` has
    compiled is not seen.

    Attributes:
        flops: so far.
        not_counted: operators with tensors in and out, views left out, that have no formula.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.not_counted: set[str] = set()
        self._calls = _Calls(self)
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        """Begins to count."""
        self._entered.enter_context(mock.patch.object(eager, "run_backward", self._watched(eager.run_backward)))
        for kind in (StepProgram, WalkingProgram, CapturedStep, CapturedWalk):
            self._entered.enter_context(mock.patch.object(kind, "run", self._counted(kind.run)))
        self._entered.enter_context(self._calls)
        return self

    def __exit__(self, *error: object) -> None:
        """Stops counting."""
        self._entered.close()

    def _watched(self, function: Callable[..., None]) -> Callable[..., None]:
        """A function in whose C++ operators are seen, though it is none of torch's Python API."""

        def watched(*args: Any) -> None:
            with _Operators(self):
                function(*args)

        return watched

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The run of a program or of a CUDA graph; for inputs of the same sizes its operators are counted once."""
        known: dict[tuple[Any, ...], FlopCount] = {}

        def counted(
            program: StepProgram | WalkingProgram | CapturedStep | CapturedWalk, given: Any, **options: Any
        ) -> Any:
            is_walk = isinstance(program, WalkingProgram | CapturedWalk)
            inputs = program.inputs_of(given, **options) if is_walk else given
            if not isinstance(inputs, Mismatch):
                graph = program.due.graph
                sizes = (graph, *(tensor.shape for tensor in inputs))
                found = known.get(sizes) or known.setdefault(sizes, graph_flops(graph, inputs))
                self.flops += found.flops * (given.steps if is_walk else 1)
                self.not_counted |= found.not_counted
            return run(program, given, **options)

        return counted


def graph_flops(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> FlopCount:
    """Counts what a graph of ATen operators would compute, on tensors without values.

    Args:
        graph: of a step.
        inputs: of which nothing but the metadata is looked at.
    """
    counts = FlopCount()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
        with _Operators(counts):
            graph(*fakes)
    return counts


class _Calls(TorchFunctionMode):
    def __init__(self, counts: FlopCount) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, OpOverload):  # what `_Operators` runs in a backward pass comes by here again
            return func(*args, **(kwargs or {}))
        with _Operators(self._counts):
            return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, counts: FlopCount) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._counts.flops += formula(*args, **kwargs, out_val=result)
        elif func.namespace == "aten" and not func.is_view and isinstance(result, Tensor):
            self._counts.not_counted.add(func._schema.name.removeprefix("aten::"))
        return result
